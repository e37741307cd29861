"""A recipe for examples that come without one: what is to be learned from them is told by their columns."""

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Value

from anyrank import config, data
from anyrank.config import Recipe
from anyrank.errors import ConfigError
from anyrank.job import CHOICES
from anyrank.problems.chat import FORMS

__all__ = ["recipe_for"]

_CLIENTS = 8
_FEW = 4  # examples: of as many a client keeps some to train on when a test part is split off
_NATURAL = ("client", "client_id", "user", "user_id", "speaker", "author", "site", "file")  # columns that name a client
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("text_a", "text_b"))
_TEXTS = ("text", "sentence", "content")
_WORDS = ("tokens", "words")
_TAGS = ("ner_tags", "pos_tags", "tags", "labels")
_LABELS = ("label", "labels", "target")
_ANSWERS = ("label", "answer")
_MOSTLY = 0.9  # of the labels are numbers: then what is none is a gap, and not a class
_REST = Path(__file__).with_name("own_data.toml")
_ENCODER = "all-MiniLM-L6-v2"
_MODELS = {
    "instruction": "a causal language model",
    "language": "a causal language model",
    "token_classification": "an encoder",
    "multiple_choice": "an encoder",
    "image_classification": "a model for images, or mlp or cnn",
}


def recipe_for(source: str, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe for a user's own data: ten rounds, two classes of devices, clients by a column that names them.

    Labelled texts can do with the packaged encoder; for anything else `model.name` says which base model is meant.

    Args:
        source: as `data.source` of a recipe.
        overrides: values by dotted key.

    Raises:
        ConfigError: the columns do not tell what is to be learned, or whatever is wrong with the overrides.
    """
    train = data.parts(source).train
    told = overrides.get("problem.name") or overrides.get("problem", {}).get("name")
    problem = {"name": told, **_filled(told, train, overrides)} if told else _problem(train)
    rest = tomllib.loads(_REST.read_text(encoding="utf-8"))
    partition, clients = _partition(train)
    raw = {
        **rest,
        "data": {"source": source},
        "problem": problem,
        "partition": partition,
        "fleet": {**rest["fleet"], "per_round": min(rest["fleet"]["per_round"], clients)},
    }
    if problem["name"] in ("classification", "regression"):
        raw["model"] = {"name": _ENCODER}
    elif problem["name"] in _MODELS and not {"model", "model.name"} & overrides.keys():
        raise ConfigError(
            f"--data: examples with the columns {', '.join(train.column_names)} are for {problem['name']}, which needs "
            f"{_MODELS[problem['name']]}. Name one with --model: a folder with a saved model, or a name on the hub."
        )
    return config.resolve(raw, overrides, CHOICES)


def _partition(train: Dataset) -> tuple[dict[str, Any], int]:
    """Who the clients are, and how many of them at least."""
    for name in _NATURAL:
        if isinstance(train.features.get(name), Value | ClassLabel):
            sizes = Counter(value for value in train[name][:] if value not in (None, ""))
            if len(sizes) > 1 and max(sizes.values()) > 1:
                return {"name": "by_column", "column": name}, max(1, sum(size >= _FEW for size in sizes.values()))
    clients = max(1, min(_CLIENTS, len(train) // _FEW))
    return {"name": "iid", "clients": clients}, clients


def _settings(columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the columns are to each problem; it suits them where nothing is None or empty."""

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    words, tags, answer, label, text = map(first, (_WORDS, _TAGS, _ANSWERS, _LABELS, _TEXTS))
    texts = next((list(pair) for pair in _PAIRS if {*pair} <= {*columns}), [text] if text else [])
    return {
        "token_classification": {"words": words, "label": tags},
        "multiple_choice": {"label": answer},
        "classification": {"text": texts, "label": label},
        "regression": {"text": texts, "label": label},
        "image_classification": {"label": label},
        "language": {"text": text},
    }


def _filled(name: str, train: Dataset, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns are to a problem that is named, as far as they tell."""
    found = {key: value for key, value in _settings(train.column_names).get(name, {}).items() if value}
    if (
        name in ("classification", "regression")
        and "text" not in found
        and not {"problem", "problem.text"} & {*overrides}
    ):
        raise ConfigError(
            f"--data: its columns ({', '.join(train.column_names)}) do not tell which are the texts. Name them, such as "
            "--set 'problem.text=[\"review\"]'."
        )
    return found


def _problem(train: Dataset) -> dict[str, Any]:
    """The problem that suits the columns."""
    columns, settings = train.column_names, _settings(train.column_names)

    def suits(name: str) -> bool:
        return all(settings[name].values())

    def chosen(name: str) -> dict[str, Any]:
        return {"name": name, **settings[name]}

    if any(all({*entry} & {*columns} for entry in form.needed) for form in FORMS.values()):
        return {"name": "instruction"}
    if suits("token_classification"):
        return chosen("token_classification")
    if {"question", "choices"} <= {*columns} and suits("multiple_choice"):
        return chosen("multiple_choice")
    if suits("classification"):
        return chosen("regression" if _are_numbers(train, settings["regression"]["label"]) else "classification")
    if "image" in columns and suits("image_classification"):
        return chosen("image_classification")
    if suits("language"):
        return chosen("language")
    raise ConfigError(
        f"--data: its columns ({', '.join(columns)}) do not tell what is to be learned. Expected messages, or instruction and "
        "response, or prompt and completion, or text and label, or text. Write a recipe that says it (docs/recipes.md), or set "
        "the problem, such as --set problem.name=classification --set 'problem.text=[\"review\"]', or --set "
        'problem.name=instruction --set \'problem.columns={instruction="question", response="answer"}\'.'
    )


def _are_numbers(train: Dataset, label: str) -> bool:
    """Whether labels are numbers with a point.

    Raises:
        ConfigError: one is none among many that are.
    """
    kind = getattr(train.features[label], "dtype", "")
    if "string" not in kind:
        return "float" in kind
    values = [value or "" for value in train[label][:]]
    odd = [row for row, value in enumerate(values) if value and not _is_number(value)]
    if (
        not odd
        or len(odd) > (1 - _MOSTLY) * len(values)
        or not any("." in value for value in values if _is_number(value))
    ):
        return False
    raise ConfigError(
        f"--data: column {label!r}: nearly all labels are numbers, and some have a point, but row {odd[0] + 1} has "
        f"{values[odd[0]]!r}. Mend or remove such rows, so that numbers can be predicted; or, if each is a class, set "
        "--set problem.name=classification."
    )


def _is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return isfinite(float(text))
    except ValueError:
        return False
