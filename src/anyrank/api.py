"""What anyrank can do with a recipe: play it, continue a run of it, look at it beforehand.

The engine plays the rounds; this file keeps what happens in the run folder.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anyrank import config
from anyrank.adapter import Adapter
from anyrank.clock import Clock
from anyrank.compute import devices, reproducible
from anyrank.config import Recipe
from anyrank.device import compute_seconds, memory_bytes, undisturbed
from anyrank.engine import Evaluation, Federation, Progress, begin, rounds
from anyrank.errors import ConfigError, RecordError, RoundFailed
from anyrank.federation import Device, Failure, Plan, Update, make_task
from anyrank.job import CHOICES, Job, Simulation, check_handed_over, learner, load_recipe, prepare, with_baseline
from anyrank.memory import Memory
from anyrank.prefix import Prefix, possible
from anyrank.probe import as_toml
from anyrank.probe import probe as measure
from anyrank.problem import Problem
from anyrank.record import RunFolder
from anyrank.results import save_results, write_card
from anyrank.trackers import Trackers
from anyrank.train import Score, evaluate
from anyrank.transport import FlowerSimulation, InProcess, Transport, Workers
from anyrank.wire import bytes_down, nbytes

__all__ = [
    "Demand",
    "Observer",
    "check",
    "described",
    "description",
    "in_process",
    "load_recipe",
    "play_rounds",
    "probe",
    "resume",
    "run",
]

_ENGINES = ("local", "flower-sim")
_VERSIONED = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors", "tokenizers")
_EXTENSIBLE = (
    "rounds",
    "evaluate.target",
    "evaluate.stop_at_target",
    "compute.threads",
    "compute.workers",
    "compute.cohort",
    "track",
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

    def ended(self, *, complete: bool) -> None:
        """A run (or a compared baseline) is over, or stopped before its end."""


class _Tracked(Observer):
    """An observer, and the recipe's trackers beside it."""

    def __init__(self, observer: Observer, names: Sequence[str]):
        self._all = (observer, Trackers(names, noticed=observer.noticed))

    def started(self, job: Job, folder: RunFolder, progress: Progress) -> None:
        for each in self._all:
            each.started(job, folder, progress)

    def noticed(self, remark: str) -> None:
        for each in self._all:
            each.noticed(remark)

    def replied(self, reply: Update | Failure) -> None:
        for each in self._all:
            each.replied(reply)

    def finished_round(self, record: Mapping[str, Any]) -> None:
        for each in self._all:
            each.finished_round(record)

    def ended(self, *, complete: bool) -> None:
        for each in self._all:
            each.ended(complete=complete)


# --- playing ------------------------------------------------------------------------------------------------------


def run(
    recipe: Recipe,
    out: Path,
    *,
    problem: Problem | None = None,
    observer: Observer | None = None,
    command: str = "",
    engine: str = "local",
) -> RunFolder:
    """Play a recipe into a new run folder, and the baselines it compares with after it.

    Args:
        recipe: what `load_recipe` returns.
        out: a folder that does not exist or is empty.
        problem: model, examples, loss and metrics, for a recipe with `problem.name = "own"`.
        observer: is told what happens.
        command: how the run was started, for the record.
        engine: who does the clients' work: `local`, processes of this machine, or `flower-sim`, Flower's simulation engine.

    Raises:
        ConfigError: the recipe does not fit its data or model, or the engine cannot be used.
        RecordError: `out` is occupied.
        RoundFailed: a round without a valid update; the checkpoint before it is kept.
    """
    _check_engine(engine, problem)
    RunFolder.check_free(out)
    observer = _Tracked(observer or Observer(), recipe.track)
    job = prepare(recipe, problem)
    folder = RunFolder.create(out, _info(job, command))
    _play(job, folder, observer, engine)
    _compare(job, folder, observer, engine)
    return folder


def resume(
    out: Path,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    problem: Problem | None = None,
    observer: Observer | None = None,
    engine: str = "local",
) -> RunFolder:
    """Continue a run from its last checkpoint, to the same bytes as if it had never stopped.

    Args:
        out: the run folder.
        overrides: more `rounds`, or a target; nothing else may change.
        problem: the one that the run was started with, if it was given one.
        observer: is told what happens.
        engine: see `run`; it need not be the one that the run was started with.

    Raises:
        RecordError: no run there, or its data, fleet or format is not what it was.
        ConfigError: an override that would make it another run, or an engine that cannot be used.
    """
    _check_engine(engine, problem)
    folder = RunFolder.open(out)
    values = overrides if isinstance(overrides, Mapping) else config.parse_overrides(overrides)
    recipe = _extended(folder, values)
    observer = _Tracked(observer or Observer(), recipe.track)
    job = prepare(recipe, problem)
    _check_same(job, folder)
    now, then = _versions(), folder.info["versions"]
    if changed := [
        f"{name} {then.get(name)} is now {version}" for name, version in now.items() if version != then.get(name)
    ]:
        observer.noticed(f"{', '.join(changed)}: the result may differ in its last digits from that of an unbroken run")
    folder.update_info(recipe=recipe.model_dump(mode="json"), rounds=job.cohort.rounds)
    _play(job, folder, observer, engine)
    _compare(job, folder, observer, engine)
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


def _check_same(job: Simulation, folder: RunFolder) -> None:
    base, then, now = folder.info["base_hash"], folder.info["data"]["fingerprint"], job.problem.fingerprint
    if base != job.outline.base_hash:
        raise RecordError(
            f"{folder.path} was started on another base model: SHA-256 {base[:12]}, now {job.outline.base_hash[:12]}. "
            f"Bring {folder.info['base']} back as it was, or start a new run."
        )
    if then != now:
        raise RecordError(
            f"{folder.path} was started on other data, or with another tokenizer or chat template: fingerprint {then[:12]}, "
            f"now {now[:12]}. Bring them back as they were, or start a new run."
        )
    if folder.info["fleet"] != described(job.cohort.fleet):
        raise RecordError(f"{folder.path}: the fleet is not the one the run was started with.")


def _check_engine(engine: str, problem: Problem | None) -> None:
    if engine not in _ENGINES:
        raise ConfigError(f"engine: expected one of {', '.join(_ENGINES)}, got {engine!r}.")
    if engine == "flower-sim" and problem is not None:
        raise ConfigError(
            "engine: flower-sim makes the problem from the recipe again in every actor, and one that is handed over is in this "
            "process alone; leave the engine out."
        )
    if engine == "flower-sim" and not all(importlib.util.find_spec(name) for name in ("flwr", "ray")):
        raise ConfigError(
            "engine: flower-sim needs Flower and Ray; install them with `pip install 'anyrank[flower-sim]'`."
        )


def _play(job: Simulation, folder: RunFolder, observer: Observer, engine: str) -> None:
    try:
        _play_rounds(job, folder, observer, engine)
    except BaseException:
        observer.ended(complete=False)
        raise
    observer.ended(complete=True)


def _play_rounds(job: Simulation, folder: RunFolder, observer: Observer, engine: str) -> None:
    with reproducible(job.recipe.compute.threads or 1), _transport(job, folder, observer, engine) as transport:
        play_rounds(job, folder, _federation(job, folder, transport, observer), observer, memory=_memory(folder))


def play_rounds(
    job: Job, folder: RunFolder, federation: Federation, observer: Observer, *, memory: Memory | None = None
) -> Progress:
    """Play the rounds that are left of a run, and write what comes out of it.

    Args:
        job: what is run.
        folder: where it is kept; rounds that are in it are played already.
        federation: how it is run.
        observer: is told what happens.
        memory: what clients keep for themselves, where that is here.

    Returns:
        where the run stands at its end.

    Raises:
        RoundFailed: a round without a valid update; the checkpoint before it is kept.
    """
    progress = folder.load(job.spec, job.cohort.fleet, target=job.recipe.evaluate.target)
    progress = progress or begin(federation, job.method.init(job.spec), job.cohort.fleet)
    observer.started(job, folder, progress)
    if progress.state.round < job.cohort.rounds:
        for result in ("adapter", "classes", "clients"):  # of a run that is extended: old as soon as it goes on
            shutil.rmtree(folder.path / result, ignore_errors=True)
    began = time.perf_counter()
    for progress in rounds(federation, progress):  # noqa: B020 - the last one is the result
        seconds = time.perf_counter() - began
        folder.save(progress, real_seconds=seconds)
        observer.finished_round({**progress.record, "real_seconds": seconds})
        began = time.perf_counter()
    save_results(job, folder, progress, memory=memory)
    return progress


def _memory(folder: RunFolder) -> Memory:
    return Memory(folder.path / "memory")


@contextlib.contextmanager
def _transport(job: Simulation, folder: RunFolder, observer: Observer, engine: str) -> Iterator[Transport]:
    """The clients: in this process, in others that are forked from it before its model goes to a GPU, or in Ray's actors."""
    compute, where = job.recipe.compute, devices()
    local = engine == "local"
    inner = in_process(job, _memory(folder), _prefix(job, folder, observer) if local else None)
    count = min(compute.workers or 1, job.cohort.per_round)
    if local and count > 1 and torch.cuda.is_initialized():
        observer.noticed("one process does all the work: this one has used a GPU, and cannot fork others that do")
        count = 1
    threads = max(1, (compute.threads or 1) // count)
    with contextlib.ExitStack() as stack:
        transport = inner
        if not local:
            setup = _setup(job, threads)
            transport = stack.enter_context(FlowerSimulation(inner, setup, count=count, threads=threads))
        elif count > 1:
            transport = stack.enter_context(Workers(inner, count=count, threads=threads, devices=where))
        job.model.to(where[0])
        yield transport


def in_process(job: Simulation, memory: Memory, prefix: Prefix | None = None) -> InProcess:
    """The clients of a run, in this process.

    Args:
        job: what is run.
        memory: what clients keep between rounds.
        prefix: what is kept of passes through blocks that nobody trains, if anything.
    """
    return InProcess(
        model=job.model,
        method=job.method,
        training=job.training,
        data=job.problem.train,
        shards=job.cohort.shards,
        test=job.problem.test,
        held_out=job.recipe.data.held_out,
        seed=job.recipe.seed,
        memory=memory,
        cohort=job.recipe.compute.cohort or 1,
        prefix=prefix,
    )


def _setup(job: Simulation, threads: int) -> dict[str, Any]:
    """From what an actor makes the clients, see `flower/actor.py`."""
    compute = job.recipe.compute.model_copy(update={"workers": 1, "threads": threads})
    return {
        "recipe": job.recipe.model_copy(update={"compute": compute}).model_dump(mode="json"),
        "found": {"model.name": job.outline.base_hash, "data.source": job.problem.fingerprint},
        "folder": str(Path.cwd()),
    }


def _prefix(job: Simulation, folder: RunFolder, observer: Observer) -> Prefix | None:
    """What clients keep of passes through blocks in which they apply nothing, where there can be such blocks."""
    compute, on_cpu = job.recipe.compute, devices()[0].type == "cpu"
    chosen = (
        (compute.memory_gb or 0) / 4 if on_cpu else 0
    )  # a GPU may pass a small block sooner than it is sent its states
    in_memory = int(1e9 * (chosen if compute.prefix_cache_gb is None else compute.prefix_cache_gb))
    if not in_memory or job.problem.lengths is None or not possible(job.method, job.spec.layers):
        return None
    prefix = Prefix.of(
        job.model,
        job.training,
        layers=job.spec.layers,
        data=job.problem.train,
        lengths=job.problem.lengths,
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


def _federation(job: Simulation, folder: RunFolder, transport: Transport, observer: Observer) -> Federation:
    recipe = job.recipe
    return Federation(
        method=job.method,
        topology=job.topology,
        transport=transport,
        clock=_clock(recipe),
        score=partial(_score, job),
        metric=job.problem.objective.metric,
        per_round=job.cohort.per_round,
        rounds=job.cohort.rounds,
        quorum=min(recipe.server.quorum, job.cohort.per_round),  # the centralised baseline has one client
        norm_limit=recipe.server.norm_limit,
        evaluation=Evaluation(**recipe.evaluate.model_dump()),
        seed=recipe.seed,
        notify=observer.replied,
        disk=folder.path,
    )


def _score(job: Simulation, adapter: Adapter, at_end: bool) -> Score:
    """How an adapter does on the server's test set."""
    score = evaluate(job.model, adapter, job.problem.test, training=job.training)
    return replace(score, metrics={**score.metrics, **job.problem.at_end(job.model)}) if at_end else score


def _clock(recipe: Recipe) -> Clock:
    # The device of the centralised baseline stands for a data centre: it is never late and never drops out.
    troubles = {} if recipe.baseline == "centralised" else dict(recipe.clock)
    return Clock(**troubles, seed=recipe.seed)


def _compare(job: Simulation, folder: RunFolder, observer: Observer, engine: str) -> None:
    """Play the baselines that the recipe compares with, each in a run folder of its own; a baseline is not compared."""
    if job.recipe.baseline:
        return
    examples = sum(record["examples"] for record in folder.records())
    for name in job.recipe.compare:
        out = folder.path / "compare" / name
        baseline = with_baseline(job, name, examples)
        try:
            nested = _nested(out, baseline) or RunFolder.create(out, _info(baseline, ""))
            _play(baseline, nested, observer, engine)
        except RoundFailed as error:  # the run itself is done, and the other baselines can be
            observer.noticed(f"the baseline {name} is not compared: {error}")
    if job.recipe.compare:
        write_card(folder)


def _nested(out: Path, job: Simulation) -> RunFolder | None:
    """The baseline's run folder, if it was begun; one from before the run was extended is removed."""
    if (out / "run.json").exists():
        folder = RunFolder.open(out)
        if folder.info["recipe"] == job.recipe.model_dump(mode="json"):
            return folder
    shutil.rmtree(out, ignore_errors=True)
    return None


# --- what is written down -----------------------------------------------------------------------------------------


def _info(job: Simulation, command: str) -> dict[str, Any]:
    problem = job.problem
    size = {"train": len(problem.train), "test": len(problem.test)}
    references = {"before training": _before(job), **problem.references}
    return description(job, command, data={"fingerprint": problem.fingerprint, **size}, references=references)


def description(job: Job, command: str, *, data: Mapping[str, Any], references: Mapping[str, float]) -> dict[str, Any]:
    """What `run.json` says of a run.

    Args:
        job: what is run.
        command: how it was started.
        data: fingerprint and numbers of examples.
        references: what a run is compared with, by what it is called.
    """
    outline = job.outline
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
        "base": outline.base,
        "base_hash": outline.base_hash,
        "data": {**data, "label_names": outline.label_names},
        "metric": {"name": outline.metric, "higher_is_better": outline.higher_is_better},
        "references": dict(references),
        "remarks": job.remarks,
        "fleet": described(job.cohort.fleet),
        "modules_to_save": outline.modules_to_save,
        "patches": outline.patches,
        "task_type": outline.task_type,
        "auto_class": outline.auto_class,
        "model_arguments": outline.model_arguments,
        "form": outline.form,
    }


def _before(job: Simulation) -> float:
    """What the model reaches that training starts from."""
    with reproducible(job.recipe.compute.threads or 1):
        return _score(job, job.spec.start, False).metrics[job.problem.objective.metric.name]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _VERSIONED}


def described(fleet: Mapping[str, Device]) -> dict[str, Any]:
    """The fleet as `run.json` has it."""
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


# --- looking before -------------------------------------------------------------------------------------


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


def check(recipe: Recipe, problem: Problem | None = None) -> tuple[list[Demand], list[str]]:
    """What a recipe would ask of each device class, and remarks, without training.

    Args:
        recipe: what `load_recipe` returns.
        problem: for a recipe with `problem.name = "own"`.

    Raises:
        ConfigError: whatever would stop the run.
    """
    Trackers(recipe.track, noticed=print)  # whether what they need is installed
    job = prepare(recipe, problem)
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


def probe(recipe: Recipe, name: str, problem: Problem | None = None) -> str:
    """Measure this machine with a recipe's model: a table for `[devices]`, as TOML.

    Args:
        recipe: names model, data and batch size.
        name: what the device is to be called.
        problem: for a recipe with `problem.name = "own"`.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    check_handed_over(recipe, problem)
    loaded = learner(recipe, problem)
    model, loss = loaded.model, loaded.training.objective.loss
    model.to(devices()[0])
    found = measure(
        model.model,
        lambda batch: loss(model.logits(batch), batch).sum(),
        batch=loaded.batch,
        train=model.rehearse,
        depths=model.depths,
        cost=model.cost(loaded.batch, loss),
    )
    return as_toml(name, found)
