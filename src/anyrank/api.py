"""What anyrank can do: play a recipe, continue a run, look at a recipe beforehand, export from a run afterwards.

The engine plays the rounds; this file keeps what happens in the run folder.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyrank import config, data, hf, lowrank
from anyrank.adapter import Adapter
from anyrank.clock import Clock
from anyrank.compute import devices
from anyrank.config import Recipe
from anyrank.device import compute_seconds, memory_bytes, undisturbed
from anyrank.engine import Evaluation, Federation, Progress, begin, rounds
from anyrank.errors import ConfigError, RecordError, RoundFailed
from anyrank.federation import Device, Failure, Plan, Update, make_task
from anyrank.job import CHOICES, Job, load_recipe, prepare, with_baseline
from anyrank.memory import Memory, folder_name
from anyrank.prefix import Prefix, possible
from anyrank.pretrained import Pretrained
from anyrank.record import RunFolder
from anyrank.seeding import generator
from anyrank.train import evaluate
from anyrank.transport import InProcess, Transport, Workers
from anyrank.wire import bytes_down, nbytes

__all__ = ["Demand", "Observer", "check", "export", "load_recipe", "resume", "run"]

_VERSIONED = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors", "tokenizers")
_EXTENSIBLE = (
    "rounds",
    "evaluate.target",
    "evaluate.stop_at_target",
    "compute.threads",
    "compute.workers",
    "compute.cohort",
)


class Observer:
    """What a run tells whoever watches. Does nothing by itself; replace the methods of interest."""

    def started(self, job: Job, folder: RunFolder, progress: Progress) -> None:
        """A run (or a compared baseline) begins or continues."""

    def noticed(self, remark: str) -> None:
        """Something is allowed, but worth knowing."""

    def replied(self, reply: Update | Failure) -> None:
        """A client of the running round replied."""

    def finished_round(self, record: Mapping[str, Any]) -> None:
        """A round is over and on disk."""


# --- playing ------------------------------------------------------------------------------------------------------


def run(recipe: Recipe, out: Path, *, observer: Observer | None = None, command: str = "") -> RunFolder:
    """Play a recipe into a new run folder, and the baselines it compares with after it.

    Args:
        recipe: what `load_recipe` returns.
        out: a folder that does not exist or is empty.
        observer: is told what happens.
        command: how the run was started, for the record.

    Raises:
        ConfigError: the recipe does not fit its data or model.
        RecordError: `out` is occupied.
        RoundFailed: a round without a valid update; the checkpoint before it is kept.
    """
    RunFolder.check_free(out)
    job = prepare(recipe)
    folder = RunFolder.create(out, _info(job, command))
    _play(job, folder, observer or Observer())
    _compare(job, folder, observer or Observer())
    return folder


def resume(
    out: Path, *, overrides: Sequence[str] | Mapping[str, Any] = (), observer: Observer | None = None
) -> RunFolder:
    """Continue a run from its last checkpoint, to the same bytes as if it had never stopped.

    Args:
        out: the run folder.
        overrides: more `rounds`, or a target; nothing else may change.
        observer: is told what happens.

    Raises:
        RecordError: no run there, or its data, fleet or format is not what it was.
        ConfigError: an override that would make it another run.
    """
    folder = RunFolder.open(out)
    values = overrides if isinstance(overrides, Mapping) else config.parse_overrides(overrides)
    recipe = _extended(folder, values)
    job = prepare(recipe)
    _check_same(job, folder)
    observer = observer or Observer()
    now, then = _versions(), folder.info["versions"]
    if changed := [
        f"{name} {then.get(name)} is now {version}" for name, version in now.items() if version != then.get(name)
    ]:
        observer.noticed(f"{', '.join(changed)}: the result may differ in its last digits from that of an unbroken run")
    folder.update_info(recipe=recipe.model_dump(mode="json"), rounds=job.cohort.rounds)
    _play(job, folder, observer)
    _compare(job, folder, observer)
    return folder


def _extended(folder: RunFolder, overrides: Mapping[str, Any]) -> Recipe:
    refused = [key for key in overrides if key not in _EXTENSIBLE]
    if refused:
        raise ConfigError(
            f"--set {', '.join(refused)}: a run that is resumed may change only {', '.join(_EXTENSIBLE)}. "
            "Start a new run for anything else."
        )
    recipe = config.resolve(folder.info["recipe"], overrides, CHOICES)
    if recipe.baseline == "centralised" and "rounds" in overrides:
        raise ConfigError("--set rounds: a centralised run has one round; start a new one with other rounds.")
    planned = folder.info["recipe"]["rounds"]
    if recipe.rounds < planned:
        raise ConfigError(f"--set rounds={recipe.rounds}: {folder.path} has {planned} rounds; a run can only grow.")
    return recipe


def _check_same(job: Job, folder: RunFolder) -> None:
    then, now = folder.info["data"]["fingerprint"], job.examples.fingerprint
    if then != now:
        raise RecordError(
            f"{folder.path} was started on other data: fingerprint {then[:12]}, now {now[:12]}. "
            "Bring the data back as it was, or start a new run."
        )
    if folder.info["fleet"] != _described(job.cohort.fleet):
        raise RecordError(f"{folder.path}: the fleet is not the one the run was started with.")


def _play(job: Job, folder: RunFolder, observer: Observer) -> None:
    progress = folder.load(job.spec, job.cohort.fleet, target=job.recipe.evaluate.target)
    with _reproducible(job.recipe.compute.threads or 1), _transport(job, folder, observer) as transport:
        federation = _federation(job, folder, transport, observer)
        progress = progress or begin(federation, job.method.init(job.spec), job.cohort.fleet)
        observer.started(job, folder, progress)
        if progress.state.round < job.cohort.rounds:
            for result in ("adapter", "clients"):  # of a run that is extended: old as soon as it goes on
                shutil.rmtree(folder.path / result, ignore_errors=True)
        began = time.perf_counter()
        for progress in rounds(federation, progress):  # noqa: B020 - the last one is the result
            folder.save(progress, real_seconds=time.perf_counter() - began)
            observer.finished_round(progress.record)
            began = time.perf_counter()
    _save_adapters(job, folder, progress)


@contextlib.contextmanager
def _transport(job: Job, folder: RunFolder, observer: Observer) -> Iterator[Transport]:
    """The clients: in this process, or in others that are forked from it before its model goes to a GPU."""
    compute, where = job.recipe.compute, devices()
    inner = InProcess(
        model=job.model,
        method=job.method,
        training=job.training,
        data=job.encoded,
        shards=job.cohort.shards,
        test=job.test,
        held_out=job.recipe.data.held_out,
        seed=job.recipe.seed,
        memory=Memory(folder.path / "memory"),
        cohort=compute.cohort or 1,
        prefix=_prefix(job, folder, observer),
    )
    count = min(compute.workers or 1, job.cohort.per_round)
    if count > 1 and torch.cuda.is_initialized():
        observer.noticed("one process does all the work: this one has used a GPU, and cannot fork others that do")
        count = 1
    with contextlib.ExitStack() as stack:
        transport = inner
        if count > 1:
            threads = max(1, (compute.threads or 1) // count)
            transport = stack.enter_context(Workers(inner, count=count, threads=threads, devices=where))
        job.model.to(where[0])
        yield transport


def _prefix(job: Job, folder: RunFolder, observer: Observer) -> Prefix | None:
    """What clients keep of passes through blocks in which they apply nothing, where there can be such blocks."""
    compute, on_cpu = job.recipe.compute, devices()[0].type == "cpu"
    chosen = (
        (compute.memory_gb or 0) / 4 if on_cpu else 0
    )  # a GPU may pass a small block sooner than it is sent its states
    in_memory = int(1e9 * (chosen if compute.prefix_cache_gb is None else compute.prefix_cache_gb))
    if not in_memory or not possible(job.method, job.spec.layers):
        return None
    prefix = Prefix.of(
        job.model,
        job.training,
        layers=job.spec.layers,
        data=job.encoded,
        lengths=np.asarray(job.encoded["length"]),
        shards=job.cohort.shards,
        per_round=job.cohort.per_round,
        in_memory=in_memory,
        folder=folder.path,
    )
    if prefix is None:
        observer.noticed(
            "what is below the adapters is computed at every step: passes of this model cannot begin at a block, or "
            "lora.modules_to_save trains something that comes before its blocks"
        )
    return prefix


def _federation(job: Job, folder: RunFolder, transport: Transport, observer: Observer) -> Federation:
    recipe = job.recipe
    return Federation(
        method=job.method,
        topology=job.topology,
        transport=transport,
        clock=_clock(recipe),
        score=lambda adapter: evaluate(job.model, adapter, job.test, training=job.training),
        per_round=job.cohort.per_round,
        rounds=job.cohort.rounds,
        norm_limit=recipe.server.norm_limit,
        evaluation=Evaluation(**recipe.evaluate.model_dump()),
        seed=recipe.seed,
        notify=observer.replied,
        disk=folder.path,
    )


def _clock(recipe: Recipe) -> Clock:
    # The device of the centralised baseline stands for a data centre: it is never late and never drops out.
    troubles = {} if recipe.baseline == "centralised" else dict(recipe.clock)
    return Clock(**troubles, seed=recipe.seed)


@contextlib.contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """Have torch refuse operations whose result can differ from run to run, and sum in so many threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS counts as one of them
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])


def _compare(job: Job, folder: RunFolder, observer: Observer) -> None:
    """Play the baselines that the recipe compares with, each in a run folder of its own; a baseline is not compared."""
    if job.recipe.baseline:
        return
    examples = sum(record["examples"] for record in folder.records())
    for name in job.recipe.compare:
        out = folder.path / "compare" / name
        baseline = with_baseline(job, name, examples)
        try:
            _play(baseline, _nested(out, baseline) or RunFolder.create(out, _info(baseline, "")), observer)
        except RoundFailed as error:  # the run itself is done, and the other baselines can be
            observer.noticed(f"the baseline {name} is not compared: {error}")


def _nested(out: Path, job: Job) -> RunFolder | None:
    """The baseline's run folder, if it was begun; one from before the run was extended is removed."""
    if (out / "run.json").exists():
        folder = RunFolder.open(out)
        if folder.info["recipe"] == job.recipe.model_dump(mode="json"):
            return folder
    shutil.rmtree(out, ignore_errors=True)
    return None


# --- what is written down -----------------------------------------------------------------------------------------


def _info(job: Job, command: str) -> dict[str, Any]:
    return {
        "anyrank": importlib.metadata.version("anyrank"),
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": job.recipe.model_dump(mode="json"),
        "rounds": job.cohort.rounds,
        "method": "centralised" if job.recipe.baseline == "centralised" else job.cohort.method,
        "versions": _versions(),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": job.recipe.compute.threads,
        },
        "commit": _commit(),
        "base": job.base.name,
        "data": {
            "fingerprint": job.examples.fingerprint,
            "train": len(job.examples.train),
            "test": len(job.examples.test),
            "label_names": list(job.examples.label_names),
        },
        "references": {"majority": data.majority(job.examples), "overlap": data.overlap(job.examples)},
        "fleet": _described(job.cohort.fleet),
        "modules_to_save": job.model.modules_to_save,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _VERSIONED}


def _described(fleet: Mapping[str, Device]) -> dict[str, Any]:
    return {c: {"kind": d.kind, "rank": d.rank, "num_examples": d.num_examples} for c, d in fleet.items()}


def _commit() -> str | None:
    """The commit that anyrank itself runs from, `+` after it if files were changed; None for an installed package."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
        tracked = git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        return head + "+" * bool(tracked and git(["git", "status", "--porcelain", "."]).stdout)
    return None


def _save_adapters(job: Job, folder: RunFolder, progress: Progress) -> None:
    spread = job.training.local.spread
    if not job.method.claims.personal:
        reached = folder.records()[-1]["accuracy"]
        _save_adapter(folder, folder.path / "adapter", spread(progress.state.whole), job.base, reached)
        return
    method, memory = job.method, Memory(folder.path / "memory")
    took_part = {client for record in folder.records() for client in record["returned_ranks"]}
    for plan in method.assign(
        progress.state, [progress.fleet[client] for client in progress.fleet if client in took_part]
    ):
        adapter = method.dispatch(progress.state, plan)
        if method.enter:
            adapter = method.enter(adapter, memory.read(plan.client, before=(progress.state.round + 1, 0)))
        _save_adapter(folder, folder.path / "clients" / folder_name(plan.client), spread(adapter), job.base, None)


def _save_adapter(folder: RunFolder, out: Path, adapter: Adapter, base: Pretrained, accuracy: float | None) -> None:
    """Write an adapter beside its place and move it there whole, so that a folder with this name is never half written."""
    scale = folder.info["recipe"]["lora"]["scale"]
    adapter = hf.factored(adapter, scale=scale)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    experts = _experts(folder)
    write = partial(hf.write_mixture, experts=experts) if experts else hf.write_adapter
    write(
        temporary,
        adapter,
        scale=scale,
        base=base,
        modules_to_save=folder.info["modules_to_save"],
        label_names=folder.info["data"]["label_names"],
        card=_card(folder, adapter, base, accuracy),
    )
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)


def _experts(folder: RunFolder) -> list[str]:
    """The finished adapters that a run mixes, if it does."""
    return folder.info["recipe"]["local"].get("experts", [])


def _card(folder: RunFolder, adapter: Adapter, base: Pretrained, accuracy: float | None) -> str:
    """A model card: what it is, how it came about, how to load it."""
    info = folder.info
    labels = info["data"]["label_names"]
    reached = (
        ""
        if accuracy is None
        else f" It reached an accuracy of {accuracy:.4f} on {info['data']['test']} test examples."
    )
    experts = _experts(folder)
    rank = max(adapter.ranks.values())
    title = f"A mixture of {len(experts)} LoRA adapters" if experts else f"A LoRA adapter of rank {rank}"
    return f"""---
base_model: {base.name}
library_name: {"anyrank" if experts else "peft"}
tags: [lora, federated-learning, anyrank]
---

# {title} for {base.name}

Trained by anyrank {info["anyrank"]} with the method `{info["method"]}` over {len(info["fleet"])} clients on
`{info["recipe"]["data"]["source"]}` ({info["data"]["train"]} training examples).{reached}
Labels: {", ".join(f"{i} = {name}" for i, name in enumerate(labels))}.

{_use_of_mixture(experts) if experts else _use_of_adapter(base, len(labels))}
"""


def _use_of_adapter(base: Pretrained, num_labels: int) -> str:
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("{base.name}", num_labels={num_labels})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""


def _use_of_mixture(experts: Sequence[str]) -> str:
    names = "\n".join(f"- `{name}`" for name in experts)
    return f"""This folder holds the gates and the head. The experts are PEFT adapters, looked for where the run found them:

{names}

PEFT has no form for such a mixture; anyrank loads it:

```python
from pathlib import Path

from anyrank.hf import load_mixture

model = load_mixture(Path("path/to/this/folder"))
```"""


# --- looking before and after -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """What a run asks of one device class at one rank, per round and client (the one with the most steps).

    Args:
        kind: device class.
        rank: of its adapters.
        clients: how many such clients there are.
        trainable: parameters trained, the head included.
        memory_bytes: needed, by estimate.
        available_bytes: on the device.
        bytes_down: to the client.
        bytes_up: back.
        steps: local steps.
        seconds: simulated, for computing and both transfers.
    """

    kind: str
    rank: int
    clients: int
    trainable: int
    memory_bytes: int
    available_bytes: float
    bytes_down: int
    bytes_up: int
    steps: int
    seconds: float


def check(recipe: Recipe) -> tuple[list[Demand], list[str]]:
    """What a recipe would ask of each device class, and remarks, without training.

    Raises:
        ConfigError: whatever would stop the run.
    """
    job = prepare(recipe)
    state = job.method.init(job.spec)
    groups: dict[tuple[str, int], list[tuple[Device, Plan]]] = {}
    for plan in job.method.assign(state, list(job.cohort.fleet.values())):
        device = job.cohort.fleet[plan.client]
        groups.setdefault((device.kind, plan.rank), []).append((device, plan))
    demands = []
    for (kind, rank), members in sorted(groups.items(), key=lambda item: item[0][::-1]):
        device, plan = max(members, key=lambda member: member[1].steps)
        task = make_task(job.method, state, plan)
        down, up = bytes_down(task), nbytes(task.start, plan.up)
        times = undisturbed(device.profile, job.spec.cost)
        compute = compute_seconds(plan, times, model=job.spec.cost, layers=job.spec.layers)
        demands.append(
            Demand(
                kind=kind,
                rank=rank,
                clients=len(members),
                trainable=task.start.num_parameters,
                memory_bytes=memory_bytes(
                    plan, model=job.spec.cost, layers=job.spec.layers, dense_parameters=job.dense_parameters
                ),
                available_bytes=float(device.profile.memory_bytes),
                bytes_down=down,
                bytes_up=up,
                steps=plan.steps,
                seconds=compute + down / device.profile.down_bps + up / device.profile.up_bps,
            )
        )
    return demands, job.remarks


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
    if (source / "clients").is_dir():
        raise RecordError(f"{source} has no global adapter: each client keeps its own, see {source / 'clients'}.")
    if not (source / "adapter").is_dir():
        raise RecordError(f"{source} has no adapter yet: finish it with `anyrank run --resume {source}`.")
    if _experts(folder):
        raise RecordError(
            f"{source} holds a mixture of adapters, which has no rank to be cut to; see {source / 'adapter'}."
        )
    adapter = hf.read_adapter(source / "adapter", scale=folder.info["recipe"]["lora"]["scale"])
    largest = max(adapter.ranks.values())
    if not 1 <= rank <= largest:
        raise ConfigError(f"--rank {rank}: expected a rank from 1 to {largest}, the rank of the run's adapter.")
    layers = {
        name: lowrank.svd(part, rank, generator(folder.info["recipe"]["seed"], "export", name))
        for name, part in adapter.layers.items()
    }
    small = Adapter(layers, adapter.dense)
    reached = folder.records()[-1]["accuracy"] if rank == largest else None  # below, it was never scored
    _save_adapter(folder, out, small, Pretrained(folder.info["base"], folder.info["base"]), reached)
    return small
