"""Labelled texts: one or two columns of them and a label, checked, and from texts to tokens."""

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from anyrank.data.read import LABEL_NAMES, Parts, absent_columns, fingerprint, parts, split_off
from anyrank.errors import ConfigError
from anyrank.paths import expanded

__all__ = [
    "Labelled",
    "class_index",
    "encode",
    "labelled",
    "labelled_texts",
    "lacks_labels",
    "load",
    "numbered",
    "with_texts",
]

LARGEST = float(np.finfo(np.float32).max)
UNLABELLED = -1  # what published test sets carry where their labels are kept secret


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts with labels.

    Args:
        train: training examples: the text columns (strings), `label` (int64, an index into `label_names`, or a float), and
            every other column of the source, so that a partition can use it.
        test: the server's test examples, likewise.
        text: one text column, or two for a pair.
        label_names: class names in label order; none where labels are numbers to be predicted.
        fingerprint: SHA-256 (hex) of the texts, labels and names of both parts; the same for the same content in
            any file format and process.
    """

    train: Dataset
    test: Dataset
    text: tuple[str, ...]
    label_names: tuple[str, ...]
    fingerprint: str


def load(source: str, *, text: Sequence[str], label: str, test: str | None, test_share: float, seed: int) -> Labelled:
    """Load labelled texts, from where `read.parts` finds them; `labelled_texts` has the rest.

    Raises:
        ConfigError: the source cannot be read, is empty, lacks a column, or has labels that are missing or unknown.
    """
    found = parts(source, test=test, as_text=text, usable=lacks_labels(label))
    return labelled_texts(found, text=text, label=label, source=source, test_share=test_share, seed=seed)


def labelled_texts(
    found: Parts,
    *,
    text: Sequence[str],
    label: str,
    source: str,
    test_share: float,
    seed: int,
    numbers: bool = False,
    known: Sequence[str] | None = None,
) -> Labelled:
    """Texts with labels out of what a source holds.

    A test part counts only if it has labels; where there is none, a seeded share of the training examples is split off.
    Class names come from `label_names.json` beside the files (a list, or an object of lists by label column), else from the
    data set itself, else they are the labels.

    Args:
        found: what a source holds.
        text: one or two columns of texts; missing texts become empty ones.
        label: the column of labels: strings, integers or booleans.
        source: what it is called, beside which class names may lie.
        test_share: between 0 and 1; used only where there is no test part.
        seed: of the split.
        numbers: labels are numbers to be predicted, not classes.
        known: class names in label order, if they are known from before.

    Raises:
        ConfigError: there are no rows, a column is lacking, or labels are missing or unknown.
    """
    columns = (text,) if isinstance(text, str) else tuple(text)
    if problems := _name_problems(columns, label):
        raise ConfigError(problems)
    found = with_texts(found, columns, besides=[label])
    if numbers:
        (train, own_test), names = numbered(found, label, test_share=test_share, seed=seed), ()
    else:
        train, own_test, names = labelled(found, label, source=source, test_share=test_share, seed=seed, known=known)
    return Labelled(train, own_test, columns, names, fingerprint((train, own_test), [*columns, "label"], [names]))


def with_texts(found: Parts, columns: Sequence[str], *, besides: Sequence[str] = ()) -> Parts:
    """What a source holds, with these columns as strings, missing texts as empty ones.

    Args:
        found: what a source holds.
        columns: of texts, or of numbers and the like, which become texts.
        besides: other columns that there must be.

    Raises:
        ConfigError: there are no rows, a column is lacking, or holds something else.
    """
    problems = []
    for where, part in zip(("training data", "test data"), found, strict=True):
        if part is not None:
            problems += absent_columns(part, [*columns, *besides], where=where)
            problems += _content_problems(part, columns, where)
    if problems:
        raise ConfigError(problems)
    return Parts(_with_texts(found.train, columns), found.test and _with_texts(found.test, columns))


def encode(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, *, text: Sequence[str], max_length: int
) -> tuple[Dataset, int]:
    """Tokenise one text or a pair per example, cut to `max_length` tokens and not padded.

    Returns:
        The tokenizer's columns, `labels` and `length` (in tokens), in the order of `data`; and how many examples were cut.
    """
    first, second = data[text[0]][:], data[text[1]][:] if len(text) > 1 else None
    tokens = tokenizer(first, second, truncation=True, max_length=max_length)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    # A tokenizer in Python does not tell what it cut.
    cut = [bool(e.overflowing) for e in tokens.encodings] if tokens.encodings else [n == max_length for n in lengths]
    return Dataset.from_dict({**tokens, "labels": data["label"][:], "length": lengths}), sum(cut)


def lacks_labels(label: str) -> Any:
    """For `read.parts`: whether a test part has no labels in this column."""

    def reason(part: Dataset) -> str:
        labels = part[label][:] if label in part.column_names else []
        return "" if any(value not in (None, UNLABELLED) for value in labels) else f"has no labels in column {label!r}"

    return reason


def labelled(
    found: Parts, label: str, *, source: str, test_share: float, seed: int, known: Sequence[str] | None = None
) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Training and test examples with class indices in the column `label`, and the class names.

    Args:
        found: what a source holds.
        label: the column of labels: strings, integers or booleans.
        source: where class names may lie beside.
        test_share: split off where there is no test part.
        seed: of the split.
        known: class names in label order, if they are known from before.

    Raises:
        ConfigError: labels that are missing or unknown, or only one.
    """
    train, own_test = found
    values = _labels(train, label, "training data")
    lookup, names = class_index(values, label, feature=train.features[label], source=source, known=known)
    train = _with_label(train, _codes(values, lookup, "training data"), "int64")
    if own_test is None:
        return *split_off(train, test_share, seed), names
    codes = _codes(_labels(own_test, label, "test data"), lookup, "test data")
    return train, _with_label(own_test, codes, "int64"), names


def class_index(
    values: Sequence[Any], label: str, *, feature: Any, source: str, known: Sequence[str] | None = None
) -> tuple[Mapping[Any, int], tuple[str, ...]]:
    """The number of each label as it is written, and the class names.

    Args:
        values: all labels of the training examples.
        label: the column that they are in.
        feature: of a label, as the data set has it; it may know the names.
        source: where class names may lie beside.
        known: class names in label order, if they are known from before.

    Raises:
        ConfigError: labels of different kinds, or only one; or a class that is not among those known from before.
    """
    published = _published_names(source, label, feature)
    if known is None:
        return _classes(values, label, published)
    return _known(values, label, known, published), tuple(known)


def numbered(found: Parts, label: str, *, test_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test examples with numbers in the column `label`.

    Args:
        found: what a source holds.
        label: the column of numbers.
        test_share: split off where there is no test part.
        seed: of the split.

    Raises:
        ConfigError: a label that is missing or no number.
    """
    train = _with_label(found.train, _numbers(found.train, label, "training data"), "float64")
    if found.test is None:
        return split_off(train, test_share, seed)
    return train, _with_label(found.test, _numbers(found.test, label, "test data"), "float64")


def _numbers(data: Dataset, label: str, where: str) -> list[float]:
    values = _labels(data, label, where)
    for row, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ConfigError(f"{where}: row {row}, column {label!r}: expected a finite number, found {value!r}")
        if abs(value) > LARGEST:
            raise ConfigError(
                f"{where}: row {row}, column {label!r}: expected a number of at most {LARGEST:.2g}, which float32 can hold, "
                f"found {value!r}; mend or remove the row, or bring all labels to another scale"
            )
    return [float(value) for value in values]


def _name_problems(columns: tuple[str, ...], label: str) -> list[str]:
    problems = []
    if len(columns) not in (1, 2) or len(set(columns)) < len(columns):
        problems.append(f"problem.text: expected one column, or two different ones for a pair, got {list(columns)}")
    if {label, "label"} & set(columns):
        problems.append("problem.text: expected neither the label column nor one named 'label'; rename it in the data")
    return problems


def _content_problems(data: Dataset, columns: Sequence[str], where: str) -> list[str]:
    problems = [] if len(data) else [f"{where}: there are no rows"]
    for column in columns:
        kind = data.features.get(column, Value("string"))
        if not isinstance(kind, Value) or "binary" in kind.dtype:
            problems.append(f"{where}: column {column!r}: expected texts, found {kind}")
    return problems


def _published_names(source: str, label: str, feature: Any) -> tuple[str, ...] | None:
    path = expanded(source, key="data.source")
    beside = (path if path.is_dir() else path.parent) / LABEL_NAMES
    if path.exists() and beside.exists():
        return _names_in(beside, label)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _names_in(path: Path, label: str) -> tuple[str, ...] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); correct it, or remove it") from error
    names = content.get(label) if isinstance(content, dict) else content
    if names is None:  # the file is about other label columns
        return None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    raise ConfigError(f"{path}: expected a list of class names, or such lists by label column, got {names!r}")


def _labels(data: Dataset, label: str, where: str) -> list[Any]:
    values = data[label][:]
    if None in values:
        row = values.index(None) + 1
        raise ConfigError(f"{where}: row {row} has no label in column {label!r}; give it one, or remove the row")
    return values


def _classes(
    values: Sequence[Any], label: str, names: tuple[str, ...] | None
) -> tuple[dict[Hashable, int], tuple[str, ...]]:
    """The index of each label as it is written in the data, and the class names."""
    kinds = sorted({type(value).__name__ for value in values})
    if kinds not in (["str"], ["int"], ["bool"]):
        found = " and ".join(kinds)
        raise ConfigError(f"label column {label!r}: expected only strings, integers or booleans, found {found}")
    written = sorted(set(values))
    if len(written) < 2:
        raise ConfigError(f"label column {label!r}: expected two labels or more, found only {written[0]!r}")
    if names is None:
        names = tuple(str(value) for value in written)
    elif kinds == ["str"]:
        written = list(names)
    else:
        written = list(range(len(names)))
    return {value: index for index, value in enumerate(written)}, names


def _known(
    values: Sequence[Any], label: str, names: Sequence[str], published: Sequence[str] | None
) -> Mapping[Any, int]:
    """The index of each label as it is written, where labels may be class names or their numbers."""
    written = set(values)
    numbers = all(isinstance(value, int) for value in written)
    if numbers and published and {*published} & {*names}:  # this data has names of its own, maybe in another order
        if strangers := [name for code, name in enumerate(published) if code in written and name not in names]:
            expected = ", ".join(map(repr, names))
            raise ConfigError(f"label column {label!r}: unknown class {strangers[0]!r}; the classes are {expected}")
        return {code: names.index(name) for code, name in enumerate(published) if name in names}
    as_names = {value: names.index(str(value)) for value in written if str(value) in names}
    if numbers and as_names.keys() != written:
        whole = {int(name): number for number, name in enumerate(names) if re.fullmatch(r"-?\d+", name)}
        return whole or {number: number for number in range(len(names))}
    return {name: number for number, name in enumerate(names)} | as_names


def _with_texts(data: Dataset, columns: Sequence[str]) -> Dataset:
    """The data with these columns as strings, missing ones empty."""
    for column in columns:
        texts = ["" if text is None else str(text) for text in data[column][:]]
        texts = Dataset.from_dict({column: texts}, Features({column: Value("string")}))
        others = data.remove_columns(column)  # without any, it has no rows either
        data = concatenate_datasets([others, texts], axis=1) if others.column_names else texts
    return data


def _with_label(data: Dataset, labels: list, dtype: str) -> Dataset:
    """The data with `label` as given; a label column of another name stays too."""
    data = data.remove_columns("label") if "label" in data.column_names else data
    return data.add_column("label", labels, feature=Value(dtype))


def _codes(values: list[Any], lookup: Mapping[Hashable, int], where: str) -> list[int]:
    for row, value in enumerate(values, start=1):
        if value not in lookup:
            known = ", ".join(repr(label) for label in lookup)
            raise ConfigError(f"{where}: row {row}: unknown label {value!r}; the labels are {known}")
    return [lookup[value] for value in values]
