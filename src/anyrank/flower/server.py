"""The server's half of a run on several machines: it meets clients, sends them tasks, and waits for their updates.

It needs neither model nor data: what is learned the clients say when they agree, and they have to say the same. Who says
something else is left out, by name and with what differs.
"""

import hashlib
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from anyrank.adapter import Adapter
from anyrank.api import Observer, described, description, play_rounds
from anyrank.baselines import Cohort
from anyrank.clock import Clock
from anyrank.compute import devices, reproducible
from anyrank.config import Recipe
from anyrank.engine import Evaluation, Federation, Scorer
from anyrank.errors import ConfigError, RecordError, TransportError
from anyrank.federation import Device, Failure, Layer, ModelCost, Profile, Spec, Task, Update
from anyrank.flower.letter import Letter
from anyrank.job import Job, Outline, learner, local_of, method_of, problem_of, profiles, ranked, steps_of, topology_of
from anyrank.messages import Compression, pack_task, unpack_update
from anyrank.problem import Answers, Metric
from anyrank.record import RunFolder
from anyrank.train import Score, evaluate
from anyrank.wire import decode, encode

__all__ = ["Clients", "Post", "play"]

_GARBAGE = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RecordError,
)  # what an answer of foreign origin can set off
_PAUSE = 0.1  # seconds between looks at what has come


@runtime_checkable
class Post(Protocol):
    """Carries letters to clients' machines, which have numbers, and answers back."""

    def nodes(self) -> Collection[int]:
        """Who is connected now."""
        ...

    def send(self, letters: Mapping[int, Letter]) -> Mapping[str, int]:
        """Send a letter to each node; under which number of its own each is answered."""
        ...

    def collect(self, numbers: Collection[str]) -> Mapping[str, Letter]:
        """The answers that have come to letters of these numbers; each is handed over once."""
        ...


@dataclass(frozen=True)
class _Known:
    """What is agreed on, once the first clients have said what they have."""

    label_names: list[str]
    outline: Outline
    spec: Spec
    digest: str


class Clients:
    """A transport whose clients are on machines of their own.

    Args:
        post: how letters reach them.
        recipe: of the run.
        run: the run's name, under which clients keep what belongs to it.
        compression: of what travels.
        deadline: seconds after which a round, or a question, is over for whoever has not answered.
        noticed: is told what is worth knowing.
    """

    def __init__(
        self,
        post: Post,
        recipe: Recipe,
        *,
        run: str,
        compression: Compression = "none",
        deadline: float | None = None,
        noticed: Callable[[str], None] = lambda remark: None,
    ):
        """Nobody is asked anything yet."""
        self.post, self.recipe, self.run_name = post, recipe, run
        self.compression: Compression = compression
        self.deadline, self.noticed = deadline, noticed
        self.node_of: dict[str, int] = {}
        self._refused: set[int] = set()
        self._hello: dict[int, Mapping[str, Any]] = {}
        self._smaller: dict[str, int] = {}
        self._folds: dict[str, int] = {}
        self._known: _Known | None = None
        self._levels: tuple[int, ...] = ()
        self.down = self.up = 0

    # --- meeting --------------------------------------------------------------------------------------------------

    def gather(
        self, count: int, *, known: Mapping[str, Device], levels: tuple[int, ...], patience: float
    ) -> tuple[Outline, Spec, dict[str, Device]]:
        """Wait until so many clients agree, and say what they agree on and who they are.

        Args:
            count: of clients.
            known: devices from before the server was started anew.
            levels: the run's ranks from then; none takes those of the clients that come.
            patience: seconds to wait.

        Raises:
            TransportError: they are not there in time.
        """
        until = time.monotonic() + patience
        told, here = -1, dict[str, Device]()
        while True:
            agreed, met = self._meet()
            here |= met
            if agreed and len(here) >= count:
                self._levels = levels
                fleet = {**known, **self._ranked(here, known, agreed.spec)}
                self._levels = levels or tuple(sorted({device.rank for device in fleet.values()}))
                return agreed.outline, replace(agreed.spec, levels=self._levels), dict(sorted(fleet.items()))
            if len(here) != told:
                told = len(here)
                self.noticed(f"waiting for clients: {told} of {count} are here")
            if time.monotonic() > until:
                raise TransportError(
                    f"{len(here)} of {count} clients came within {patience:g} s. Start the others, or lower fleet.per_round."
                )
            time.sleep(_PAUSE)

    def meet(self, fleet: Mapping[str, Device]) -> tuple[dict[str, Device], list[str]]:
        """Before a round: the fleet with those who are new or came back otherwise, and who of it is here now."""
        known, met = self._meet()
        fleet = {**fleet, **self._ranked(met, fleet, known.spec)} if known and met else dict(fleet)
        for client, number in self._folds.items():  # of who was greeted since: it may have lost them, or come back
            if client in fleet:
                fleet[client] = replace(fleet[client], folds=number)
        self._folds = {}
        for client, rank in self._smaller.items():
            self.noticed(f"{client} could not hold its work; from now on its rank is {rank}")
            fleet[client] = replace(fleet[client], rank=rank)
        self._smaller = {}
        here = set(self.post.nodes())
        return fleet, [client for client in fleet if self.node_of.get(client) in here]

    def _meet(self) -> tuple[_Known | None, dict[str, Device]]:
        """Greet nodes that were not here before; what is agreed on, and the devices that were met."""
        here = set(self.post.nodes())
        for node in [*self._hello]:
            if node not in here:  # it is greeted again when it comes back: its profile may be another one
                del self._hello[node]
        self._refused &= here
        new = sorted(here - self._hello.keys() - self._refused)
        hello = {"ask": "hello", "recipe": self.recipe.model_dump(mode="json"), "compression": self.compression}
        for node, answer in self._ask({node: Letter(hello | {"run": self.run_name}) for node in new}).items():
            try:
                self._greet(node, answer.values, here)
            except _GARBAGE as error:
                self._refuse(node, f"on node {node}", f"its answer cannot be read ({error!r})")
        return self._agree()

    def _greet(self, node: int, said: Mapping[str, Any], here: Collection[int]) -> None:
        if "error" in said:
            self._refuse(node, str(said.get("client", node)), str(said["error"]))
            return
        name, ours = str(said["client"]), importlib.metadata.version("anyrank")
        if said["anyrank"] != ours:
            self._refuse(node, name, f"it has anyrank {said['anyrank']}, the server {ours}")
        elif self.node_of.get(name, node) != node and self.node_of[name] in here:
            self._refuse(node, name, "another client of this name is here already; give it a name of its own")
        else:
            self.node_of[name], self._hello[node], self._folds[name] = node, said, int(said["folds"])

    def _agree(self) -> tuple[_Known | None, dict[str, Device]]:
        waiting = {node: said for node, said in self._hello.items() if "device" not in said}
        if not waiting:
            return self._known, {}
        names = self._known.label_names if self._known else _union(waiting.values())
        asked = {"ask": "agree", "run": self.run_name, "label_names": names}
        answers = self._ask({node: Letter(asked) for node in waiting})
        outlines = {}
        for node, answer in answers.items():
            if "error" in answer.values:
                self._refuse(node, waiting[node]["client"], str(answer.values["error"]))
            else:
                try:
                    outlines[node] = _outline(self.recipe, answer)
                except _GARBAGE as error:
                    self._refuse(node, waiting[node]["client"], f"its answer cannot be read ({error!r})")
        if self._known is None and outlines:
            common, _ = Counter(digest for _, _, digest in outlines.values()).most_common(1)[0]
            outline, spec, digest = next(each for _, each in sorted(outlines.items()) if each[2] == common)
            self._known = _Known(names, outline, spec, digest)
        met = {}
        for node, (outline, spec, digest) in sorted(outlines.items(), key=lambda item: waiting[item[0]]["client"]):
            assert self._known is not None
            client = waiting[node]["client"]
            if digest != self._known.digest:
                self._refuse(node, client, _difference(outline, spec, self._known))
            elif device := self._device(node, waiting[node], answers[node].values["labels"]):
                met[client] = device
                self._hello[node] = {**waiting[node], "device": True}
        return self._known, met

    def _device(self, node: int, said: Mapping[str, Any], labels: Sequence[int]) -> Device | None:
        classes, own, kind = self.recipe.fleet.classes, said["profile"], said["kind"]
        kind = kind or (next(iter(classes)) if len(classes) == 1 else "")
        if kind not in classes and not own:
            named = f"names the device class {kind!r}" if kind else "names no device class"
            self._refuse(node, said["client"], f"it {named}; the recipe has: {', '.join(classes)}")
            return None
        profile = Profile(**own) if own else profiles(self.recipe)[kind]
        count = said["num_examples"]
        steps = steps_of(self.recipe, count)
        return Device(said["client"], kind, profile, 0, count, steps, tuple(labels))

    def _ranked(self, met: Mapping[str, Device], fleet: Mapping[str, Device], spec: Spec) -> dict[str, Device]:
        """The new devices with ranks; one that was known keeps what was learned of it, unless it came back another."""
        everyone = dict(sorted({**fleet, **met}.items()))
        ranks = ranked(self.recipe, everyone, spec)
        found = {}
        for client, device in met.items():
            before = fleet.get(client)
            rank = min(
                ranks[client], max(self._levels, default=ranks[client])
            )  # the server's adapter has no more slots
            if before and (before.kind, before.profile) == (device.kind, device.profile):
                rank = before.rank
                device = replace(device, times=before.times)
            found[client] = replace(device, rank=rank)
        return found

    def _refuse(self, node: int, client: str, reason: str) -> None:
        self._hello.pop(node, None)
        self._refused.add(node)
        self.noticed(f"client {client} is not let in: {reason}")

    def _ask(self, letters: Mapping[int, Letter]) -> dict[int, Letter]:
        """Questions to nodes, and their answers; who does not answer in time is asked again later."""
        if not letters:
            return {}
        numbers, answers = dict(self.post.send(letters)), {}
        for number, answer in self._answers(numbers):
            answers[numbers[number]] = answer
        return answers

    def _answers(self, numbers: Collection[str]) -> Iterator[tuple[str, Letter]]:
        """Answers as they come, until all are here or time is up."""
        until = time.monotonic() + (float("inf") if self.deadline is None else self.deadline)
        open_numbers = set(numbers)
        while open_numbers and time.monotonic() < until:
            came = self.post.collect(open_numbers)
            for number, answer in came.items():
                open_numbers.discard(number)
                yield number, answer
            if not came:
                time.sleep(_PAUSE)

    # --- working --------------------------------------------------------------------------------------------------

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        """Have tasks carried out; who has not answered by the deadline is late."""
        assert self._known is not None
        spec = self._known.spec
        here, letters, by_node = set(self.post.nodes()), {}, {}
        for task in tasks:
            node = self.node_of.get(task.plan.client)
            if node is None or node not in here:
                yield Failure(task.plan.client, task.round, "dropped", "is not connected")
                continue
            payload = pack_task(task, spec, compression=self.compression)
            self.down += len(payload)
            values = {
                "ask": "task",
                "run": self.run_name,
                "levels": list(self._levels),
                "kind": task.kind,
                "round": task.round,
            }
            letters[node], by_node[node] = Letter(values, payload), task
        numbers = dict(self.post.send(letters)) if letters else {}
        missing = dict(by_node)
        for number, answer in self._answers(numbers):
            task = missing.pop(numbers[number])
            self.up += len(answer.payload)
            yield self._read(task, answer)
        for task in missing.values():
            yield Failure(task.plan.client, task.round, "late", f"no reply within {self.deadline:g} s")

    def _read(self, task: Task, answer: Letter) -> Update | Failure:
        client = task.plan.client
        if "error" in answer.values:
            self._hello.pop(self.node_of[client], None)  # it is greeted again: it may have been started anew
            if answer.values.get("too_large"):
                self._smaller[client] = max(1, task.plan.rank // 2)
            return Failure(client, task.round, "rejected", str(answer.values["error"]))
        try:
            return unpack_update(answer.payload, task)
        except RecordError as error:
            return Failure(client, task.round, "rejected", str(error))

    def end(self) -> None:
        """Tell everyone that the run is over."""
        here = self.post.nodes()
        self._ask({n: Letter({"ask": "bye", "run": self.run_name}) for n in self.node_of.values() if n in here})


def _union(said: Any) -> list[str]:
    """The labels of all clients: as all have them, or else in order."""
    names = [list(each["label_names"]) for each in said]
    return names[0] if all(each == names[0] for each in names) else sorted({name for each in names for name in each})


def _outline(recipe: Recipe, answer: Letter) -> tuple[Outline, Spec, str]:
    """What a client says is learned, and a hash of all of it that has to be the same everywhere."""
    values = answer.values
    start = decode(answer.payload)[0]["start"]
    layers = tuple(Layer(**layer) for layer in values["layers"])
    spec = Spec(layers, (), recipe.lora.scale, recipe.seed, start, ModelCost(**values["cost"]))
    same = json.dumps([values["outline"], values["layers"], values["cost"]], sort_keys=True).encode()
    return Outline(**values["outline"]), spec, hashlib.sha256(same + encode({"start": start}, {})).hexdigest()


def _difference(outline: Outline, spec: Spec, known: _Known) -> str:
    """What of a client's outline is not as agreed."""
    for name, value in vars(known.outline).items():
        if (own := getattr(outline, name)) != value:
            return f"its {name.replace('_', ' ')} is {own}, the others' {value}"
    if spec.layers != known.spec.layers:
        return "other layers of its model are adapted"
    if spec.cost != known.spec.cost:
        return "a step of its model costs otherwise; the versions of its libraries may differ"
    return "the adapter that it starts from is another one"


def play(
    recipe: Recipe,
    out: Path,
    clients: Clients,
    *,
    count: int,
    patience: float = float("inf"),
    observer: Observer | None = None,
    command: str = "",
) -> RunFolder:
    """Play a recipe with clients on machines of their own; a run folder that is there already is gone on with.

    Where the recipe names a test set that is here, the server scores on it; or else a round's score is that of the clients'
    own examples.

    Args:
        recipe: what is played; its source and its partition are the clients' affair.
        out: the run folder.
        clients: how they are reached.
        count: how many to wait for before the first round.
        patience: seconds to wait for them.
        observer: is told what happens.
        command: how the run was started, for the record.

    Raises:
        ConfigError: a recipe that needs all data in one place.
        RecordError: a run folder of another recipe, or of clients that now have another model.
        TransportError: the clients do not come.
        RoundFailed: a round without a valid update; the checkpoint before it is kept.
    """
    _check(recipe)
    observer = observer or Observer()
    folder = RunFolder.open(out) if (out / "run.json").exists() else None
    known, levels = _remembered(folder, recipe) if folder else ({}, ())
    outline, spec, fleet = clients.gather(count, known=known, levels=levels, patience=patience)
    cohort = Cohort(
        fleet=fleet,
        shards={},
        rounds=recipe.rounds,
        per_round=recipe.fleet.per_round,
        method=recipe.method["name"],
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
    )
    method = method_of(recipe)
    job = Job(recipe, outline, local_of(recipe), cohort, spec, method, topology_of(recipe, cohort, method))
    # What clients have of their own is scored where it is.
    judge = _judge(recipe, outline, spec) if recipe.data.test and not method.claims.personal else None
    if folder is None:
        size = {"train": sum(device.num_examples for device in fleet.values()), "test": judge[1] if judge else 0}
        about = description(job, command, data={"fingerprint": "", **size}, references={})
        folder = RunFolder.create(
            out, {**about, "run": clients.run_name, "levels": list(spec.levels), "devices": _told(fleet)}
        )
    elif folder.info["base_hash"] != outline.base_hash:
        raise RecordError(
            f"{out} was started with another base model: SHA-256 {folder.info['base_hash'][:12]}; the clients' is now "
            f"{outline.base_hash[:12]}. Bring it back as it was, or start a new run."
        )

    def meet(before: Mapping[str, Device]) -> tuple[Mapping[str, Device], Collection[str]]:
        fleet, here = clients.meet(before)
        if fleet.keys() != before.keys():  # so that the server, started anew, knows who is in its checkpoint
            folder.update_info(fleet=described(fleet), devices=_told(fleet))
        return fleet, here

    federation = Federation(
        method=method,
        topology=job.topology,
        transport=clients,
        clock=Clock(seed=recipe.seed),
        score=judge[0] if judge else None,
        metric=Metric(outline.metric, _elsewhere, outline.higher_is_better),
        per_round=recipe.fleet.per_round,
        rounds=recipe.rounds,
        norm_limit=recipe.server.norm_limit,
        evaluation=Evaluation(**recipe.evaluate.model_dump()),
        seed=recipe.seed,
        notify=observer.replied,
        meet=meet,
        disk=folder.path,
    )
    play_rounds(job, folder, federation, observer)
    clients.end()
    return folder


def _check(recipe: Recipe) -> None:
    problems = []
    if recipe.baseline or recipe.compare:
        problems.append(
            "compare, baseline: they need all data in one place; leave them out, or run them in a simulation."
        )
    if recipe.clock.dropout or recipe.clock.straggler or recipe.clock.changes:
        problems.append("clock: real clients drop out and are slow by themselves; leave out all but deadline.")
    if problems:
        raise ConfigError(problems)


def _judge(recipe: Recipe, outline: Outline, spec: Spec) -> tuple[Scorer, int]:
    """What scores on the server's own test set, and how many examples that has."""
    problem = problem_of(
        recipe, source=recipe.data.test, test=None, only="test", label_names=outline.label_names or None
    )
    loaded = learner(recipe, problem)
    if loaded.base_hash != outline.base_hash:
        raise ConfigError(
            f"model.name: the server's base model has SHA-256 {loaded.base_hash[:12]}, the clients' {outline.base_hash[:12]}. "
            "Bring the same one everywhere, or leave data.test out."
        )
    loaded.model.to(devices()[0])

    def score(adapter: Adapter, at_end: bool) -> Score:
        with reproducible(recipe.compute.threads or torch.get_num_threads()):
            found = evaluate(loaded.model, adapter, problem.test, training=loaded.training)
        return replace(found, metrics={**found.metrics, **problem.at_end(loaded.model)}) if at_end else found

    return score, len(problem.test)


def _elsewhere(answers: Answers) -> float:
    raise RecordError("the server has no examples to work this out on")


def _remembered(folder: RunFolder, recipe: Recipe) -> tuple[dict[str, Device], tuple[int, ...]]:
    if folder.info["recipe"] != recipe.model_dump(mode="json"):
        raise RecordError(f"{folder.path} holds a run of another recipe. Choose another folder with --out.")
    return {
        client: Device(**{**told, "profile": Profile(**told["profile"]), "labels": tuple(told["labels"])})
        for client, told in folder.info["devices"].items()
    }, tuple(folder.info["levels"])


def _told(fleet: Mapping[str, Device]) -> dict[str, Any]:
    """Devices as they were met; what was learned of them since is in the checkpoint."""
    return {client: {**asdict(device), "times": None} for client, device in fleet.items()}
