"""What this machine can do: its free memory, and how fast it takes a training step of a model, as a device profile."""

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from anyrank.errors import ConfigError
from anyrank.federation import ModelCost, Profile

__all__ = ["Probed", "as_toml", "free_bytes", "matrix_flops", "probe"]

_SIDE = 1024  # of the matrices that are multiplied
_MOST = 21  # repetitions: a median of more hardly gets better


@dataclass(frozen=True)
class Probed:
    """What was measured of a machine.

    Args:
        profile: what follows for training the model; bandwidth is what was said, not measured.
        machine: what kind it is, in words.
        matrix_flops: operations a second in a product of two float32 matrices.
        depths: the two at which steps were timed.
        seconds: of a step at each, without the optimizer; medians.
        repeats: how many steps each median is of.
    """

    profile: Profile
    machine: str
    matrix_flops: float
    depths: tuple[int, int]
    seconds: tuple[float, float]
    repeats: int


def probe(
    model: nn.Module,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    batch: Mapping[str, Tensor],
    train: Callable[[int], object],
    depths: tuple[int, int],
    cost: ModelCost,
    seconds: float = 20.0,
    up_bps: float = 1e6,
    down_bps: float = 1e7,
) -> Probed:
    """Time training steps of a model at two depths, from which the speed of both passes follows.

    Where the difference of the depths is lost in noise, both passes get the speed of the deeper step. The model is left
    with what `train` put into it last.

    Args:
        model: where it is to be timed: on a CPU or a GPU.
        loss: a scalar from a batch, as in training.
        batch: the one of which `cost` is.
        train: puts adapters into the last so many blocks and takes them out of the others.
        depths: the two to time, the smaller first.
        cost: of a step, from `footprint`.
        seconds: that timing may take, about; each depth gets one step to warm up and one to be timed in any case.
        up_bps: upload, bytes a second, which nothing here can measure.
        down_bps: download, likewise.
    """
    device = next(model.parameters()).device
    memory = free_bytes(device) + cost.base_bytes  # the model is there already
    began, taken = time.perf_counter(), {depth: list[float]() for depth in depths}
    while True:
        for depth in depths:  # in turn, so that a machine that slows down does so for both
            train(depth)
            taken[depth].append(_seconds(lambda: _step(model, loss, batch), device))
        rounds, used = len(taken[depths[0]]), time.perf_counter() - began
        if rounds > _MOST or (rounds > 1 and used * (rounds + 1) / rounds > seconds):
            break
    shallow, deep = (median(taken[depth][1:]) for depth in depths)
    backward = (deep - shallow) / (depths[1] - depths[0])
    forward = deep - depths[1] * backward
    if min(forward, backward) <= 0:
        speed = (cost.forward_flops + depths[1] * cost.block_backward_flops) / deep
        forward, backward = cost.forward_flops / speed, cost.block_backward_flops / speed
    return Probed(
        profile=Profile(
            forward_flops=cost.forward_flops / forward,
            backward_flops=cost.block_backward_flops / backward,
            memory_bytes=float(memory),
            up_bps=up_bps,
            down_bps=down_bps,
        ),
        machine=_described(device),
        matrix_flops=matrix_flops(device),
        depths=depths,
        seconds=(shallow, deep),
        repeats=rounds - 1,
    )


def as_toml(name: str, probed: Probed) -> str:
    """What was measured as a table for a recipe, the measurements above it.

    Args:
        name: what recipes call the device.
        probed: what was measured.

    Raises:
        ConfigError: a name that a recipe would have to quote.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"device name {name!r}: expected letters, digits, - and _ only. Choose another one.")
    steps = " and ".join(
        f"{taken:.4g} s at depth {depth}" for depth, taken in zip(probed.depths, probed.seconds, strict=True)
    )
    lines = [
        f"# {probed.machine}: {probed.matrix_flops / 1e9:,.0f} GFLOP/s in products of float32 matrices",
        f"# a step takes {steps} (medians of {probed.repeats})",
        "# up_bps and down_bps are not measured: put in those of the device's network",
        f"[devices.{name}]",
        *(f"{key} = {value:.4g}" for key, value in vars(probed.profile).items()),
    ]
    return "\n".join(lines) + "\n"


def matrix_flops(device: torch.device) -> float:
    """Operations a second in a product of two float32 matrices of 1024 x 1024, the median of several.

    Args:
        device: where.
    """
    a = torch.ones(_SIDE, _SIDE, device=device)
    return 2 * _SIDE**3 / median([_seconds(lambda: a @ a, device) for _ in range(_MOST)][1:])


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that a process could still take on a device.

    Args:
        device: a GPU, or the CPU, whose limit may be that of a container.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux, which alone says what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = 1024 * int(re.findall(r"MemAvailable: +(\d+)", meminfo.read_text())[0])
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, limit)


def _step(model: nn.Module, loss: Callable[[Mapping[str, Tensor]], Tensor], batch: Mapping[str, Tensor]) -> None:
    value = loss(batch)
    if value.requires_grad:
        value.backward()
    model.zero_grad()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
