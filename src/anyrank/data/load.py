"""From a name or a path to labelled training and test texts, and from texts to tokens."""

import glob
import hashlib
import json
import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Value
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from anyrank.data import stdlib_docs
from anyrank.errors import ConfigError
from anyrank.seeding import numpy_generator

__all__ = ["Labelled", "absent_columns", "encode", "load"]

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
EXPECTED = {
    "csv": "a header line, at least one row, as many fields in each row as in the header; quote texts with commas",
    "json": "at least one row, each a JSON object with the same keys",
    "parquet": "a Parquet file with at least one row",
}
SPLITS = ("train", "test", "validation")
UNLABELLED = -1  # what published test sets carry where their labels are kept secret

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Labelled:
    """A classification task.

    Args:
        train: training examples: the text columns (strings), `label` (int64, an index into `label_names`), and
            every other column of the source, so that a partition can use it.
        test: the server's test examples, likewise.
        text: one text column, or two for a pair.
        label_names: class names in label order.
        fingerprint: SHA-256 (hex) of the texts, labels and names of both parts; the same for the same content in
            any file format and process.
    """

    train: Dataset
    test: Dataset
    text: tuple[str, ...]
    label_names: tuple[str, ...]
    fingerprint: str


def load(source: str, *, text: Sequence[str], label: str, test: str | None, test_share: float, seed: int) -> Labelled:
    """Load a data set from this machine or, where no such file is here, from the Hugging Face hub.

    Test examples come from `test`; else from the source's own test or validation part, the first that has labels;
    else a seeded share of the training examples is split off. Class names come from `label_names.json` beside the
    files (a list, or an object of lists by label column), else from the data set itself, else they are the labels.

    Args:
        source: `stdlib-docs`; a .csv, .json, .jsonl or .parquet file; a directory with train.* and maybe test.* or
            validation.* files of these formats; or the name of a Hugging Face data set, `name:config` where it has
            several.
        text: one or two columns of texts; missing texts become empty ones.
        label: the column of labels: strings, integers or booleans.
        test: a second file with the test examples.
        test_share: between 0 and 1; used only where there is no test part.
        seed: of the split.

    Raises:
        ConfigError: the source cannot be read, is empty, lacks a column, or has labels that are missing or unknown.
    """
    columns = (text,) if isinstance(text, str) else tuple(text)
    with _no_progress_bars():
        splits = _splits(source, columns)
        given_test = None if test is None else _file(Path(test).expanduser(), columns)
    train = _train_part(splits, source)
    own_test = _own_test(splits, label) if given_test is None else given_test
    _check({"training data": train, "test data": own_test}, columns, label)
    lookup, names = _classes(train, label, _published_names(source, label, train))
    train = _tidied(train, columns, label, lookup, "training data")
    if own_test is None:
        train, own_test = _split_off(train, test_share, seed)
    else:
        own_test = _tidied(own_test, columns, label, lookup, "test data")
    return Labelled(train, own_test, columns, names, _fingerprint((train, own_test), columns, names))


def encode(data: Dataset, tokenizer: PreTrainedTokenizerBase, *, text: Sequence[str], max_length: int) -> Dataset:
    """Tokenise one text or a pair per example, cut to `max_length` tokens and not padded.

    Returns:
        The tokenizer's columns, `labels` (0..n-1) and `length` (in tokens), in the order of `data`.
    """
    first, second = data[text[0]][:], data[text[1]][:] if len(text) > 1 else None
    tokens = tokenizer(first, second, truncation=True, max_length=max_length)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    return Dataset.from_dict({**tokens, "labels": data["label"][:], "length": lengths})


def absent_columns(data: Dataset, wanted: Sequence[str], *, where: str) -> list[str]:
    """One sentence for each wanted column that `data` lacks: the columns it has, and the nearest of them."""
    return [_absent(data, name, where) for name in wanted if name not in data.column_names]


def _absent(data: Dataset, name: str, where: str) -> str:
    near = get_close_matches(name, data.column_names, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}: there is no column {name!r}; the columns are {', '.join(data.column_names)}{suggestion}"


# Where the data comes from


def _train_part(splits: Mapping[str, Dataset], source: str) -> Dataset:
    if "train" not in splits:
        raise ConfigError(f"data {source}: there is no part 'train'; the parts are {', '.join(splits)}")
    return splits["train"]


def _own_test(splits: Mapping[str, Dataset], label: str) -> Dataset | None:
    for name in ("test", "validation"):
        if name in splits and _has_labels(splits[name], label):
            return splits[name]
        if name in splits:
            logger.warning("the %s part has no labels in column %r and is not used", name, label)
    return None


def _has_labels(data: Dataset, label: str) -> bool:
    return label in data.column_names and any(value not in (None, UNLABELLED) for value in data[label][:])


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Also without the hub's own lines about its retries: what went wrong is said once, at the end."""
    shown, logger = not datasets.are_progress_bars_disabled(), logging.getLogger("huggingface_hub")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _splits(source: str, columns: tuple[str, ...]) -> Mapping[str, Dataset]:
    path = Path(source).expanduser()
    if source == stdlib_docs.NAME:
        return stdlib_docs.stdlib_docs()
    if path.is_dir():
        return _directory(path, columns)
    if path.suffix in FORMATS or path.exists():
        return {"train": _file(path, columns)}
    return _hub(source)


def _directory(path: Path, columns: tuple[str, ...]) -> dict[str, Dataset]:
    files = [file for file in sorted(path.iterdir()) if file.stem in SPLITS and file.suffix in FORMATS]
    by_split = {file.stem: file for file in files}
    if len(by_split) < len(files):
        found = ", ".join(file.name for file in files)
        raise ConfigError(f"data {path}: expected one file for each part, found {found}; remove some")
    if "train" not in by_split:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
        expected = " or ".join(f"train{suffix}" for suffix in FORMATS)
        raise ConfigError(f"data {path}: expected {expected} in the directory, found {found}")
    return {split: _file(file, columns) for split, file in by_split.items()}


def _file(path: Path, columns: tuple[str, ...]) -> Dataset:
    if not path.is_file():
        raise ConfigError(f"data file {path}: there is no such file (looked for {path.absolute()})")
    if path.suffix not in FORMATS:
        raise ConfigError(f"data file {path}: expected a name ending in {', '.join(FORMATS)}")
    kind = FORMATS[path.suffix]
    try:
        return _read(kind, path, columns)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:  # the last is an empty file of JSON lines
        reason = str(error.__cause__ or error).strip() or "no rows"
        raise ConfigError(f"data file {path}: cannot be read ({reason}); expected {EXPECTED[kind]}") from error


def _read(kind: str, path: Path, columns: tuple[str, ...]) -> Dataset:
    options = _csv_options(columns) if kind == "csv" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Length of header")
        return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)


def _csv_options(columns: tuple[str, ...]) -> dict[str, Any]:
    """Without these "NA" is a missing value, "007" a number, and rows longer than the header shift unnoticed."""
    as_written = dict.fromkeys(columns, str)
    return {"keep_default_na": False, "na_values": [""], "index_col": False, "converters": as_written}


def _hub(source: str) -> Mapping[str, Dataset]:
    name, _, config = source.partition(":")
    try:
        return {str(split): part for split, part in datasets.load_dataset(name, config or None).items()}
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"data {source!r}: there is no such file or directory (looked for {Path(source).absolute()}), and "
            f"the Hugging Face data set {name!r} could not be loaded ({error}); expected {stdlib_docs.NAME}, a "
            f"path to a {', '.join(FORMATS)} file or a directory of them, or the name of a data set that is in "
            "the local cache or within reach"
        ) from error


# What is in it


def _check(parts: Mapping[str, Dataset | None], columns: tuple[str, ...], label: str) -> None:
    problems = _name_problems(columns, label)
    for where, data in parts.items():
        if data is not None:
            problems += absent_columns(data, [*columns, label], where=where)
            problems += _content_problems(data, columns, where)
    if problems:
        raise ConfigError(problems)


def _name_problems(columns: tuple[str, ...], label: str) -> list[str]:
    problems = []
    if len(columns) not in (1, 2) or len(set(columns)) < len(columns):
        problems.append(f"data.text: expected one column, or two different ones for a pair, got {list(columns)}")
    if {label, "label"} & set(columns):
        problems.append("data.text: expected neither the label column nor one named 'label'; rename it in the data")
    return problems


def _content_problems(data: Dataset, columns: tuple[str, ...], where: str) -> list[str]:
    problems = [] if len(data) else [f"{where}: there are no rows"]
    for column in columns:
        kind = data.features.get(column, Value("string"))
        if not isinstance(kind, Value) or "binary" in kind.dtype:
            problems.append(f"{where}: column {column!r}: expected texts, found {kind}")
    return problems


def _published_names(source: str, label: str, train: Dataset) -> tuple[str, ...] | None:
    path = Path(source).expanduser()
    beside = (path if path.is_dir() else path.parent) / "label_names.json"
    if path.exists() and beside.exists():
        return _names_in(beside, label)
    feature = train.features[label]
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


def _classes(train: Dataset, label: str, names: tuple[str, ...] | None) -> tuple[dict[Hashable, int], tuple[str, ...]]:
    """The index of each label as it is written in the data, and the class names."""
    values = _labels(train, label, "training data")
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


def _tidied(data: Dataset, columns: tuple[str, ...], label: str, lookup: Mapping[Hashable, int], where: str) -> Dataset:
    """The data with texts as strings and `label` as indices; a label column of another name stays too."""
    codes = _codes(_labels(data, label, where), lookup, where)
    for column in columns:
        texts = ["" if text is None else str(text) for text in data[column][:]]
        data = data.remove_columns(column).add_column(column, texts, feature=Value("string"))
    data = data.remove_columns("label") if "label" in data.column_names else data
    return data.add_column("label", codes, feature=Value("int64"))


def _codes(values: list[Any], lookup: Mapping[Hashable, int], where: str) -> list[int]:
    for row, value in enumerate(values, start=1):
        if value not in lookup:
            known = ", ".join(repr(label) for label in lookup)
            raise ConfigError(f"{where}: row {row}: unknown label {value!r}; the labels are {known}")
    return [lookup[value] for value in values]


def _split_off(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    if not 0 < share < 1:
        raise ConfigError(f"data.test_share: expected a number between 0 and 1, as there is no test part, got {share}")
    size = min(max(round(share * len(data)), 1), len(data) - 1)
    order = numpy_generator(seed, "test").permutation(len(data))
    return data.select(np.sort(order[size:])), data.select(np.sort(order[:size]))


def _fingerprint(parts: Sequence[Dataset], columns: tuple[str, ...], names: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps([columns, names]).encode())
    for part in parts:
        digest.update(b"\n")
        for row in zip(*(part[column][:] for column in (*columns, "label")), strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
