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
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from anyrank.report import charts
from anyrank.report.charts import Axis, Bar, Column, Level, Point, Series
from anyrank.report.runs import Round, Run, read

__all__ = ["render"]

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
FEW = 8  # rows that are shown without being asked for

Tones = Mapping[str, int | None]
Cell = str | int | float | None


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
        _energy(runs),
        _missing(runs),
        _behind(runs),
    ]
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(_title(runs)), body="\n".join(part for part in parts if part))


def _named(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.parent is None]


def _tones(runs: Sequence[Run]) -> dict[str, int | None]:
    """A colour for each run that has a course; a single round has none and is drawn as a level."""
    courses = [run.name for run in runs if len(run.rounds) > 1]
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
    facts = {
        "Method": run.method,
        "Baseline": run.baseline,
        "Model": recipe.get("model", {}).get("name"),
        "Data": f"{recipe.get('data', {}).get('source', NONE)} ({sizes})" if sizes else None,
        "Fleet": _fleet(run),
        "Rounds": _progress(run),
    }
    return {key: value for key, value in facts.items() if value}


def _fleet(run: Run) -> str:
    per_round = run.recipe.get("fleet", {}).get("per_round")
    clients = f"{len(run.fleet)} client{'s' * (len(run.fleet) != 1)}"
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
    last, up, down = run.rounds[-1], _total(run, "bytes_up"), _total(run, "bytes_down")
    figures = [
        ("Accuracy", _percent(run.evaluated[-1].accuracy), _beside(run, runs)),
        ("On the clients’ own data", *_own_data(run)),
        ("Sent up and down", f"{_megabytes(up)} + {_megabytes(down)}{SPACE}MB", f"in {_count(run.played, 'round')}"),
        ("Simulated time", _clock(last.simulated_seconds), f"computed in {_clock(_total(run, 'real_seconds'))}"),
    ]
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class='aside'>{escape(aside)}</dd></div>"
        for name, value, aside in figures
        if value != NONE
    )
    return f"<dl class='figures'>{tiles}</dl>"


def _beside(run: Run, runs: Sequence[Run]) -> str:
    others = [(other.name, other.evaluated[-1].accuracy) for other in runs if other is not run and other.evaluated]
    references = [(name, value) for name, value, _ in _references([run])]
    return ", ".join(f"{name} {_percent(value)}" for name, value in others + references)


def _own_data(run: Run) -> tuple[str, str]:
    federated = _last(run, "federated")
    if federated is None:
        return NONE, ""
    spread = f"{_percent(federated.low)} to {_percent(federated.high)}"
    return _percent(federated.accuracy), f"{spread} over {_count(federated.clients, 'client')}"


# --- tables -------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run], tones: Tones) -> str:
    columns = [column for column in _columns(tones) if column[0] in _ALWAYS or any(column[2](run) for run in runs)]
    rows = [[column[2](run) for column in columns] for run in runs]
    for name, value, of in _references(runs):
        label = f"{name} ({of})" if of else name
        rows.append([{"run": label, "final": _percent(value)}.get(key) for key, *_ in columns])
    groups = _groups([group for _, (group, _), _ in columns])
    labels = [label for _, (_, label), _ in columns]
    return _section("Summary", _table(labels, rows, groups=groups, name="Summary of the runs"))


_ALWAYS = {"run", "method", "rounds", "final", "best", "federated", "up", "down", "simulated", "real"}


def _columns(tones: Tones) -> list[tuple[str, tuple[str, str], Callable[[Run], Cell]]]:
    """Key, (group, label) and content of the summary's columns."""
    return [
        ("run", ("", "Run"), lambda run: _run_label(run, tones)),
        ("method", ("", "Method"), lambda run: run.method),
        ("baseline", ("", "Baseline"), lambda run: run.baseline),
        ("rounds", ("", "Rounds"), _progress),
        ("final", ("Accuracy", "final"), lambda run: _percent(run.evaluated[-1].accuracy if run.evaluated else None)),
        ("best", ("Accuracy", "best"), _best),
        ("federated", ("Accuracy", "on clients’ data"), _spread),
        ("up", ("Sent, MB", "up"), lambda run: _megabytes(_total(run, "bytes_up"))),
        ("down", ("Sent, MB", "down"), lambda run: _megabytes(_total(run, "bytes_down"))),
        ("simulated", ("Time, h:mm:ss", "simulated"), lambda run: _clock(_simulated(run))),
        ("target", ("Time, h:mm:ss", "to target"), _to_target),
        ("real", ("Time, h:mm:ss", "real"), lambda run: _clock(_total(run, "real_seconds"))),
    ]


def _run_label(run: Run, tones: Tones) -> Markup:
    return Markup(f"<span class='run'>{charts.swatch(tones[run.name])}<span>{escape(run.name)}</span></span>")


def _best(run: Run) -> Cell:
    if run.best is None:
        return NONE
    return Markup(f"{_percent(run.best.accuracy)} <small>round {run.best.number}</small>")


def _spread(run: Run) -> Cell:
    federated = _last(run, "federated")
    if federated is None:
        return NONE
    return f"{_percent(federated.accuracy)} ±{SPACE}{federated.std * 100:.1f}"


def _to_target(run: Run) -> Cell:
    if run.target is None:
        return None
    if run.target_seconds is None:
        return Markup(f"not reached <small>{_percent(run.target)}</small>")
    return Markup(f"{_clock(run.target_seconds)} <small>{_percent(run.target)}</small>")


def _references(runs: Sequence[Run]) -> list[tuple[str, float, str]]:
    """Name, accuracy and, where runs differ in it, the runs of each thing that needs no training."""
    found = []
    for key, name in (("overlap", "word overlap"), ("majority", "majority label")):
        values: dict[float, list[str]] = {}
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
        [Markup(f"<code>{escape(key)}</code>"), *(_value(settings.get(key)) for settings in flat)]
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
    divisor, unit = _time_unit(max(_simulated(run) for run in courses))
    y = Axis("", write=lambda value: f"{value * 100:g}{SPACE}%")

    def chart(title: str, x: Axis, place: Callable[[Round], float]) -> str:
        series = [
            Series(
                points=[Point(place(r), r.accuracy or 0.0, _accuracy_tip(run, r)) for r in run.evaluated],
                tone=tones[run.name] or 0,
                end=_percent(run.evaluated[-1].accuracy),
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
    flat = [(run.name, run.evaluated[-1].accuracy or 0.0) for run in runs if len(run.evaluated) == 1]
    levels = [Level(f"{name} {_percent(value)}", value, strong=True) for name, value in flat]
    levels += [Level(f"target {_percent(value)}", value) for value in sorted({r.target for r in courses if r.target})]
    reached = [round.accuracy or 0.0 for run in courses for round in run.evaluated]
    lowest = min(reached) - (max(reached) - min(reached))
    references = [(name, value) for name, value, of in _references(runs) if value >= lowest and not of]
    return levels + [Level(f"{name} {_percent(value)}", value) for name, value in references]


def _traffic(runs: Sequence[Run], tones: Tones) -> str:
    courses = [run for run in runs if tones[run.name] is not None]
    most = max((_total(run, key) for run in courses for key in ("bytes_up", "bytes_down")), default=0)
    if not most:
        return ""
    divisor, unit = _byte_unit(most)

    def figure(title: str, key: str, note: str) -> str:
        series = [
            Series(
                points=(points := _cumulative(run, key, divisor=divisor, unit=unit)),
                tone=tones[run.name] or 0,
                end=f"{points[-1].y:.3g}{SPACE}{unit}",
            )
            for run in courses
        ]
        axis = Axis("round", low=0, whole=True)
        y = Axis("", write=lambda value: f"{value:g}{SPACE}{unit}", low=0, high=most / divisor)
        return _figure(title, note, charts.lines(series, title=f"{title}, cumulative bytes", x=axis, y=y))

    up = figure("Up", "bytes_up", "From the clients to the server, all rounds so far.")
    down = figure("Down", "bytes_down", "From the server to the clients, all rounds so far.")
    return _section("Traffic", up, down, legend=_legend(courses, tones))


def _cumulative(run: Run, key: str, *, divisor: float, unit: str) -> list[Point]:
    points = [Point(max(0, run.rounds[0].number - 1), 0.0, f"{run.name}, before the first round\n0{SPACE}{unit}")]
    total = 0.0
    for round in run.rounds:
        total += getattr(round, key) / divisor
        tip = f"{run.name}, round {round.number}\n{total:.3g}{SPACE}{unit} so far"
        points.append(Point(round.number, total, tip))
    return points if run.rounds[0].number else points[1:]


def _ranks(runs: Sequence[Run], tones: Tones) -> str:
    figures = [_class_bars(runs, tones)]
    figures += [_histogram(same) for same in _by_fleet(runs)]
    figures += [_shrinking(run, many=len(_named(runs)) > 1) for run in runs if run.prunes]
    scored = [run for run in runs if _last(run, "class_accuracy")]
    return _section("Ranks", *figures, legend=_legend(scored, tones))


def _class_bars(runs: Sequence[Run], tones: Tones) -> str:
    scores = [(run, scores) for run in runs if (scores := _last(run, "class_accuracy"))]
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
    """Runs whose clients are planned at the same ranks share one histogram; one client makes none."""
    groups: dict[tuple[tuple[str, int], ...], list[Run]] = {}
    for run in runs:
        if len(planned := _planned(run)) > 1:
            groups.setdefault(tuple(sorted(planned.items())), []).append(run)
    return list(groups.values())


def _planned(run: Run) -> dict[str, int]:
    """The rank each client was first planned at.

    Clients that were never asked count with their device's rank, but only if the method follows the devices' ranks
    for everyone it did ask; otherwise their plan is unknown.
    """
    first: dict[str, int] = {}
    for round in run.rounds:
        first = {**round.planned_ranks, **first}
    first = {client: rank for client, rank in first.items() if client in run.fleet}
    follows = all(run.fleet[client].rank == rank for client, rank in first.items())
    return {client: member.rank for client, member in run.fleet.items()} if follows else first


def _histogram(runs: Sequence[Run]) -> str:
    run, planned = runs[0], _planned(runs[0])
    kinds = _kinds(run)
    strengths = _ramp(len(kinds))
    counts = Counter((rank, run.fleet[client].kind) for client, rank in planned.items())
    stacks = [
        Column(
            label=str(rank),
            parts=[counts[rank, kind] for kind in kinds],
            strengths=strengths,
            tip=f"rank {rank}\n" + "\n".join(_of_kind(counts[rank, k], k) for k in kinds if counts[rank, k]),
        )
        for rank in sorted({rank for rank, _ in counts})
    ]
    y, x = Axis("", whole=True, low=0), Axis("rank")
    silent = len(run.fleet) - len(planned)
    note = "How many clients are planned at each rank, by device class."
    note += f" {_count(silent, 'client')} never asked and left out." if silent else ""
    svg = charts.columns(stacks, title="Clients by planned rank", x=x, y=y)
    boxes = "".join(
        f"<li><i class='box' style='opacity:{strength:.2f}'></i>{escape(kind)}</li>"
        for kind, strength in zip(kinds, strengths, strict=True)
    )
    names = ", ".join(same.name for same in runs)
    return _figure(f"Planned ranks: {names}", note, f"<ul class='legend'>{boxes}</ul>{svg}")


def _of_kind(number: int, kind: str) -> str:
    return f"{kind}: {_count(number, 'client')}"


def _shrinking(run: Run, *, many: bool) -> str:
    """The mean rank of each device class, round by round, where clients come back smaller than planned."""
    kinds = _kinds(run)
    course = list(_current_ranks(run))
    series = [
        Series(
            points=[Point(r, mean, f"{kind}, round {r}\nmean rank {mean:.2f}") for r, mean in means],
            strength=strength,
            tone=0,
            end=f"{_short(kind)} {means[-1][1]:.1f}",
        )
        for kind, strength in zip(kinds, _ramp(len(kinds), least=0.5), strict=True)
        if (means := [(r, fmean(rank for c, rank in ranks.items() if run.fleet[c].kind == kind)) for r, ranks in course])
    ]
    svg = charts.lines(
        series, title="Mean rank over rounds", x=Axis("round", low=0, whole=True), y=Axis("", low=0), step=True
    )
    name = f"Mean rank over rounds: {run.name}" if many else "Mean rank over rounds"
    return _figure(name, "Of all clients of a device class; updates that come back smaller lower it.", svg)


def _current_ranks(run: Run) -> Iterator[tuple[int, dict[str, int]]]:
    """After each round, the rank of every client as far as it is known."""
    ranks = {client: member.rank for client, member in run.fleet.items()}
    ranks |= _planned(run)
    yield max(0, run.rounds[0].number - 1), dict(ranks)
    for round in run.rounds:
        ranks |= {client: rank for client, rank in round.returned_ranks.items() if client in ranks}
        if round.number:
            yield round.number, dict(ranks)


def _kinds(run: Run) -> list[str]:
    """Device classes from the smallest mean rank to the largest."""
    ranks: dict[str, list[int]] = {}
    for member in run.fleet.values():
        ranks.setdefault(member.kind, []).append(member.rank)
    return sorted(ranks, key=lambda kind: (fmean(ranks[kind]), kind))


def _energy(runs: Sequence[Run]) -> str:
    figures = [_bands(run, many=len(_named(runs)) > 1) for run in runs if len(_band_names(run)) > 1]
    intro = (
        "How the global product’s squared singular values divide into bands between the ranks of the device classes. "
        "What lies above a class’s rank, clients of that class never hold."
    )
    return _section("Where the energy is", *figures, intro=intro)


def _band_names(run: Run) -> list[str]:
    names = {band for round in run.rounds for band in round.energy}
    return sorted(names, key=lambda band: [int(number) for number in re.findall(r"\d+", band)])


def _bands(run: Run, *, many: bool) -> str:
    names = _band_names(run)
    measured = [round for round in run.rounds if round.energy]
    series = [
        Series(
            points=[Point(r.number, r.energy.get(band, 0.0), _band_tip(r, band, first=band == names[-1])) for r in measured],
            strength=strength,
            end=_dashed(band),
        )
        for band, strength in zip(names, _ramp(len(names), least=0.25), strict=True)
    ]
    svg = charts.areas(series, title="Energy by rank band over rounds", x=Axis("round", whole=True))
    name = run.name if many or run.parent else "Ranks over rounds"
    return _figure(name, f"After round {measured[-1].number}: {_shares(measured[-1], names)}.", svg)


def _band_tip(round: Round, band: str, *, first: bool) -> str:
    head = f"round {round.number}\n" if first else ""
    return f"{head}ranks {_dashed(band)}: {_percent(round.energy.get(band, 0.0))}"


def _shares(round: Round, names: Sequence[str]) -> str:
    return ", ".join(f"{_percent(round.energy.get(band, 0.0))} in ranks {_dashed(band)}" for band in names)


def _ramp(count: int, *, least: float = 0.3) -> list[float]:
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
    bands = _band_names(run)
    labels = ["Round", "Accuracy", "Loss", "Train loss", "On clients’ data", "MB up", "MB down", "Simulated", "Real"]
    labels += ["Asked", "Replied", "Mean rank planned", "returned", *(f"Ranks {_dashed(band)}" for band in bands)]
    rows = [[*_measures(round), *(_percent(round.energy.get(band)) for band in bands)] for round in run.rounds]
    return _table(labels, rows, name=f"Every round of {run.name}")


def _measures(round: Round) -> list[Cell]:
    return [
        round.number,
        _percent(round.accuracy),
        _decimals(round.loss, 4),
        _decimals(round.train_loss, 4),
        _percent(round.federated.accuracy if round.federated else None),
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
    tables = [_toml(value, f"{path}.{_key(key)}".lstrip(".")) for key, value in table.items() if isinstance(value, Mapping)]
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
        f"<th colspan='{span}' scope='colgroup'>{escape(group)}</th>" if group else f"<td colspan='{span}'></td>"
        for group, span in groups
    )
    head = f"<tr class='groups'>{upper}</tr>" if groups else ""
    head += "<tr>" + "".join(f"<th scope='col'>{escape(label)}</th>" for label in labels) + "</tr>"
    body = "".join(f"<tr>{_row(row)}</tr>" for row in rows)
    caption = f"<caption>{escape(name)}</caption>"
    return (
        f"<div class='scroll' role='region' aria-label='{escape(name)}' tabindex='0'>"
        f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[Cell]) -> str:
    first, *others = [_cell(cell) for cell in cells]
    return f"<th scope='row'>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Markup):
        return cell
    return "" if cell is None else escape(str(cell))


def _groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Neighbours of the same name as (name, how many)."""
    groups: list[tuple[str, int]] = []
    for name in names:
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1] + 1)
        else:
            groups.append((name, 1))
    return groups


# --- numbers as text ----------------------------------------------------------------------------------------------


def _last(run: Run, key: str) -> Any:
    """The newest value of a field that not every round has."""
    return next((value for round in reversed(run.rounds) if (value := getattr(round, key))), None)


def _total(run: Run, key: str) -> float:
    return sum(getattr(round, key) for round in run.rounds)


def _simulated(run: Run) -> float:
    return run.rounds[-1].simulated_seconds if run.rounds else 0.0


def _mean(ranks: Mapping[str, int]) -> float | None:
    return fmean(ranks.values()) if ranks else None


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.1f}{SPACE}%"


def _decimals(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _megabytes(size: float) -> str:
    megabytes = size / 1e6
    return f"{megabytes:,.1f}" if megabytes >= 1 or not megabytes else f"{megabytes:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _time_unit(seconds: float) -> tuple[float, str]:
    """A unit in which a time is a handy number, as seconds and as an axis label."""
    units = [(86400, "days"), (3600, "hours"), (60, "minutes")]
    return next(((float(size), f"simulated time, {name}") for size, name in units if seconds >= 3 * size), (1.0, "simulated time, seconds"))


def _byte_unit(size: float) -> tuple[float, str]:
    units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next((unit for unit in units if size >= unit[0]), (1.0, "B"))


def _dashed(band: str) -> str:
    return band.replace("-", "–")


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def _value(value: Any) -> str:
    return NONE if value is None else json.dumps(value, ensure_ascii=False)
