"""What a run learns: a model, examples, a loss, and metrics by which answers are judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from anyrank.errors import ConfigError

__all__ = [
    "ACCURACY",
    "CLASSIFICATION",
    "Answers",
    "Batch",
    "Examples",
    "Metric",
    "Objective",
    "Problem",
    "collate_pairs",
    "one_each",
]

Batch = Mapping[str, Tensor]
"""What a model takes, by the names of its arguments, and `labels`; what it takes as its only argument is called `inputs`."""


@runtime_checkable
class Examples(Protocol):
    """A map-style data set: anything with a length and items by position."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One example, as the collate function takes it."""
        ...


class Answers(NamedTuple):
    """What a model answered to many examples.

    Attributes:
        predictions: one for each target.
        labels: what was expected, likewise.
        loss: the mean over targets.
    """

    predictions: np.ndarray
    labels: np.ndarray
    loss: float


@dataclass(frozen=True)
class Metric:
    """How well a model answers.

    Args:
        name: such as `accuracy`.
        of: its value for these answers.
        higher_is_better: or else lower is.
    """

    name: str
    of: Callable[[Answers], float]
    higher_is_better: bool = True

    def value(self, answers: Answers) -> float:
        """How well these answers do.

        Raises:
            ConfigError: it is no number.
        """
        found = self.of(answers)
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:  # the last is PyTorch's, of a tensor with many numbers
            raise ConfigError(
                f"problem.objective: metric {self.name!r}: expected a number, got {found!r:.200}. Have `of` return a float."
            ) from error

    def reached(self, value: float | None, target: float) -> bool:
        """Whether a value is at least as good as a target; one that was not measured is not."""
        return value is not None and (value >= target if self.higher_is_better else value <= target)


def one_each(batch: Batch) -> Tensor:
    """Every example has one target."""
    return torch.ones(len(batch["labels"]))


class Objective(NamedTuple):
    """What training lowers, and how the outcome is judged.

    Attributes:
        loss: from the model's output `[examples, ...]` and the batch to the loss of each example, summed over its targets.
        predict: from the same two to the predictions and labels of all targets, in one dimension each.
        metrics: the first is what a run is judged by.
        targets: how many targets each example of a batch has, `[examples]`: tokens of a text, or 1. A loss is averaged over
            targets, so that a long answer counts for more than a short one.
    """

    loss: Callable[[Tensor, Batch], Tensor]
    predict: Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
    metrics: Sequence[Metric]
    targets: Callable[[Batch], Tensor] = one_each

    @property
    def metric(self) -> Metric:
        """What a run is judged by."""
        return self.metrics[0]


ACCURACY = Metric("accuracy", lambda answers: float(np.mean(answers.predictions == answers.labels)))
CLASSIFICATION = Objective(
    loss=lambda logits, batch: F.cross_entropy(logits, batch["labels"].to(logits.device), reduction="none"),
    predict=lambda logits, batch: (logits.argmax(-1), batch["labels"]),
    metrics=(ACCURACY,),
)
"""One of several classes for each example, from logits `[examples, classes]`."""


def collate_pairs(examples: list[Any]) -> Batch:
    """A batch of `(input, label)` pairs, or of mappings that have `labels`.

    Raises:
        ConfigError: they are something else.
    """
    batch = default_collate(examples)
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return {"inputs": batch[0], "labels": batch[1]}
    raise ConfigError(
        "problem.collate: expected examples that are pairs of input and label, or mappings with `labels`, got "
        f"{_kind(examples[0])}. For others, hand over a collate function of your own."
    )


def _kind(example: Any) -> str:
    """What an example is, for an error."""
    if isinstance(example, Mapping):
        return f"a mapping with {', '.join(map(str, example))}"
    if isinstance(example, list | tuple):
        return f"{len(example)} values"
    return f"a {type(example).__name__}"


def _nothing_else(model: Any) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """Everything that a run learns from, and what it is judged by.

    Args:
        model: makes the base model; called once, with torch's random numbers seeded from the run's seed.
        train: all clients' training examples.
        test: the server's test examples.
        objective: loss and metrics.
        collate: examples to a batch of tensors.
        columns: of the training examples, by name, one value for each: what a partition can go by. `label` among them makes
            partitions by label possible.
        lengths: of the training examples, in tokens; None where all are of one size.
        largest: a batch of so many of the largest examples there can be, to count memory and time by; None takes the longest
            training example.
        label_names: class names in label order, where there are classes.
        references: what rules that understand nothing reach by the metric, by what they are called.
        fingerprint: of the data's content, and of the tokens that it became; a run is only continued with the same one.
        task_type: PEFT's name for what the model does, if it has one.
        auto_class: the class of transformers that loads such a model, if one does.
        model_arguments: what that class is told beside the model's name, such as `num_labels`.
        form: of conversations, in a name; an adapter is used with prompts of the same form.
        at_end: metrics that take too long for every round, from the model with its adapter in place; by default none.
        remarks: what is allowed but worth knowing.

    Raises:
        ConfigError: no examples or metrics, columns or lengths that do not fit the examples, or a model in place of what
            makes one.
    """

    model: Callable[[], nn.Module]
    train: Examples
    test: Examples
    objective: Objective = CLASSIFICATION
    collate: Callable[[list[Any]], Batch] = collate_pairs
    columns: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    lengths: np.ndarray | None = None
    largest: Callable[[int], Batch] | None = None
    label_names: Sequence[str] = ()
    references: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    task_type: str | None = None
    auto_class: str | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    form: str | None = None
    at_end: Callable[[Any], Mapping[str, float]] = _nothing_else
    remarks: Sequence[str] = ()

    def __post_init__(self):
        """Refuse what no run can use.

        Raises:
            ConfigError: it cannot be used.
        """
        problems = [
            f"problem.{name}: there are no examples." for name in ("train", "test") if not len(getattr(self, name))
        ]
        if isinstance(self.model, nn.Module):
            problems.append(
                "problem.model: expected what makes a model, such as its class; got a model that is made already."
            )
        if not self.objective.metrics:
            problems.append("problem.objective: expected at least one metric, by which a run is judged.")
        problems += [
            f"problem.columns: expected a value for each of {len(self.train)} training examples, {name} has {len(values)}."
            for name, values in self.columns.items()
            if len(values) != len(self.train)
        ]
        if problems := problems or [*self._odd_lengths(), *self._odd_labels()]:
            raise ConfigError(problems)

    def _odd_lengths(self) -> list[str]:
        if self.lengths is None:
            return []
        found = self.lengths if isinstance(self.lengths, np.ndarray) else None
        fits = found is not None and found.shape == (len(self.train),) and found.dtype.kind in "iu" and found.min() > 0
        if fits:
            return []
        what = type(self.lengths).__name__ if found is None else f"{found.dtype} {list(found.shape)}"
        return [
            f"problem.lengths: expected a NumPy array of {len(self.train)} whole numbers above 0, one for each training "
            f"example, got {what}. Such as np.array([...]), or None where all are of one size."
        ]

    def _odd_labels(self) -> list[str]:
        if not self.label_names or "label" not in self.columns:
            return []
        codes = np.asarray(self.columns["label"])
        if codes.dtype.kind in "iub" and codes.min() >= 0 and codes.max() < len(self.label_names):
            return []
        odd = next(
            (code for code in codes.tolist() if not isinstance(code, int) or not 0 <= code < len(self.label_names)),
            codes.dtype,
        )
        return [
            f"problem.columns: label: expected whole numbers from 0 to {len(self.label_names) - 1}, as there are "
            f"{len(self.label_names)} label_names, got {odd!r}. Name every class, or leave label_names out."
        ]

    def batch_of_largest(self, count: int) -> Batch:
        """A batch of so many of the largest examples there can be."""
        if self.largest is not None:
            return self.largest(count)
        longest = 0 if self.lengths is None else int(np.argmax(self.lengths))
        return self.collate([self.train[longest]] * count)
