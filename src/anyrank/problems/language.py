"""Causal language models: the next token of plain text."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from anyrank import data
from anyrank.errors import ConfigError
from anyrank.problem import ACCURACY, Batch, Metric, Objective, Problem
from anyrank.problems.given import Given, by_length, without
from anyrank.problems.texts import IGNORED, check_length, largest_batch, opening, padding, tokens_of

__all__ = ["CAUSAL", "LANGUAGE", "language"]

CAUSAL = "AutoModelForCausalLM"


def _targets(batch: Batch) -> Tensor:
    """Which tokens are to be predicted: each from those before it, so never the first."""
    return batch["labels"][:, 1:] != IGNORED


def _of_targets(logits: Tensor, wanted: Tensor) -> Tensor:
    """Logits `[targets, vocabulary]`: a head that is itself adapted answers to all tokens."""
    return logits[:, :-1][wanted.to(logits.device)] if logits.ndim == 3 else logits


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    wanted = _targets(batch)
    labels = batch["labels"][:, 1:][wanted].to(logits.device)
    each = F.cross_entropy(_of_targets(logits, wanted), labels, reduction="none")
    return torch.stack([own.sum() for own in each.split(wanted.sum(1).tolist())])


def _predict(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    wanted = _targets(batch)
    return _of_targets(logits, wanted).argmax(-1), batch["labels"][:, 1:][wanted]


PERPLEXITY = Metric("perplexity", lambda a: float(np.exp(min(a.loss, 700.0))), higher_is_better=False)
LANGUAGE = Objective(
    loss=_loss,
    predict=_predict,
    metrics=(PERPLEXITY, ACCURACY),
    targets=lambda batch: _targets(batch).sum(1),
)
"""The next token, from logits `[targets, vocabulary]` or of all tokens; accuracy is the share of tokens that are guessed."""


def language(given: Given, *, text: str = "text", max_length: Annotated[int, Ge(2)] = 128) -> Problem:
    """Plain text. A text that is longer than `max_length` tokens becomes several examples.

    Args:
        given: model and data.
        text: the column of texts; each ends with the end-of-text token.
        max_length: tokens of an example.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    train, test = given.split(data.with_texts(given.parts([text]), [text]))
    tokenizer = given.tokenizer()
    check_length(max_length, tokenizer, given.config())
    (pieces, rows), (tested, tested_rows) = (_cut(part[text][:], tokenizer, max_length) for part in (train, test))
    if not len(pieces) or not len(tested):
        raise ConfigError(
            f"problem.text: expected training and test texts of two tokens or more, one to be predicted from the other; "
            f"column {text!r} has {len(set(rows))} and {len(set(tested_rows))} of them."
        )
    collate = padding(tokenizer)
    columns = {name: [values[row] for row in rows] for name, values in without(train, text).items()}
    return Problem(
        model=given.load(CAUSAL),
        train=pieces,
        test=by_length(tested),
        objective=LANGUAGE,
        collate=collate,
        columns=columns or {"row": rows},
        lengths=np.asarray(pieces["length"][:]),
        largest=largest_batch(pieces[0], max_length, collate),
        fingerprint=data.with_tokens(data.fingerprint((train, test), [text]), (pieces, tested)),
        task_type="CAUSAL_LM",
        auto_class=CAUSAL,
        remarks=[*_remarks("training", len(train), rows), *_remarks("test", len(test), tested_rows)],
    )


def _cut(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[Dataset, list[int]]:
    """Pieces of two tokens or more, and the row that each is from."""
    pieces, rows = list[list[int]](), list[int]()
    begin, end = opening(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row, tokens in enumerate(tokens_of(tokenizer, texts)):
        ids = [*begin, *tokens, *end] if tokens else []
        for first in range(0, len(ids), max_length):
            if len(ids) - first >= 2:
                pieces.append(ids[first : first + max_length])
                rows.append(row)
    lengths = [len(ids) for ids in pieces]
    mask = [[1] * length for length in lengths]
    table = {"input_ids": pieces, "attention_mask": mask, "labels": pieces, "length": lengths}
    return Dataset.from_dict(table), rows


def _remarks(part: str, texts: int, rows: Sequence[int]) -> list[str]:
    """What became of the texts, where they did not become one example each."""
    pieces = Counter(rows)
    remarks = [] if len(pieces) == texts else [f"{texts - len(pieces)} of {texts} {part} texts are empty and left out"]
    if cut := [count for count in pieces.values() if count > 1]:
        remarks.append(
            f"{len(cut)} of {texts} {part} texts are longer than problem.max_length tokens and become {sum(cut)} examples"
        )
    return remarks
