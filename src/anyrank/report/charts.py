"""Charts as SVG text: pure functions from numbers to markup, styled by the page's CSS.

Everything is drawn in a box 460 units wide, which is about the width of half a page and of a phone, so that text keeps
a readable size in both. Colours are CSS classes (`tone-0` ...); each tone has a marker shape and a dash of its own, so
that nothing rests on colour alone. A `<title>` in a mark is its tooltip.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

__all__ = [
    "Axis",
    "Bar",
    "Column",
    "Level",
    "Number",
    "Point",
    "Series",
    "areas",
    "bars",
    "columns",
    "lines",
    "percent_tick",
    "ratio_ticks",
    "swatch",
    "ticks",
]

WIDTH, HEIGHT = 460, 280
TOP, BOTTOM, LEFT = 14, 42, 56
LINE_HEIGHT, LETTER = 14, 6.6
TONES = 5
MANY_POINTS = 40
NO_XML = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # what names may hold and XML cannot write
SHAPES = (
    "M-3.4,0a3.4,3.4 0 1,0 6.8,0a3.4,3.4 0 1,0 -6.8,0Z",
    "M-3.1,-3.1H3.1V3.1H-3.1Z",
    "M0,-4.2L4,3H-4Z",
    "M0,-4.4L4.4,0L0,4.4L-4.4,0Z",
    "M0,4.2L4,-3H-4Z",
)


Number = int | float


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        label: what it shows, with the unit; may be empty.
        write: how a tick is written.
        low: where it begins; None lets the data decide.
        high: where it ends; likewise.
        whole: ticks at whole numbers only.
        log: equal distances are equal ratios; everything on it is above 0.
    """

    label: str
    write: Callable[[Number], str] = "{:g}".format
    low: Number | None = None
    high: Number | None = None
    whole: bool = False
    log: bool = False


@dataclass(frozen=True)
class Point:
    """A measured value.

    Args:
        x: on the horizontal axis.
        y: on the vertical axis.
        tip: the text of its tooltip.
    """

    x: Number
    y: Number
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
    strength: Number = 1.0
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
    y: Number
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
    parts: Sequence[Number]
    strengths: Sequence[Number]
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
    value: Number
    text: str
    tone: int | None
    tip: str


@dataclass(frozen=True)
class _Scale:
    """From numbers to units of the drawing."""

    low: Number
    high: Number
    start: Number
    stop: Number
    log: bool = False

    def __call__(self, value: Number) -> Number:
        low, high, place = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (place - low) / ((high - low) or 1.0) * (self.stop - self.start)


def ticks(low: Number, high: Number, *, count: int = 5, whole: bool = False) -> list[Number]:
    """Round numbers at equal distances, from at or below `low` to at or above `high`.

    Args:
        low: least value.
        high: greatest value.
        count: how many steps are wanted; it may be one or two more or fewer.
        whole: only whole numbers.
    """
    if high <= low:
        low, high = (low - abs(low) * 0.1, low) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.7)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def ratio_ticks(low: Number, high: Number, *, most: int = 8) -> list[Number]:
    """Round numbers at about equal ratios, from at or below `low` to at or above `high`.

    Args:
        low: least value, above 0.
        high: greatest value, above `low`.
        most: how many there may be.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        grid = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        inside = grid[bisect_right(grid, low) - 1 : bisect_left(grid, high) + 1]
        if len(inside) <= most:
            return [float(f"{tick:.6g}") for tick in inside]
    step = math.ceil((last - first) / (most - 1))
    return [10.0**power for power in range(first, last + step, step)]


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
    right = _margin(series)
    points = [point for one in series for point in one.points]
    across = _across(points, x, right=right)
    grid = _heights([point.y for point in points] + [level.y for level in levels], y)
    up = _upwards(grid, y)
    return _svg(
        title,
        _grid(grid, up, y, right=right),
        _below(across, x),
        *[_rule(level, across, up) for level in levels],
        *[_line(one, across, up, step=step) for one in series],
        *_level_labels(levels, [one.points for one in series], across, up),
        _ends([(up(one.points[-1].y), one) for one in series if one.points and one.end], right=right),
    )


def areas(bands: Sequence[Series], *, title: str, x: Axis) -> str:
    """Shares of a whole, stacked; every band has a point at each x.

    Args:
        bands: from the ground up; a point's y is the share (0 to 1), not the height.
        title: what the chart is called by a screen reader.
        x: horizontal axis.
    """
    right = _margin(bands)
    places = _widened([point.x for point in bands[0].points])
    across = _across([Point(place, 0, "") for place in places], Axis(x.label, low=places[0], whole=True), right=right)
    up = _Scale(0, 1, HEIGHT - BOTTOM, TOP)
    shares = [[point.y for point in band.points] for band in bands]
    tops = [
        [0.0] * len(shares[0]),
        *accumulate(shares, lambda below, more: [a + b for a, b in zip(below, more, strict=True)]),
    ]
    middles = [up((low[-1] + high[-1]) / 2) for low, high in pairwise(tops)]
    axis = Axis("", write=percent_tick)
    return _svg(
        title,
        *[
            _area(band, _edge(places, low, across, up), _edge(places, high, across, up))
            for band, (low, high) in zip(bands, pairwise(tops), strict=True)
        ],
        _grid([0, 0.25, 0.5, 0.75, 1.0], up, axis, right=right),
        _below(across, x),
        _ends(list(zip(middles, bands, strict=True)), right=right),
        *_slices(_tips(bands, x), places, across),
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
    up = _upwards(grid, y)
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
    left = 18 + LETTER * max(len(row.group) for row in rows)
    across = _Scale(0, 1, left, WIDTH - 12 - LETTER * max(len(row.text) for row in rows))
    drawn, y, group = [], 4.0, None
    for row in rows:
        if row.group != group:
            y += gap / 2 if group is not None else 0
            tall = (thick + 3) * sum(other.group == row.group for other in rows) - 3
            drawn.append(_text(row.group, left - 10, y + tall / 2 + 4, "name", anchor="end"))
            group = row.group
        drawn.append(_bar(row, y, thick, across))
        y += thick + 3
    ground = _node("line", x1=left, x2=left, y1=0, y2=y + 2, class_="axis")
    return _svg(title, *drawn, ground, height=y + 4)


def swatch(tone: int | None) -> str:
    """A piece of line as the legend shows it; None is a run that is drawn as a level."""
    stroke = _node("line", x1=0, x2=26, y1=6, y2=6, class_="level strong" if tone is None else "line")
    marks = (
        [] if tone is None else [_node("path", d=SHAPES[tone % TONES], transform=_moved(13, 6), class_="mark still")]
    )
    group = _node("g", stroke, *marks, class_=_tone(tone))
    svg = _node("svg", group, class_="swatch", viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")
    return ElementTree.tostring(svg, encoding="unicode")


def percent_tick(share: Number) -> str:
    """A share (0 to 1) as an axis shows it."""
    return f"{share * 100:g}\N{NO-BREAK SPACE}%"


# --- axes ---------------------------------------------------------------------------------------------------------


def _margin(series: Sequence[Series]) -> Number:
    """Room for labels at the right edge, and for markers before them if there are several tones."""
    longest = max((len(one.end) for one in series), default=0)
    return LETTER * longest + (28 if _mixed(series) else 14)


def _mixed(series: Sequence[Series]) -> bool:
    return len({one.tone for one in series}) > 1


def _across(points: Sequence[Point], x: Axis, *, right: Number) -> _Scale:
    low = x.low if x.low is not None else min((point.x for point in points), default=0.0)
    high = x.high if x.high is not None else max((point.x for point in points), default=low)
    return _Scale(low, high if high > low else low + 1, LEFT, WIDTH - right)


def _heights(values: Sequence[Number], y: Axis) -> list[Number]:
    low = y.low if y.low is not None else min(values, default=0.0)
    high = y.high if y.high is not None else max(values, default=1.0)
    return ratio_ticks(low, high) if y.log else ticks(low, high, whole=y.whole)


def _upwards(grid: Sequence[Number], y: Axis) -> _Scale:
    return _Scale(grid[0], grid[-1], HEIGHT - BOTTOM, TOP, y.log)


def _grid(grid: Sequence[Number], up: _Scale, y: Axis, *, right: Number) -> Element:
    rules = [
        _node("line", x1=LEFT, x2=WIDTH - right, y1=up(tick), y2=up(tick), class_="rule" if tick > grid[0] else "axis")
        for tick in grid
    ]
    labels = [_text(y.write(tick), LEFT - 8, up(tick) + 4, "tick", anchor="end") for tick in grid]
    return _node("g", *rules, *labels)


def _below(across: _Scale, x: Axis) -> Element:
    inside = [
        tick for tick in ticks(across.low, across.high, count=6, whole=x.whole) if across.low <= tick <= across.high
    ]
    labels = [_text(x.write(tick), across(tick), HEIGHT - BOTTOM + 16, "tick", anchor="middle") for tick in inside]
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
            transform=_moved(x, y),
            class_="mark faint" if crowded else "mark",
        )
        for point, (x, y) in zip(one.points, places, strict=True)
    ]
    return _node("g", path, *marks, class_=_tone(one.tone), opacity=one.strength)


def _stairs(places: Sequence[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
    corners = list(places[:1])
    for (_, before), (x, y) in pairwise(places):
        corners += [(x, before), (x, y)]
    return corners


def _rule(level: Level, across: _Scale, up: _Scale) -> Element:
    kind = "level strong" if level.strong else "level"
    return _node("line", x1=across.start, x2=across.stop, y1=up(level.y), y2=up(level.y), class_=kind)


def _level_labels(
    levels: Sequence[Level], courses: Sequence[Sequence[Point]], across: _Scale, up: _Scale
) -> list[Element]:
    """Labels over their lines, each at the end where curves leave it more room."""
    drawn = []
    for at_left in (True, False):
        here = [level for level in levels if _freer_left(level, courses, across, up) == at_left]
        heights = _spread([up(level.y) - 5 for level in here])
        x, anchor = (across.start + 5, "start") if at_left else (across.stop - 4, "end")
        drawn += [
            _text(level.label, x, height, "level-label", anchor=anchor)
            for level, height in zip(here, heights, strict=True)
        ]
    return drawn


def _freer_left(level: Level, courses: Sequence[Sequence[Point]], across: _Scale, up: _Scale) -> bool:
    span, height = LETTER * len(level.label), up(level.y) - 8
    placed = [[(across(point.x), up(point.y)) for point in course] for course in courses]

    def room(start: Number) -> Number:
        beside = [start + span * part / 6 for part in range(7)]
        gaps = [abs(_height_at(x, course) - height) for course in placed for x in beside]
        return sum(min(gap, 2 * LINE_HEIGHT) for gap in gaps)

    return room(across.start) >= room(across.stop - span)


def _height_at(x: Number, course: Sequence[tuple[Number, Number]]) -> Number:
    """How high a curve is at some place; infinitely far away where it has not begun or is over."""
    for (x0, y0), (x1, y1) in pairwise(course):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / ((x1 - x0) or 1.0)
    return math.inf


def _ends(places: Sequence[tuple[Number, Series]], *, right: Number) -> Element:
    """Labels at the right edge, moved apart where they would overlap; every so many of them where there is no room for all."""
    every = math.ceil(len(places) * LINE_HEIGHT / (HEIGHT - TOP - BOTTOM)) or 1
    ordered = sorted(places, key=lambda place: place[0])[::every]
    heights = _spread([height for height, _ in ordered])
    edge = WIDTH - right
    signs, indent = [], 8
    if _mixed([one for _, one in ordered]):
        signs = [_sign(one, edge, place, height) for height, (place, one) in zip(heights, ordered, strict=True)]
        indent = 26
    labels = [
        _text(one.end, edge + indent, height + 4, "end") for height, (_, one) in zip(heights, ordered, strict=True)
    ]
    return _node("g", *signs, *labels)


def _sign(one: Series, edge: Number, place: Number, height: Number) -> Element:
    """A series' marker before its label, and a thin line from where the series ends."""
    lead = _node("polyline", points=_points([(edge + 5, place), (edge + 14, height)]), class_="lead")
    mark = _node("path", d=SHAPES[one.tone % TONES], transform=_moved(edge + 17, height), class_="mark still")
    return _node("g", lead, mark, class_=_tone(one.tone))


def _spread(heights: Sequence[Number]) -> list[Number]:
    """The same heights in their order, at least a line apart and inside the plot, each moved as little as its neighbours."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    wanted = [heights[index] for index in order]
    pushed_down = _apart(wanted)
    pushed_up = [-height for height in reversed(_apart([-height for height in reversed(wanted)]))]
    middle = [(down + up) / 2 for down, up in zip(pushed_down, pushed_up, strict=True)]
    lowest = HEIGHT - BOTTOM
    lifted = [-height for height in reversed(_apart([max(-lowest, -height) for height in reversed(middle)]))]
    placed = dict(zip(order, lifted, strict=True))
    return [placed[index] for index in range(len(heights))]


def _apart(heights: Sequence[Number]) -> list[Number]:
    """Rising heights, each pushed on until it is a line away from the one before."""
    return list(accumulate(heights, lambda before, height: max(height, before + LINE_HEIGHT)))


def _widened(places: list[Number]) -> list[Number]:
    return places if len(places) > 1 else [places[0] - 0.5, places[0] + 0.5]


def _edge(
    places: Sequence[Number], heights: Sequence[Number], across: _Scale, up: _Scale
) -> list[tuple[Number, Number]]:
    heights = heights if len(heights) == len(places) else [heights[0]] * len(places)
    return [(across(x), up(height)) for x, height in zip(places, heights, strict=True)]


def _area(band: Series, lower: list[tuple[Number, Number]], upper: list[tuple[Number, Number]]) -> Element:
    shape = _node("polygon", points=_points(upper + lower[::-1]), class_="area", fill_opacity=band.strength)
    return _node("g", shape, class_=_tone(band.tone))


def _tips(bands: Sequence[Series], x: Axis) -> list[str]:
    """One tooltip for each x, with the bands in the order in which they are seen."""
    stacks = zip(*[band.points for band in reversed(bands)], strict=True)
    return ["\n".join([f"{x.label} {stack[0].x:g}", *(point.tip for point in stack)]) for stack in stacks]


def _slices(tips: Sequence[str], places: Sequence[Number], across: _Scale) -> list[Element]:
    """Invisible strips that carry the tooltips, each reaching half way to its neighbours."""
    xs = [across(place) for place in places]
    halves = [(a + b) / 2 for a, b in pairwise(xs)] if len(tips) > 1 else []
    edges = [xs[0], *halves, xs[-1]]
    return [
        _node("rect", _node("title", tip), x=a, width=b - a, y=TOP, height=HEIGHT - BOTTOM - TOP, class_="mark slice")
        for tip, (a, b) in zip(tips, pairwise(edges), strict=True)
    ]


def _column(stack: Column, left: Number, pitch: Number, up: _Scale) -> Element:
    width = min(pitch * 0.7, 56)
    x = left + (pitch - width) / 2
    tops = [0.0, *accumulate(stack.parts)]
    parts = [
        _node("rect", x=x, width=width, y=up(high), height=up(low) - up(high), class_="bar", fill_opacity=strength)
        for (low, high), strength in zip(pairwise(tops), stack.strengths, strict=True)
        if high > low
    ]
    total = [_text(f"{tops[-1]:g}", x + width / 2, up(tops[-1]) - 5, "value", anchor="middle")] if pitch > 16 else []
    ground = _node("rect", x=x, width=width, y=up(tops[-1]), height=up(0) - up(tops[-1]), class_="ground")
    return _node("g", _node("title", stack.tip), ground, *parts, *total, class_=f"mark {_tone(0)}")


def _bar(row: Bar, y: Number, thick: Number, across: _Scale) -> Element:
    shape = _node("rect", x=across.start, width=across(row.value) - across.start, y=y, height=thick, class_="bar")
    label = _text(row.text, across(row.value) + 6, y + thick / 2 + 4, "value")
    return _node("g", _node("title", row.tip), shape, label, class_=f"mark {_tone(row.tone)}")


def _tone(tone: int | None) -> str:
    if tone is None:
        return "tone-none"
    return f"tone-{tone % TONES} again-{tone // TONES % 3}" if tone >= TONES else f"tone-{tone}"


# --- elements -----------------------------------------------------------------------------------------------------


def _svg(title: str, *children: Element, height: Number = HEIGHT) -> str:
    svg = _node("svg", *children, viewBox=f"0 0 {WIDTH} {_number(height)}", role="img", aria_label=title)
    return ElementTree.tostring(svg, encoding="unicode")


def _text(content: str, x: Number, y: Number, kind: str, *, anchor: str = "start") -> Element:
    return _node("text", content, x=x, y=y, class_=kind, text_anchor=anchor)


def _node(tag: str, *children: Element | str, **attributes: Number | str) -> Element:
    node = Element(tag, {_attribute(name): _number(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, str):
            node.text = NO_XML.sub("", child)
        else:
            node.append(child)
    return node


def _attribute(name: str) -> str:
    return name if name == "viewBox" else name.rstrip("_").replace("_", "-")


def _moved(x: Number, y: Number) -> str:
    return f"translate({_number(x)},{_number(y)})"


def _points(places: Sequence[tuple[Number, Number]]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in places)


def _number(value: Number | str) -> str:
    return value if isinstance(value, str) else f"{round(value, 2) + 0.0:g}"
