"""What a checkpoint holds of the devices: what a run has learned, whatever the number of clients."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from anyrank.clock import Clock
from anyrank.engine import Progress, begin, rounds
from anyrank.errors import RecordError
from anyrank.federation import Device, Task, Update
from anyrank.methods import METHODS
from anyrank.record import RunFolder
from anyrank.wire import decode, encode
from toy import FLEET, SPEC, federation

INFO = dict.fromkeys(["recipe", "rounds", "method", "versions", "data", "fleet", "modules_to_save"])
CROWD = {f"client {i:03}": replace(FLEET["ann"], client=f"client {i:03}") for i in range(1000)}


class Echo:
    """Clients that return what they were sent."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Update]:
        for task in tasks:
            adapter = task.start if task.kind == "train" else None
            yield Update(task.plan.client, task.round, adapter, 1, {"loss": 1.0, "accuracy": 1.0})


def played(path: Path, fleet: Mapping[str, Device], **settings) -> tuple[RunFolder, Progress]:
    """A run folder after two rounds of two clients, and where the run stands."""
    settings = {"transport": Echo(), "per_round": 2, "rounds": 2} | settings
    folder, run = RunFolder.create(path, INFO), federation(METHODS["rbla"](), **settings)
    found = list(rounds(run, begin(run, run.method.init(SPEC), fleet)))
    for progress in found:
        folder.save(progress, real_seconds=0.0)
    return folder, found[-1]


def checkpoint(folder: RunFolder) -> Path:
    return folder.path / "checkpoint" / "state.safetensors"


def learned(folder: RunFolder) -> dict:
    return decode(checkpoint(folder).read_bytes())[1]["fleet"]


def test_a_checkpoint_holds_the_devices_that_have_replied(tmp_path):
    folder, after = played(tmp_path / "run", CROWD, clock=Clock(dropout=0.5, seed=0))
    replied = {client for record in folder.records() for client in record["returned_ranks"]}
    assert 0 < len(replied) < 4
    assert learned(folder).keys() == replied
    loaded = folder.load(SPEC, CROWD)
    assert loaded.fleet == after.fleet
    assert list(loaded.fleet) == list(CROWD)


def test_a_checkpoint_does_not_grow_with_the_clients_that_were_never_asked(tmp_path):
    sizes = [
        checkpoint(played(tmp_path / str(len(fleet)), fleet)[0]).stat().st_size
        for fleet in (dict(list(CROWD.items())[:100]), CROWD)
    ]
    assert abs(sizes[1] - sizes[0]) <= 64  # digits of numbers


def test_all_that_is_learned_of_a_device_survives(tmp_path):
    _, after = played(tmp_path / "run", FLEET, rounds=1)
    client = next(client for client, device in after.fleet.items() if device.times)
    fleet = {**after.fleet, client: replace(after.fleet[client], rank=1, folds=7)}
    folder = RunFolder.create(tmp_path / "changed", INFO)
    folder.save(replace(after, fleet=fleet), real_seconds=0.0)
    assert folder.load(SPEC, FLEET).fleet == fleet


def test_a_checkpoint_that_names_every_device_can_be_read(tmp_path):
    """As they were written once."""
    folder, after = played(tmp_path / "run", FLEET)
    adapters, header = decode(checkpoint(folder).read_bytes())
    unknown = {client: {"rank": device.rank, "folds": 0, "times": None} for client, device in FLEET.items()}
    del header["clients"]
    checkpoint(folder).write_bytes(encode(adapters, header | {"fleet": unknown | header["fleet"]}))
    assert folder.load(SPEC, FLEET).fleet == after.fleet


@pytest.mark.parametrize("fleet", [{}, dict(list(CROWD.items())[:-1]), CROWD | FLEET])
def test_a_checkpoint_of_another_fleet_is_refused(tmp_path, fleet):
    folder, _ = played(tmp_path / "run", CROWD)
    with pytest.raises(RecordError, match="clients are not those"):
        folder.load(SPEC, fleet)
