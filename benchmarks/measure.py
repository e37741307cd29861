"""What the benchmarks share: times, memory and CPU seconds of whole process trees, and result files that say where they
come from. Memory and CPU seconds are read from `/proc`, so they need Linux.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "cores", "median_of", "peak", "save"]

HERE = Path(__file__).parent
RESULTS = HERE / "results"

_TAG = "BENCHMARK_TREE"  # in the environment of every process of a measured command
_EVERY = 0.25  # seconds between two looks at the CPU seconds of the processes
_SHARE = 0.02  # of one core that looking at their memory may take, which is slow: it would be measured too
_PACKAGES = ("torch", "transformers", "peft", "flwr", "ray")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- time ---------------------------------------------------------------------------------------------------------


def median_of(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time functions in turn, so that whatever else the machine does meets all of them alike.

    Args:
        functions: by name; each is called once in each repeat, in this order.
        repeats: how often.

    Returns:
        all seconds by name, of which the median is usually reported; work on a GPU is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            _settle()
            began = time.perf_counter()
            function()
            _settle()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- memory -------------------------------------------------------------------------------------------------------


def peak(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command and watch all of its processes, daemons included, until it ends.

    Args:
        command: the program and its arguments.
        env: added to this process's environment.

    Returns:
        `pss_mb`: the largest sum of the processes' memory in MiB, a shared page divided among its users; `cpu_s`: CPU
        seconds of all of them; `wall_s`; `output`: what was printed. Sampled, so short peaks and the last moments of a
        process are missed.

    Raises:
        RuntimeError: the command failed, with what it printed last.
    """
    tag, stop = uuid.uuid4().hex, threading.Event()
    tree = _Tree(f"{_TAG}={tag}".encode())
    watcher = threading.Thread(target=tree.watch, args=(stop,), daemon=True)
    began = time.perf_counter()
    watcher.start()
    # Files, not pipes: a daemon that outlives the command would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        code = subprocess.call(command, env={**os.environ, **(env or {}), _TAG: tag}, stdout=output, stderr=errors)
        wall = time.perf_counter() - began
        stop.set()
        watcher.join()
        output.seek(0)
        errors.seek(0)
        if code:
            raise RuntimeError(f"{shlex.join(command)} ended with {code}:\n{errors.read()[-3000:]}")
        printed = output.read()
    return {
        "pss_mb": round(tree.pss_kb / 1024),
        "cpu_s": round(sum(tree.cpu_s.values()), 1),
        "wall_s": round(wall, 2),
        "output": printed,
    }


class _Tree:
    """The processes with a mark in their environment, and what was seen of them so far."""

    def __init__(self, mark: bytes):
        self.mark, self.pss_kb, self.cpu_s = mark, 0, dict[str, float]()

    def watch(self, stop: threading.Event) -> None:
        rested = 0.0
        while not stop.wait(_EVERY):
            self._look_at_cpu()
            if time.monotonic() >= rested:
                began = time.thread_time()
                self._look_at_memory()
                rested = time.monotonic() + (time.thread_time() - began) / _SHARE

    def _look_at_cpu(self) -> None:
        for process, stat in self._read("stat"):
            user, system = stat.rsplit(")", 1)[1].split()[11:13]
            self.cpu_s[process] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _look_at_memory(self) -> None:
        rollups = [rollup.partition("\nPss:")[2].split() for _, rollup in self._read("smaps_rollup")]
        self.pss_kb = max(self.pss_kb, sum(int(words[0]) for words in rollups if words))

    def _read(self, name: str) -> Iterator[tuple[str, str]]:
        """A file of `/proc` for each process of the tree; one may end while it is looked at."""
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and self.mark in (folder / "environ").read_bytes():
                    yield folder.name, (folder / name).read_text()


# --- result files -------------------------------------------------------------------------------------------------


def save(name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `results/NAME.json`: the rows with the machine, the versions and the commit that they were measured with.

    With a GPU at hand it is `NAME-cuda.json`. Settings with a true `quick` go to `NAME-quick.json`, which is never committed.
    """
    content = {
        "benchmark": name,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _machine(),
        "versions": _versions(),
        "settings": dict(settings),
        "results": [dict(row) for row in rows],
    }
    suffix = "-quick" if settings.get("quick") else "-cuda" if torch.cuda.is_available() else ""
    file = RESULTS / f"{name}{suffix}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def _commit() -> str | None:
    """The commit that is measured, `+` after it if its code was changed."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = _git("rev-parse", "HEAD").strip()
        changed = [line for line in _git("status", "--porcelain", "--", "../src", "*.py").splitlines() if line]
        return head + "+" * bool(changed)
    return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
