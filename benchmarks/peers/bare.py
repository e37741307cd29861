"""Federated averaging without any framework: a loop over clients with one PEFT model, and the same loop in forked processes."""

import multiprocessing
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peers.work import Example, Result, State, Work, build, train

__all__ = ["forked", "loop"]

Sums = tuple[Mapping[str, Tensor], float]


def loop(work: Work) -> Result:
    """One client after another in this process, with all threads."""
    model, examples, result = build(work), work.examples(), Result(work.start())
    for round in range(1, work.rounds + 1):
        began = time.perf_counter()
        sums, loss = _summed(work, model, examples, result.state, round, range(work.clients))
        result.state, result.loss = {name: total / work.clients for name, total in sums.items()}, loss / work.clients
        result.seconds.append(time.perf_counter() - began)
    return result


def forked(work: Work, *, workers: int) -> Result:
    """The same with the clients dealt to processes of one thread each, forked after the model is loaded."""
    torch.set_num_threads(1)
    model, examples, result = build(work), work.examples(), Result(work.start())
    pipes = [_fork(work, model, examples, range(first, work.clients, workers)) for first in range(workers)]
    for round in range(1, work.rounds + 1):
        began = time.perf_counter()
        for pipe in pipes:
            pipe.send((round, {name: tensor.numpy() for name, tensor in result.state.items()}))
        parts = [pipe.recv() for pipe in pipes]
        result.state = {
            name: torch.from_numpy(sum(sums[name] for sums, _ in parts) / work.clients) for name in result.state
        }
        result.loss = sum(loss for _, loss in parts) / work.clients
        result.seconds.append(time.perf_counter() - began)
    for pipe in pipes:
        pipe.send(None)
    return result


def _fork(work: Work, model, examples: list[Example], clients: Iterable[int]) -> Any:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there, work, model, examples, clients), daemon=True).start()
    return here


def _serve(pipe: Any, work: Work, model, examples: list[Example], clients: Iterable[int]) -> None:
    while (asked := pipe.recv()) is not None:
        round, state = asked
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        sums, loss = _summed(work, model, examples, tensors, round, clients)
        pipe.send(({name: total.numpy() for name, total in sums.items()}, loss))


def _summed(work: Work, model, examples: list[Example], state: State, round: int, clients: Iterable[int]) -> Sums:
    """What these clients return, summed, and their losses."""
    sums, losses = {name: torch.zeros_like(tensor) for name, tensor in state.items()}, 0.0
    for client in clients:
        trained, loss = train(model, state, work.batches(examples, round, client), work)
        losses += loss
        for name, tensor in trained.items():
            sums[name] += tensor
    return sums, losses
