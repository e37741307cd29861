"""A client's half of a run on several machines: it holds the model, its own data, and what it keeps for itself.

    hello   the recipe comes; the client reads its data, and says what it is: device, examples, labels
    agree   the labels of all clients come; the client loads the model, and says what is learned
    task    a task comes; the update goes back
    bye     the run is over

Examples, and what a method lets clients keep, never leave.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from anyrank import config, data
from anyrank.client import Assignment, work
from anyrank.compute import devices, reproducible
from anyrank.config import Recipe
from anyrank.errors import AnyrankError, RecordError
from anyrank.federation import Failure, Fold, Method, Profile, Spec, Task
from anyrank.flower.letter import Letter
from anyrank.job import CHOICES, Learner, learner, method_of, problem_of
from anyrank.memory import Memory
from anyrank.messages import Compression, pack_update, unpack_task
from anyrank.problem import Problem
from anyrank.wire import decode, encode

__all__ = ["Site"]


class Site:
    """One client's side of a run.

    Args:
        client: its name, unique among all clients.
        source: its examples, as `data.source` of a recipe; the recipe says what their columns mean.
        folder: of its own, for what it keeps.
        kind: its device class, one of the recipe's.
        profile: what its device can do; None leaves that to the device class.
    """

    def __init__(self, client: str, source: str, folder: Path, *, kind: str = "", profile: Profile | None = None):
        """Nothing is loaded before the first letter."""
        self.client, self.source, self.folder, self.kind, self.profile = client, source, folder, kind, profile
        self._run = ""
        self._problem: Problem | None = None
        self._learner: Learner | None = None

    def answer(self, letter: Letter) -> Letter:
        """Do what is asked. What goes wrong is said in the answer."""
        asked: Mapping[str, Callable[[Letter], Letter]] = {
            "hello": self._hello,
            "agree": self._agree,
            "task": self._task,
            "bye": self._bye,
        }
        try:
            if letter.values.get("ask") not in asked:
                raise RecordError(f"asked for {letter.values.get('ask')!r}; expected one of {', '.join(asked)}")
            return asked[letter.values["ask"]](letter)
        except (AnyrankError, OSError) as error:
            return Letter({"error": str(error), "client": self.client})
        except (MemoryError, torch.OutOfMemoryError) as error:
            return Letter({"error": f"out of memory: {error}", "client": self.client, "too_large": True})

    def _hello(self, letter: Letter) -> Letter:
        if letter.values["run"] != self._run:
            self._run, self._learner, self._problem = letter.values["run"], None, None
            self._folder = self.folder / self._run
            self._lost: dict[str, torch.Tensor] = {}
        self._recipe: Recipe = config.resolve(letter.values["recipe"], {}, CHOICES)
        self._compression: Compression = letter.values["compression"]
        self._problem = self._problem or problem_of(self._recipe, source=self.source, test=None, only="train")
        train, _ = self._parts(self._problem)
        return Letter(
            {
                "client": self.client,
                "anyrank": importlib.metadata.version("anyrank"),
                "kind": self.kind,
                "profile": self.profile and asdict(self.profile),
                "num_examples": len(train),
                "label_names": list(self._problem.label_names),
                "fingerprint": self._problem.fingerprint,
                "folds": max(self._held(), default=0),
            }
        )

    def _agree(self, letter: Letter) -> Letter:
        names = letter.values["label_names"]
        if self._learner is None or list(self._learner.problem.label_names) != names:
            problem = self._problem or problem_of(self._recipe, source=self.source, test=None, only="train")
            if list(problem.label_names) != names:
                problem = problem_of(self._recipe, source=self.source, test=None, only="train", label_names=names)
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

    def _task(self, letter: Letter) -> Letter:
        if letter.values["run"] != self._run or self._learner is None:
            raise RecordError("this client knows nothing of the run; it has been started anew since it agreed")
        spec = replace(self._spec, levels=tuple(letter.values["levels"]))
        held = self._held()
        task = unpack_task(letter.payload, spec, self._method, held)
        self._hold(task, held)
        rows = self._parts(self._learner.problem)
        train, evaluate = (Subset(self._learner.problem.train, part.tolist()) for part in rows)  # pyright: ignore[reportArgumentType]
        memory, when = Memory(self._folder / "memory"), (task.round, task.phase)
        kept = None
        if self._method.keep:
            kept = memory.read(self.client, before=when if task.kind == "train" else (task.round + 1, 0))
        if task.kind == "test":
            raise RecordError("this client has no test set of the server's")
        asked = Assignment(task, {"train": train, "evaluate": evaluate}, kept)
        with reproducible(self._recipe.compute.threads or torch.get_num_threads()):
            reply, keeps = work(
                self._learner.model, self._method, asked, training=self._learner.training, seed=self._recipe.seed
            )
        if isinstance(reply, Failure):
            return Letter({"error": reply.reason, "client": self.client})
        if keeps:
            memory.write(self.client, when, keeps)
        packed, lost = pack_update(task, reply, compression=self._compression, lost=self._lost)
        if task.kind == "train":
            self._lost = lost
        return Letter({"client": self.client}, packed)

    def _bye(self, letter: Letter) -> Letter:
        shutil.rmtree(self.folder / letter.values["run"], ignore_errors=True)
        self._run = ""
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
