"""Forked workers: the same bytes as one process, whoever works on what; what a killed or failing worker leaves."""

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anyrank
from anyrank import spool
from anyrank.adapter import Adapter
from anyrank.errors import ConfigError, RoundFailed, TransportError, UpdateRejected
from anyrank.federation import Update, make_task
from anyrank.job import load_recipe, prepare
from anyrank.transport import InProcess, Workers
from anyrank.transport.pickles import dumps
from tiny import in_process, recipe_toml, write_model, write_reviews


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv")))
    return file


@pytest.fixture(scope="module")
def job(recipe):
    return prepare(load_recipe(recipe, {"method.name": "rbla", "train.steps": 3}))


def tasks_of(job, kind="train"):
    state = job.method.init(job.spec)
    return [
        make_task(job.method, state, plan, kind=kind)
        for plan in job.method.assign(state, list(job.cohort.fleet.values()))
    ]


def replies_of(transport, tasks) -> dict[str, Update]:
    return {reply.client: reply for reply in transport.run(tasks)}


def assert_same(one: dict[str, Update], other: dict[str, Update]) -> None:
    assert one.keys() == other.keys()
    for client, reply in one.items():
        assert reply.metrics == other[client].metrics
        if reply.adapter:
            theirs = other[client].adapter.tensors()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in reply.adapter.tensors().items())


@pytest.mark.parametrize("kind", ["train", "evaluate", "test"])
def test_workers_do_what_one_process_does(job, tmp_path, kind):
    inner = in_process(job, tmp_path)
    with Workers(inner, count=2, threads=1) as workers:
        for _ in range(2):
            assert_same(replies_of(workers, tasks_of(job, kind)), replies_of(inner, tasks_of(job, kind)))


def test_the_same_plan_gives_the_same_bytes(recipe, tmp_path):
    chosen = load_recipe(
        recipe, ["compute.threads=2", "compute.workers=2", "compute.cohort=2", "method.name=fedsa_lora"]
    )
    runs = [anyrank.run(chosen, tmp_path / name) for name in ("one", "other")]
    assert runs[0].info["recipe"]["compute"]["workers"] == 2
    one, other = (
        {f.relative_to(r.path): f.read_bytes() for f in (r.path / "clients").rglob("*.safetensors")} for r in runs
    )
    assert one == other
    assert len(one) == 6


def test_a_run_goes_on_with_the_plan_that_it_began_with(recipe, tmp_path):
    chosen = load_recipe(recipe, ["compute.threads=2", "compute.workers=2", "rounds=2"])
    whole = anyrank.run(load_recipe(recipe, ["compute.threads=2", "compute.workers=2", "rounds=3"]), tmp_path / "whole")
    begun = anyrank.run(chosen, tmp_path / "begun")
    resumed = anyrank.resume(begun.path, overrides=["rounds=3"])
    assert resumed.info["recipe"]["compute"] == whole.info["recipe"]["compute"]
    file = "adapter/adapter_model.safetensors"
    assert (whole.path / file).read_bytes() == (resumed.path / file).read_bytes()


def test_a_run_that_took_too_much_goes_on_with_less(recipe, tmp_path):
    begun = anyrank.run(load_recipe(recipe, ["compute.threads=2", "compute.workers=2", "rounds=1"]), tmp_path / "begun")
    less = anyrank.resume(begun.path, overrides=["rounds=2", "compute.workers=1", "compute.cohort=1"])
    compute = less.info["recipe"]["compute"]
    assert (compute["threads"], compute["workers"], compute["cohort"]) == (2, 1, 1)
    assert len(less.records()) == 2


def test_threads_of_a_worker_start_after_the_parents_have_run(job, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = torch.randn(700, 700)
        assert (big @ big).isfinite().all()  # the parent's threads are there now
        with Workers(in_process(job, tmp_path), count=1, threads=2) as workers:
            assert len(replies_of(workers, tasks_of(job))) == 6
    finally:
        torch.set_num_threads(before)


def test_a_killed_worker_is_an_error_that_says_what_to_do(job, tmp_path):
    class Kills(InProcess):
        def run(self, tasks):
            os.kill(os.getpid(), signal.SIGKILL)
            yield from ()

    inner = Kills(**vars(in_process(job, tmp_path)))
    with (
        Workers(inner, count=2, threads=1) as workers,
        pytest.raises(
            TransportError, match=r"round 1: a worker process ended with exit code -9 .* Lower compute.workers"
        ),
    ):
        replies_of(workers, tasks_of(job))


def test_a_worker_killed_while_idle_is_the_same_error(job, tmp_path):
    said = r"round 1: a worker process ended with exit code -9 .* Lower compute.workers"
    with Workers(in_process(job, tmp_path), count=2, threads=1) as workers:
        process = workers._workers[1].process
        process.kill()
        process.join()
        with pytest.raises(TransportError, match=said):
            replies_of(workers, tasks_of(job))


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
def test_a_worker_that_cannot_be_started_ends_those_before_it(job, tmp_path, monkeypatch, number):
    fork, children = os.fork, []

    def forks_once():
        if children:
            raise OSError(number, os.strerror(number))
        if child := fork():
            children.append(child)
        return child

    monkeypatch.setattr(os, "fork", forks_once)
    with pytest.raises(
        TransportError, match=rf"could not be started: .*{os.strerror(number)}\. Lower compute\.workers"
    ):
        Workers(in_process(job, tmp_path), count=3, threads=1)
    assert len(children) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)
    assert gc.get_freeze_count() == 0


def test_workers_end_with_their_parent(job, tmp_path):
    told, tell = multiprocessing.Pipe(duplex=False)

    class Sleeps(InProcess):
        def run(self, tasks):
            tell.send("at work")
            time.sleep(60)
            yield

    def play():
        with Workers(Sleeps(**vars(in_process(job, tmp_path))), count=3, threads=1) as workers:
            replies_of(workers, tasks_of(job))

    parent = multiprocessing.get_context("fork").Process(target=play)
    parent.start()
    tell.close()
    for _ in range(3):
        assert told.recv() == "at work"
    parent.kill()
    parent.join()
    assert told.poll(2)
    with pytest.raises(EOFError):  # nobody has the other end any more
        told.recv()


def test_a_device_that_cannot_be_had_is_told(job, tmp_path):
    devices = [torch.device("cuda", 99)]
    with (
        Workers(in_process(job, tmp_path), count=2, threads=1, devices=devices) as workers,
        pytest.raises(TransportError, match=r"(?s)round 1: a worker process failed:.*CUDA"),
    ):
        replies_of(workers, tasks_of(job))


def test_an_error_in_a_worker_is_told(job, tmp_path):
    class Fails(InProcess):
        def run(self, tasks):
            raise ZeroDivisionError("what went wrong there")
            yield

    inner = Fails(**vars(in_process(job, tmp_path)))
    with (
        Workers(inner, count=1, threads=1) as workers,
        pytest.raises(TransportError, match="what went wrong there"),
    ):
        replies_of(workers, tasks_of(job))


class LibrarysError(OSError):
    def __init__(self, message, *, response):
        super().__init__(message)
        self.response = response


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UpdateRejected("ann", "A/q", "is odd"), UpdateRejected),
        (ConfigError(["one problem", "another"]), ConfigError),
        (RoundFailed("nobody came"), RoundFailed),
        (OSError(errno.ENOSPC, "No space left on device", "memory/ann/1-0.tmp"), OSError),
        (FileNotFoundError("there is no such text"), FileNotFoundError),
        (LibrarysError("not there", response=404), OSError),
    ],
)
def test_an_error_that_users_can_meet_is_raised_as_it_is(job, tmp_path, error, kind):
    class Fails(InProcess):
        def run(self, tasks):
            raise error
            yield

    inner = Fails(**vars(in_process(job, tmp_path)))
    with Workers(inner, count=1, threads=1) as workers, pytest.raises((anyrank.AnyrankError, OSError)) as caught:
        replies_of(workers, tasks_of(job))
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)
    if kind is type(error):
        assert "in run" in caught.value.__notes__[0]  # where it came from
        assert {**vars(caught.value), "__notes__": None} == {**vars(error), "__notes__": None}
        assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)


def test_workers_end_with_their_transport(job, tmp_path):
    with Workers(in_process(job, tmp_path), count=2, threads=1) as workers:
        processes = [worker.process for worker in workers._workers]
        assert all(process.is_alive() for process in processes)
        assert gc.get_freeze_count() > 0
    assert not any(process.is_alive() for process in processes)
    assert gc.get_freeze_count() == 0


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    count=st.integers(1, 4),
    cohort=st.integers(1, 3),
)
def test_tasks_are_dealt_out_once_each_and_evenly(job, steps, count, cohort):
    inner = in_process(job, Path("unused"), cohort=cohort)
    first = tasks_of(job)[0]
    names = [f"client-{i}" for i in range(len(steps))]
    tasks = [replace(first, plan=replace(first.plan, client=n, steps=s)) for n, s in zip(names, steps, strict=True)]
    inner = replace(inner, shards={name: np.arange(40) for name in names})
    shares = inner.shares(tasks, count)
    assert sorted(task.plan.client for share in shares for task in share) == sorted(names)
    assert all(shares)
    if cohort > 1:
        load = [sum(task.plan.steps for task in share) for share in shares]
        assert len(shares) == min(count, len(tasks))
        assert max(load) <= sum(steps) / len(shares) + max(steps) + len(tasks)
    else:
        assert len(shares) == min(8 * count, len(tasks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_cross_whole_and_what_is_shared_stays_shared(dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    one, other = pickle.loads(dumps([tensor, tensor]))
    assert one is other
    assert one.dtype == dtype
    assert torch.equal(one, tensor)
    part = torch.arange(1000.0).reshape(10, 100)[:2]
    assert len(dumps(part)) < 2000  # a view sends what it shows


def test_adapters_cross_whole(job):
    task = tasks_of(job)[0]
    for adapter in (
        task.start,
        Adapter({}),
        Adapter({}, {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float64)}),
    ):
        one, other = pickle.loads(dumps([adapter, adapter]))
        assert one is other
        assert list(one.tensors()) == list(adapter.tensors())
        for name, tensor in adapter.tensors().items():
            assert torch.equal(one.tensors()[name], tensor)
            assert one.tensors()[name].dtype == tensor.dtype


def test_adapters_on_disk_cross_each_as_it_is(monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    with spool.Spool() as kept:
        stored = [kept.keep(Adapter({}, {"head": torch.full((1000,), i)})) for i in range(200)]
        found = pickle.loads(dumps(stored))
    assert [adapter.dense["head"].unique().tolist() for adapter in found] == [[i] for i in range(200)]
