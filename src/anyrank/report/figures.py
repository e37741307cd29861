"""The page's figures: which numbers of the runs go into which chart."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from anyrank.report import charts
from anyrank.report.charts import Axis, Bar, Column, Level, Number, Point, Series
from anyrank.report.compare import Tones, by_fleet, by_metric, named, owners, references
from anyrank.report.markup import boxes, figure, legend, section
from anyrank.report.runs import Metric, Round, Run
from anyrank.report.text import (
    SHARES,
    SPACE,
    amount,
    byte_unit,
    capitalised,
    clock,
    counted,
    dashed,
    percent,
    score,
    score_tick,
    shortened,
    time_unit,
)

__all__ = ["ranks", "scores", "traffic"]

WIDE = 10  # from this ratio on, errors are shown on a logarithmic axis


def scores(runs: Sequence[Run], tones: Tones) -> str:
    """How well the global model does, over rounds and over simulated time; a section for each metric."""
    groups = by_metric(runs)
    return "\n".join(_scores(same, tones, many=len(groups) > 1) for same in groups)


def _scores(runs: Sequence[Run], tones: Tones, *, many: bool) -> str:
    courses = [run for run in runs if tones[run.name] is not None and len(run.evaluated) > 1]
    if not courses:
        return ""
    metric = runs[0].metric
    log = _is_wide(courses)
    levels = _levels(runs, courses, log=log)
    log = log and all(level.y > 0 for level in levels)
    divisor, unit = time_unit(max(run.simulated_seconds for run in courses))
    y = Axis("", write=score_tick(metric.name), log=log)

    def chart(over: str, x: Axis, place: Callable[[Round], Number]) -> str:
        series = [
            Series(
                points=[Point(place(r), r.score or 0.0, _score_tip(run, r)) for r in run.evaluated],
                tone=tones[run.name] or 0,
                end=score(metric.name, run.final),
            )
            for run in courses
        ]
        return charts.lines(series, title=f"{capitalised(metric.name)} over {over}", x=x, y=y, levels=levels)

    rounds = chart("rounds", Axis("round", low=0, whole=True), lambda r: r.number)
    time = chart("simulated time", Axis(unit, low=0), lambda r: r.simulated_seconds / divisor)
    note = "The global model on the server’s test set, or the clients’ own on average."
    return section(
        capitalised(metric.name),
        figure("Over rounds", _hinted(note, metric, log=log), rounds),
        figure("Over simulated time", "The same, over what the virtual clock showed.", time),
        intro=f"Scores by different metrics share no axis. By {metric.name}: {owners(runs)}." if many else "",
        legend=legend(courses, tones),
    )


def _hinted(note: str, metric: Metric, *, log: bool = False) -> str:
    """A figure's note, with what its reader has to know of the axis."""
    hints = ", ".join(hint for hint in (metric.advice, "logarithmic axis" * log) if hint)
    return f"{note} {capitalised(hints)}." if hints else note


def _score_tip(run: Run, round: Round) -> str:
    loss = "" if round.loss is None else f", loss {round.loss:.3f}"
    value = score(run.metric.name, round.score)
    value = value if run.metric.name in SHARES else f"{run.metric.name} {value}"
    return f"{run.name}, round {round.number}\n{value}{loss}\nafter {clock(round.simulated_seconds)}"


def _reached(courses: Sequence[Run]) -> list[Number]:
    return [round.score or 0.0 for run in courses for round in run.evaluated]


def _is_wide(courses: Sequence[Run]) -> bool:
    """Whether what comes after the first rounds would be flat on an axis of equal distances, as with perplexity."""
    reached = _reached(courses)
    return not courses[0].metric.higher_is_better and 0 < min(reached) * WIDE <= max(reached)


def _levels(runs: Sequence[Run], courses: Sequence[Run], *, log: bool) -> list[Level]:
    """Runs of a single point, the target, and references unless they would squeeze the curves."""
    metric, reached = runs[0].metric, _reached(courses)
    flat = [(run.name, run.final) for run in runs if run not in courses and run.final is not None]
    targets = sorted({run.target for run in courses if run.target is not None})
    best, worst = (max, min) if metric.higher_is_better else (min, max)
    limit = worst(reached) ** 2 / best(reached) if log else 2 * worst(reached) - best(reached)
    near = [(name, value) for name, value, of in references(runs) if worst(value, limit) == limit and not of]
    return [
        *(Level(f"{name} {score(metric.name, value)}", value, strong=True) for name, value in flat),
        *(
            Level(f"{name} {score(metric.name, value)}", value)
            for name, value in [("target", t) for t in targets] + near
        ),
    ]


def traffic(runs: Sequence[Run], tones: Tones) -> str:
    """What was sent so far, over rounds."""
    courses = [run for run in runs if tones[run.name] is not None]
    most = max((run.total(key) for run in courses for key in ("bytes_up", "bytes_down")), default=0)
    if not most:
        return ""
    divisor, unit = byte_unit(most)

    def course(title: str, key: str, note: str) -> str:
        series = [
            Series(
                points=(points := _cumulative(run, key, divisor=divisor, unit=unit)),
                tone=tones[run.name] or 0,
                end=f"{amount(points[-1].y)}{SPACE}{unit}",
            )
            for run in courses
        ]
        axis = Axis("round", low=0, whole=True)
        y = Axis("", write=lambda value: f"{value:g}{SPACE}{unit}", low=0, high=most / divisor)
        return figure(title, note, charts.lines(series, title=f"{title}, cumulative bytes", x=axis, y=y))

    up = course("Up", "bytes_up", "What the clients sent, all rounds so far.")
    down = course("Down", "bytes_down", "What the clients received, all rounds so far.")
    return section("Traffic", up, down, legend=legend(courses, tones))


def _cumulative(run: Run, key: str, *, divisor: Number, unit: str) -> list[Point]:
    points = [Point(run.start, 0.0, f"{run.name}, before the first round\n0{SPACE}{unit}")]
    total = 0.0
    for round in run.rounds:
        total += getattr(round, key) / divisor
        tip = f"{run.name}, round {round.number}\n{amount(total)}{SPACE}{unit} so far"
        points.append(Point(round.number, total, tip))
    return points if run.rounds[0].number else points[1:]


def ranks(runs: Sequence[Run], tones: Tones) -> str:
    """Who is at which rank, how well each rank does, and how much the upper ranks hold."""
    figures = [_class_bars(same, tones) for same in by_metric(runs)]
    fleets = by_fleet(runs)
    figures += [_histogram(same, many=len(fleets) > 1) for same in fleets]
    figures += [_shrinking(run, runs) for run in runs if run.prunes]
    figures += [_energy(run, runs) for run in runs if len(run.bands) > 1]
    scored = [run for run in runs if run.newest("class_scores")]
    return section("Ranks", *figures, legend=legend(scored, tones))


def _class_bars(runs: Sequence[Run], tones: Tones) -> str:
    found = [(run, by_rank) for run in runs if (by_rank := run.newest("class_scores"))]
    if not found:
        return ""
    metric = runs[0].metric
    full = 1.0 if metric.name in SHARES else max(max(by_rank.values()) for _, by_rank in found)
    rows = [
        Bar(
            group=f"rank {rank}",
            value=max(0.0, by_rank[rank] / full) if full > 0 else 0.0,
            text=score(metric.name, by_rank[rank]),
            tone=tones[run.name],
            tip=f"{run.name}, what a client of rank {rank} is sent\n{score(metric.name, by_rank[rank])}",
        )
        for rank in sorted({rank for _, by_rank in found for rank in by_rank})
        for run, by_rank in found
        if rank in by_rank
    ]
    name = f"{capitalised(metric.name)} by rank"
    note = f"Test {metric.name} of the adapter that a client of each rank is sent, when last measured."
    return figure(name, _hinted(note, metric), charts.bars(rows, title=name))


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
    return figure(title, _histogram_note(run), boxes(run.kinds, strengths) + svg)


def _histogram_note(run: Run) -> str:
    silent = len(run.fleet) - len(run.first_ranks)
    note = "How many clients are planned at each rank, by device class."
    return note + (f" {counted(silent, 'client')} never asked and left out." if silent else "")


def _column_tip(rank: int, counts: Mapping[str, int]) -> str:
    return "\n".join([f"rank {rank}", *(f"{kind}: {counted(n, 'client')}" for kind, n in counts.items() if n)])


def _shrinking(run: Run, runs: Sequence[Run]) -> str:
    """The mean rank of each device class, round by round, where clients come back smaller than planned."""
    course = list(run.current_ranks())
    series = []
    for kind, strength in zip(run.kinds, _ramp(len(run.kinds), least=0.6), strict=True):
        means = [(round, fmean(_of_kind(kind, run, ranks))) for round, ranks in course]
        points = [Point(round, mean, f"{kind}, round {round}\nmean rank {mean:.2f}") for round, mean in means]
        series.append(Series(points=points, strength=strength, end=f"{shortened(kind)} {means[-1][1]:.1f}"))
    x, y = Axis("round", low=0, whole=True), Axis("", low=0)
    svg = charts.lines(series, title="Mean rank over rounds", x=x, y=y, step=True)
    return figure(_titled("Mean rank", run, runs), "Over all clients of a class, by what each last returned.", svg)


def _of_kind(kind: str, run: Run, ranks: Mapping[str, int]) -> list[int]:
    return [rank for client, rank in ranks.items() if run.fleet[client].kind == kind]


def _energy(run: Run, runs: Sequence[Run]) -> str:
    """Which share of the global product lies between the ranks of the device classes."""
    measured = [round for round in run.rounds if round.energy]
    series = []
    for band, strength in zip(run.bands, _ramp(len(run.bands)), strict=True):
        shares = [(round.number, round.energy.get(band, 0.0)) for round in measured]
        points = [Point(number, share, f"ranks {dashed(band)}: {percent(share)}") for number, share in shares]
        series.append(Series(points=points, strength=strength, end=f"{dashed(band)}: {percent(shares[-1][1])}"))
    svg = charts.areas(series, title="Energy by rank band over rounds", x=Axis("round", whole=True))
    note = "Share of the global product’s squared singular values between the ranks of the classes."
    return figure(_titled("Energy by rank", run, runs), note, svg)


def _titled(title: str, run: Run, runs: Sequence[Run]) -> str:
    """A figure's title, with the run's name where there are several."""
    return title if len(named(runs)) == 1 and run.parent is None else f"{title}: {run.name}"


def _ramp(count: int, *, least: float = 0.35) -> list[float]:
    """Opacities from weak to full: the higher the rank, the stronger the colour."""
    return [1.0 if count == 1 else least + (1 - least) * index / (count - 1) for index in range(count)]
