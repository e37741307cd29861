"""What is read back of a run: what it has learned of the devices, when it reached a target, which formats."""

import contextlib
import json
import resource
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

INFO = {
    "recipe": {},
    "rounds": 2,
    "method": "rbla",
    "metric": {},
    "references": {},
    "versions": {},
    "data": {},
    "fleet": {},
    "modules_to_save": [],
}
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


@pytest.mark.parametrize("fleet", [{}, dict(list(CROWD.items())[:-1]), FLEET])
def test_a_checkpoint_of_another_fleet_is_refused(tmp_path, fleet):
    folder, _ = played(tmp_path / "run", CROWD)
    with pytest.raises(RecordError, match="clients are not those"):
        folder.load(SPEC, fleet)


@pytest.mark.parametrize(
    ("scores", "target", "higher", "reached"),
    [
        ([0.5, 0.7, 0.6, 0.8], 0.7, True, 20.0),
        ([0.5, 0.7, 0.6, 0.8], 0.9, True, None),
        ([40.0, None, 15.0, 12.0], 15.0, False, 30.0),
        ([40.0, None, 15.0, 12.0], 11.0, False, None),
        ([None, None, None, -0.1], -0.5, True, 40.0),
        ([40.0, 20.0, 15.0, 12.0], None, False, None),
    ],
)
def test_when_a_target_was_reached_is_worked_out_anew(tmp_path, scores, target, higher, reached):
    folder, _ = played(tmp_path / "run", FLEET, rounds=4)
    lines = [
        record | {"score": score, "simulated_seconds": 10.0 * record["round"]}
        for record, score in zip(folder.records(), scores, strict=True)
    ]
    (folder.path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.update_info(metric={"name": "some", "higher_is_better": higher})
    assert folder.load(SPEC, FLEET, target=target).target_seconds == reached


def test_a_run_of_the_format_before_is_refused_with_what_can_still_be_done(tmp_path):
    folder = RunFolder.create(tmp_path / "run", INFO)
    folder.update_info(format=1)
    with pytest.raises(RecordError, match=r"not a run of format 2; it says 1\. `anyrank report` can still show it"):
        RunFolder.open(folder.path)


def test_a_run_without_a_metric_is_none(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {key: value for key, value in INFO.items() if key != "metric"})
    with pytest.raises(RecordError, match="lacks metric"):
        RunFolder.open(folder.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("recipe", 5), ("fleet", []), ("data", "x"), ("metric", None), ("rounds", True), ("modules_to_save", {})],
)
def test_a_run_of_other_types_is_none(tmp_path, key, value):
    folder = RunFolder.create(tmp_path / "run", INFO)
    assert RunFolder.open(folder.path).info == folder.info
    folder.update_info(**{key: value})
    with pytest.raises(RecordError, match=rf"run\.json: {key} is .*; the file was changed"):
        RunFolder.open(folder.path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"round": 1}', "score is not there"),
        ("[1]", r"it is \[1\]"),
        ("junk", r"Expecting value"),
        ("{}", "round is not there"),
        (None, "returned_ranks is 5"),
    ],
)
def test_a_line_that_is_no_round_is_named(tmp_path, line, said):
    folder, _ = played(tmp_path / "run", FLEET)
    changed = json.dumps(folder.records()[0] | {"returned_ranks": 5})
    (folder.path / "rounds.jsonl").write_text((line or changed) + "\n")
    with pytest.raises(RecordError, match=rf"rounds\.jsonl holds a line that is no round.*{said}"):
        folder.records()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that gets full: what goes over this many bytes is not written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "file"), [(100, "rounds.jsonl"), (1000, "checkpoint/state.safetensors")])
def test_a_round_that_finds_no_room_names_the_file_and_can_be_played_again(tmp_path, size, file):
    whole, after = played(tmp_path / "whole", FLEET, rounds=1)
    folder = RunFolder.create(tmp_path / "run", INFO)
    assert (whole.path / "rounds.jsonl").stat().st_size < 1000 < checkpoint(whole).stat().st_size
    with files_of_at_most(size), pytest.raises(OSError, match="File too large") as found:
        folder.save(after, real_seconds=0.0)
    assert found.value.filename == str(folder.path / file)
    assert not list(folder.path.rglob("*.tmp"))
    assert folder.load(SPEC, FLEET) is None
    folder.save(after, real_seconds=0.0)
    assert checkpoint(folder).read_bytes() == checkpoint(whole).read_bytes()
