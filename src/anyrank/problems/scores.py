"""Metrics by scikit-learn and SciPy.

They are imported when a score is worked out: it takes most of a second, and many processes never do.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from anyrank.problem import Answers

__all__ = ["f1", "macro_f1", "matthews", "pearson", "spearman"]


def f1(answers: Answers, *, average: Literal["binary", "macro"] = "binary") -> float:
    """F1 of the second of two classes, or the mean over classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(answers.labels, answers.predictions, average=average, zero_division=0.0))  # pyright: ignore


def macro_f1(answers: Answers) -> float:
    """The mean over classes of F1."""
    return f1(answers, average="macro")


def matthews(answers: Answers) -> float:
    """Matthews' correlation of two or more classes."""
    from sklearn.metrics import matthews_corrcoef

    return _correlation(matthews_corrcoef, answers)


def pearson(answers: Answers) -> float:
    """Pearson's correlation of numbers."""
    from scipy.stats import pearsonr

    return _correlation(lambda *both: pearsonr(*both)[0], answers)


def spearman(answers: Answers) -> float:
    """Spearman's correlation of numbers: Pearson's of their ranks."""
    from scipy.stats import spearmanr

    return _correlation(lambda *both: spearmanr(*both)[0], answers)


def _correlation(by: Callable[..., Any], answers: Answers) -> float:
    """A correlation; where all predictions, or all labels, are equal there is none."""
    constant = np.ptp(answers.predictions) == 0 or np.ptp(answers.labels) == 0
    return 0.0 if constant else float(by(answers.labels, answers.predictions))
