"""Charts as SVG text: pure functions from numbers to markup, styled by the page's CSS.

Everything is drawn in a box 460 units wide, which is about the width of half a page and of a phone, so that text keeps
a readable size in both. Colours are CSS classes (`tone-0` ...); each tone has a marker shape and a dash of its own, so
that nothing rests on colour alone. A `<title>` in a mark is its tooltip.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

__all__ = ["Axis", "Bar", "Column", "Level", "Point", "Series", "areas", "bars", "columns", "lines", "swatch", "ticks"]

WIDTH, HEIGHT = 460, 280
TOP, BOTTOM, LEFT = 14, 42, 48
LINE_HEIGHT, LETTER = 13, 6.6
TONES = 5
MANY_POINTS = 40
SHAPES = (
    "M-3.4,0a3.4,3.4 0 1,0 6.8,0a3.4,3.4 0 1,0 -6.8,0Z",
    "M-3.1,-3.1H3.1V3.1H-3.1Z",
    "M0,-4.2L4,3H-4Z",
    "M0,-4.4L4.4,0L0,4.4L-4.4,0Z",
    "M0,4.2L4,-3H-4Z",
)


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        label: what it shows, with the unit; may be empty.
        write: how a tick is written.
        low: where it begins; None lets the data decide.
        high: where it ends; likewise.
        whole: ticks at whole numbers only.
    """

    label: str
    write: Callable[[float], str] = "{:g}".format
    low: float | None = None
    high: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Point:
    """A measured value.

    Args:
        x: on the horizontal axis.
        y: on the vertical axis.
        tip: the text of its tooltip.
    """

    x: float
    y: float
    tip: str


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line, or a band of a stacked area.

    Args:
        points: from left to right.
        tone: which colour, marker and dash.
        strength: opacity, for series that differ in degree rather than in kind.
        end: what is written where the line or band ends.
    """

    points: Sequence[Point]
    tone: int = 0
    strength: float = 1.0
    end: str = ""


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with.

    Args:
        label: written on it.
        y: its height.
        strong: a run's result rather than a mere orientation.
    """

    label: str
    y: float
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    """A vertical bar made of parts.

    Args:
        label: under it.
        parts: heights, from the ground up.
        strengths: opacity of each part.
        tip: the text of its tooltip.
    """

    label: str
    parts: Sequence[float]
    strengths: Sequence[float]
    tip: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A horizontal bar.

    Args:
        group: bars of one group stand together under this label.
        value: its length, 0 to 1.
        text: written at its end.
        tone: its colour; None is neutral.
        tip: the text of its tooltip.
    """

    group: str
    value: float
    text: str
    tone: int | None
    tip: str


@dataclass(frozen=True)
class _Scale:
    """From numbers to units of the drawing."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.stop - self.start)


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps apart from each other.

    Args:
        low: least value.
        high: greatest value.
        count: how many steps are wanted; there are at most twice as many.
        whole: only whole numbers.
    """
    if high <= low:
        low, high = low - abs(low) * 0.1 - 0.05, high + abs(high) * 0.1 + 0.05
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def lines(
    series: Sequence[Series], *, title: str, x: Axis, y: Axis, levels: Sequence[Level] = (), step: bool = False
) -> str:
    """Lines with markers over a light grid.

    Args:
        series: what to draw; later ones lie on top.
        title: what the chart is called by a screen reader.
        x: horizontal axis; it ends at the last point.
        y: vertical axis; it ends at round numbers.
        levels: values to compare with.
        step: hold each value until the next one.
    """
    right = _margin([one.end for one in series])
    points = [point for one in series for point in one.points]
    across = _across(points, x, right=right)
    grid = _heights([point.y for point in points] + [level.y for level in levels], y)
    up = _upwards(grid)
    return _svg(
        title,
        _grid(grid, up, y, right=right),
        _below(across, x),
        *_levels(levels, points, across, up),
        *[_line(one, across, up, step=step) for one in series],
        _ends([(up(one.points[-1].y), one) for one in series if one.points and one.end], right=right),
    )


def areas(bands: Sequence[Series], *, title: str, x: Axis) -> str:
    """Shares of a whole, stacked; every band has a point at each x.

    Args:
        bands: from the ground up; a point's y is the share (0 to 1), not the height.
        title: what the chart is called by a screen reader.
        x: horizontal axis.
    """
    right = _margin([band.end for band in bands])
    places = _widened([point.x for point in bands[0].points])
    across = _across([Point(place, 0, "") for place in places], Axis(x.label, low=places[0], whole=True), right=right)
    up = _Scale(0, 1, HEIGHT - BOTTOM, TOP)
    shares = [[point.y for point in band.points] for band in bands]
    tops = [[0.0] * len(shares[0]), *accumulate(shares, lambda below, more: [a + b for a, b in zip(below, more, strict=True)])]
    middles = [up((low[-1] + high[-1]) / 2) for low, high in pairwise(tops)]
    axis = Axis("", write=lambda share: f"{share * 100:.0f} %")
    return _svg(
        title,
        *[_area(band, _edge(places, low, across, up), _edge(places, high, across, up)) for band, (low, high) in zip(bands, pairwise(tops), strict=True)],
        _grid([0, 0.25, 0.5, 0.75, 1.0], up, axis, right=right),
        _below(across, x),
        _ends(list(zip(middles, bands, strict=True)), right=right, plain=True),
        *_slices(bands, places, across),
    )


def columns(stacks: Sequence[Column], *, title: str, x: Axis, y: Axis) -> str:
    """A histogram whose columns are made of parts; the total is written on top.

    Args:
        stacks: from left to right.
        title: what the chart is called by a screen reader.
        x: horizontal axis; only its label counts.
        y: vertical axis, from 0.
    """
    totals = [sum(stack.parts) for stack in stacks]
    grid = _heights([0, max(totals) * 1.06], y)
    up = _upwards(grid)
    pitch = (WIDTH - LEFT - 14) / len(stacks)
    every = math.ceil(len(stacks) / 16)
    drawn = [_column(stack, LEFT + pitch * place, pitch, up) for place, stack in enumerate(stacks)]
    labels = [
        _text(stack.label, LEFT + pitch * (place + 0.5), HEIGHT - BOTTOM + 16, "tick", anchor="middle")
        for place, stack in enumerate(stacks)
        if place % every == 0
    ]
    return _svg(title, _grid(grid, up, y, right=14), *drawn, *labels, _axis_label(x.label))


def bars(rows: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars from 0 to 1, in groups, each with its value.

    Args:
        rows: from top to bottom; those of a group follow each other.
        title: what the chart is called by a screen reader.
    """
    thick, gap = (24, 16) if len({row.group for row in rows}) == len(rows) else (15, 18)
    left = 14 + LETTER * max(len(row.group) for row in rows)
    across = _Scale(0, 1, left, WIDTH - 12 - LETTER * max(len(row.text) for row in rows))
    drawn, y, group = [], 4.0, None
    for row in rows:
        if row.group != group:
            y += gap / 2 if group is not None else 0
            drawn.append(_text(row.group, left - 10, y + thick / 2 + 4, "name", anchor="end"))
            group = row.group
        drawn.append(_bar(row, y, thick, across))
        y += thick + 3
    ground = _node("line", x1=left, x2=left, y1=0, y2=y + 2, class_="axis")
    return _svg(title, *drawn, ground, height=y + 4)


def swatch(tone: int | None) -> str:
    """A piece of line as the legend shows it; None is a run that is drawn as a level."""
    stroke = _node("line", x1=0, x2=26, y1=6, y2=6, class_="level strong" if tone is None else "line")
    marks = [] if tone is None else [_node("path", d=SHAPES[tone % TONES], transform="translate(13,6)", class_="mark")]
    group = _node("g", stroke, *marks, class_=_tone(tone))
    svg = _node("svg", group, class_="swatch", viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")
    return ElementTree.tostring(svg, encoding="unicode")


# --- axes ---------------------------------------------------------------------------------------------------------


def _margin(ends: Sequence[str]) -> float:
    return 14 + LETTER * max((len(end) for end in ends), default=0)


def _across(points: Sequence[Point], x: Axis, *, right: float) -> _Scale:
    low = x.low if x.low is not None else min((point.x for point in points), default=0.0)
    high = x.high if x.high is not None else max((point.x for point in points), default=low)
    return _Scale(low, high if high > low else low + 1, LEFT, WIDTH - right)


def _heights(values: Sequence[float], y: Axis) -> list[float]:
    low = y.low if y.low is not None else min(values, default=0.0)
    high = y.high if y.high is not None else max(values, default=1.0)
    return ticks(low, high, whole=y.whole)


def _upwards(grid: Sequence[float]) -> _Scale:
    return _Scale(grid[0], grid[-1], HEIGHT - BOTTOM, TOP)


def _grid(grid: Sequence[float], up: _Scale, y: Axis, *, right: float) -> Element:
    rules = [
        _node("line", x1=LEFT, x2=WIDTH - right, y1=up(tick), y2=up(tick), class_="rule" if tick > grid[0] else "axis")
        for tick in grid
    ]
    labels = [_text(y.write(tick), LEFT - 8, up(tick) + 4, "tick", anchor="end") for tick in grid]
    return _node("g", *rules, *labels)


def _below(across: _Scale, x: Axis) -> Element:
    inside = [tick for tick in ticks(across.low, across.high, whole=x.whole) if across.low <= tick <= across.high]
    labels = [
        _text(x.write(tick), across(tick), HEIGHT - BOTTOM + 16, "tick", anchor="middle") for tick in inside
    ]
    stubs = [
        _node("line", x1=across(tick), x2=across(tick), y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis")
        for tick in inside
    ]
    return _node("g", *stubs, *labels, _axis_label(x.label))


def _axis_label(label: str) -> Element:
    return _text(label, LEFT, HEIGHT - 6, "axis-label")


# --- marks --------------------------------------------------------------------------------------------------------


def _line(one: Series, across: _Scale, up: _Scale, *, step: bool) -> Element:
    places = [(across(point.x), up(point.y)) for point in one.points]
    corners = _stairs(places) if step else places
    path = _node("polyline", points=_points(corners), class_="line")
    crowded = len(places) > MANY_POINTS
    marks = [
        _node(
            "path",
            _node("title", point.tip),
            d=SHAPES[one.tone % TONES],
            transform=f"translate({_number(x)},{_number(y)})",
            class_="mark faint" if crowded else "mark",
        )
        for point, (x, y) in zip(one.points, places, strict=True)
    ]
    return _node("g", path, *marks, class_=_tone(one.tone), opacity=one.strength)


def _stairs(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    corners = list(places[:1])
    for (_, before), (x, y) in pairwise(places):
        corners += [(x, before), (x, y)]
    return corners


def _levels(levels: Sequence[Level], points: Sequence[Point], across: _Scale, up: _Scale) -> list[Element]:
    """Dashed lines, each label on the side where the data is further away."""
    drawn = []
    for left in (True, False):
        chosen = [level for level in levels if _calmer_left(level, points, across, up) == left]
        heights = _spread([up(level.y) - 5 for level in chosen])
        for level, height in zip(chosen, heights, strict=True):
            drawn.append(_level(level, across, up, height=height, left=left))
    return drawn


def _calmer_left(level: Level, points: Sequence[Point], across: _Scale, up: _Scale) -> bool:
    middle = (across.low + across.high) / 2

    def room(side: Sequence[Point]) -> float:
        return min((abs(up(point.y) - up(level.y) + 8) for point in side), default=math.inf)

    return room([p for p in points if p.x <= middle]) >= room([p for p in points if p.x > middle])


def _level(level: Level, across: _Scale, up: _Scale, *, height: float, left: bool) -> Element:
    kind = "level strong" if level.strong else "level"
    rule = _node("line", x1=across.start, x2=across.stop, y1=up(level.y), y2=up(level.y), class_=kind)
    x, anchor = (across.start + 5, "start") if left else (across.stop - 4, "end")
    return _node("g", rule, _text(level.label, x, height, "level-label", anchor=anchor))


def _ends(places: Sequence[tuple[float, Series]], *, right: float, plain: bool = False) -> Element:
    """Labels at the right edge, moved apart where they would overlap."""
    ordered = sorted(places, key=lambda place: place[0])
    heights = _spread([height for height, _ in ordered])
    labels = [
        _text(one.end, WIDTH - right + 8, height + 4, "end" if plain else f"end {_tone(one.tone)}")
        for height, (_, one) in zip(heights, ordered, strict=True)
    ]
    return _node("g", *labels)


def _spread(heights: Sequence[float]) -> list[float]:
    """The same heights in their order, at least a line apart and inside the plot."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [0.0] * len(heights)
    above = -math.inf
    for index in order:
        above = placed[index] = max(heights[index], above + LINE_HEIGHT)
    below = HEIGHT - BOTTOM + LINE_HEIGHT
    for index in reversed(order):
        below = placed[index] = min(placed[index], below - LINE_HEIGHT)
    return placed


def _widened(places: list[float]) -> list[float]:
    return places if len(places) > 1 else [places[0] - 0.5, places[0] + 0.5]


def _edge(places: Sequence[float], heights: Sequence[float], across: _Scale, up: _Scale) -> list[tuple[float, float]]:
    heights = heights if len(heights) == len(places) else [heights[0]] * len(places)
    return [(across(x), up(height)) for x, height in zip(places, heights, strict=True)]


def _area(band: Series, lower: list[tuple[float, float]], upper: list[tuple[float, float]]) -> Element:
    shape = _node("polygon", points=_points(upper + lower[::-1]), class_="area", fill_opacity=band.strength)
    return _node("g", shape, class_=_tone(band.tone))


def _slices(bands: Sequence[Series], places: Sequence[float], across: _Scale) -> list[Element]:
    """Invisible strips that carry the tooltips, each reaching half way to its neighbours."""
    tips = ["\n".join(band.points[i].tip for band in reversed(bands)) for i in range(len(bands[0].points))]
    xs = [across(place) for place in places]
    halves = [(a + b) / 2 for a, b in pairwise(xs)] if len(tips) > 1 else []
    edges = [xs[0], *halves, xs[-1]]
    return [
        _node("rect", _node("title", tip), x=a, width=b - a, y=TOP, height=HEIGHT - BOTTOM - TOP, class_="mark slice")
        for tip, (a, b) in zip(tips, pairwise(edges), strict=True)
    ]


def _column(stack: Column, left: float, pitch: float, up: _Scale) -> Element:
    width = min(pitch * 0.7, 56)
    x = left + (pitch - width) / 2
    tops = [0.0, *accumulate(stack.parts)]
    parts = [
        _node("rect", x=x, width=width, y=up(high), height=up(low) - up(high), class_="bar", fill_opacity=strength)
        for (low, high), strength in zip(pairwise(tops), stack.strengths, strict=True)
        if high > low
    ]
    total = [_text(f"{tops[-1]:g}", x + width / 2, up(tops[-1]) - 5, "value", anchor="middle")] if pitch > 16 else []
    return _node("g", _node("title", stack.tip), *parts, *total, class_=f"mark {_tone(0)}")


def _bar(row: Bar, y: float, thick: float, across: _Scale) -> Element:
    shape = _node("rect", x=across.start, width=across(row.value) - across.start, y=y, height=thick, class_="bar")
    label = _text(row.text, across(row.value) + 6, y + thick / 2 + 4, "value")
    return _node("g", _node("title", row.tip), shape, label, class_=f"mark {_tone(row.tone)}")


def _tone(tone: int | None) -> str:
    if tone is None:
        return "tone-none"
    return f"tone-{tone % TONES} again-{tone // TONES % 3}" if tone >= TONES else f"tone-{tone}"


# --- elements -----------------------------------------------------------------------------------------------------


def _svg(title: str, *children: Element, height: float = HEIGHT) -> str:
    svg = _node("svg", *children, viewBox=f"0 0 {WIDTH} {_number(height)}", role="img", aria_label=title)
    return ElementTree.tostring(svg, encoding="unicode")


def _text(content: str, x: float, y: float, kind: str, *, anchor: str = "start") -> Element:
    return _node("text", content, x=x, y=y, class_=kind, text_anchor=anchor)


def _node(tag: str, *children: Element | str, **attributes: float | str) -> Element:
    node = Element(tag, {_attribute(name): _number(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, str):
            node.text = child
        else:
            node.append(child)
    return node


def _attribute(name: str) -> str:
    return name if name == "viewBox" else name.rstrip("_").replace("_", "-")


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in places)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{round(value, 2) + 0.0:g}"
