"""Where examples come from: files, folders of files or of images, and the hub."""

import glob
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError

from anyrank.data import stdlib_docs
from anyrank.data.images import folders_of_images
from anyrank.errors import ConfigError
from anyrank.paths import expanded
from anyrank.seeding import numpy_generator

__all__ = [
    "FILE",
    "FORMATS",
    "LABEL_NAMES",
    "Parts",
    "absent_columns",
    "fingerprint",
    "parts",
    "split_off",
    "with_tokens",
]

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
EXPECTED = {
    "csv": "a header line, at least one row, as many fields in each row as in the header; quote texts with commas",
    "json": "at least one row, each a JSON object with the same keys",
    "parquet": "a Parquet file with at least one row",
    "text": "plain text in UTF-8, paragraphs separated by empty lines",
}
SPLITS = ("train", "test", "validation")
LABEL_NAMES = "label_names.json"
"""What class names lie in beside the files."""
FILE = "file"
"""The column that names the file of a row, where a folder holds a file for each client."""

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a source holds.

    Attributes:
        train: training examples.
        test: test examples, if the source has any that can be used.
    """

    train: Dataset
    test: Dataset | None


def parts(
    source: str,
    *,
    test: str | None = None,
    as_text: Sequence[str] = (),
    usable: Callable[[Dataset], str] = lambda part: "",
) -> Parts:
    """Read a data set from this machine or, where no such file is here, from the Hugging Face hub.

    Test examples come from `test`, else from the source's own test or validation part, the first that is usable.

    Args:
        source: `stdlib-docs`; a .csv, .json, .jsonl or .parquet file; a directory with train.* and maybe test.* or
            validation.* files of these formats; one with such files by other names, a file for each client, which becomes
            the column `file`; or the name of a Hugging Face data set, `name:config` where it has several. `$NAME` stands for
            a variable of the environment.
        test: a second file, with the test examples.
        as_text: columns that are texts, whatever they look like.
        usable: why a part cannot serve as test examples; empty if it can.

    Raises:
        ConfigError: there is no such source, or it cannot be read.
    """
    columns = tuple(as_text)
    with _no_progress_bars():
        splits = _splits(str(expanded(source, key="data.source")), columns)
        given = None if test is None else _file(expanded(test, key="data.test"), columns)
    return Parts(_train_part(splits, source), given if given is not None else _own_test(splits, usable))


def split_off(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test examples, where a source has no test part.

    Args:
        data: all examples.
        share: of the test examples, between 0 and 1.
        seed: of the run.

    Raises:
        ConfigError: a share that leaves one of them empty.
    """
    if not 0 < share < 1 or len(data) < 2:
        raise ConfigError(
            f"data.test_share: expected a number between 0 and 1 and two examples or more, as there is no test part, got "
            f"{share} of {len(data)} examples"
        )
    size = min(max(round(share * len(data)), 1), len(data) - 1)
    order = numpy_generator(seed, "test").permutation(len(data))
    return data.select(np.sort(order[size:])), data.select(np.sort(order[:size]))


def fingerprint(parts: Sequence[Dataset], columns: Sequence[str], more: Sequence[Any] = ()) -> str:
    """SHA-256 (hex) of these columns' content; the same for the same content in any file format and process.

    Args:
        parts: training and test examples.
        columns: whose content counts.
        more: what else it depends on.
    """
    digest = hashlib.sha256(json.dumps([list(columns), *more]).encode())
    for part in parts:
        digest.update(b"\n")
        for row in zip(*(part[column][:] for column in columns), strict=True):
            digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def with_tokens(fingerprint: str, encoded: Sequence[Dataset]) -> str:
    """A fingerprint (hex) that another tokenizer, or another chat template, changes too.

    Args:
        fingerprint: of the data's content.
        encoded: what a tokenizer made of it: columns of numbers, or of lists of them.
    """
    digest = hashlib.sha256(fingerprint.encode())
    for part in encoded:
        for name in sorted(part.column_names):
            digest.update(f"\n{name} {len(part)}\n".encode())
            for chunk in part.data.column(name).chunks:
                for content in _contents(chunk):
                    digest.update(content)
    return digest.hexdigest()


def _contents(array: Any) -> Iterator[bytes]:
    """An Arrow array as it lies in memory: a hundred times as fast as by way of Python's numbers."""
    if hasattr(array, "value_lengths"):
        yield from _contents(array.value_lengths())
        yield from _contents(array.flatten())
    else:
        yield array.to_numpy(zero_copy_only=False).tobytes()


def absent_columns(data: Dataset, wanted: Sequence[str], *, where: str) -> list[str]:
    """One sentence for each wanted column that `data` lacks: the columns it has, and the nearest of them."""
    return [_absent(data, name, where) for name in wanted if name not in data.column_names]


def _absent(data: Dataset, name: str, where: str) -> str:
    near = get_close_matches(name, data.column_names, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}: there is no column {name!r}; the columns are {', '.join(data.column_names)}{suggestion}"


def _train_part(splits: Mapping[str, Dataset], source: str) -> Dataset:
    if "train" not in splits:
        raise ConfigError(f"data {source}: there is no part 'train'; the parts are {', '.join(splits)}")
    return splits["train"]


def _own_test(splits: Mapping[str, Dataset], usable: Callable[[Dataset], str]) -> Dataset | None:
    for name in ("test", "validation"):
        if name in splits:
            if not (reason := usable(splits[name])):
                return splits[name]
            logger.warning("the %s part %s and is not used", name, reason)
    return None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Also without the hub's own lines about its retries: what went wrong is said once, at the end."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with _silent("huggingface_hub", logging.ERROR):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _silent(library: str, below: int) -> Iterator[None]:
    """Without what a library logs below a level."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(below)
    try:
        yield
    finally:
        logger.setLevel(level)


def _splits(source: str, columns: tuple[str, ...]) -> Mapping[str, Dataset]:
    path = Path(source)
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
    if not by_split and (images := folders_of_images(path)):
        return images
    clients = [file for file in sorted(path.iterdir()) if file.suffix in FORMATS and file.name != LABEL_NAMES]
    if any(file.suffix != ".txt" for file in clients):  # beside tables a text is a note
        clients = [file for file in clients if file.suffix != ".txt"]
    if clients and not by_split:
        return {"train": _of_clients(clients, columns)}
    if "train" not in by_split:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
        expected = " or ".join(f"train{suffix}" for suffix in FORMATS)
        raise ConfigError(f"data {path}: expected {expected} in the directory, found {found}")
    return {split: _file(file, columns) for split, file in by_split.items()}


def _of_clients(files: Sequence[Path], columns: tuple[str, ...]) -> Dataset:
    """Files of several clients as one table, in which the column `file` says whose a row is."""
    tables = [_file(file, columns) for file in files]
    kinds = [_kinds(table) for table in tables]
    common = {name: kind for own in reversed(kinds) for name, kind in own.items()}
    problems, first = list[str](), tables[0]
    for file, table, own in zip(files, tables, kinds, strict=True):
        if {*table.column_names} != {*first.column_names} or any(common[name] != kind for name, kind in own.items()):
            problems.append(
                f"data file {file}: its columns are {_columns(table)}, but those of {files[0].name} are {_columns(first)}; a "
                "folder with a file for each client needs the same columns of the same types in all of them"
            )
        if FILE in table.column_names:
            problems.append(f"data file {file}: a column {FILE!r} is added, which says whose a row is; rename its own")
    if problems:
        raise ConfigError(problems)
    alike = Features({name: common.get(name, kind) for name, kind in first.features.items()})
    named = [
        table.cast(alike).add_column(FILE, [file.stem] * len(table)) for file, table in zip(files, tables, strict=True)
    ]  # pyright: ignore
    return datasets.concatenate_datasets(named)


def _kinds(table: Dataset) -> dict[str, Any]:
    """The types of the columns, but for those that are empty, whose types mean nothing."""
    full = [name for name in table.column_names if table.data.column(name).null_count < len(table)]
    text, long = Value("string"), Value("large_string")  # which of them depends on the file's format
    return {name: text if table.features[name] == long else table.features[name] for name in full}


def _columns(table: Dataset) -> str:
    kinds = {**table.features, **_kinds(table)}
    return ", ".join(f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in kinds.items())


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
    if kind == "text":
        return _paragraphs(path.read_text(encoding="utf-8"))
    options = _csv_options(columns) if kind == "csv" else {}
    with warnings.catch_warnings(), _silent("datasets", logging.CRITICAL):  # it logs as an error what it raises as well
        warnings.filterwarnings("error", message="Length of header")
        return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)


def _paragraphs(text: str) -> Dataset:
    found = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not found:
        raise ValueError("no rows")
    return Dataset.from_dict({"text": found})


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
