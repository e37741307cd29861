"""Simulation in several processes, forked from this one after the base model is loaded: its memory is shared until written to.

Who works on what does not depend on how long things take: tasks that share passes are dealt out beforehand, in equal shares,
and a task on its own gives the same result wherever it is done. So the same plan gives the same bytes.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from anyrank.errors import TransportError
from anyrank.federation import Failure, Task, Update
from anyrank.transport.in_process import InProcess
from anyrank.transport.pickles import dumps, heard, told

__all__ = ["Workers", "one_thread"]

_DONE = None  # after the replies to a share


@dataclass(frozen=True, eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Workers:
    """A transport that has other processes do the work; a context manager, whose end is theirs.

    Args:
        inner: what each of them does.
        count: how many there are.
        threads: of each.
        devices: where each has its model, in turn; none leaves it where it is.

    Raises:
        TransportError: one could not be started.
    """

    def __init__(self, inner: InProcess, *, count: int, threads: int, devices: Sequence[torch.device] = ()):
        """Fork them."""
        self._inner = inner
        gc.collect()
        gc.freeze()  # a collection writes to every object that it looks at, and a page that is written to is shared no more
        self._workers: list[_Worker] = []
        try:
            for i in range(count):
                self._workers.append(_fork(inner, threads, devices[i % len(devices)] if devices else None))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Workers":
        """Nothing to do: they run already."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the processes, whatever they are at."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
            worker.process.join()
        gc.unfreeze()

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        """Have the tasks carried out; replies come in the order in which they are ready.

        Raises:
            TransportError: a worker was killed or failed.
            AnyrankError: as a worker raised it.
            OSError: as a worker raised it.
        """
        with one_thread():
            yield from self._run(self._inner.shares(tasks, len(self._workers)))

    def _run(self, shares: list[list[Task]]) -> Iterator[Update | Failure]:
        idle, busy = list(self._workers), dict[Connection, tuple[_Worker, Sequence[Task]]]()
        while shares or busy:
            while shares and idle:
                worker, share = idle.pop(0), shares.pop(0)
                content = dumps(share)
                with _alive(worker, share):
                    worker.pipe.send_bytes(content)
                busy[worker.pipe] = worker, share
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                reply = _received(*busy[pipe])
                if reply is _DONE:
                    idle.append(busy.pop(pipe)[0])
                else:
                    yield reply


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Leave the cores to those who work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _received(worker: _Worker, share: Sequence[Task]) -> Any:
    with _alive(worker, share):
        content = worker.pipe.recv_bytes()
    return heard(content, round=share[0].round)


@contextlib.contextmanager
def _alive(worker: _Worker, share: Sequence[Task]) -> Iterator[None]:
    """Have a pipe that broke say how its worker ended."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        worker.process.join()
        raise TransportError(
            f"round {share[0].round}: a worker process ended with exit code {worker.process.exitcode} before its work for "
            f"{len(share)} clients was done; the system kills a process (exit code -9) where memory runs out. Lower "
            "compute.workers or compute.cohort when you resume the run."
        ) from error


def _fork(inner: InProcess, threads: int, device: torch.device | None) -> _Worker:
    """Start a worker, from a thread of its own: OpenMP's threads belong to the thread that first used them, and do not
    survive a fork. In one that never used any, the child can start its own."""
    try:
        ours, theirs = multiprocessing.Pipe()
        assert isinstance(ours, Connection)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_serve, args=(inner, ours, theirs, threads, device), daemon=True)
        with ThreadPoolExecutor(1) as starter:
            starter.submit(process.start).result()
    except (OSError, RuntimeError) as error:  # the latter for want of a thread
        raise TransportError(f"a worker process could not be started: {error}. Lower compute.workers.") from error
    theirs.close()
    return _Worker(process, ours)


def _serve(inner: InProcess, parents: Connection, pipe: Connection, threads: int, device: torch.device | None) -> None:
    """What a worker does until its pipe closes or its parent ends."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the whole group; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _keep_freed_memory()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            share = pickle.loads(pipe.recv_bytes())
            try:
                if device:
                    inner.model.to(device)
                for reply in inner.run(share):
                    pipe.send_bytes(dumps(reply))
                pipe.send_bytes(dumps(_DONE))
            except Exception as error:
                pipe.send_bytes(dumps(told(error)))
    os._exit(0)


def _end_with_parent() -> None:
    """A parent that was killed ends nobody, and who resumes its run must be alone with the clients' memory."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _keep_freed_memory() -> None:
    """Have the C library keep what is freed: activations come and go at every step, and new pages cost more than their use."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
