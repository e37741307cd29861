"""The page's figures: which numbers of the runs go into which chart."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from anyrank.report import charts
from anyrank.report.charts import Axis, Bar, Column, Level, Number, Point, Series
from anyrank.report.compare import Tones, by_fleet, named, references
from anyrank.report.markup import boxes, figure, legend, section
from anyrank.report.runs import Round, Run
from anyrank.report.text import SPACE, amount, byte_unit, clock, counted, dashed, percent, shortened, time_unit

__all__ = ["accuracy", "ranks", "traffic"]


def accuracy(runs: Sequence[Run], tones: Tones) -> str:
    """How well the global model does, over rounds and over simulated time."""
    courses = [run for run in runs if tones[run.name] is not None and len(run.evaluated) > 1]
    if not courses:
        return ""
    levels = _accuracy_levels(runs, courses)
    divisor, unit = time_unit(max(run.simulated_seconds for run in courses))
    y = Axis("", write=charts.percent_tick)

    def chart(title: str, x: Axis, place: Callable[[Round], Number]) -> str:
        series = [
            Series(
                points=[Point(place(r), r.accuracy or 0.0, _accuracy_tip(run, r)) for r in run.evaluated],
                tone=tones[run.name] or 0,
                end=percent(run.final),
            )
            for run in courses
        ]
        return charts.lines(series, title=title, x=x, y=y, levels=levels)

    rounds = chart("Accuracy over rounds", Axis("round", low=0, whole=True), lambda r: r.number)
    time = chart("Accuracy over simulated time", Axis(unit, low=0), lambda r: r.simulated_seconds / divisor)
    return section(
        "Accuracy",
        figure(
            "Over rounds",
            "Share of the server’s test examples that the global model gets right, or the clients’ own on average.",
            rounds,
        ),
        figure("Over simulated time", "The same, over what the virtual clock showed.", time),
        legend=legend(courses, tones),
    )


def _accuracy_tip(run: Run, round: Round) -> str:
    loss = "" if round.loss is None else f", loss {round.loss:.3f}"
    return f"{run.name}, round {round.number}\n{percent(round.accuracy)}{loss}\nafter {clock(round.simulated_seconds)}"


def _accuracy_levels(runs: Sequence[Run], courses: Sequence[Run]) -> list[Level]:
    """Runs of a single point, the target, and references unless they would squeeze the curves."""
    flat = [(run.name, run.final) for run in runs if run not in courses and run.final is not None]
    levels = [Level(f"{name} {percent(value)}", value, strong=True) for name, value in flat]
    levels += [Level(f"target {percent(value)}", value) for value in sorted({r.target for r in courses if r.target})]
    reached = [round.accuracy or 0.0 for run in courses for round in run.evaluated]
    lowest = min(reached) - (max(reached) - min(reached))
    near = [(name, value) for name, value, of in references(runs) if value >= lowest and not of]
    return levels + [Level(f"{name} {percent(value)}", value) for name, value in near]


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
    figures = [_class_bars(runs, tones)]
    fleets = by_fleet(runs)
    figures += [_histogram(same, many=len(fleets) > 1) for same in fleets]
    figures += [_shrinking(run, runs) for run in runs if run.prunes]
    figures += [_energy(run, runs) for run in runs if len(run.bands) > 1]
    scored = [run for run in runs if run.newest("class_accuracy")]
    return section("Ranks", *figures, legend=legend(scored, tones))


def _class_bars(runs: Sequence[Run], tones: Tones) -> str:
    scores = [(run, scores) for run in runs if (scores := run.newest("class_accuracy"))]
    if not scores:
        return ""
    rows = [
        Bar(
            group=f"rank {rank}",
            value=by_rank[rank],
            text=percent(by_rank[rank]),
            tone=tones[run.name],
            tip=f"{run.name}, what a client of rank {rank} is sent\n{percent(by_rank[rank])}",
        )
        for rank in sorted({rank for _, by_rank in scores for rank in by_rank})
        for run, by_rank in scores
        if rank in by_rank
    ]
    note = "Test accuracy of the adapter that a client of each rank is sent, when last measured."
    return figure("Accuracy by rank", note, charts.bars(rows, title="Accuracy by rank"))


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
