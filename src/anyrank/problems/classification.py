"""One label for a text, or for a pair of texts: a class, or a number.

Metrics are those of GLUE (Wang et al., ICLR 2019, arXiv 1804.07461).
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, MaxLen, MinLen
from torch.nn import functional as F

from anyrank import data
from anyrank.data import Labelled
from anyrank.data.read import FILE
from anyrank.problem import ACCURACY, CLASSIFICATION, Answers, Metric, Objective, Problem
from anyrank.problems.given import Given, by_length, without
from anyrank.problems.scores import f1, matthews, pearson, spearman
from anyrank.problems.texts import check_length, cut_remarks, largest_batch, padding

__all__ = ["classification", "regression"]

Columns = Annotated[list[str], MinLen(1), MaxLen(2)]


ROOT_MEAN_SQUARE = Metric("rmse", lambda a: float(np.sqrt(a.loss)), higher_is_better=False)
REGRESSION = Objective(
    loss=lambda logits, batch: F.mse_loss(logits[:, 0], batch["labels"].to(logits), reduction="none"),
    predict=lambda logits, batch: (logits[:, 0], batch["labels"]),
    metrics=(Metric("pearson", pearson), Metric("spearman", spearman), ROOT_MEAN_SQUARE),
)
"""A number for each example, from logits `[examples, 1]`, by mean square error."""


def classification(
    given: Given,
    *,
    text: Columns = ["signature", "docstring"],  # noqa: B006 - never changed
    label: str = "label",
    max_length: Annotated[int, Ge(2)] = 128,
    metric: Literal["accuracy", "f1", "matthews"] = "accuracy",
) -> Problem:
    """A class for each text or pair.

    Args:
        given: model and data.
        text: one column of texts, or two for a pair.
        label: the column of classes: strings, integers or booleans.
        max_length: tokens after which a text is cut.
        metric: by which a run is judged.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    examples = given.labelled_texts(text, label)
    names = dict(enumerate(examples.label_names))
    average = "binary" if len(names) == 2 else "macro"
    metrics = (ACCURACY, Metric("f1", partial(f1, average=average)), Metric("matthews", matthews))
    ordered = sorted(metrics, key=lambda each: each.name != metric)
    further = {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }
    return _problem(
        given,
        examples,
        CLASSIFICATION._replace(metrics=tuple(ordered)),
        max_length=max_length,
        further=further,
        references=_references(examples, ordered[0]),
    )


def regression(
    given: Given,
    *,
    text: Columns = ["signature", "docstring"],  # noqa: B006 - never changed
    label: str = "label",
    max_length: Annotated[int, Ge(2)] = 128,
) -> Problem:
    """A number for each text or pair.

    Args:
        given: model and data.
        text: one column of texts, or two for a pair.
        label: the column of numbers.
        max_length: tokens after which a text is cut.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    examples = given.labelled_texts(text, label, numbers=True)
    further = {"num_labels": 1, "problem_type": "regression"}
    return _problem(given, examples, REGRESSION, max_length=max_length, further=further, references={})


def _problem(
    given: Given,
    examples: Labelled,
    objective: Objective,
    *,
    max_length: int,
    further: Mapping[str, object],
    references: Mapping[str, float],
) -> Problem:
    tokenizer = given.tokenizer()
    check_length(max_length, tokenizer, given.config())
    encode = partial(data.encode, tokenizer=tokenizer, text=examples.text, max_length=max_length)
    (train, cut), (test, cut_in_test) = encode(examples.train), encode(examples.test)
    counts = {"training": len(train), "test": len(test)}
    collate = padding(tokenizer)
    auto_class, arguments = "AutoModelForSequenceClassification", {"pad_token_id": tokenizer.pad_token_id, **further}
    return Problem(
        model=given.load(auto_class, **arguments),
        train=train,
        test=by_length(test),
        objective=objective,
        collate=collate,
        columns=without(examples.train, *examples.text),
        lengths=np.asarray(train["length"][:]),
        largest=largest_batch(train[0], max_length, collate),
        label_names=examples.label_names,
        references=references,
        fingerprint=data.with_tokens(examples.fingerprint, (train, test)),
        task_type="SEQ_CLS",
        auto_class=auto_class,
        model_arguments=arguments,
        remarks=[
            *cut_remarks({"training": cut, "test": cut_in_test}, counts, max_length),
            *_strangers(examples),
            *_many(examples),
        ],
    )


def _many(examples: Labelled) -> list[str]:
    """That there are so many classes that the labels are maybe no classes."""
    rows = len(examples.train)
    classes = len({*examples.train["label"][:]}) if examples.label_names else 0
    if classes <= max(2, rows / 2):
        return []
    return [f"{classes} classes in {rows} training examples: are these labels classes, and not numbers or names?"]


def _strangers(examples: Labelled) -> list[str]:
    """Whose labels are nobody else's, where there is a file for each client: maybe other words for the same."""
    if FILE not in examples.train.column_names or not examples.label_names:
        return []
    have: dict[str, set[int]] = {}
    for file, label in zip(examples.train[FILE][:], examples.train["label"][:], strict=True):
        have.setdefault(file, set()).add(label)
    clients = Counter(label for labels in have.values() for label in labels)
    alone = {file: labels for file, labels in have.items() if all(clients[label] == 1 for label in labels)}
    if not alone or len(have) == 1:
        return []
    shown = [
        f"{file} ({', '.join(examples.label_names[label] for label in sorted(labels))})"
        for file, labels in list(alone.items())[:3]
    ]
    return [
        f"{len(alone)} of {len(have)} files have labels that are in no other one: {', '.join(shown)}"
        f"{', ...' if len(alone) > 3 else ''}; if they are other words for the same, rename them"
    ]


def _references(examples: Labelled, metric: Metric) -> dict[str, float]:
    """What rules that understand nothing reach."""
    labels = np.asarray(examples.test["label"][:])
    answers = {"word overlap": data.overlap(examples), "majority class": data.majority(examples)}
    return {
        name: metric.value(Answers(predictions, labels, np.nan))
        for name, predictions in answers.items()
        if predictions is not None
    }
