"""Multiple choice: which of several answers goes with a question."""

from collections.abc import Mapping, Sequence
from functools import partial
from string import ascii_uppercase
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, MinLen
from datasets import Dataset
from torch import Tensor

from anyrank import data
from anyrank.errors import ConfigError
from anyrank.problem import CLASSIFICATION, Problem
from anyrank.problems.given import Given, by_length, without
from anyrank.problems.texts import check_fast, check_length, cut_remarks

__all__ = ["multiple_choice"]

CHOICES, ANSWER = "choices of a row", "answer of a row"  # columns that we add


def multiple_choice(
    given: Given,
    *,
    question: str = "question",
    choices: Annotated[list[str], MinLen(1)] = ["choices"],  # noqa: B006 - never changed
    label: str = "label",
    max_length: Annotated[int, Ge(2)] = 128,
) -> Problem:
    """One of several answers to each question; question and answer are put to the model as a pair of texts.

    Args:
        given: model and data.
        question: the column of questions, or of what answers go on with.
        choices: the column with a list of answers for each question; or several columns, each with one answer.
        label: the column that says which one is right: 0 for the first, or A.
        max_length: tokens after which a pair is cut.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    texts, used = [question, *(choices if len(choices) > 1 else [])], [question, *choices, label]
    found = given.parts(texts, usable=data.lacks_labels(label))
    found = data.with_texts(found, texts, besides=[*choices, label])
    wheres = ("training data", "test data")
    checked = [part and _checked(part, choices, label, where) for part, where in zip(found, wheres, strict=True)]
    train, test = given.split(data.Parts(*checked))  # pyright: ignore[reportArgumentType]
    tokenizer, auto_class = given.tokenizer(), "AutoModelForMultipleChoice"
    check_fast(tokenizer)
    check_length(max_length, tokenizer, given.config())
    (encoded, cut), (tested, cut_in_test) = (_encoded(part, tokenizer, question, max_length) for part in (train, test))
    counts = {"training": len(train), "test": len(test)}
    arguments = {"pad_token_id": tokenizer.pad_token_id}
    return Problem(
        model=given.load(auto_class, **arguments),
        train=encoded,
        test=by_length(tested),
        objective=CLASSIFICATION,
        collate=partial(_collated, tokenizer),
        columns=without(train, *used, CHOICES, ANSWER),
        lengths=np.asarray(encoded["length"][:]),
        largest=partial(_largest, tokenizer, encoded[0], max_length),
        references={"chance": 1 / len(test[CHOICES][0])},
        fingerprint=data.with_tokens(data.fingerprint((train, test), [question, CHOICES, ANSWER]), (encoded, tested)),
        auto_class=auto_class,
        model_arguments=arguments,
        remarks=cut_remarks({"training": cut, "test": cut_in_test}, counts, max_length),
    )


def _checked(part: Dataset, choices: Sequence[str], label: str, where: str) -> Dataset:
    """The data with a list of choices and the number of the right one in each row."""
    offered = [list(row) for row in zip(*(part[name][:] for name in choices), strict=True)]
    if len(choices) == 1:
        offered = [row[0] for row in offered]
    count = len(offered[0] or ())
    answers = [_number(answer) for answer in part[label][:]]
    for row, (texts, answer) in enumerate(zip(offered, answers, strict=True), start=1):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) < 2:
            raise ConfigError(
                f"{where}: row {row}: expected a list of two texts or more to choose from, got {texts!r:.200}"
            )
        if len(texts) != count:
            raise ConfigError(f"{where}: row {row}: expected {count} choices, as in the first row, got {len(texts)}")
        if answer not in range(count):
            raise ConfigError(
                f"{where}: row {row}, column {label!r}: expected a whole number from 0 to {count - 1} or a letter from A to "
                f"{ascii_uppercase[:count][-1]}, got {part[label][row - 1]!r}"
            )
    return part.add_column(CHOICES, offered).add_column(ANSWER, answers)  # pyright: ignore[reportCallIssue]


def _number(answer: Any) -> Any:
    """Which choice is meant, counted from 0, as far as it can be told."""
    if isinstance(answer, str) and answer.isdecimal():
        return int(answer)
    return ascii_uppercase.index(answer) if isinstance(answer, str) and answer in [*ascii_uppercase] else answer


def _encoded(part: Dataset, tokenizer: Any, question: str, max_length: int) -> tuple[Dataset, int]:
    """Tokens of each question with each of its choices, and how many questions have one that was cut."""
    offered = part[CHOICES][:]
    count = len(offered[0])
    asked = [text for text in part[question][:] for _ in range(count)]
    tokens = tokenizer(asked, [text for row in offered for text in row], truncation=True, max_length=max_length)
    by_row = {name: _in_rows(values, count) for name, values in tokens.items()}
    lengths = [max(map(len, row)) for row in by_row["input_ids"]]
    cut = sum(any(each.overflowing for each in row) for row in _in_rows(tokens.encodings, count))
    return Dataset.from_dict({**by_row, "labels": part[ANSWER][:], "length": lengths}), cut


def _in_rows(values: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [values[first : first + count] for first in range(0, len(values), count)]


def _collated(tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch `[examples, choices, tokens]`."""
    names = [name for name in examples[0] if name not in ("labels", "length")]
    count = len(examples[0]["input_ids"])
    pairs = [{name: each[name][number] for name in names} for each in examples for number in range(count)]
    batch = tokenizer.pad(pairs, return_tensors="pt")
    labels = torch.tensor([each["labels"] for each in examples])
    return {**{name: tensor.unflatten(0, (len(examples), count)) for name, tensor in batch.items()}, "labels": labels}


def _largest(tokenizer: Any, example: Mapping[str, Any], max_length: int, count: int) -> dict[str, Tensor]:
    """A batch of so many questions with choices of `max_length` tokens."""
    full = {
        name: [(row * max_length)[:max_length] for row in rows] if isinstance(rows, list) else rows
        for name, rows in example.items()
    }
    return _collated(tokenizer, [full] * count)
