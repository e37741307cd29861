"""What rules that understand nothing reach on the test set: the floor under any accuracy that is reported."""

import re
from collections import Counter

import numpy as np
from datasets import Dataset
from sklearn.linear_model import LogisticRegression

from anyrank.data.load import Labelled

__all__ = ["majority", "overlap"]

WORD = re.compile(r"[^\W_]+")


def majority(data: Labelled) -> float:
    """Test accuracy (0 to 1) of always answering the most frequent training label, the lowest at a tie."""
    counts = Counter(data.train["label"][:])
    answer = min(counts, key=lambda label: (-counts[label], label))
    return float(np.mean(np.asarray(data.test["label"][:]) == answer))


def overlap(data: Labelled) -> float | None:
    """Test accuracy (0 to 1) of logistic regression on how many words a pair shares; None for single texts."""
    if len(data.text) != 2:
        return None
    train, test = (_shared_words(part, data.text) for part in (data.train, data.test))
    model = LogisticRegression().fit(train, data.train["label"][:])
    return float(model.score(test, data.test["label"][:]))


def _shared_words(part: Dataset, text: tuple[str, ...]) -> np.ndarray:
    return np.array([_shares(*pair) for pair in zip(*(part[column][:] for column in text), strict=True)])


def _shares(first: str, second: str) -> tuple[float, float, int]:
    one, two = (set(WORD.findall(text.lower())) for text in (first, second))
    shared = len(one & two)
    return shared / max(len(one), 1), shared / max(len(two), 1), shared
