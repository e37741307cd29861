"""The server's half of a run on several machines: it meets clients, sends them tasks, and waits for their updates.

It needs neither model nor data: what is learned the clients say when they agree, and they have to say the same. Who says
something else is left out, by name and with what differs.
"""

import fcntl
import importlib.metadata
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from anyrank import config
from anyrank.adapter import Adapter
from anyrank.api import Observer, described, description, play_rounds
from anyrank.baselines import Cohort
from anyrank.clock import Clock
from anyrank.compute import devices, reproducible
from anyrank.config import Recipe
from anyrank.engine import Evaluation, Federation, Scorer
from anyrank.errors import ConfigError, RecordError, RoundFailed, TransportError
from anyrank.federation import Device, Failure, Profile, Spec, Task, Update, make_task
from anyrank.flower.answers import Agreed, Hello, clean, difference, union
from anyrank.flower.letter import Letter
from anyrank.job import (
    Job,
    Outline,
    learner,
    load_recipe,
    local_of,
    method_of,
    problem_of,
    profiles,
    ranked,
    steps_of,
    topology_of,
)
from anyrank.messages import Compression, pack_task, unpack_update
from anyrank.problem import Answers, Metric
from anyrank.record import RunFolder
from anyrank.results import own_plans
from anyrank.train import Score, evaluate

__all__ = ["Clients", "Post", "play", "recipe_of"]

_TRIES = 3  # at rounds without a quorum, in the course of a run
_QUESTION, _FAREWELL = 600.0, 30.0  # seconds for an answer to a question, where there is no longer deadline
_REFUSED = 30.0  # seconds until somebody who was not let in is greeted again: what was wrong may be mended
_LEFT_OVER = 60.0  # seconds that what is left of a killed server may take to end
_PAUSE = 0.1  # seconds between looks at what has come


@runtime_checkable
class Post(Protocol):
    """Carries letters to clients' machines, which have numbers, and answers back."""

    def nodes(self) -> Set[int]:
        """Who is connected now."""
        ...

    def send(self, letters: Mapping[int, Letter]) -> Mapping[str, int]:
        """Send a letter to each node; under which number of its own each is answered."""
        ...

    def collect(self, numbers: Collection[str]) -> Mapping[str, Letter]:
        """The answers that have come to letters of these numbers; each is handed over once."""
        ...


@dataclass(frozen=True)
class Past:
    """What a server that is started anew knows of its run.

    Args:
        devices: as they were met, by client.
        levels: the run's ranks.
        label_names: in label order.
        base_hash: of the base model.
        digest: of what is learned, `Agreed.digest`.
    """

    devices: Mapping[str, Device]
    levels: tuple[int, ...]
    label_names: list[str]
    base_hash: str
    digest: str


@dataclass(frozen=True)
class Question:
    """What somebody was asked whom nobody waits for.

    Args:
        number: under which it is answered.
        when: by `time.monotonic()`.
    """

    number: str
    when: float


class Clients:
    """A transport whose clients are on machines of their own.

    Args:
        post: how letters reach them.
        recipe: of the run.
        run: the run's name, under which clients keep what belongs to it.
        compression: of what travels.
        deadline: seconds after which a round, or a question, is over for whoever has not answered.
        patience: seconds to wait for clients where there are too few.
        measured: whether a device is as fast as its work is measured to be, or as its profile says.
        name_of: the name that belongs to a node's key, where that is known; a client may have no other.
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
        patience: float = float("inf"),
        measured: bool = False,
        name_of: Callable[[int], str | None] = lambda node: None,
        noticed: Callable[[str], None] = lambda remark: None,
    ):
        """Nobody is asked anything yet."""
        self.post, self.recipe, self.run_name = post, recipe, run
        self.compression: Compression = compression
        self.deadline, self.patience, self.measured = deadline, patience, measured
        self.name_of, self.noticed = name_of, noticed
        self.node_of: dict[str, int] = {}
        self._refused: dict[int, tuple[str, float]] = {}  # why, and until when nothing is asked
        self._aside: dict[int, Question | None] = {}  # who is not waited for, and what it has been asked
        self._greeted: dict[int, Hello] = {}
        self._met: set[int] = set()
        self._smaller: dict[str, int] = {}
        self._too_large: dict[str, int] = {}  # the rank at which a client ran out of memory last
        self._folds: dict[str, int] = {}
        self._past: Past | None = None
        self._known: Agreed | None = None
        self._levels: tuple[int, ...] = ()
        self.down = self.up = 0

    # --- meeting --------------------------------------------------------------------------------------------------

    def gather(self, count: int, past: Past | None = None) -> tuple[Agreed, dict[str, Device]]:
        """Wait until so many clients agree, and say what they agree on and who they are.

        Args:
            count: of clients.
            past: what is known of a run that is gone on with.

        Raises:
            TransportError: they are not there in time, or do not agree.
        """
        here, self._past = dict[str, Device](), past

        def look() -> int:
            here.update(self._meet(count))
            return sum(self.node_of[client] in self._met for client in here)

        self._wait_for(count, look)
        assert self._known is not None
        self._levels = past.levels if past else ()
        fleet = {**(past.devices if past else {}), **self._ranked(here, past.devices if past else {})}
        self._levels = self._levels or tuple(sorted({device.rank for device in fleet.values()}))
        self._known = replace(self._known, spec=replace(self._known.spec, levels=self._levels))
        return self._known, dict(sorted(fleet.items()))

    def meet(self, fleet: Mapping[str, Device]) -> tuple[dict[str, Device], list[str]]:
        """Before a round: the fleet with those who are new or came back otherwise, and who of it is here now.

        Raises:
            TransportError: there are fewer than the recipe's quorum, and no more come in time.
        """
        now, here = dict(fleet), list[str]()

        def look() -> int:
            now.update(self._ranked(self._meet(1), now))
            here[:] = [client for client in now if self.node_of.get(client) in self._met]
            return len(here)

        self._wait_for(self.recipe.server.quorum, look)
        for client, number in self._folds.items():  # of who was greeted since: it may have lost them, or come back
            if client in now:
                now[client] = replace(now[client], folds=number)
        self._folds = {}
        for client, rank in self._smaller.items():
            self.noticed(f"{client} could not hold its work; from now on its rank is {rank}")
            now[client] = replace(now[client], rank=rank)
        self._smaller = {}
        return now, here

    def forget(self) -> None:
        """Greet everyone again, as a server does that was started anew."""
        self._greeted.clear()
        self._met.clear()
        self._aside = dict.fromkeys(self._aside)
        self._known = None

    def _wait_for(self, count: int, look: Callable[[], int]) -> None:
        """Look again and again, until so many clients are here."""
        until, told = time.monotonic() + self.patience, -1
        while (here := look()) < count:
            if here != told:
                self.noticed(f"waiting for clients: {here} of {count} are here")
                told = here
            if time.monotonic() > until:
                raise TransportError(
                    f"{here} of {count} clients came within {self.patience:g} s. Start the others, or ask for fewer "
                    "(fleet.per_round, server.quorum, --clients)."
                )
            time.sleep(_PAUSE)

    def _meet(self, count: int) -> dict[str, Device]:
        """Greet nodes that were not here before, and agree with them once there are enough; the devices that were met.

        Until it is known what is learned, all answers are waited for. Later on none is: who is new loads data and model while
        the others play.
        """
        here, now = self.post.nodes(), time.monotonic()
        self._greeted = {
            node: hello for node, hello in self._greeted.items() if node in here
        }  # who comes back is another
        self._met &= self._greeted.keys()
        self._aside = {node: question for node, question in self._aside.items() if node in here}
        heard = self._heard()
        barred = {node for node, (_, until) in self._refused.items() if now < until}
        new = dict.fromkeys(sorted(here - self._greeted.keys() - barred - self._aside.keys() - heard.keys()))
        if self._known:
            self._aside |= new
        else:
            heard |= self._ask(dict.fromkeys(new, self._hello()))
        for node, answer in heard.items():
            self._greet(node, answer, here)
        unmet = sorted(self._greeted.keys() - self._met)
        if self._known:
            met = self._agree({node: heard[node] for node in unmet})
        elif unmet and len(self._greeted) >= count:
            met = self._agree(self._ask(dict.fromkeys(unmet, self._agreement(unmet))))
            self._aside = dict.fromkeys(self._aside)  # what they have been asked was without labels
        else:
            met = {}
        self._ask_aside()
        return met

    def _hello(self) -> Letter:
        """Ask who a client is, and if the labels are known, to agree at once."""
        values = {"run": self.run_name, "recipe": self.recipe.model_dump(mode="json"), "compression": self.compression}
        names = self._known and self._known.outline.label_names
        return Letter({"ask": "hello", **values, "label_names": names})

    def _agreement(self, nodes: Sequence[int]) -> Letter:
        names = self._past.label_names if self._past else union([self._greeted[node] for node in nodes])
        return Letter({"ask": "agree", "run": self.run_name, "label_names": names})

    def _heard(self) -> dict[int, Letter]:
        """Answers of those whom nobody waits for, who are then no longer among them."""
        asked = {question.number: node for node, question in self._aside.items() if question}
        heard = {asked[number]: answer for number, answer in self.post.collect(asked).items()}
        self._aside = {node: question for node, question in self._aside.items() if node not in heard}
        return heard

    def _ask_aside(self) -> None:
        """Ask those whom nobody waits for. Who is gone may be among them: Flower takes a minute to notice.

        Who does not answer is asked again after a while, since a question may be lost with a SuperNode.
        """
        now = time.monotonic()
        to_ask = [node for node, asked in self._aside.items() if asked is None or now > asked.when + _QUESTION]
        sent = self.post.send(dict.fromkeys(to_ask, self._hello()))
        self._aside |= {node: Question(number, now) for number, node in sent.items()}

    def _missed(self, node: int) -> None:
        self._forget_node(node)
        self._aside[node] = None

    def _forget_node(self, node: int) -> None:
        self._greeted.pop(node, None)
        self._met.discard(node)

    def _greet(self, node: int, answer: Letter, here: Collection[int]) -> None:
        called = self.name_of(node) or clean(answer.values.get("client", f"on node {node}"), most=100)
        if "client" not in answer.values:  # Flower answers in place of a client that it cannot reach
            self._missed(node)
            return
        if "error" in answer.values:
            self._refuse(node, called, str(answer.values["error"]))
            return
        try:
            hello = Hello.read(answer.values)
        except RecordError as error:
            self._refuse(node, called, str(error))
            return
        name, ours = hello.client, importlib.metadata.version("anyrank")
        if hello.anyrank != ours:
            self._refuse(node, name, f"it has anyrank {hello.anyrank}, the server {ours}")
        elif self.name_of(node) not in (None, name):
            self._refuse(node, name, f"its key is that of {self.name_of(node)}")
        elif self.node_of.get(name, node) != node and self.node_of[name] in here:
            self._refuse(node, name, "another client of this name is here already; give it a name of its own")
        else:
            self.node_of = {other: at for other, at in self.node_of.items() if at != node} | {name: node}
            self._greeted[node], self._folds[name] = hello, hello.folds

    def _agree(self, answers: Mapping[int, Letter]) -> dict[str, Device]:
        """Let in who says the same of what is learned; what most of them say at first is agreed on."""
        found: dict[int, Agreed] = {}
        for node, answer in answers.items():
            hello = self._greeted[node]
            if "client" not in answer.values or answer.values.get("anew"):
                self._missed(node)
            elif "error" in answer.values:
                self._refuse(node, hello.client, str(answer.values["error"]))
            else:
                try:
                    found[node] = Agreed.read(self.recipe, answer)
                except RecordError as error:
                    self._refuse(node, hello.client, str(error))
        self._known = self._known or self._common(found)
        met = {}
        for node in sorted(found, key=lambda node: self._greeted[node].client):
            hello = self._greeted[node]
            if self._known and found[node].digest == self._known.digest:
                if device := self._device(node, hello, found[node].labels):
                    met[device.client] = device
                    self._met.add(node)
            else:
                self._refuse(node, hello.client, self._apart(found[node]))
        return met

    def _common(self, found: Mapping[int, Agreed]) -> Agreed | None:
        """What more than half of the clients say, or what the run began with."""
        if not found:
            return None
        said = Counter(each.digest for each in found.values())
        digest, times = (self._past.digest, len(found)) if self._past else said.most_common(1)[0]
        if 2 * times <= len(found):
            one, other = [next(each for each in found.values() if each.digest == d) for d, _ in said.most_common(2)]
            raise TransportError(
                f"no more than {times} of {len(found)} clients agree on what is learned; of two of them: "
                f"{clean(difference(one, other))}. Bring the same model and the same versions everywhere."
            )
        return next((each for _, each in sorted(found.items()) if each.digest == digest), None)

    def _apart(self, found: Agreed) -> str:
        if self._known:
            return difference(found, self._known)
        assert self._past is not None
        if found.outline.base_hash != self._past.base_hash:
            return f"its base hash is {found.outline.base_hash}, that of the run {self._past.base_hash}"
        return "the labels, layers, start or costs of its model are not those that the run began with"

    def _device(self, node: int, hello: Hello, labels: Sequence[int]) -> Device | None:
        classes = self.recipe.fleet.classes
        kind = hello.kind or (next(iter(classes)) if len(classes) == 1 else "")
        if kind not in classes and (hello.profile is None or self.recipe.ranks["name"] == "per_class"):
            named = f"names the device class {kind!r}" if kind else "names no device class"
            self._refuse(node, hello.client, f"it {named}; the recipe has: {', '.join(classes)}")
            return None
        profile = Profile(**hello.profile.model_dump()) if hello.profile else profiles(self.recipe)[kind]
        steps = steps_of(self.recipe, hello.num_examples)
        return Device(hello.client, kind, profile, 0, hello.num_examples, steps, tuple(labels))

    def _ranked(self, met: Mapping[str, Device], fleet: Mapping[str, Device]) -> dict[str, Device]:
        """The new devices with ranks; one that was known keeps what was learned of it, unless it came back another.

        Raises:
            ConfigError: the recipe has no ranks for the clients that begin a run.
        """
        if not met:
            return {}
        assert self._known is not None
        try:
            ranks = ranked(self.recipe, dict(sorted({**fleet, **met}.items())), self._known.spec)
        except ConfigError as error:
            if not fleet:
                raise
            for client in met:
                self._refuse(self.node_of[client], client, str(error))
            return {}
        found = {}
        for client, device in met.items():
            before = fleet.get(client)
            most = max(self._levels, default=ranks[client])  # the server's adapter has no more slots
            rank = min(ranks[client], most)
            if before and (before.kind, before.profile) == (device.kind, device.profile):
                rank = before.rank
                device = replace(device, times=before.times)
            found[client] = replace(device, rank=rank)
        return found

    def _refuse(self, node: int, client: str, reason: str) -> None:
        """Say why somebody is not let in, once; what is wrong may be mended."""
        self._forget_node(node)
        reason, (before, _) = clean(reason), self._refused.get(node, ("", 0.0))
        self._refused[node] = reason, time.monotonic() + _REFUSED
        if reason != before:
            self.noticed(f"client {clean(client, most=100)} is not let in: {reason}")
            self.post.send({node: Letter({"ask": "refused", "reason": reason})})

    def _ask(self, letters: Mapping[int, Letter], seconds: float = _QUESTION) -> dict[int, Letter]:
        """Questions to nodes, and their answers; who does not answer in time is not waited for again."""
        if not letters:
            return {}
        numbers, answers = dict(self.post.send(letters)), {}
        for number, answer in self._answers(numbers, max(seconds, self.deadline or 0.0)):
            answers[numbers[number]] = answer
        for node in letters.keys() - answers.keys():  # nor is whoever it could not be sent to
            self._missed(node)
        return answers

    def _answers(self, numbers: Collection[str], seconds: float) -> Iterator[tuple[str, Letter]]:
        """Answers as they come, until all are here or time is up."""
        until = time.monotonic() + seconds
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
        here, letters, by_node = self.post.nodes() - self._aside.keys(), {}, {}
        for task in tasks:
            node = self.node_of.get(task.plan.client)
            if node is None or node not in here:
                yield Failure(task.plan.client, task.round, "dropped", "is not connected, or has not answered since")
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
        for node in by_node.keys() - numbers.values():
            yield Failure(by_node.pop(node).plan.client, tasks[0].round, "dropped", "its task could not be sent")
        for number, answer in self._answers(numbers, self.deadline or float("inf")):
            task = by_node.pop(numbers[number])
            self.up += len(answer.payload)
            yield self._read(numbers[number], task, answer)
        for node in by_node:
            self._missed(node)
        self._ask_aside()
        for task in by_node.values():
            yield Failure(task.plan.client, task.round, "late", f"no reply within {self.deadline or 0:g} s")

    def _read(self, node: int, task: Task, answer: Letter) -> Update | Failure:
        client = task.plan.client
        if "error" in answer.values:
            if answer.values.get("too_large"):
                self._lessen(client, task.plan.rank)
            elif answer.values.get("anew") or "client" not in answer.values:
                self._missed(node)
            return Failure(client, task.round, "rejected", clean(answer.values["error"]))
        try:
            update, seconds = unpack_update(answer.payload, task), answer.values.get("seconds")
        except RecordError as error:
            return Failure(client, task.round, "rejected", clean(error))
        if self.measured and isinstance(seconds, float) and isfinite(seconds) and seconds > 0:
            return replace(update, seconds=seconds)
        return update

    def _lessen(self, client: str, rank: int) -> None:
        """Half the rank for a client that cannot hold it; nothing more where that does not help."""
        if rank > 1 and rank < self._too_large.get(client, rank + 1):
            self._too_large[client], self._smaller[client] = rank, rank // 2
        else:
            node, reason = (
                self.node_of[client],
                f"it runs out of memory at rank {rank}, and the method has no less for it",
            )
            self._refuse(node, client, reason)
            self._refused[node] = reason, float("inf")

    def hand_over(self, tasks: Iterable[Task]) -> None:
        """Have clients write down what is their own at the end of a run, with what they are sent for it."""
        assert self._known is not None
        self._meet(1)  # somebody may have come back since
        letters = {}
        for task in tasks:
            node = self.node_of.get(task.plan.client)
            if node in self._met:
                values = {"ask": "own", "run": self.run_name, "levels": list(self._levels)}
                letters[node] = Letter(values, pack_task(task, self._known.spec))
        self._ask(letters)

    def end(self) -> None:
        """Tell everyone that the run is over; those whom nobody waits for will hear it, too."""
        here, bye = self.post.nodes(), Letter({"ask": "bye", "run": self.run_name})
        self.post.send(dict.fromkeys(sorted(here - self._met), bye))
        self._ask(dict.fromkeys(sorted(here & self._met), bye), _FAREWELL)


def recipe_of(file: Path, settings: Sequence[str]) -> Recipe:
    """A recipe as clients on machines of their own play it: their source and how it is parted are their affair.

    Args:
        file: the recipe, which need not say either.
        settings: `key=value`, over the recipe's.

    Raises:
        ConfigError: with all problems of the recipe.
    """
    theirs = {"data.source": "the clients", "partition.name": "by_column", "partition.column": "file"}
    return load_recipe(file, {**config.parse_overrides(settings), **theirs})


def play(
    recipe: Recipe,
    out: Path,
    clients: Clients,
    *,
    count: int,
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
        observer: is told what happens.
        command: how the run was started, for the record.

    Raises:
        ConfigError: a recipe that needs all data in one place.
        RecordError: a run folder of another recipe, or of clients that now have another model.
        TransportError: the clients do not come.
        RoundFailed: a round without a quorum, time and again; the checkpoint before it is kept.
    """
    _check(recipe)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        if (out / "adapter").exists() and len(RunFolder.open(out).records()) == recipe.rounds:
            folder = RunFolder.open(out)
            _remembered(folder, recipe)
            return folder  # it needs nobody
        for left in reversed(range(_TRIES)):
            try:
                return _play(recipe, out, clients, count, observer or Observer(), command)
            except RoundFailed as error:
                said = error.args[0].partition(". Resuming")[0]
                if not left:
                    raise RoundFailed(f"{said}. What was played is kept: the same command goes on with it.") from error
                clients.noticed(f"{said}. The round is played again.")
                clients.forget()
                count = recipe.server.quorum
        raise AssertionError  # the last try returned or raised


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second server from playing into the same run folder."""
    folder = os.open(out, os.O_RDONLY)
    try:
        until = time.monotonic() + _LEFT_OVER
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise RecordError(
                        f"{out} is being played into by another server; wait for it, or stop it."
                    ) from error
                time.sleep(_PAUSE)
        yield
    finally:
        os.close(folder)


def _play(recipe: Recipe, out: Path, clients: Clients, count: int, observer: Observer, command: str) -> RunFolder:
    folder = RunFolder.open(out) if (out / "run.json").exists() else None
    agreed, fleet = clients.gather(count, _remembered(folder, recipe) if folder else None)
    outline, spec = agreed.outline, agreed.spec
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
        told = {"run": clients.run_name, "levels": list(spec.levels), "devices": _told(fleet), "agreed": agreed.digest}
        folder = RunFolder.create(out, {**about, **told})
    else:
        folder.update_info(fleet=described(fleet), devices=_told(fleet))  # some may have come since

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
        quorum=recipe.server.quorum,
        norm_limit=recipe.server.norm_limit,
        evaluation=Evaluation(**recipe.evaluate.model_dump()),
        seed=recipe.seed,
        notify=observer.replied,
        meet=meet,
        disk=folder.path,
    )
    progress = play_rounds(job, folder, federation, observer)
    if method.claims.personal or progress.peers:
        fleet = progress.fleet
        clients.hand_over(
            make_task(method, state, plan, kind="test", held=fleet[plan.client].folds)
            for state, plan in own_plans(job, progress, list(fleet.values()))
        )
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


def _remembered(folder: RunFolder, recipe: Recipe) -> Past:
    info = folder.info
    if info["recipe"] != recipe.model_dump(mode="json"):
        raise RecordError(f"{folder.path} holds a run of another recipe. Choose another folder with --out.")
    devices = {
        client: Device(**{**told, "profile": Profile(**told["profile"]), "labels": tuple(told["labels"])})
        for client, told in info["devices"].items()
    }
    return Past(devices, tuple(info["levels"]), info["data"]["label_names"], info["base_hash"], info["agreed"])


def _told(fleet: Mapping[str, Device]) -> dict[str, Any]:
    """Devices as they were met; what was learned of them since is in the checkpoint."""
    return {client: {**asdict(device), "times": None} for client, device in fleet.items()}
