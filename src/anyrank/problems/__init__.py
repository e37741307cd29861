"""What can be learned, by the name that a recipe uses; each one's keyword-only arguments are its settings."""

from collections.abc import Callable, Mapping

from anyrank.errors import ConfigError
from anyrank.problem import Problem
from anyrank.problems.choice import multiple_choice
from anyrank.problems.classification import classification, regression
from anyrank.problems.given import Given
from anyrank.problems.images import image_classification
from anyrank.problems.instruction import instruction
from anyrank.problems.language import language
from anyrank.problems.words import token_classification

__all__ = ["PROBLEMS", "Given"]


def own(given: Given) -> Problem:
    """A problem that is handed over in Python.

    Raises:
        ConfigError: it was not.
    """
    raise ConfigError(
        "problem.name: own stands for one that is handed over in Python: anyrank.run(recipe, out, "
        "problem=...), and anyrank.resume(out, problem=...) to go on with it."
    )


PROBLEMS: Mapping[str, Callable[..., Problem]] = {
    "classification": classification,
    "regression": regression,
    "token_classification": token_classification,
    "multiple_choice": multiple_choice,
    "image_classification": image_classification,
    "language": language,
    "instruction": instruction,
    "own": own,
}
