"""Flower's simulation engine, with Ray: the records of a run in one process, errors from actors, and nothing that is left."""

import contextlib
import importlib.util
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import anyrank
from anyrank import api
from anyrank.api import Observer
from anyrank.cli import main
from anyrank.config import Recipe
from anyrank.errors import ConfigError, TransportError
from anyrank.job import prepare
from anyrank.problem import Problem
from anyrank.record import RunFolder
from anyrank.transport import FlowerSimulation
from test_deployed import assert_alike, without_times
from test_workers import tasks_of
from tiny import in_process, recipe_toml, write_model, write_reviews

ANYRANK = [sys.executable, "-c", "from anyrank.cli import main; main()"]


class Shared:
    """One engine in the place of all that are asked for: each takes ten seconds to start."""

    def __init__(self) -> None:
        self.engine: FlowerSimulation | None = None

    def __call__(self, inner: Any, setup: Mapping[str, Any], **settings: Any) -> Any:
        if self.engine is None:
            self.engine = FlowerSimulation(inner, setup, count=2, threads=1)
        self.engine._inner, self.engine._setup = inner, pickle.dumps(setup)
        return contextlib.nullcontext(self.engine)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    if shared.engine:
        shared.engine.__exit__()


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flower_sim")
    write_model(folder / "model")
    write_reviews(folder / "reviews.csv")
    return folder


def recipe_of(material: Path, method: str, **changes: Any) -> Recipe:
    file = material / f"{method}.toml"
    file.write_text(recipe_toml(material / "model", material / "reviews.csv", method=method))
    return anyrank.load_recipe(file, {"compute.cohort": 1, "evaluate.every": 2, **changes})


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """The same records in every field but the real seconds, the same adapters, and the same kept by clients."""
    for one, other in zip(found.records(), expected.records(), strict=True):
        assert_alike(without_times(one), without_times(other))
    kept = [{f.relative_to(r.path): f for f in r.path.rglob("*.safetensors")} for r in (found, expected)]
    assert kept[0].keys() == kept[1].keys()
    for file in kept[0]:
        one, other = (load_file(files[file]) for files in kept)
        assert one.keys() == other.keys()
        assert all(one[key].allclose(other[key], atol=1e-5) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hetlora", "flora", "fedsa_lora"])
def test_a_run_on_the_engine_is_the_run_in_one_process(material, shared, tmp_path, monkeypatch, method):
    recipe = recipe_of(material, method, compare=["centralised"] if method == "hetlora" else [])
    whole = anyrank.run(recipe, tmp_path / "whole")
    monkeypatch.setattr(api, "FlowerSimulation", shared)
    run = anyrank.run(recipe, tmp_path / "run", engine="flower-sim")
    assert len(run.records()) == recipe.rounds
    assert_same_run(run, whole)
    if method == "hetlora":
        assert_same_run(*(RunFolder.open(r.path / "compare" / "centralised") for r in (run, whole)))
    assert (run.path / "memory").exists() == (method == "fedsa_lora")


@pytest.mark.slow
def test_clients_that_share_passes_give_the_bytes_that_workers_give(material, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "FlowerSimulation", shared)
    changes = {"compute.cohort": 2, "compute.workers": 2, "compute.threads": 2}
    runs = [
        anyrank.run(recipe_of(material, "hetlora", **changes), tmp_path / engine, engine=engine)
        for engine in ("local", "flower-sim")
    ]
    one, other = (run.path / "adapter" / "adapter_model.safetensors" for run in runs)
    assert one.read_bytes() == other.read_bytes()


class Stops(Observer):
    def finished_round(self, record):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_what_its_clients_kept(material, shared, tmp_path, monkeypatch):
    """On either engine, whichever it was stopped on."""
    monkeypatch.setattr(api, "FlowerSimulation", shared)
    recipe = recipe_of(material, "fedsa_lora")
    whole = anyrank.run(recipe, tmp_path / "whole")
    for first, then in (("flower-sim", "flower-sim"), ("local", "flower-sim"), ("flower-sim", "local")):
        out = tmp_path / f"{first}-{then}"
        with pytest.raises(KeyboardInterrupt):
            anyrank.run(recipe, out, observer=Stops(), engine=first)
        assert_same_run(api.resume(out, engine=then), whole)


@pytest.mark.slow
def test_an_error_in_an_actor_is_told(material, shared, tmp_path):
    job = prepare(recipe_of(material, "hetlora"))
    task, *_ = tasks_of(job)
    setup, inner = api._setup(job, 1), in_process(job, tmp_path)
    with (
        pytest.raises(ConfigError, match=r"^data.source: what actors find on .* SHA-256 \w{12}, there other\. Put"),
        shared(inner, {**setup, "found": {**setup["found"], "data.source": "other"}}) as engine,
    ):
        list(engine.run([task]))
    with (
        pytest.raises(TransportError, match=r"(?s)^round 1: a worker process failed:\nTrace.*KeyError: 'recipe'"),
        shared(inner, {"folder": str(tmp_path / "nowhere")}) as engine,
    ):
        list(engine.run([task]))
    with shared(inner, setup) as engine:
        assert [reply.client for reply in engine.run([task])] == [task.plan.client]


@pytest.mark.slow
def test_an_actor_that_is_killed_is_told_and_nothing_is_left(material, shared, tmp_path):
    job = prepare(recipe_of(material, "hetlora"))
    with shared(in_process(job, tmp_path), api._setup(job, 1)) as engine:
        assert list(engine.run(tasks_of(job)))
        below = psutil.Process(engine._process.pid).children(recursive=True)
        assert {address.ip for address in listening(below)} <= {"127.0.0.1", "::ffff:127.0.0.1"}
        actors = actors_of(below)
        assert len(actors) == 2
        for actor in actors:
            actor.kill()
        with pytest.raises(TransportError, match=r"^round 1: a worker process failed:\nFlower reports: .*ActorDied"):
            list(engine.run(tasks_of(job)))
        engine.__exit__()
        shared.engine = None
        assert psutil.wait_procs(below, timeout=5)[1] == []


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_continue_and_leaves_nothing(material, tmp_path):
    recipe_of(material, "hetlora")
    out = tmp_path / "run"
    settings = [f"--set={each}" for each in ("rounds=1000", "compute.workers=2", "compute.threads=2")]
    command = [*ANYRANK, "run", material / "hetlora.toml", "--engine", "flower-sim", "--out", out, *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        try:
            until = time.monotonic() + 120
            while not (out / "rounds.jsonl").exists() and run.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
            below = psutil.Process(run.pid).children(recursive=True)
            assert len(actors_of(below)) == 2
            run.send_signal(signal.SIGINT)
            _, told = run.communicate(timeout=60)
        finally:
            run.kill()
    assert told == f"\nStopped. Continue with: anyrank run --resume {out} --engine flower-sim\n"
    assert run.returncode == 130
    assert psutil.wait_procs(below, timeout=5)[1] == []


def actors_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.name().startswith("ray::ClientApp")]


def listening(processes: list[psutil.Process]) -> list[Any]:
    found = [connection for process in processes for connection in process.net_connections("tcp")]
    return [connection.laddr for connection in found if connection.status == psutil.CONN_LISTEN]


# Without Ray


def test_an_unknown_engine_is_refused(material, tmp_path, monkeypatch, capsys):
    recipe = recipe_of(material, "hetlora")
    with pytest.raises(ConfigError, match="engine: expected one of local, flower-sim, got 'ray'"):
        anyrank.run(recipe, tmp_path / "run", engine="ray")
    monkeypatch.setattr(sys, "argv", ["anyrank", "run", "--engine", "ray", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "expected one of local, flower-sim" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_problem_that_is_handed_over_is_refused(material, tmp_path):
    problem = object.__new__(Problem)
    with pytest.raises(ConfigError, match="flower-sim makes the problem from the recipe"):
        anyrank.run(recipe_of(material, "hetlora"), tmp_path / "run", problem=problem, engine="flower-sim")


@pytest.mark.parametrize("missing", ["flwr", "ray"])
def test_without_flower_or_ray_it_says_what_to_install(material, tmp_path, monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"anyrank\[flower-sim\]"):
        anyrank.run(recipe_of(material, "hetlora"), tmp_path / "run", engine="flower-sim")


def test_an_engine_that_does_not_start_is_told(material, tmp_path, monkeypatch):
    inner = in_process(prepare(recipe_of(material, "hetlora")), tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(TransportError, match="could not be started"):
        FlowerSimulation(inner, {}, count=1, threads=1)


def test_an_engine_that_ends_is_told(material, tmp_path):
    job = prepare(recipe_of(material, "hetlora"))
    with FlowerSimulation(in_process(job, tmp_path), {}, count=1, threads=1) as engine:
        engine._process.kill()
        with pytest.raises(TransportError, match="round 1: Flower's simulation engine ended with exit code -9"):
            list(engine.run(tasks_of(job)))
