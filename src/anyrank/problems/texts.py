"""Tokens in batches: padding, and the largest batch there can be."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyrank.errors import ConfigError
from anyrank.problem import Batch

__all__ = [
    "IGNORED",
    "check_fast",
    "check_length",
    "cut_remarks",
    "largest_batch",
    "opening",
    "padding",
    "tokens_and_ends",
    "tokens_of",
]

IGNORED = -100
"""The label of a token that is no target."""


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, such as a beginning-of-text token."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)]


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without what the tokenizer would put before or behind it."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def tokens_and_ends(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """The same, and for each token where in its text it ends."""
    if not texts:
        return []
    wanted = {"return_offsets_mapping": True, "return_attention_mask": False, "return_token_type_ids": False}
    made = tokenizer(list(texts), add_special_tokens=False, verbose=False, **wanted)
    ends = [[end for _, end in places] for places in made["offset_mapping"]]
    return list(zip(made["input_ids"], ends, strict=True))


def padding(tokenizer: Any) -> Callable[[list[Any]], Batch]:
    """A collate function that pads texts to the longest of a batch, and labels of tokens with `IGNORED`."""
    return partial(_padded, tokenizer)


def _padded(tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    texts = [{k: v for k, v in each.items() if k not in ("labels", "length")} for each in examples]
    batch = dict(tokenizer.pad(texts, return_tensors="pt"))
    labels = [each["labels"] for each in examples]
    if isinstance(labels[0], list):
        longest = batch["input_ids"].shape[-1]
        labels = [[*own, *[IGNORED] * (longest - len(own))] for own in labels]
    return {**batch, "labels": torch.tensor(labels)}


def largest_batch(
    example: Mapping[str, Any], max_length: int, collate: Callable[[list[Any]], Batch]
) -> Callable[[int], Batch]:
    """What makes a batch of so many texts of `max_length` tokens, out of one that is repeated until it is as long."""
    full = {k: (v * max_length)[:max_length] if isinstance(v, list) else v for k, v in example.items() if k != "length"}
    return lambda count: collate([full] * count)


def check_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not say where in a text its tokens are.

    Raises:
        ConfigError: it is one.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.name: the tokenizer of this model ({type(tokenizer).__name__}) is written in Python and does not say where "
            "in a text its tokens are, which this problem needs. Use a model with a tokenizer.json."
        )


def check_length(max_length: int, tokenizer: Any, config: Any) -> None:
    """Refuse texts that are longer than the model has positions.

    Raises:
        ConfigError: they are.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or max_length
    most = min(positions, tokenizer.model_max_length)  # RoBERTa has positions that no token can have
    if max_length > most:
        raise ConfigError(f"problem.max_length: {max_length} tokens, but the model has {most} positions.")


def cut_remarks(cut: Mapping[str, int], of: Mapping[str, int], max_length: int) -> list[str]:
    """How many examples of each part are longer than they may be."""
    return [
        f"{count} of {of[part]} {part} examples are longer than problem.max_length = {max_length} tokens and are cut there"
        for part, count in cut.items()
        if count
    ]
