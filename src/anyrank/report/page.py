"""The page: its top, and everything below in order."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from anyrank.report.compare import named, references, tones
from anyrank.report.figures import ranks, scores, traffic
from anyrank.report.markup import pairs
from anyrank.report.runs import Run, read
from anyrank.report.tables import behind, differences, metrics, missing, progress, remarks, summary
from anyrank.report.text import NONE, SPACE, capitalised, clock, counted, megabytes, score

__all__ = ["render"]


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
    drawn = tones(runs)
    parts = [
        _header(runs),
        summary(runs, drawn),
        differences(named(runs)),
        metrics(runs),
        scores(runs, drawn),
        traffic(runs, drawn),
        ranks(runs, drawn),
        missing(runs),
        remarks(runs),
        behind(runs),
    ]
    frame = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = frame.substitute(title=escape(_title(runs)), body="\n".join(part for part in parts if part))
    return page.encode("utf-8", "replace").decode("utf-8")  # a folder's name may hold bytes that are no text


def _title(runs: Sequence[Run]) -> str:
    asked = named(runs)
    return asked[0].name if len(asked) == 1 else f"{len(asked)} runs compared"


def _header(runs: Sequence[Run]) -> str:
    asked = named(runs)
    facts = [_facts(run) for run in asked]
    shared = {key: value for key, value in facts[0].items() if all(other.get(key) == value for other in facts)}
    figures = _key_figures(asked[0], runs) if len(asked) == 1 else ""
    return (
        f"<header><p class='eyebrow'>anyrank report</p><h1>{escape(_title(runs))}</h1>{pairs(shared)}{figures}</header>"
    )


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
        "Rounds": progress(run),
    }
    return {key: value for key, value in facts.items() if value}


def _fleet(run: Run) -> str:
    per_round = run.recipe.get("fleet", {}).get("per_round")
    clients = counted(len(run.fleet), "client")
    return f"{clients}, {per_round} a round" if per_round and per_round < len(run.fleet) else clients


def _key_figures(run: Run, runs: Sequence[Run]) -> str:
    if not run.evaluated:
        return ""
    up, down = run.total("bytes_up"), run.total("bytes_down")
    figures = [
        (capitalised(run.metric.name), score(run.metric.name, run.final), _beside(run, runs)),
        ("On the clients’ own data", *_own_data(run)),
        ("Sent", f"{megabytes(up + down)}{SPACE}MB", f"{megabytes(up)} up, {megabytes(down)} down"),
        ("Simulated time", clock(run.simulated_seconds), f"computed in {clock(run.total('real_seconds'))}"),
    ]
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class='aside'>{escape(aside)}</dd></div>"
        for name, value, aside in figures
        if value != NONE
    )
    return f"<dl class='figures'>{tiles}</dl>"


def _beside(run: Run, runs: Sequence[Run]) -> str:
    others = [(other.name, other.final) for other in runs if other is not run and other.evaluated]
    untrained = [(name, value) for name, value, _ in references([run])]
    return ", ".join(f"{name} {score(run.metric.name, value)}" for name, value in others + untrained)


def _own_data(run: Run) -> tuple[str, str]:
    federated, metric = run.newest("federated"), run.metric.name
    if federated is None:
        return NONE, ""
    extremes = f"{score(metric, federated.low)} to {score(metric, federated.high)} " if federated.clients != 1 else ""
    return score(metric, federated.score), f"{extremes}over {counted(federated.clients, 'client')}"
