"""What rules that understand nothing answer to the test set: the floor under any score that is reported."""

import re
from collections import Counter

import numpy as np
from datasets import Dataset

from anyrank.data.load import Labelled

__all__ = ["majority", "overlap"]

WORD = re.compile(r"[^\W_]+")


def majority(data: Labelled) -> np.ndarray:
    """To every test example the most frequent training label, the lowest at a tie."""
    counts = Counter(data.train["label"][:])
    answer = min(counts, key=lambda label: (-counts[label], label))
    return np.full(len(data.test), answer)


def overlap(data: Labelled) -> np.ndarray | None:
    """What logistic regression on how many words a pair shares answers to the test examples.

    None for single texts, and where all training examples have one label, as those that are only scored may.
    """
    labels = data.train["label"][:]
    if len(data.text) != 2 or len(set(labels)) < 2:
        return None
    from sklearn.linear_model import LogisticRegression  # here, since it takes long to import

    train, test = (_shared_words(part, data.text) for part in (data.train, data.test))
    return LogisticRegression().fit(train, labels).predict(test)


def _shared_words(part: Dataset, text: tuple[str, ...]) -> np.ndarray:
    return np.array([_shares(*pair) for pair in zip(*(part[column][:] for column in text), strict=True)])


def _shares(first: str, second: str) -> tuple[float, float, int]:
    one, two = (set(WORD.findall(text.lower())) for text in (first, second))
    shared = len(one & two)
    return shared / max(len(one), 1), shared / max(len(two), 1), shared
