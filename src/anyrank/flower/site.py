"""A client's half of a run on several machines: it holds the model, its own data, and what it keeps for itself.

    hello   the recipe comes; the client reads its data, and says what it is: device, examples, labels; if the labels of all
            come, too, it goes on to
    agree   the labels of all clients come; the client loads the model, and says what is learned
    task    a task comes; the update goes back
    own     without a global adapter, what this client has at the end is written down here
    refused the server does not let this client in
    bye     the run is over

Examples, and what a method lets clients keep, never leave. What comes is not trusted: a server says what is learned, and
nothing about what else is on this machine.
"""

import importlib.metadata
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from anyrank import config, data, hf
from anyrank.adapter import Adapter
from anyrank.client import Assignment, work
from anyrank.compute import devices, reproducible
from anyrank.config import Recipe
from anyrank.errors import AnyrankError, ConfigError, RecordError
from anyrank.federation import Device, Failure, Fold, Method, Profile, Spec, Task
from anyrank.flower.letter import Letter
from anyrank.job import CHOICES, Learner, learner, local_of, method_of, problem_of
from anyrank.memory import Memory
from anyrank.messages import Compression, pack_update, unpack_task
from anyrank.paths import replaced
from anyrank.problem import Problem
from anyrank.wire import decode, encode

__all__ = ["Site"]

_LONGEST = 500  # letters of an error that is answered
_MOST_LABELS, _FEW, _DIFFERENT, _LONG = 1000, 20, 0.9, 60  # labels; and where more of the rows differ, or are longer
_VALUE = re.compile(r"\b(found only|found|got|unknown class|unknown label) .*", re.DOTALL)  # of a cell, in an error


class Site:
    """One client's side of a run.

    Args:
        client: its name, unique among all clients.
        source: its examples, as `data.source` of a recipe; the recipe says what their columns mean.
        folder: of its own, for what it keeps in the course of runs; beside it come `adapters/`, those that are its own.
        kind: its device class, one of the recipe's.
        profile: what its device can do; None leaves that to the device class.
    """

    def __init__(self, client: str, source: str, folder: Path, *, kind: str = "", profile: Profile | None = None):
        """Nothing is loaded before the first letter."""
        self.client, self.source, self.folder, self.kind, self.profile = client, source, folder, kind, profile
        self.run = ""  # the one that it was greeted for last; nothing of others is touched
        self._problem: Problem | None = None
        self._learner: Learner | None = None

    def answer(self, letter: Letter) -> Letter:
        """Do what is asked. What goes wrong is said in the answer."""
        asked: Mapping[str, Callable[[Letter], Letter]] = {
            "hello": self._hello,
            "agree": self._agree,
            "task": self._task,
            "own": self._own,
            "refused": lambda letter: Letter({"client": self.client}),
            "bye": self._bye,
        }
        ask, run = letter.values.get("ask"), letter.values.get("run")
        try:
            if ask not in asked:
                raise RecordError(f"asked for {ask!r}; expected one of {', '.join(asked)}")
            if ask != "refused" and not (isinstance(run, str) and re.fullmatch(r"[\w-]{1,64}", run, re.ASCII)):
                raise RecordError(f"run {run!r}: expected a name of up to 64 letters, digits, _ and -")
            if ask in ("agree", "task", "own") and self.run not in ("", run):
                raise RecordError(f"client {self.client} is busy with another run; runs go one after another")
            if ask in ("agree", "task", "own") and (not self.run or (ask != "agree" and self._learner is None)):
                return self._sorry("this client knows nothing of the run; it has been started anew", anew=True)
            return asked[ask](letter)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._sorry(f"out of memory: {error}", too_large=True)
        except (AnyrankError, OSError) as error:
            return self._sorry(str(error))
        except Exception as error:  # its words may be those of an example
            traceback.print_exc()
            return self._sorry(f"{type(error).__name__} when asked for {ask}; see worker.log in this client's --state")

    def _sorry(self, error: str, **further: bool) -> Letter:
        said = "".join(letter if letter.isprintable() else " " for letter in error[:_LONGEST])
        return Letter({"error": said, "client": self.client, **further})

    def _hello(self, letter: Letter) -> Letter:
        run, recipe = letter.values["run"], config.resolve(letter.values["recipe"], {}, CHOICES)
        _check(recipe)
        if self._problem is None or (run, recipe) != (self.run, self._recipe):
            problem = self._read(recipe)
            _check_labels(recipe, problem)
            self.run, self._recipe, self._problem, self._learner = run, recipe, problem, None
            self._folder = self.folder / run
            self._lost: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._compression: Compression = letter.values["compression"]
        train, _ = self._parts(self._problem)
        agreed = self._agree(letter) if letter.values.get("label_names") is not None else Letter()
        values = {
            "client": self.client,
            "anyrank": importlib.metadata.version("anyrank"),
            "kind": self.kind,
            "profile": self.profile and asdict(self.profile),
            "num_examples": len(train),
            "label_names": list(self._problem.label_names),
            "folds": max(self._held(), default=0),
        }
        return Letter({**agreed.values, **values}, agreed.payload)

    def _read(self, recipe: Recipe, **known: Sequence[str]) -> Problem:
        """This client's data, for a recipe.

        Raises:
            ConfigError: without the cells that are wrong; those are in the worker's log.
        """
        try:
            return problem_of(recipe, source=self.source, test=None, only="train", **known)
        except ConfigError as error:
            print(error, flush=True)
            kept = [_VALUE.sub(r"\1 what worker.log in this client's --state says", said) for said in error.problems]
            raise ConfigError(kept) from error

    def _agree(self, letter: Letter) -> Letter:
        names = letter.values["label_names"]
        if self._learner is None or list(self._learner.problem.label_names) != names:
            assert self._problem
            same = list(self._problem.label_names) == names
            problem = self._problem if same else self._read(self._recipe, label_names=names)
            self._learner = learner(self._recipe, problem)
            self._learner.model.to(devices()[0])
            self._method: Method = method_of(self._recipe)
        known, problem = self._learner, self._learner.problem
        self._spec: Spec = known.spec(scale=self._recipe.lora.scale, seed=self._recipe.seed)
        train, _ = self._parts(problem)
        labels = np.asarray(problem.columns["label"])[train] if names and "label" in problem.columns else None
        values = {
            "client": self.client,
            "outline": asdict(known.outline),
            "layers": [asdict(layer) for layer in self._spec.layers],
            "cost": asdict(known.cost),
            "labels": [] if labels is None else np.bincount(labels, minlength=len(names)).tolist(),
        }
        return Letter(values, encode({"start": known.start}, {}))

    def _unpacked(self, letter: Letter) -> tuple[Learner, Task, Adapter | None]:
        """What trains, the task in a letter, and what this client has kept for it."""
        assert self._learner
        spec = replace(self._spec, levels=tuple(letter.values["levels"]))
        held = self._held()
        task = unpack_task(letter.payload, spec, self._method, held)
        if self._method.keep and task.kind == "train":
            self._check_up(task, spec)
        self._hold(task, held)
        before = (task.round, task.phase) if task.kind == "train" else (task.round + 1, 0)
        kept = Memory(self._folder / "memory").read(self.client, before=before) if self._method.keep else None
        return self._learner, task, kept

    def _check_up(self, task: Task, spec: Spec) -> None:
        """Refuse to send what the method has clients keep for themselves, whatever the task says."""
        anyone = Device(self.client, self.kind, Profile(1.0, 1.0, 1.0, 1.0, 1.0), task.plan.rank, 1, 1)
        (own,) = self._method.assign(self._method.init(spec), [anyone])
        if task.plan.up != own.up:
            raise RecordError(
                f"asked to send the factors {task.plan.up!r}; by {self._recipe.method['name']} only {own.up!r} leave a client"
            )

    def _task(self, letter: Letter) -> Letter:
        known, task, kept = self._unpacked(letter)
        if task.kind == "test":
            raise RecordError("this client has no test set of the server's")
        rows = self._parts(known.problem)
        train, evaluate = (Subset(known.problem.train, part.tolist()) for part in rows)  # pyright: ignore[reportArgumentType]
        asked = Assignment(task, {"train": train, "evaluate": evaluate}, kept)
        began = time.perf_counter()
        with reproducible(self._recipe.compute.threads or torch.get_num_threads()):
            reply, keeps = work(known.model, self._method, asked, training=known.training, seed=self._recipe.seed)
        seconds = time.perf_counter() - began
        if isinstance(reply, Failure):
            return self._sorry(reply.reason)
        when = task.round, task.phase
        if keeps:
            Memory(self._folder / "memory").write(self.client, when, keeps)
        before = [past for past in self._lost if past < when]  # a round that did not count is played again
        packed, lost = pack_update(
            task, reply, compression=self._compression, lost=self._lost[max(before)] if before else None
        )
        if task.kind == "train":
            self._lost = {past: self._lost[past] for past in before[-1:]} | {when: lost}
        return Letter({"client": self.client, "seconds": seconds}, packed)

    def _own(self, letter: Letter) -> Letter:
        known, task, kept = self._unpacked(letter)
        adapter = self._method.enter(task.start, kept) if self._method.enter else task.whole
        outline, out = known.outline, self.folder.parent / "adapters" / self.run
        with replaced(out) as temporary:
            hf.write_adapter(
                temporary,
                hf.factored(local_of(self._recipe).spread(adapter), scale=self._recipe.lora.scale),
                scale=self._recipe.lora.scale,
                base=known.base,
                modules_to_save=outline.modules_to_save,
                label_names=outline.label_names,
                card=f"# {self.client}'s own adapter\n\nBy `{self._recipe.method['name']}` on {outline.base}.\n",
                patches=outline.patches,
                task_type=outline.task_type,
            )
        return Letter({"client": self.client, "written": str(out)})

    def _bye(self, letter: Letter) -> Letter:
        if self.run == letter.values["run"]:
            shutil.rmtree(self._folder, ignore_errors=True)
            self.run, self._learner, self._problem = "", None, None
        return Letter({"client": self.client})

    def _parts(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        """The rows to train on, and those kept back."""
        rows, share = np.arange(len(problem.train)), self._recipe.data.held_out
        return data.held_out(rows, share=share, seed=self._recipe.seed, client=self.client)

    def _held(self) -> dict[int, Fold]:
        file = self._folder / "folds.safetensors"
        if not file.exists():
            return {}
        adapters, _ = decode(file.read_bytes())
        return {int(number): Fold(int(number), adapter) for number, adapter in adapters.items()}

    def _hold(self, task: Task, held: Mapping[int, Fold]) -> None:
        if [fold.number for fold in task.folds] != sorted(held):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = self._folder / "folds.tmp"
            temporary.write_bytes(encode({str(fold.number): fold.adapter for fold in task.folds}, {}))
            temporary.replace(self._folder / "folds.safetensors")


def _check(recipe: Recipe) -> None:
    """Refuse a recipe by which a server would get at what else is on this machine.

    Raises:
        ConfigError: it is one.
    """
    problems = []
    if recipe.lora.start is not None:
        problems.append(
            "lora.start: clients on machines of their own start from no adapter on their disks; leave it out."
        )
    if recipe.local["name"] == "mole":
        problems.append("local.name: clients on machines of their own open no adapters for mole; choose another one.")
    if recipe.problem["name"] == config.OWN:
        problems.append(
            f'problem.name: "{config.OWN}" is handed over in Python, and not by a server; name another one.'
        )
    if problems:
        raise ConfigError(problems)


def _check_labels(recipe: Recipe, problem: Problem) -> None:
    """Refuse to tell label names that may be no classes, but texts.

    Raises:
        ConfigError: there are too many.
    """
    names, rows = problem.label_names, len(problem.train)
    long = sum(map(len, names)) > _LONG * len(names)
    if len(names) > _MOST_LABELS or long or (len(names) > _FEW and len(names) > _DIFFERENT * rows):
        column = recipe.problem.get("label", "label")
        raise ConfigError(
            f"problem.label: column {column!r} has {len(names)} different labels in {rows} rows"
            f"{', which are long' if long else ''}; they look like texts, which a client does not tell. Name a column of "
            "classes."
        )
