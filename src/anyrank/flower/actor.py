"""What an actor of Flower's simulation engine does: it makes model and data from the recipe, once, and works for any client."""

import functools
import os
import pickle
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyrank import config
from anyrank.adapter import Adapter
from anyrank.api import in_process
from anyrank.compute import devices, reproducible
from anyrank.errors import ConfigError
from anyrank.job import CHOICES, Simulation, prepare
from anyrank.memory import Memory
from anyrank.transport.pickles import dumps, told

__all__ = ["carried_out"]


def carried_out(content: bytes) -> bytes:
    """The updates of a share of tasks, and what their clients keep; or what went wrong.

    Args:
        content: as `transport.FlowerSimulation` sends it.
    """
    try:
        setup, share, kept = pickle.loads(content)
        job, memory = _job(setup), _Carried(kept)
        with reproducible(job.recipe.compute.threads or 1):
            replies = list(in_process(job, memory).run(share))
        return dumps((replies, memory.written))
    except Exception as error:
        return dumps(told(error))


class _Carried(Memory):
    """What clients keep where it cannot be read or written: what came with their tasks, and what goes back."""

    def __init__(self, kept: Mapping[str, Adapter | None]):
        super().__init__(Path(os.devnull))
        self._came = kept
        self.written: list[tuple[str, tuple[int, int], Adapter]] = []

    def read(self, client: str, *, before: tuple[int, int]) -> Adapter | None:
        return self._came[client]

    def write(self, client: str, when: tuple[int, int], adapter: Adapter) -> None:
        self.written.append((client, when, adapter))


@functools.cache
def _job(setup: bytes) -> Simulation:
    given: Mapping[str, Any] = pickle.loads(setup)
    if Path(given["folder"]).is_dir():
        os.chdir(given["folder"])  # paths of the recipe may be relative
    job = prepare(config.resolve(given["recipe"], {}, CHOICES))
    found = {"model.name": job.outline.base_hash, "data.source": job.problem.fingerprint}
    if problems := [
        f"{key}: what actors find on {platform.node()} is not what the run was started with: SHA-256 {found[key][:12]}, there "
        f"{expected[:12]}. Put the same on every machine of the cluster."
        for key, expected in given["found"].items()
        if expected != found[key]
    ]:
        raise ConfigError(problems)
    job.model.to(devices()[0])
    return job
