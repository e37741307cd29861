"""Several runs side by side: which were asked for, which colour each has, and what they share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyrank.report.charts import Number
from anyrank.report.runs import Metric, Run
from anyrank.report.text import score

__all__ = ["Tones", "by_fleet", "by_metric", "flatten", "named", "owners", "references", "tones"]

Tones = Mapping[str, int | None]


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs that were asked for, without what their recipes compare them with."""
    return [run for run in runs if run.parent is None]


def tones(runs: Sequence[Run]) -> dict[str, int | None]:
    """A colour for each run that has a course; a single round has none and is drawn as a level."""
    courses = [run.name for run in runs if run.played > 1]
    return {run.name: courses.index(run.name) if run.name in courses else None for run in runs}


def by_metric(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose scores can be compared, in the order of their first."""
    groups: dict[Metric, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.metric, []).append(run)
    return list(groups.values())


def references(runs: Sequence[Run]) -> list[tuple[str, Number, str]]:
    """Name, score and, where runs of one metric differ in it, the runs of each thing that needs no training.

    Scores that read the same are one: on another machine the last digits can be others.
    """
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.references):
        values: dict[str, tuple[Number, list[Run]]] = {}
        for run in runs:
            if name in run.references:
                value = run.references[name]
                values.setdefault(score(run.metric.name, value), (value, []))[1].append(run)
        found += [(name, value, owners(of) if len(values) > 1 else "") for value, of in values.values()]
    return found


def owners(runs: Sequence[Run]) -> str:
    """The names of runs to which something applies; one that is compared with another goes without saying."""
    names = {run.name for run in runs}
    return ", ".join(run.name for run in runs if run.parent not in names)


def flatten(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a recipe, by its path."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}{key}.")
        else:
            yield path + key, value


def by_fleet(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose clients are planned alike share one histogram; a single client makes none."""
    groups: dict[tuple[tuple[str, int, str], ...], list[Run]] = {}
    for run in runs:
        planned = sorted((client, rank, run.fleet[client].kind) for client, rank in run.first_ranks.items())
        if len(planned) > 1:
            groups.setdefault(tuple(planned), []).append(run)
    return list(groups.values())
