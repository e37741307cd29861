"""Several runs side by side: which were asked for, which colour each has, and what they share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyrank.report.charts import Number
from anyrank.report.runs import Run

__all__ = ["Tones", "by_fleet", "flatten", "named", "references", "tones"]

Tones = Mapping[str, int | None]


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs that were asked for, without what their recipes compare them with."""
    return [run for run in runs if run.parent is None]


def tones(runs: Sequence[Run]) -> dict[str, int | None]:
    """A colour for each run that has a course; a single round has none and is drawn as a level."""
    courses = [run.name for run in runs if run.played > 1]
    return {run.name: courses.index(run.name) if run.name in courses else None for run in runs}


def references(runs: Sequence[Run]) -> list[tuple[str, Number, str]]:
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
