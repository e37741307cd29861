"""How a machine does the work of a simulation: processes, their threads, how many clients share a pass.

All of it is settled before a run starts, from sizes alone and never from a stopwatch, so that the same recipe gives the same
bytes on the same machine. Other settings agree but for rounding.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from anyrank.config import ComputeTable
from anyrank.federation import ModelCost

__all__ = ["cohort_of", "devices", "reproducible", "settled"]

# A pass takes a while for its calls, whatever its size, and then so long for each token. On a CPU both were measured, with
# all-MiniLM-L6-v2 on one core of an AMD EPYC with AVX-512; for a GPU these are estimates.
_BLOCK_SECONDS = 2.4e-3
_FLOPS = {
    ("cpu", "float32"): 8e10,
    ("cpu", "bfloat16"): 1.6e11,
    ("cpu", "float16"): 8e10,  # few processors have instructions for it
    ("cuda", "float32"): 2e13,
    ("cuda", "bfloat16"): 1e14,
    ("cuda", "float16"): 1e14,
}
_WORTH = 0.97  # what passes may cost with others, relative to passes alone, before clients share them
_NEARLY_BEST = 1.05  # what a larger cohort would gain beyond this is not worth its memory


def devices() -> list[torch.device]:
    """The GPUs of this machine, or else its CPU."""
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]


def settled(
    table: ComputeTable,
    *,
    cost: ModelCost,
    dtype: str,
    lengths: Sequence[int],
    batch_size: int,
    clients: int,
    apart: bool,
) -> ComputeTable:
    """What the recipe leaves open, decided.

    On a CPU, two processes of one thread do more than one process of two; on a GPU there is one process for each.

    Args:
        table: what the recipe says.
        cost: of a local step.
        dtype: of the base model.
        lengths: of the training examples, in tokens.
        batch_size: of a client.
        clients: in a round.
        apart: clients cannot share a pass.
    """
    where = devices()
    threads = table.threads or torch.get_num_threads()
    memory_gb = table.memory_gb or round(_memory(where[0]) / 2e9, 3)
    of_a_client = cost.working_bytes + cost.num_blocks * cost.block_activation_bytes
    room = max(1, int(memory_gb * 1e9 / of_a_client))  # in all processes together
    forks = sys.platform == "linux"  # macOS offers it too, where system libraries do not survive it
    workers = table.workers or (min(threads if where[0].type == "cpu" else len(where), clients, room) if forks else 1)
    most = max(1, min(room // workers, -(-clients // workers)))
    speed = _FLOPS[where[0].type, dtype]
    cohort = table.cohort or cohort_of(most, cost=cost, speed=speed, lengths=lengths, batch_size=batch_size)
    return table.model_copy(
        update={"threads": threads, "workers": workers, "cohort": 1 if apart else cohort, "memory_gb": memory_gb}
    )


def cohort_of(most: int, *, cost: ModelCost, speed: float, lengths: Sequence[int], batch_size: int) -> int:
    """How many clients should share a pass: as few as is nearly best, since a larger pass pads to a longer example.

    Args:
        most: that there is room for.
        cost: of a local step.
        speed: floating-point operations a second.
        lengths: of the training examples, in tokens.
        batch_size: of a client.
    """
    flops = cost.forward_flops + cost.num_blocks * cost.block_backward_flops
    calls = cost.num_blocks * _BLOCK_SECONDS / (flops / cost.tokens_per_step / speed)  # in tokens
    counts = range(1, most + 1)
    longest = _expected_longest(lengths)
    tokens = [calls / count + batch_size * longest(count * batch_size) for count in counts]
    if min(tokens) > _WORTH * tokens[0]:
        return 1
    return next(count for count, each in zip(counts, tokens, strict=True) if each <= _NEARLY_BEST * min(tokens))


def _expected_longest(lengths: Sequence[int]) -> Callable[[int], float]:
    """The longest of so many examples, on average."""
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    below = np.cumsum(counts) / counts.sum()
    return lambda draws: float(values @ np.diff(below**draws, prepend=0.0))


def _memory(device: torch.device) -> int:
    """Bytes that a device has. A GPU is asked by a process of its own: one that has used CUDA cannot fork workers that do."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_initialized() or sys.platform != "linux":
        return _gpu_memory(device)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_gpu_memory, (device,))


def _gpu_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Have torch refuse operations whose result can differ from run to run, and sum in so many threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS counts as one of them
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
