"""A class for each word of a text: names, parts of speech."""

from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from datasets import Dataset, List, Value
from torch import Tensor
from torch.nn import functional as F

from anyrank import data
from anyrank.errors import ConfigError
from anyrank.problem import ACCURACY, Batch, Metric, Objective, Problem
from anyrank.problems.given import Given, by_length, without
from anyrank.problems.scores import macro_f1
from anyrank.problems.texts import IGNORED, check_fast, check_length, cut_remarks, largest_batch, padding

__all__ = ["token_classification"]


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch["labels"].to(logits.device)
    return F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(1)


def _predict(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    labelled = batch["labels"] != IGNORED
    return logits.argmax(-1).cpu()[labelled], batch["labels"][labelled]


WORDS = Objective(
    loss=_loss,
    predict=_predict,
    metrics=(Metric("f1", macro_f1), ACCURACY),
    targets=lambda batch: (batch["labels"] != IGNORED).sum(1),
)
"""A class for each word, from logits `[examples, tokens, classes]`; F1 is the mean over classes."""


def token_classification(
    given: Given, *, words: str = "tokens", label: str = "ner_tags", max_length: Annotated[int, Ge(2)] = 128
) -> Problem:
    """A class for each word; a word of several tokens is judged by its first.

    Args:
        given: model and data.
        words: the column with a list of words for each text.
        label: the column with as many classes: strings or integers.
        max_length: tokens after which a text is cut.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    found, names = _coded(given, _found(given, words, label), label)
    train, test = given.split(found)
    id2label = dict(enumerate(names))
    arguments = {"num_labels": len(names), "id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    tokenizer, auto_class = given.tokenizer(), "AutoModelForTokenClassification"
    check_fast(tokenizer)
    check_length(max_length, tokenizer, given.config())
    (encoded, cut), (tested, cut_in_test) = (
        _encoded(part, tokenizer, words, label, max_length) for part in (train, test)
    )
    collate, counts = padding(tokenizer), {"training": len(train), "test": len(test)}
    return Problem(
        model=given.load(auto_class, **arguments),
        train=encoded,
        test=by_length(tested),
        objective=WORDS,
        collate=collate,
        columns=without(train, words, label, "label"),  # another column of that name says nothing about these classes
        lengths=np.asarray(encoded["length"][:]),
        largest=largest_batch(encoded[0], max_length, collate),
        label_names=names,
        fingerprint=data.with_tokens(data.fingerprint((train, test), [words, label], [names]), (encoded, tested)),
        task_type="TOKEN_CLS",
        auto_class=auto_class,
        model_arguments=arguments,
        remarks=cut_remarks({"training": cut, "test": cut_in_test}, counts, max_length),
    )


def _found(given: Given, words: str, label: str) -> data.Parts:
    """The source's parts, once every row is a list of words and as many labels."""
    found = given.parts(())
    problems = []
    for where, part in zip(("training data", "test data"), found, strict=True):
        if part is not None:
            problems += data.absent_columns(part, [words, label], where=where) or _odd(part, words, label, where)
    if problems:
        raise ConfigError(problems)
    return found


def _odd(part: Dataset, words: str, label: str, where: str) -> list[str]:
    """What is wrong with the first row that is not as it should be."""
    if not len(part):
        return [f"{where}: there are no rows"]
    for row, (said, own) in enumerate(zip(part[words][:], part[label][:], strict=True), start=1):
        lists = isinstance(said, list) and isinstance(own, list)
        if not lists or not said or len(said) != len(own) or None in own or not all(isinstance(w, str) for w in said):
            return [
                f"{where}: row {row}: expected a list of words in column {words!r} and as many labels in {label!r}, none of "
                f"them missing; got {said!r:.100} and {own!r:.100}"
            ]
    return []


def _coded(given: Given, found: data.Parts, label: str) -> tuple[data.Parts, tuple[str, ...]]:
    """The source's parts with class numbers for labels, and the class names."""
    values = [each for own in found.train[label][:] for each in own]
    feature = getattr(found.train.features[label], "feature", None)
    lookup, names = data.class_index(values, label, feature=feature, source=given.source, known=given.label_names)
    coded = []
    for where, part in zip(("training data", "test data"), found, strict=True):
        if part is not None:
            rows = part[label][:]
            for row, own in enumerate(rows, start=1):
                if unknown := [each for each in own if each not in lookup]:
                    known = ", ".join(map(repr, lookup))
                    raise ConfigError(f"{where}: row {row}: unknown label {unknown[0]!r}; the labels are {known}")
            codes = [[lookup[each] for each in own] for own in rows]
            part = part.remove_columns(label).add_column(label, codes, feature=List(Value("int64")))
        coded.append(part)
    return data.Parts(*coded), names


def _encoded(part: Dataset, tokenizer: Any, words: str, label: str, max_length: int) -> tuple[Dataset, int]:
    """Tokens with the label of each word at its first token, and how many texts were cut."""
    texts = part[words][:]
    if getattr(tokenizer, "add_prefix_space", None) is False:  # GPT-2's kind tells a word within a text by its space
        texts = [[said[0], *(f" {word}" for word in said[1:])] for said in texts]
    tokens = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    labels = []
    for row, codes in enumerate(part[label][:]):
        places = tokens.word_ids(row)
        first = [place is not None and place != before for place, before in zip(places, [None, *places], strict=False)]
        labels.append([codes[p] if is_first else IGNORED for p, is_first in zip(places, first, strict=True)])
        if not any(first):
            raise ConfigError(
                f"problem.max_length: {max_length} tokens leave no word of {texts[row]!r:.100}; expected at least 3, or remove "
                "texts of which the tokenizer makes no tokens"
            )
    lengths = [len(ids) for ids in tokens["input_ids"]]
    cut = sum(bool(each.overflowing) for each in tokens.encodings)
    return Dataset.from_dict({**tokens, "labels": labels, "length": lengths}), cut
