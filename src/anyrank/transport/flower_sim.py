"""Simulation by Flower's engine, whose actors Ray runs on this machine or on a cluster.

Flower and Ray are in a process of their own (`flower/simulation.py`): neither can be interrupted while an actor works, except
with its process. Work is dealt out as `Workers` does it, so the results depend on no actor.
"""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from anyrank.errors import TransportError
from anyrank.federation import Failure, Task, Update
from anyrank.transport.in_process import InProcess
from anyrank.transport.pickles import dumps, heard
from anyrank.transport.workers import one_thread

__all__ = ["FlowerSimulation"]

_PROGRAM = "import sys; from anyrank.flower.simulation import main; main(*map(int, sys.argv[1:]))"
_ENVIRONMENT = {  # unless the user says otherwise
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns that this will be so
    "RAY_NUM_REDIS_GET_RETRIES": "2",  # a cluster that is not there is given up in two minutes, not in twelve
}
_END = 60.0  # seconds that Ray may take to start and to end


class FlowerSimulation:
    """A transport that has the actors of Flower's simulation engine do the work; a context manager, whose end is theirs.

    With `RAY_ADDRESS` in the environment the actors are on that cluster.

    Args:
        inner: deals out the tasks, and has what clients keep.
        setup: from which an actor makes what `inner` is here, see `flower.simulation`.
        count: for how many actors the work is cut up; on this machine there are as many.
        threads: of each.

    Raises:
        TransportError: the process that has Flower and Ray could not be started.
    """

    def __init__(self, inner: InProcess, setup: Mapping[str, Any], *, count: int, threads: int):
        """Start the engine; it goes on starting while the run begins."""
        self._inner, self._setup, self._count, self._sent = inner, pickle.dumps(setup), count, 0
        ours, theirs = multiprocessing.Pipe()
        assert isinstance(ours, Connection)
        self._pipe = ours
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(count), str(threads)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT | os.environ,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal interrupts the whole group; the closed pipe ends it
            )
        except OSError as error:
            raise TransportError(f"Flower's simulation engine could not be started: {error}.") from error
        finally:
            theirs.close()

    def __enter__(self) -> "FlowerSimulation":
        """Nothing to do: it starts already."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the engine and Ray's processes, whatever they are at."""
        self._pipe.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        """Have the tasks carried out; replies come in the order in which they are ready.

        Raises:
            TransportError: an actor or the engine failed, or was killed.
            AnyrankError: as an actor raised it.
            OSError: as an actor raised it.
        """
        with one_thread():
            yield from self._run(self._inner.shares(tasks, self._count))

    def _run(self, shares: list[list[Task]]) -> Iterator[Update | Failure]:
        out, round = set[int](), shares[0][0].round if shares else 0
        while shares or out:
            while shares and len(out) < 2 * self._count:  # one that is worked on, and one that waits
                share = shares.pop(0)
                kept = {task.plan.client: self._inner.kept(task) for task in share}
                self._sent += 1
                with self._alive(round):
                    self._pipe.send((self._sent, dumps((self._setup, share, kept))))
                out.add(self._sent)
            with self._alive(round):
                number, content = self._pipe.recv()
            replies, written = heard(content, round=round)
            out.remove(number)
            for client, when, adapter in written:
                self._inner.memory.write(client, when, adapter)
            yield from replies

    @contextlib.contextmanager
    def _alive(self, round: int) -> Iterator[None]:
        """Have a pipe that broke say how the engine ended."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            raise TransportError(
                f"round {round}: Flower's simulation engine ended with exit code {self._process.wait()} before the work was "
                "done; the system kills a process (exit code -9) where memory runs out. Lower compute.workers or "
                "compute.cohort when you resume the run."
            ) from error
