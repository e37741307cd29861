"""How tasks reach clients and updates come back."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from anyrank.federation import Failure, Task, Update
from anyrank.transport.flower_sim import FlowerSimulation
from anyrank.transport.in_process import InProcess
from anyrank.transport.workers import Workers

__all__ = ["FlowerSimulation", "InProcess", "Transport", "Workers"]


@runtime_checkable
class Transport(Protocol):
    """Carries out tasks; replies come in any order, one per task."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        """Hand each task to its client and yield what comes back."""
        ...
