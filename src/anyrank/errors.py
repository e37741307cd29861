"""What can go wrong, in one tree.

    AnyrankError                 every error a user can meet
    ├── ConfigError              a wrong key, value, file or combination, found before anything is trained
    ├── ShapeError               factors that do not fit their layer or each other
    ├── UpdateRejected           one client's update is not used; the round goes on without it
    ├── RecordError              a run folder that is occupied, foreign, truncated or from another recipe
    └── RoundFailed              a round without a single valid update; the checkpoint before it is kept

Messages say what and where, what was expected, what was found, and what to do about it.
"""

from collections.abc import Sequence

__all__ = ["AnyrankError", "ConfigError", "RecordError", "RoundFailed", "ShapeError", "UpdateRejected"]


class AnyrankError(Exception):
    """Base of all errors that anyrank raises on purpose."""


class ConfigError(AnyrankError):
    """One or more problems in what the user asked for, all of them at once.

    Args:
        problems: one sentence each; a single string counts as one problem.
    """

    def __init__(self, problems: str | Sequence[str]):
        """Join the problems into one message, one line each."""
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ShapeError(AnyrankError):
    """Tensors whose shapes contradict their layer or each other."""


class UpdateRejected(AnyrankError):
    """An update that must not reach the average.

    Args:
        client: who sent it.
        tensor: the tensor (or metric) at fault.
        reason: what is wrong with it, with the numbers.
    """

    def __init__(self, client: str, tensor: str, reason: str):
        """Keep the parts; the message is `client: tensor: reason`."""
        self.client, self.tensor, self.reason = client, tensor, reason
        super().__init__(f"client {client}: {tensor}: {reason}")


class TransportError(AnyrankError):
    """Clients that cannot be reached, or whose process ended."""


class RecordError(AnyrankError):
    """A run folder that cannot be read, written or continued."""


class RoundFailed(AnyrankError):
    """No client of a round returned a valid update."""
