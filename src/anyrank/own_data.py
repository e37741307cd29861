"""A recipe for examples that come without one: what is to be learned from them is told by their columns."""

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
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
    problem = {"name": told} if told else _problem(train)
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


def _problem(train: Dataset) -> dict[str, Any]:
    """The problem that suits the columns."""
    columns = train.column_names

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    if any(all(first(entry) for entry in form.needed) for form in FORMS.values()):
        return {"name": "instruction"}
    words, tags, answer, label, text = map(first, (_WORDS, _TAGS, _ANSWERS, _LABELS, _TEXTS))
    if words and tags:
        return {"name": "token_classification", "words": words, "label": tags}
    if {"question", "choices"} <= {*columns} and answer:
        return {"name": "multiple_choice", "label": answer}
    texts = next((list(pair) for pair in _PAIRS if {*pair} <= {*columns}), [text] if text else [])
    if texts and label:
        number = "float" in getattr(train.features[label], "dtype", "")
        return {"name": "regression" if number else "classification", "text": texts, "label": label}
    if "image" in columns and label:
        return {"name": "image_classification", "label": label}
    if text:
        return {"name": "language", "text": text}
    raise ConfigError(
        f"--data: its columns ({', '.join(columns)}) do not tell what is to be learned. Expected messages, or instruction and "
        "response, or prompt and completion, or text and label, or text. Write a recipe that says it (docs/recipes.md), or set "
        "the problem, such as --set problem.name=classification --set 'problem.text=[\"review\"]'."
    )
