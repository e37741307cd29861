"""Run folders as one HTML page that needs nothing but itself.

    runs      folders -> plain values, checked
    charts    numbers -> SVG
    here      what is shown of a run, and in which words
    page.html the frame: style, and a few lines of script that only make tooltips quicker

The same folders make the same bytes: no dates, no machine's paths but what the runs themselves recorded.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from anyrank.report import charts
from anyrank.report.charts import Axis, Bar, Column, Level, Number, Point, Series
from anyrank.report.runs import Round, Run, read

__all__ = ["render"]

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
FEW = 8  # rows that are shown without being asked for

Tones = Mapping[str, int | None]
Cell = str | Number | None


class Markup(str):
    """Text that is HTML already. Every other text is escaped where it enters the page."""


def render(folders: Sequence[Path]) -> str:
    """One self-contained page about one or more runs, and about what their recipes compare them with.

    Args:
        folders: run folders, in the order in which they are to be shown.

    Returns:
        an HTML document.

    Raises:
        RecordError: no folder, one that holds no run, a foreign format, or a file that cannot be understood.
    """
    runs = read(folders)
    tones = _tones(runs)
    parts = [
        _header(runs),
        _summary(runs, tones),
        _differences(_named(runs)),
        _accuracy(runs, tones),
        _traffic(runs, tones),
        _ranks(runs, tones),
        _missing(runs),
        _behind(runs),
    ]
    frame = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = frame.substitute(title=escape(_title(runs)), body="\n".join(part for part in parts if part))
    return page.encode("utf-8", "replace").decode("utf-8")  # a folder's name may hold bytes that are no text


def _named(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.parent is None]


def _tones(runs: Sequence[Run]) -> dict[str, int | None]:
    """A colour for each run that has a course; a single round has none and is drawn as a level."""
    courses = [run.name for run in runs if run.played > 1]
    return {run.name: courses.index(run.name) if run.name in courses else None for run in runs}


# --- the top of the page ------------------------------------------------------------------------------------------


def _title(runs: Sequence[Run]) -> str:
    named = _named(runs)
    return named[0].name if len(named) == 1 else f"{len(named)} runs compared"


def _header(runs: Sequence[Run]) -> str:
    named = _named(runs)
    facts = [_facts(run) for run in named]
    shared = {key: value for key, value in facts[0].items() if all(other.get(key) == value for other in facts)}
    figures = _key_figures(named[0], runs) if len(named) == 1 else ""
    return f"<header><p class='eyebrow'>anyrank report</p><h1>{escape(_title(runs))}</h1>{_pairs(shared)}{figures}</header>"


def _facts(run: Run) -> dict[str, str]:
    recipe, data = run.recipe, run.info.get("data", {})
    sizes = ", ".join(f"{data[part]:,} to {part}" for part in ("train", "test") if part in data)
    source = recipe.get("data", {}).get("source")
    facts = {
        "Method": run.method,
        "Baseline": run.baseline,
        "Model": recipe.get("model", {}).get("name"),
        "Data": f"{source} ({sizes})" if source and sizes else source,
        "Fleet": _fleet(run),
        "Rounds": _progress(run),
    }
    return {key: value for key, value in facts.items() if value}


def _fleet(run: Run) -> str:
    per_round = run.recipe.get("fleet", {}).get("per_round")
    clients = _count(len(run.fleet), "client")
    return f"{clients}, {per_round} a round" if per_round and per_round < len(run.fleet) else clients


def _progress(run: Run) -> str:
    if run.unfinished:
        return f"unfinished, {run.played} of {run.planned} rounds"
    if run.played < run.planned:
        return f"{run.played} of {run.planned}, stopped at the target"
    return str(run.played)


def _key_figures(run: Run, runs: Sequence[Run]) -> str:
    if not run.evaluated:
        return ""
    last, up, down = run.rounds[-1], run.total("bytes_up"), run.total("bytes_down")
    figures = [
        ("Accuracy", _percent(run.final), _beside(run, runs)),
        ("On the clients’ own data", *_own_data(run)),
        ("Sent", f"{_megabytes(up + down)}{SPACE}MB", f"{_megabytes(up)} up, {_megabytes(down)} down"),
        ("Simulated time", _clock(last.simulated_seconds), f"computed in {_clock(run.total('real_seconds'))}"),
    ]
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class='aside'>{escape(aside)}</dd></div>"
        for name, value, aside in figures
        if value != NONE
    )
    return f"<dl class='figures'>{tiles}</dl>"


def _beside(run: Run, runs: Sequence[Run]) -> str:
    others = [(other.name, other.final) for other in runs if other is not run and other.evaluated]
    references = [(name, value) for name, value, _ in _references([run])]
    return ", ".join(f"{name} {_percent(value)}" for name, value in others + references)


def _own_data(run: Run) -> tuple[str, str]:
    federated = run.newest("federated")
    if federated is None:
        return NONE, ""
    spread = f"{_percent(federated.low)} to {_percent(federated.high)}"
    return _percent(federated.accuracy), f"{spread} over {_count(federated.clients, 'client')}"


# --- tables -------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run], tones: Tones) -> str:
    aimed = any(run.target for run in runs)
    columns = [column for column in _columns(tones) if aimed or column[0] != "target"]
    rows = [[column[2](run) for column in columns] for run in runs]
    for name, value, of in _references(runs):
        label = f"{name} ({of})" if of else name
        rows.append([{"run": label, "final": _percent(value)}.get(key) for key, *_ in columns])
    titles = [title for _, title, _ in columns]
    table = _table([label for _, label in titles], rows, groups=_groups(titles), name="Summary of the runs")
    return _section("Summary", table)


def _columns(tones: Tones) -> list[tuple[str, tuple[str, str], Callable[[Run], Cell]]]:
    """Key, (group, label) and content of the summary's columns."""
    return [
        ("run", ("", "Run"), lambda run: _run_cell(run, tones)),
        ("method", ("", "Method"), _method),
        ("rounds", ("", "Rounds"), lambda run: run.played),
        ("final", ("Accuracy", "final"), lambda run: _percent(run.final)),
        ("best", ("Accuracy", "best"), _best),
        ("federated", ("Accuracy", "on clients’ data"), _spread),
        ("up", ("Sent, MB", "up"), lambda run: _megabytes(run.total("bytes_up"))),
        ("down", ("Sent, MB", "down"), lambda run: _megabytes(run.total("bytes_down"))),
        ("simulated", ("Time, h:mm:ss", "simulated"), lambda run: _clock(run.simulated_seconds)),
        ("target", ("Time, h:mm:ss", "to target"), _to_target),
        ("real", ("Time, h:mm:ss", "real"), lambda run: _clock(run.total("real_seconds"))),
    ]


def _run_label(run: Run, tones: Tones) -> Markup:
    return Markup(f"<span class='run'>{charts.swatch(tones[run.name])}<span>{escape(run.name)}</span></span>")


def _run_cell(run: Run, tones: Tones) -> Markup:
    short = run.played < run.planned
    return Markup(_run_label(run, tones) + f" <small>{_progress(run)}</small>" * short)


def _method(run: Run) -> Markup:
    baseline = f" <small>baseline: {escape(run.baseline)}</small>" if run.baseline else ""
    return Markup(escape(run.method) + baseline)


def _best(run: Run) -> Cell:
    if run.best is None:
        return NONE
    return Markup(f"{_percent(run.best.accuracy)} <small>round {run.best.number}</small>")


def _spread(run: Run) -> Cell:
    federated = run.newest("federated")
    if federated is None:
        return NONE
    return f"{_percent(federated.accuracy)}{SPACE}±{SPACE}{federated.std * 100:.1f}"


def _to_target(run: Run) -> Cell:
    if run.target is None:
        return None
    if run.target_seconds is None:
        return Markup(f"{NONE} <small>{_percent(run.target)} not reached</small>")
    return Markup(f"{_clock(run.target_seconds)} <small>{_percent(run.target)}</small>")


def _references(runs: Sequence[Run]) -> list[tuple[str, Number, str]]:
    """Name, accuracy and, where runs differ in it, the runs of each thing that needs no training."""
    found = []
    for key, name in (("overlap", "word overlap"), ("majority", "majority label")):
        values: dict[Number, list[str]] = {}
        for run in runs:
            value = (run.info.get("references") or {}).get(key)
            if value is not None:
                values.setdefault(value, []).append(run.name)
        found += [(name, value, ", ".join(of) if len(values) > 1 else "") for value, of in values.items()]
    return found


def _differences(runs: Sequence[Run]) -> str:
    """The settings in which runs differ: what a comparison compares."""
    flat = [dict(_flatten(run.recipe)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [
        [Markup(f"<code>{escape(key)}</code>"), *(_plain(settings.get(key)) for settings in flat)]
        for key in keys
        if len({_value(settings.get(key)) for settings in flat}) > 1
    ]
    if not rows:
        return ""
    table = _table(["Setting", *(run.name for run in runs)], rows, name="Settings in which the runs differ")
    return _details("Settings in which the runs differ", table, shown=len(rows) <= FEW)


def _missing(runs: Sequence[Run]) -> str:
    rows = [
        [run.name, round.number, rejection.client, rejection.stage, rejection.reason]
        for run in runs
        for round in run.rounds
        for rejection in round.rejected
    ]
    if not rows:
        return ""
    kinds = Counter(str(row[3]) for row in rows)
    words = ", ".join(f"{number} {stage}" for stage, number in sorted(kinds.items()))
    only = len({row[0] for row in rows}) == len(runs) == 1
    labels = ["Run", "Round", "Client", "Stage", "Reason"]
    table = _table(labels[only:], [row[only:] for row in rows], name="Clients that rounds had to do without")
    if len(rows) > 2 * FEW:
        table = _details(f"All {len(rows)}", table)
    intro = f"{_count(len(rows), 'reply', 'replies')} that a round had to do without: {words}."
    return _section("Missing replies", table, intro=intro)


# --- charts -------------------------------------------------------------------------------------------------------


def _accuracy(runs: Sequence[Run], tones: Tones) -> str:
    courses = [run for run in runs if tones[run.name] is not None and len(run.evaluated) > 1]
    if not courses:
        return ""
    levels = _accuracy_levels(runs, courses)
    divisor, unit = _time_unit(max(run.simulated_seconds for run in courses))
    y = Axis("", write=lambda value: f"{value * 100:g}{SPACE}%")

    def chart(title: str, x: Axis, place: Callable[[Round], Number]) -> str:
        series = [
            Series(
                points=[Point(place(r), r.accuracy or 0.0, _accuracy_tip(run, r)) for r in run.evaluated],
                tone=tones[run.name] or 0,
                end=_percent(run.final),
            )
            for run in courses
        ]
        return charts.lines(series, title=title, x=x, y=y, levels=levels)

    rounds = chart("Accuracy over rounds", Axis("round", low=0, whole=True), lambda r: r.number)
    time = chart("Accuracy over simulated time", Axis(unit, low=0), lambda r: r.simulated_seconds / divisor)
    return _section(
        "Accuracy",
        _figure("Over rounds", "Share of the server’s test examples that the global model gets right.", rounds),
        _figure("Over simulated time", "The same, over what the virtual clock showed.", time),
        legend=_legend(courses, tones),
    )


def _accuracy_tip(run: Run, round: Round) -> str:
    loss = "" if round.loss is None else f", loss {round.loss:.3f}"
    return (
        f"{run.name}, round {round.number}\n{_percent(round.accuracy)}{loss}\nafter {_clock(round.simulated_seconds)}"
    )


def _accuracy_levels(runs: Sequence[Run], courses: Sequence[Run]) -> list[Level]:
    """Runs of a single point, the target, and references unless they would squeeze the curves."""
    flat = [(run.name, run.final) for run in runs if run not in courses and run.final is not None]
    levels = [Level(f"{name} {_percent(value)}", value, strong=True) for name, value in flat]
    levels += [Level(f"target {_percent(value)}", value) for value in sorted({r.target for r in courses if r.target})]
    reached = [round.accuracy or 0.0 for run in courses for round in run.evaluated]
    lowest = min(reached) - (max(reached) - min(reached))
    references = [(name, value) for name, value, of in _references(runs) if value >= lowest and not of]
    return levels + [Level(f"{name} {_percent(value)}", value) for name, value in references]


def _traffic(runs: Sequence[Run], tones: Tones) -> str:
    courses = [run for run in runs if tones[run.name] is not None]
    most = max((run.total(key) for run in courses for key in ("bytes_up", "bytes_down")), default=0)
    if not most:
        return ""
    divisor, unit = _byte_unit(most)

    def figure(title: str, key: str, note: str) -> str:
        series = [
            Series(
                points=(points := _cumulative(run, key, divisor=divisor, unit=unit)),
                tone=tones[run.name] or 0,
                end=f"{_amount(points[-1].y)}{SPACE}{unit}",
            )
            for run in courses
        ]
        axis = Axis("round", low=0, whole=True)
        y = Axis("", write=lambda value: f"{value:g}{SPACE}{unit}", low=0, high=most / divisor)
        return _figure(title, note, charts.lines(series, title=f"{title}, cumulative bytes", x=axis, y=y))

    up = figure("Up", "bytes_up", "From the clients to the server, all rounds so far.")
    down = figure("Down", "bytes_down", "From the server to the clients, all rounds so far.")
    return _section("Traffic", up, down, legend=_legend(courses, tones))


def _cumulative(run: Run, key: str, *, divisor: Number, unit: str) -> list[Point]:
    points = [Point(max(0, run.rounds[0].number - 1), 0.0, f"{run.name}, before the first round\n0{SPACE}{unit}")]
    total = 0.0
    for round in run.rounds:
        total += getattr(round, key) / divisor
        tip = f"{run.name}, round {round.number}\n{_amount(total)}{SPACE}{unit} so far"
        points.append(Point(round.number, total, tip))
    return points if run.rounds[0].number else points[1:]


def _ranks(runs: Sequence[Run], tones: Tones) -> str:
    figures = [_class_bars(runs, tones)]
    fleets = _by_fleet(runs)
    figures += [_histogram(same, many=len(fleets) > 1) for same in fleets]
    figures += [_shrinking(run, runs) for run in runs if run.prunes]
    figures += [_energy(run, runs) for run in runs if len(run.bands) > 1]
    scored = [run for run in runs if run.newest("class_accuracy")]
    return _section("Ranks", *figures, legend=_legend(scored, tones))


def _class_bars(runs: Sequence[Run], tones: Tones) -> str:
    scores = [(run, scores) for run in runs if (scores := run.newest("class_accuracy"))]
    if not scores:
        return ""
    rows = [
        Bar(
            group=f"rank {rank}",
            value=by_rank[rank],
            text=_percent(by_rank[rank]),
            tone=tones[run.name],
            tip=f"{run.name}, what a client of rank {rank} is sent\n{_percent(by_rank[rank])}",
        )
        for rank in sorted({rank for _, by_rank in scores for rank in by_rank})
        for run, by_rank in scores
        if rank in by_rank
    ]
    note = "Test accuracy of the adapter that a client of each rank is sent, when last measured."
    return _figure("Accuracy by rank", note, charts.bars(rows, title="Accuracy by rank"))


def _by_fleet(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose clients are planned alike share one histogram; a single client makes none."""
    groups: dict[tuple[tuple[str, int, str], ...], list[Run]] = {}
    for run in runs:
        planned = sorted((client, rank, run.fleet[client].kind) for client, rank in run.first_ranks.items())
        if len(planned) > 1:
            groups.setdefault(tuple(planned), []).append(run)
    return list(groups.values())


def _histogram(runs: Sequence[Run], *, many: bool) -> str:
    """Clients by planned rank and device class, of runs in which these are the same."""
    run, planned = runs[0], runs[0].first_ranks
    strengths = _ramp(len(run.kinds))
    counts = Counter((rank, run.fleet[client].kind) for client, rank in planned.items())
    stacks = [
        Column(
            label=str(rank),
            parts=[counts[rank, kind] for kind in run.kinds],
            strengths=strengths,
            tip=_column_tip(rank, {kind: counts[rank, kind] for kind in run.kinds}),
        )
        for rank in sorted(set(planned.values()))
    ]
    svg = charts.columns(stacks, title="Clients by planned rank", x=Axis("rank"), y=Axis("", whole=True, low=0))
    title = "Planned ranks: " + ", ".join(same.name for same in runs) if many else "Planned ranks"
    return _figure(title, _histogram_note(run), _boxes(run.kinds, strengths) + svg)


def _histogram_note(run: Run) -> str:
    silent = len(run.fleet) - len(run.first_ranks)
    note = "How many clients are planned at each rank, by device class."
    return note + (f" {_count(silent, 'client')} never asked and left out." if silent else "")


def _column_tip(rank: int, counts: Mapping[str, int]) -> str:
    return "\n".join([f"rank {rank}", *(f"{kind}: {_count(n, 'client')}" for kind, n in counts.items() if n)])


def _shrinking(run: Run, runs: Sequence[Run]) -> str:
    """The mean rank of each device class, round by round, where clients come back smaller than planned."""
    course = list(run.current_ranks())
    series = []
    for kind, strength in zip(run.kinds, _ramp(len(run.kinds), least=0.6), strict=True):
        means = [(round, fmean(_of_kind(kind, run, ranks))) for round, ranks in course]
        points = [Point(round, mean, f"{kind}, round {round}\nmean rank {mean:.2f}") for round, mean in means]
        series.append(Series(points=points, strength=strength, end=f"{_short(kind)} {means[-1][1]:.1f}"))
    x, y = Axis("round", low=0, whole=True), Axis("", low=0)
    svg = charts.lines(series, title="Mean rank over rounds", x=x, y=y, step=True)
    return _figure(_titled("Mean rank", run, runs), "Over all clients of a class, by what each last returned.", svg)


def _of_kind(kind: str, run: Run, ranks: Mapping[str, int]) -> list[int]:
    return [rank for client, rank in ranks.items() if run.fleet[client].kind == kind]


def _energy(run: Run, runs: Sequence[Run]) -> str:
    """Which share of the global product lies between the ranks of the device classes."""
    measured = [round for round in run.rounds if round.energy]
    series = []
    for band, strength in zip(run.bands, _ramp(len(run.bands)), strict=True):
        shares = [(round.number, round.energy.get(band, 0.0)) for round in measured]
        points = [Point(number, share, f"ranks {_dashed(band)}: {_percent(share)}") for number, share in shares]
        series.append(Series(points=points, strength=strength, end=f"{_dashed(band)}: {_percent(shares[-1][1])}"))
    svg = charts.areas(series, title="Energy by rank band over rounds", x=Axis("round", whole=True))
    note = "Share of the global product’s squared singular values between the ranks of the classes."
    return _figure(_titled("Energy by rank", run, runs), note, svg)


def _titled(title: str, run: Run, runs: Sequence[Run]) -> str:
    """A figure's title, with the run's name where there are several."""
    return title if len(_named(runs)) == 1 and run.parent is None else f"{title}: {run.name}"


def _ramp(count: int, *, least: float = 0.35) -> list[float]:
    """Opacities from weak to full: the higher the rank, the stronger the colour."""
    return [1.0 if count == 1 else least + (1 - least) * index / (count - 1) for index in range(count)]


# --- the numbers behind -------------------------------------------------------------------------------------------


def _behind(runs: Sequence[Run]) -> str:
    parts = [
        f"<h3>{escape(run.name)}</h3>" * (len(runs) > 1)
        + _details("Every round", _rounds(run))
        + _details("Recipe and versions", f"{_pairs(_origin(run))}<pre>{escape(_toml(run.recipe))}</pre>")
        for run in runs
    ]
    return _section("Behind the figures", "".join(parts))


def _rounds(run: Run) -> str:
    columns = [
        ("", "Round"),
        *[("Accuracy", of) for of in ("test", "clients’ data")],
        *[("Loss", of) for of in ("test", "training")],
        *[("Sent, MB", way) for way in ("up", "down")],
        *[("Time, h:mm:ss", clock) for clock in ("simulated", "real")],
        *[("Clients", what) for what in ("asked", "replied")],
        *[("Mean rank", what) for what in ("planned", "returned")],
        *[("Energy in ranks", _dashed(band)) for band in run.bands],
    ]
    rows = [[*_measures(round), *(_percent(round.energy.get(band)) for band in run.bands)] for round in run.rounds]
    return _table([label for _, label in columns], rows, groups=_groups(columns), name=f"Every round of {run.name}")


def _measures(round: Round) -> list[Cell]:
    return [
        round.number,
        _percent(round.accuracy),
        _percent(round.federated.accuracy if round.federated else None),
        _decimals(round.loss, 3),
        _decimals(round.train_loss, 3),
        _megabytes(round.bytes_up),
        _megabytes(round.bytes_down),
        _clock(round.simulated_seconds),
        _clock(round.real_seconds),
        len(round.planned_ranks),
        len(round.returned_ranks),
        _decimals(_mean(round.planned_ranks), 1),
        _decimals(_mean(round.returned_ranks), 1),
    ]


def _origin(run: Run) -> dict[str, str]:
    """Where a run comes from."""
    info = run.info
    data = {key: value for key, value in info.get("data", {}).items() if key in ("fingerprint", "label_names")}
    origin = {
        "Command": info.get("command"),
        "Started": info.get("started"),
        "anyrank": info.get("anyrank"),
        "Commit": info.get("commit"),
        "Versions": _listed(info.get("versions")),
        "Machine": _listed(info.get("machine")),
        "Data fingerprint": data.get("fingerprint"),
        "Labels": ", ".join(map(str, data.get("label_names") or [])),
    }
    return {key: str(value) for key, value in origin.items() if value}


def _listed(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (values or {}).items())


def _toml(table: Mapping[str, Any], path: str = "") -> str:
    """A recipe as TOML; what is not set is left out."""
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping) and value is not None}
    lines = [f"[{path}]"] if path and (plain or not table) else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    tables = [
        _toml(value, f"{path}.{_key(key)}".lstrip(".")) for key, value in table.items() if isinstance(value, Mapping)
    ]
    return "\n\n".join(part for part in ["\n".join(lines), *tables] if part)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _flatten(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield path + key, value


# --- pieces of HTML -----------------------------------------------------------------------------------------------


def _section(title: str, *parts: str, intro: str = "", legend: str = "") -> str:
    filled = [part for part in parts if part]
    if not filled:
        return ""
    body = "".join(filled)
    if body.startswith("<figure"):
        body = f"<div class='grid'>{body}</div>"
    return f"<section><h2>{escape(title)}</h2>{_paragraph(intro)}{legend}{body}</section>"


def _figure(title: str, note: str, svg: str) -> str:
    return f"<figure><figcaption><strong>{escape(title)}</strong> {escape(note)}</figcaption>{svg}</figure>"


def _details(title: str, body: str, *, shown: bool = False) -> str:
    return f"<details{' open' * shown}><summary>{escape(title)}</summary>{body}</details>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def _pairs(values: Mapping[str, str]) -> str:
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in values.items())
    return f"<dl class='facts'>{pairs}</dl>"


def _boxes(names: Sequence[str], strengths: Sequence[Number]) -> str:
    """The legend of one colour in several strengths."""
    items = "".join(
        f"<li><i class='box' style='opacity:{strength:.2f}'></i>{escape(name)}</li>"
        for name, strength in zip(names, strengths, strict=True)
    )
    return f"<ul class='legend'>{items}</ul>"


def _legend(runs: Sequence[Run], tones: Tones) -> str:
    """Which line is which run; a single one needs none."""
    if len(runs) < 2:
        return ""
    return f"<ul class='legend'>{''.join(f'<li>{_run_label(run, tones)}</li>' for run in runs)}</ul>"


def _table(
    labels: Sequence[str], rows: Sequence[Sequence[Cell]], *, name: str, groups: Sequence[tuple[str, int]] = ()
) -> str:
    """A table whose first column names the row. It scrolls by itself where the page is too narrow for it."""
    upper = "".join(
        f"<th colspan='{span}' scope='colgroup'><span>{escape(group)}</span></th>"
        if group
        else f"<td colspan='{span}'></td>"
        for group, span in groups
    )
    head = f"<tr class='groups'>{upper}</tr>" if groups else ""
    words = [any(_is_words(row[place]) for row in rows) for place in range(len(labels))]
    kinds = [" class='words'" if wordy else "" for wordy in words]
    titles = zip(labels, kinds, strict=True)
    head += "<tr>" + "".join(f"<th scope='col'{kind}>{escape(label)}</th>" for label, kind in titles) + "</tr>"
    body = "".join(f"<tr>{_row(row, kinds)}</tr>" for row in rows)
    caption = f"<caption>{escape(name)}</caption>"
    return (
        f"<div class='scroll' role='region' aria-label='{escape(name)}' tabindex='0'>"
        f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _is_words(cell: Cell) -> bool:
    """Whether a cell is to be read rather than compared by its digits."""
    return isinstance(cell, str) and re.match(r"[^\d–\[]*[^\W\d]", cell) is not None


def _row(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    first, *others = [f"{kind}>{_cell(cell)}" for cell, kind in zip(cells, kinds, strict=True)]
    return f"<th scope='row'{first}</th>" + "".join(f"<td{other}</td>" for other in others)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Markup):
        return cell
    return "" if cell is None else escape(str(cell))


def _groups(titles: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Neighbours in a table's head that share a group, as (group, how many)."""
    return [(group, len(list(members))) for group, members in groupby(title[0] for title in titles)]


# --- numbers as text ----------------------------------------------------------------------------------------------


def _mean(ranks: Mapping[str, int]) -> float | None:
    return fmean(ranks.values()) if ranks else None


def _percent(share: Number | None) -> str:
    return NONE if share is None else f"{share * 100:.1f}{SPACE}%"


def _decimals(value: Number | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _megabytes(size: Number) -> str:
    megabytes = size / 1e6
    return f"{megabytes:,.1f}" if megabytes >= 1 or not megabytes else f"{megabytes:.3f}"


def _amount(value: Number) -> str:
    """Three digits that count, written without an exponent."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _clock(seconds: Number) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _time_unit(seconds: Number) -> tuple[Number, str]:
    """A unit in which a time is a handy number, as seconds and as an axis label."""
    units = [(86400, "days"), (3600, "hours"), (60, "minutes")]
    return next(
        ((float(size), f"simulated time, {name}") for size, name in units if seconds >= 3 * size),
        (1.0, "simulated time, seconds"),
    )


def _byte_unit(size: Number) -> tuple[Number, str]:
    units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next((unit for unit in units if size >= unit[0]), (1.0, "B"))


def _dashed(band: str) -> str:
    return band.replace("-", "–")


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _value(value)


def _value(value: Any) -> str:
    return NONE if value is None else json.dumps(value, ensure_ascii=False)
