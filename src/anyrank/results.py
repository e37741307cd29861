"""What comes out of a run: PEFT directories of the global adapter, of each rank class, of clients, of any smaller rank.

Beside an adapter lies `anyrank.json`: what a program needs to use it, which PEFT's own file does not say.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anyrank import hf, lowrank
from anyrank.adapter import Adapter
from anyrank.card import licence_of, model_card
from anyrank.config import ModelTable
from anyrank.data import stdlib_docs
from anyrank.engine import Progress, applied
from anyrank.errors import ConfigError, RecordError
from anyrank.federation import Device, Plan, State
from anyrank.job import Job
from anyrank.memory import Memory, folder_name
from anyrank.methods import describe
from anyrank.paths import expanded, replace_file, replaced
from anyrank.pretrained import Pretrained, resolve
from anyrank.record import RunFolder
from anyrank.seeding import generator

__all__ = ["ABOUT", "export", "own_plans", "read_about", "save_results", "write_card"]

ABOUT = "anyrank.json"
_FOR_PEOPLE = ("README.md", "labels.json")  # what may be changed in the folder of an adapter


class _Named(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: str


class _About(BaseModel):
    """What `anyrank.json` holds."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    arguments: dict[str, Any]
    auto_class: str | None
    base: str | None
    base_hash: str
    files: dict[str, str] | None
    form: str | None
    label_names: list[str]
    layers: Annotated[list[str], Field(min_length=1)]
    metric: _Named
    model: ModelTable
    modules_to_save: list[str]
    problem: _Named
    scale: Annotated[float, Field(gt=0)]
    seed: int


def read_about(folder: Path) -> dict[str, Any]:
    """The content of `anyrank.json`, with the adapter beside it looked at: it is the one that was written, to the last byte.

    Raises:
        RecordError: it cannot be read, or the adapter is another, or not whole.
    """
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError("expected an object")
        _About.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        where, fault = ".".join(map(str, first["loc"])), first["msg"][0].lower() + first["msg"][1:]
        raise RecordError(
            f"{file}: {where}: {fault}; the file was changed, or is not from this version of anyrank. Bring it back as it was."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{file} cannot be read ({error}).") from error
    for name, expected in (about["files"] or {}).items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise RecordError(
                f"{folder / name} cannot be read ({error.strerror}), so the adapter is not whole."
            ) from error
        if found != expected:
            raise RecordError(
                f"{folder / name} is not the file that anyrank wrote: expected SHA-256 {expected[:12]}, found {found[:12]}. "
                "Bring it back as it was; if it was changed on purpose, load the adapter with PEFT."
            )
    return about


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def save_results(job: Job, folder: RunFolder, progress: Progress, *, memory: Memory | None) -> None:
    """Write the adapters of a run that has ended.

    `adapter/` is the global one, `classes/rank-R/` what a client of that rank is sent, where there are several, and
    `clients/CLIENT/` each client's own: of methods that have no global one, or where the recipe asks for it.

    Args:
        job: what was run.
        folder: of the run.
        progress: at its end.
        memory: what clients kept for themselves; None where that is on machines of their own, and so are their adapters.
    """
    spread, save, base = job.local.spread, job.recipe.save, Pretrained(job.outline.base, job.outline.base)
    whole = not job.method.claims.personal
    if whole:
        _save(folder, folder.path / "adapter", spread(progress.state.whole), base)
        for rank, adapter in _of_classes(job, progress) if save.classes and not progress.peers else ():
            _save(folder, folder.path / "classes" / f"rank-{rank}", spread(adapter), base, scored=str(rank))
    if memory and (not whole or save.clients):
        for client, adapter in _of_clients(job, folder, progress, memory):
            _save(folder, folder.path / "clients" / folder_name(client), spread(adapter), base, scored=None)


def _of_classes(job: Job, progress: Progress) -> Iterator[tuple[int, Adapter]]:
    """What clients of each rank are sent, where there are several."""
    one_of_each = {device.rank: device for device in progress.fleet.values()}
    for rank, device in sorted(one_of_each.items()) if len(one_of_each) > 1 else ():
        for plan in job.method.assign(progress.state, [device]):
            yield rank, applied(job.method, progress.state, plan)


def _of_clients(job: Job, folder: RunFolder, progress: Progress, memory: Memory) -> Iterator[tuple[str, Adapter]]:
    """What each client that took part has: what it is sent, with what it kept."""
    method = job.method
    took_part = {client for record in folder.records() for client in record["returned_ranks"]}
    for state, plan in own_plans(job, progress, [device for c, device in progress.fleet.items() if c in took_part]):
        if method.enter:
            kept = memory.read(plan.client, before=(state.round + 1, 0))
            yield plan.client, method.enter(method.dispatch(state, plan), kept)
        else:
            yield plan.client, applied(method, state, plan)


def own_plans(job: Job, progress: Progress, devices: Sequence[Device]) -> Iterator[tuple[State, Plan]]:
    """The state that each client has or is sent at the end of a run, and what it would be asked to do with it."""
    own = [(progress.peers[device.client], [device]) for device in devices] if progress.peers else []
    for state, some in own or [(progress.state, devices)]:
        for plan in job.method.assign(state, some):
            yield state, plan


def _save(folder: RunFolder, out: Path, adapter: Adapter, base: Pretrained, *, scored: str | None = "all") -> None:
    """Write an adapter beside its place and move it there whole, so that a folder with this name is never half written.

    Args:
        folder: of the run that it is from.
        out: its place.
        adapter: what is written.
        base: whose adapter it is.
        scored: `all` for the global adapter, or the rank class whose score is this adapter's; None if it has none.
    """
    info = folder.info
    scale = info["recipe"]["lora"]["scale"]
    adapter = hf.factored(adapter, scale=scale)
    experts = _experts(folder)
    further = {"experts": experts} if experts else {"patches": info["patches"], "task_type": info["task_type"]}
    write = partial(hf.write_mixture if experts else hf.write_adapter, **further)
    about = {
        "base": base.name,
        "base_hash": info["base_hash"],
        "arguments": info["model_arguments"],
        "auto_class": info["auto_class"],
        "files": {},
        "form": info["form"],
        "label_names": info["data"]["label_names"],
        "layers": list(adapter.layers),
        "modules_to_save": info["modules_to_save"],
        "metric": info["metric"],
        "model": info["recipe"]["model"],
        "problem": info["recipe"]["problem"],
        "scale": scale,
        "seed": info["recipe"]["seed"],
    }
    with replaced(out) as temporary:
        write(
            temporary,
            adapter,
            scale=scale,
            base=base,
            modules_to_save=info["modules_to_save"],
            label_names=info["data"]["label_names"],
            card=_card(folder, adapter, scored),
        )
        about["files"] = {file.name: _sha256(file) for file in temporary.iterdir() if file.name not in _FOR_PEOPLE}
        (temporary / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_card(folder: RunFolder) -> None:
    """Write the global adapter's model card anew, with the baselines that were compared in the meantime."""
    place = folder.path / "adapter"
    if place.is_dir() and not _experts(folder):
        adapter = hf.read_adapter(place, scale=folder.info["recipe"]["lora"]["scale"])
        replace_file(place / "README.md", _card(folder, adapter, "all").encode())


def _card(folder: RunFolder, adapter: Adapter, scored: str | None) -> str:
    info, records = folder.info, folder.records()
    if not records:
        raise RecordError(f"{folder.path / 'rounds.jsonl'} holds no round; the folder was changed. Start a new run.")
    last = records[-1]
    recipe, names = info["recipe"], info["data"]["label_names"]
    if scored not in (None, "all"):
        score = (last["class_scores"] or {}).get(scored)
        last = None if score is None else {"round": last["round"], "score": score}
    reached = {
        path.parent.name: RunFolder.open(path.parent).records()
        for path in sorted(folder.path.glob("compare/*/run.json"))
    }
    return model_card(
        info,
        last if scored else None,
        rank=max(adapter.ranks.values()),
        licence=_licence(recipe["model"]["name"]),
        method=None if info["method"] == "centralised" else describe(info["method"]),
        auto_class=info["auto_class"],
        num_labels=1 if recipe["problem"]["name"] == "regression" else len(names) or None,
        dataset=_on_the_hub(recipe["data"]["source"]),
        compared={name: r[-1]["score"] for name, r in reached.items() if r and r[-1]["score"] is not None},
        experts=_experts(folder),
    )


def _licence(base: str | None) -> str | None:
    """The base model's licence, where the model is still to be had."""
    try:
        return licence_of(resolve(base).location) if base else None
    except ConfigError:
        return None


def _on_the_hub(source: str | None) -> str | None:
    """The name of a data set on the hub; None if examples are from elsewhere."""
    if source is None or source == stdlib_docs.NAME or expanded(source, key="data.source").exists():
        return None
    return source.partition(":")[0]


def _experts(folder: RunFolder) -> list[str]:
    """The finished adapters that a run mixes, if it does."""
    return folder.info["recipe"]["local"].get("experts", [])


def export(source: Path, rank: int, out: Path) -> Adapter:
    """Write the best approximation at one rank of a finished run's global adapter, as a PEFT directory.

    Args:
        source: a finished run folder.
        rank: from 1 to the run's own rank.
        out: a folder that does not exist or is empty.

    Raises:
        RecordError: the run is not finished, has no global adapter or a mixture, or `out` is occupied.
        ConfigError: a rank out of range.
    """
    folder, out = RunFolder.open(source), out.resolve()
    RunFolder.check_free(out)
    if not (source / "adapter").is_dir() and (source / "clients").is_dir():
        raise RecordError(f"{source} has no global adapter: each client keeps its own, see {source / 'clients'}.")
    if not (source / "adapter").is_dir():
        raise RecordError(f"{source} has no adapter yet: finish it with `anyrank run --resume {source}`.")
    if _experts(folder):
        raise RecordError(
            f"{source} holds a mixture of adapters, which has no rank to be cut to; see {source / 'adapter'}."
        )
    adapter = hf.read_adapter(source / "adapter", scale=read_about(source / "adapter")["scale"])
    largest = max(adapter.ranks.values())
    if not 1 <= rank <= largest:
        raise ConfigError(f"--rank {rank}: expected a rank from 1 to {largest}, the rank of the run's adapter.")
    layers = {
        name: lowrank.svd(part, rank, generator(folder.info["recipe"]["seed"], "export", name))
        for name, part in adapter.layers.items()
    }
    small = Adapter(layers, adapter.dense)
    scored = "all" if rank == largest else None  # below, it was never scored
    _save(folder, out, small, Pretrained(folder.info["base"], folder.info["base"]), scored=scored)
    return small
