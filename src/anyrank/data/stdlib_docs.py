"""The embedded data set `stdlib-docs`: does this docstring belong to this function?

It is made from the standard library of the running Python, which is read with `ast` and never imported. A pair is
a function's signature as words and the first paragraph of a docstring; every function gives one pair with its own
docstring and one with another function's of the same client and split. So each signature and each docstring is
seen once with either label, and no word on its own says which. The clients are the top-level packages and modules.
"""

import ast
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, Features, Value

from anyrank.errors import ConfigError
from anyrank.seeding import numpy_generator

__all__ = ["CLIENTS", "NAME", "stdlib_docs"]

NAME = "stdlib-docs"
CLIENTS = 24
TEST_SHARE = 0.2  # of the functions
FEWEST_FUNCTIONS = 15  # so that each client's test part has functions to swap docstrings between
FEWEST_WORDS = 3  # "Undocumented." fits any function
FEATURES = Features(
    {
        "client": Value("string"),
        "signature": Value("string"),
        "docstring": Value("string"),
        "label": ClassLabel(names=["mismatch", "match"]),
    }
)

# Tests, what some systems package apart from Python, and other people's code.
LEFT_OUT = {
    *("test", "tests", "idlelib", "tkinter", "turtle", "turtledemo", "distutils", "lib2to3"),
    *("ensurepip", "site-packages", "dist-packages", "__pycache__"),
}

WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


class Function(NamedTuple):
    """A documented function: its package, its name and arguments as words, its docstring's first paragraph."""

    client: str
    signature: str
    docstring: str


@cache  # reading takes seconds, and the library does not change under a running process
def stdlib_docs(root: Path | None = None) -> dict[str, Dataset]:
    """The splits `train` and `test`: columns client, signature, docstring, label; the same on every call.

    Args:
        root: the standard library to read; the running Python's where None.

    Raises:
        ConfigError: the library holds too few documented functions, as in a Python stripped of its sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    clients = _largest(_distinct(_functions(root)), root)
    train, test = zip(*(_split(client, functions) for client, functions in clients.items()), strict=True)
    return {"train": _dataset(train), "test": _dataset(test)}


def _dataset(parts: Iterable[list[dict]]) -> Dataset:
    return Dataset.from_list([pair for part in parts for pair in part], features=FEATURES)


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    # Left-out folders are skipped before they are walked: site-packages may hold very many files.
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if not entry.stem.isidentifier() or entry.stem in LEFT_OUT:
            continue
        for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            if path.suffix == ".py" and not {*path.relative_to(root).parts, path.stem} & LEFT_OUT:
                yield entry.stem, path


def _functions(root: Path) -> Iterator[Function]:
    for client, path in _sources(root):
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Function(client, _signature(node), _first_paragraph(node))


def _parsed(path: Path) -> ast.AST:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # turned into errors elsewhere, they would change the data
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _words(name: str) -> str:
    return " ".join(WORD.findall(name)).lower()


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    given = node.args
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [argument.arg for argument in named if argument and argument.arg not in ("self", "cls")]
    return f"{_words(node.name)} ({', '.join(_words(name) for name in names)})"


def _first_paragraph(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = ast.get_docstring(node) or ""
    return " ".join(re.split(r"\n\s*\n", docstring)[0].split())


def _distinct(functions: Iterable[Function]) -> list[Function]:
    """Each docstring once anywhere; each signature once per client, so that no swapped pair is a true one."""
    kept, docstrings, signatures = [], set(), set()
    for function in functions:
        docstring = _words(function.docstring)
        signature = (function.client, function.signature)
        if len(docstring.split()) < FEWEST_WORDS or docstring in docstrings or signature in signatures:
            continue
        docstrings.add(docstring)
        signatures.add(signature)
        kept.append(function)
    return kept


def _largest(functions: list[Function], root: Path) -> dict[str, list[Function]]:
    sizes = Counter(function.client for function in functions)
    names = [name for name in sizes if sizes[name] >= FEWEST_FUNCTIONS]
    if len(names) < CLIENTS:
        raise ConfigError(
            f"data {NAME}: expected at least {CLIENTS} packages with {FEWEST_FUNCTIONS} documented functions each "
            f"in {root}, found {len(names)}; this Python seems to come without its sources: use a full "
            "installation, or give a data file of your own"
        )
    largest = sorted(names, key=lambda name: (-sizes[name], name))[:CLIENTS]
    return {name: [function for function in functions if function.client == name] for name in sorted(largest)}


def _split(client: str, functions: list[Function]) -> tuple[list[dict], list[dict]]:
    # The seed is a constant: the data set is the same for every run.
    order = [functions[i] for i in numpy_generator(NAME, client).permutation(len(functions))]
    size = round(TEST_SHARE * len(order))
    return _pairs(order[size:]), _pairs(order[:size])


def _pairs(functions: list[Function]) -> list[dict]:
    """Two pairs of each function; in the swapped one it has the docstring of its predecessor in this random order."""
    own = [function._asdict() | {"label": 1} for function in functions]
    swapped = [
        pair | {"docstring": other["docstring"], "label": 0}
        for pair, other in zip(own, [own[-1], *own[:-1]], strict=True)
    ]
    return [pair for both in zip(own, swapped, strict=True) for pair in both]
