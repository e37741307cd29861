"""What a recipe says of model and data beside its problem: the same for every kind of problem."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from torch import nn
from torch.utils.data import Subset

from anyrank import data, hf
from anyrank.data import Parts
from anyrank.hf import Loading
from anyrank.pretrained import Pretrained

__all__ = ["Given", "by_length", "without"]


@dataclass(frozen=True)
class Given:
    """Where model and examples come from.

    Args:
        base: the base model.
        loading: how it is put into memory.
        source: of the examples, as `data.parts` takes it.
        test: a second file, with the test examples.
        test_share: split off where the source has no test part.
        seed: of the run.
        label_names: class names in label order, where they are known from before; None takes the data's.
        only: all of the source is there to `train` on, or to `test` with, in the latter case its test part if it has one; the
            other part is left out as far as it can be.
    """

    base: Pretrained
    loading: Loading
    source: str
    test: str | None
    test_share: float
    seed: int
    label_names: Sequence[str] | None = None
    only: Literal["train", "test"] | None = None

    def parts(self, columns: Sequence[str], *, usable: Callable[[Dataset], str] = lambda part: "") -> Parts:
        """The source's training and test examples; `columns` are texts, see `data.parts`."""
        found = data.parts(self.source, test=self.test, as_text=columns, usable=usable)
        if self.only == "test":
            return Parts(found.test or found.train, found.test or found.train)
        if self.only == "train":
            return Parts(found.train, found.train.select(range(min(1, len(found.train)))))
        return found

    def split(self, found: Parts) -> tuple[Dataset, Dataset]:
        """Training and test examples, the latter split off where there are none."""
        if found.test is None:
            return data.split_off(found.train, self.test_share, self.seed)
        return found.train, found.test

    def labelled(self, found: Parts, label: str) -> tuple[Dataset, Dataset, tuple[str, ...]]:
        """Training and test examples with class indices in the column `label`, and the class names."""
        return data.labelled(
            found,
            label,
            source=self.source,
            test_share=self.test_share,
            seed=self.seed,
            known=self.label_names,
        )

    def labelled_texts(self, text: Sequence[str], label: str, *, numbers: bool = False) -> data.Labelled:
        """Labelled texts, see `data.labelled_texts`."""
        return data.labelled_texts(
            self.parts(text, usable=data.lacks_labels(label)),
            text=text,
            label=label,
            source=self.source,
            test_share=self.test_share,
            seed=self.seed,
            numbers=numbers,
            known=self.label_names,
        )

    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return hf.load_tokenizer(self.base)

    def image_processor(self) -> Any:
        """The base model's image processor."""
        return hf.load_image_processor(self.base)

    def config(self) -> Any:
        """What the base model says of itself."""
        return hf.load_config(self.base)

    def load(self, auto_class: str, **further: Any) -> Callable[[], nn.Module]:
        """What loads the base model by a class of transformers."""
        return partial(hf.load_model, self.base, auto_class, self.loading, **further)


def by_length(examples: Dataset) -> Subset:
    """Examples in order of their `length`, in which they are padded least."""
    return Subset(examples, np.argsort(examples["length"][:], kind="stable").tolist())  # pyright: ignore[reportArgumentType]


def without(examples: Dataset, *columns: str) -> dict[str, Sequence[Any]]:
    """The other columns, for partitions to go by."""
    return {name: examples[name][:] for name in examples.column_names if name not in columns}
