"""The page's tables: the summary, differing settings, missing replies and every round."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from anyrank.report.compare import Tones, by_metric, flatten, owners, references
from anyrank.report.markup import Cell, Markup, details, grouped, listed, pairs, run_label, section, table
from anyrank.report.runs import Metric, Round, Run
from anyrank.report.text import (
    NONE,
    SPACE,
    capitalised,
    clock,
    counted,
    dashed,
    decimals,
    literal,
    megabytes,
    percent,
    plain,
    score,
    spread,
    toml,
)

__all__ = ["behind", "differences", "metrics", "missing", "progress", "remarks", "summary"]

FEW = 8  # rows that are shown without being asked for


def summary(runs: Sequence[Run], tones: Tones) -> str:
    """One row for each run, and for what needs no training."""
    groups = by_metric(runs)
    used = {"metric": len(groups) > 1, "target": any(run.target is not None for run in runs)}
    heading = "Score" if used["metric"] else _heading(runs[0].metric)
    columns = [column for column in _columns(heading, tones) if used.get(column[0], True)]
    rows = [[column[2](run) for column in columns] for run in runs]
    for same in groups:
        metric = same[0].metric.name
        for name, value, of in references(same):
            cells = {"run": f"{name} ({of})" if of else name, "metric": metric, "final": score(metric, value)}
            rows.append([cells.get(key) for key, *_ in columns])
    titles = [title for _, title, _ in columns]
    labels = [label for _, label in titles]
    return section("Summary", table(labels, rows, groups=grouped(titles), name="Summary of the runs"))


def _columns(heading: str, tones: Tones) -> list[tuple[str, tuple[str, str], Callable[[Run], Cell]]]:
    """Key, (group, label) and content of the summary's columns."""
    return [
        ("run", ("", "Run"), lambda run: _run_cell(run, tones)),
        ("method", ("", "Method"), _method),
        ("metric", ("", "Metric"), _metric),
        ("rounds", ("", "Rounds"), lambda run: run.played),
        ("final", (heading, "final"), lambda run: score(run.metric.name, run.final)),
        ("best", (heading, "best"), _best),
        ("federated", (heading, "on clients’ data"), _own_data),
        ("up", ("Sent, MB", "up"), lambda run: megabytes(run.total("bytes_up"))),
        ("down", ("Sent, MB", "down"), lambda run: megabytes(run.total("bytes_down"))),
        ("simulated", ("Time, h:mm:ss", "simulated"), lambda run: clock(run.simulated_seconds)),
        ("target", ("Time, h:mm:ss", "to target"), _to_target),
        ("real", ("Time, h:mm:ss", "real"), lambda run: clock(run.total("real_seconds"))),
    ]


def _heading(metric: Metric) -> str:
    return ", ".join(part for part in (capitalised(metric.name), metric.advice) if part)


def metrics(runs: Sequence[Run]) -> str:
    """All metrics of each run's last evaluation, where there are more than the one that it is scored by."""
    found = [(run, values) for run in runs if (values := run.newest("metrics"))]
    names = list(dict.fromkeys(name for _, values in found for name in values))
    if all(values.keys() <= {run.metric.name} for run, values in found):
        return ""
    heading = "All metrics of the last evaluation"
    rows = [[run.name, *(score(name, values.get(name)) for name in names)] for run, values in found]
    return section(heading, table(["Run", *map(capitalised, names)], rows, name=heading))


def progress(run: Run) -> str:
    """How many rounds there are, and why not all that were planned."""
    if run.unfinished:
        return f"unfinished, {run.played} of {run.planned} rounds"
    if run.short:
        return f"{run.played} of {run.planned}, stopped at the target"
    return str(run.played)


def _run_cell(run: Run, tones: Tones) -> Markup:
    return Markup(run_label(run, tones) + f" <small>{progress(run)}</small>" * run.short)


def _method(run: Run) -> Markup:
    baseline = f" <small>baseline: {escape(run.baseline)}</small>" if run.baseline else ""
    return Markup(escape(run.method) + baseline)


def _metric(run: Run) -> Markup:
    return Markup(escape(run.metric.name) + f" <small>{run.metric.advice}</small>" * bool(run.metric.advice))


def _best(run: Run) -> Cell:
    if run.best is None:
        return NONE
    return Markup(f"{score(run.metric.name, run.best.score)} <small>round {run.best.number}</small>")


def _own_data(run: Run) -> Cell:
    federated, metric = run.newest("federated"), run.metric.name
    if federated is None:
        return NONE
    around = SPACE + spread(metric, federated.score, federated.std) if federated.clients != 1 else ""
    return score(metric, federated.score) + around


def _to_target(run: Run) -> Cell:
    if run.target is None:
        return None
    target = score(run.metric.name, run.target)
    if run.target_seconds is None:
        return Markup(f"{NONE} <small>{target} not reached</small>")
    return Markup(f"{clock(run.target_seconds)} <small>{target}</small>")


def differences(runs: Sequence[Run]) -> str:
    """The settings in which runs differ: what a comparison compares."""
    flat = [dict(flatten(run.recipe)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [
        [Markup(f"<code>{escape(key)}</code>"), *(plain(settings.get(key)) for settings in flat)]
        for key in keys
        if len({literal(settings.get(key)) for settings in flat}) > 1
    ]
    if not rows:
        return ""
    heading = "Settings in which the runs differ"
    listing = table(["Setting", *(run.name for run in runs)], rows, name=heading)
    return details(heading, listing, shown=len(rows) <= FEW)


def missing(runs: Sequence[Run]) -> str:
    """The replies that rounds had to do without, and why."""
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
    listing = table(labels[only:], [row[only:] for row in rows], name="Clients that rounds had to do without")
    if len(rows) > 2 * FEW:
        listing = details(f"All {len(rows)}", listing)
    intro = f"{counted(len(rows), 'reply', 'replies')} that a round had to do without: {words}."
    return section("Missing replies", listing, intro=intro)


def remarks(runs: Sequence[Run]) -> str:
    """What is worth knowing of how the runs were set up."""
    said: dict[str, list[Run]] = {}
    for run in runs:
        for remark in run.remarks:
            said.setdefault(remark, []).append(run)
    sentences = [remark if len(of) == len(runs) else f"{owners(of)}: {remark}" for remark, of in said.items()]
    return section("Remarks", listed(sentences))


def behind(runs: Sequence[Run]) -> str:
    """Every round of every run in numbers, and where the runs come from."""
    parts = [
        f"<h3>{escape(run.name)}</h3>" * (len(runs) > 1)
        + details("Every round", _rounds(run))
        + details("Recipe and versions", f"{pairs(_origin(run))}<pre>{escape(toml(run.recipe))}</pre>")
        for run in runs
    ]
    return section("Behind the figures", "".join(parts))


def _rounds(run: Run) -> str:
    further = list(dict.fromkeys(name for round in run.rounds for name in round.metrics if name != run.metric.name))
    columns = [
        ("", "Round"),
        *[(capitalised(run.metric.name), of) for of in ("test", "clients’ data")],
        *[("Further metrics", capitalised(name)) for name in further],
        *[("Loss", of) for of in ("test", "training")],
        *[("Sent, MB", way) for way in ("up", "down")],
        *[("Time, h:mm:ss", kind) for kind in ("simulated so far", "real")],
        *[("Clients", what) for what in ("asked", "replied")],
        *[("Mean rank", what) for what in ("planned", "returned")],
        *[("Energy in ranks", dashed(band)) for band in run.bands],
    ]
    rows = [
        [
            *_scores(round, [run.metric.name, *further]),
            *_measures(round),
            *(percent(round.energy.get(band)) for band in run.bands),
        ]
        for round in run.rounds
    ]
    return table([label for _, label in columns], rows, groups=grouped(columns), name=f"Every round of {run.name}")


def _scores(round: Round, names: Sequence[str]) -> list[Cell]:
    metric, *further = names
    own = round.federated.score if round.federated else None
    return [
        round.number,
        score(metric, round.score),
        score(metric, own),
        *(score(name, round.metrics.get(name)) for name in further),
    ]


def _measures(round: Round) -> list[Cell]:
    return [
        decimals(round.loss, 3),
        decimals(round.train_loss, 3),
        megabytes(round.bytes_up),
        megabytes(round.bytes_down),
        clock(round.simulated_seconds),
        clock(round.real_seconds),
        len(round.planned_ranks),
        len(round.returned_ranks),
        decimals(_mean(round.planned_ranks), 1),
        decimals(_mean(round.returned_ranks), 1),
    ]


def _mean(ranks: Mapping[str, int]) -> float | None:
    return fmean(ranks.values()) if ranks else None


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
