"""A federation of real processes: a SuperLink with TLS behind its door, and three SuperNodes with keys and different ranks.

Run by `make test-flower`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("flwr")

import anyrank
from anyrank.federation import Device, make_task
from anyrank.flower.answers import Agreed
from anyrank.flower.letter import Letter
from anyrank.flower.programs import free_port
from anyrank.flower.site import Site
from anyrank.flower.worker import ask
from anyrank.job import method_of
from anyrank.messages import pack_task, unpack_update
from anyrank.record import RunFolder
from federations import PROFILE
from test_deployed import assert_alike, without_times
from tiny import recipe_toml, write_model, write_reviews

pytestmark = pytest.mark.flower

NAMES = ("bay", "cove", "dune")
ANYRANK = str(Path(sys.executable).with_name("anyrank"))
CLASSES = """
[fleet.classes.weak]
device = "phone"
rank = 1
[fleet.classes.middle]
device = "jetson-nx"
rank = 2
[fleet.classes.strong]
device = "laptop"
rank = 4
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, the files of three clients, a test file, and keys."""
    folder = tmp_path_factory.mktemp("federation")
    write_model(folder / "model")
    (folder / "clients").mkdir()
    for i, name in enumerate(NAMES):
        write_reviews(folder / "clients" / f"{name}.csv", rows=30 + 10 * i, seed=i)
    write_reviews(folder / "test.csv", rows=60, seed=9)
    clients = [part for name in NAMES for part in ("--client", name)]
    subprocess.run(
        [ANYRANK, "flower", "keys", "keys", "--host", "localhost", *clients],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


def recipe_file(place: Path, method: str, **changes: Any) -> Path:
    """A recipe for three rounds of three clients of three ranks."""
    text = recipe_toml(place / "model", place / "clients", method=method)
    head, rest = text.split("[fleet.classes.weak]")
    text = head + CLASSES + rest[rest.index("[compute]") :]
    for old, new in {
        'name = "iid"\nclients = 6': 'name = "by_column"\ncolumn = "file"',
        "per_round = 4": "per_round = 3",
        "epochs = 4": "steps = 3",
        "[data]\n": f'[evaluate]\nevery = 3\n[data]\ntest = "{place / "test.csv"}"\n',
        **changes,
    }.items():
        assert old in text
        text = text.replace(old, new)
    file = place / f"{method}.toml"
    file.write_text(text)
    return file


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "HF_HUB_OFFLINE": "1"}


class Processes:
    """Commands of ours, each with a log beside the others'."""

    def __init__(self, place: Path):
        self.place, self.running = place, dict[str, subprocess.Popen]()

    def start(self, name: str, *arguments: str) -> subprocess.Popen:
        with (self.place / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [ANYRANK, "flower", *arguments],
                cwd=self.place,
                env=environment(self.place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def server(self, port: int, *arguments: str) -> subprocess.Popen:
        return self.start("server", "server", "--keys", "keys", "--port", str(port), *arguments)

    def client(
        self, name: str, port: int, device: str, *, key: str | None = None, process: str | None = None
    ) -> subprocess.Popen:
        files = ["--data", f"clients/{name}.csv", "--state", f"state/{process or name}", "--ca", "keys/ca.crt"]
        return self.start(
            process or name,
            "client",
            *("--server", f"localhost:{port}", "--name", name, "--device", device),
            *files,
            *("--key", key or f"keys/clients/{name}"),
        )

    def log(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        """With everything that it started, all at once."""
        for process in reversed([*descendants(self.running[name].pid)]):
            os.kill(process, signal.SIGKILL)
        self.running.pop(name).wait()

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait(60)


def descendants(process: int) -> Iterator[int]:
    yield process
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout
    for child in map(int, found.split()):
        yield from descendants(child)


@pytest.fixture
def processes(place) -> Iterator[Processes]:
    found = Processes(place)
    yield found
    found.end()
    shutil.rmtree(place / "state", ignore_errors=True)
    wait_for("the end of all processes", lambda: not running(place), seconds=30)


def running(folder: Path) -> list[str]:
    """Processes that have to do with a folder."""
    listed = subprocess.run(["ps", "-eo", "pid,stat,args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line and " Z" not in line and "pytest" not in line]


def kinds_of(run: RunFolder) -> dict[str, str]:
    return {client: told["kind"] for client, told in run.info["fleet"].items()}


def anyrank_flower(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ANYRANK, "flower", *arguments], cwd=place, env=environment(place), capture_output=True, text=True
    )


def in_process(recipe: Path, out: Path) -> RunFolder:
    """The same run without Flower, its clients one after another as they are on machines of their own."""
    return anyrank.run(anyrank.load_recipe(recipe, {"compute.cohort": 1}), out)


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    for one, other in zip(found.records(), expected.records(), strict=True):
        assert_alike(without_times(one), without_times(other))
    one, other = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (found, expected))
    assert one.keys() == other.keys()
    assert all(one[name].allclose(other[name], atol=1e-5) for name in one)


def wait_for(what: str, happened, *, seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.05)


def test_three_methods_are_the_runs_in_one_process(place, processes, tmp_path):
    """One server plays them one after another, while a stranger knocks; then a run fails."""
    port = free_port()
    whole = {name: in_process(recipe_file(place, name), tmp_path / name) for name in ("hetlora", "flora", "legend")}
    kinds = kinds_of(whole["hetlora"])
    assert sorted(kinds.values()) == ["middle", "strong", "weak"]
    assert all(kinds_of(run) == kinds for run in whole.values())
    processes.server(port, "--state", "state/server")
    for name in NAMES:
        processes.client(name, port, kinds[name])
    strange = ["flower", "keys", str(tmp_path / "keys"), "--host", "localhost", "--client", "bay"]
    subprocess.run([ANYRANK, *strange], check=True, capture_output=True)
    processes.client("bay", port, kinds["bay"], key=str(tmp_path / "keys" / "clients" / "bay"), process="stranger")
    wait_for("the server's start", lambda: "Runs:" in processes.log("server"))
    for name, expected in whole.items():
        command = (
            f"run {name}.toml --out runs/{name} --state state/server --times profile --patience 120 --deadline 120"
        )
        played = anyrank_flower(place, *command.split())
        assert played.returncode == 0, played.stdout + played.stderr
        assert_same_run(RunFolder.open(place / "runs" / name), expected)
        for client in NAMES:
            log = processes.log(client)
            assert [f"round {number}: trained" in log for number in (1, 2, 3)] == [True] * 3
            assert log.count("the run is over") == list(whole).index(name) + 1

    wait_for("the refusal", lambda: "does not let this client in" in processes.log("stranger"))
    assert "SuperNode ID" not in processes.log("stranger")

    failed = anyrank_flower(place, *["run", "flora.toml", "--out", "runs/hetlora", "--state", "state/server"])
    assert failed.returncode == 1
    assert "holds a run of another recipe" in failed.stdout
    assert "the run did not end well" in failed.stderr
    told = json.loads(anyrank_flower(place, "status", "--state", "state/server", "--json").stdout)
    assert [run["status"] for run in told["runs"]] == ["finished:failed"] + ["finished:completed"] * 3
    assert [(run["round"], run["rounds"]) for run in told["runs"]][1:] == [(3, 3)] * 3
    assert {client["name"] for client in told["clients"]} == {*NAMES}


def test_a_client_is_killed_and_the_server_is_killed_and_both_come_back(place, processes):
    """Without any chance to say so: a client in the middle of its work in round 2, the server in round 4."""
    port, deadline = free_port(), 30
    recipe = recipe_file(
        place, "hlora", **{"rounds = 3": "rounds = 4", "every = 3": "every = 4", "steps = 3": "steps = 60"}
    )
    kinds = dict(zip(NAMES, ("weak", "middle", "strong"), strict=True))
    run = place / "runs" / "killed"
    command = [str(recipe), "--out", "runs/killed", "--state", "state/server", "--deadline", str(deadline)]
    for name in NAMES:
        processes.client(name, port, kinds[name])
    server = processes.server(port, *command)
    wait_for("round 1", lambda: played(run) == 1)
    processes.kill("cove")
    wait_for("round 3", lambda: played(run) == 3)
    server.kill()
    server.wait()
    first, second, third = RunFolder.open(run).records()
    assert sorted(first["returned_ranks"]) == [*NAMES]
    assert [failure["client"] for failure in second["rejected"]] == ["cove"]
    assert sorted(third["planned_ranks"]) == ["bay", "dune"]
    assert not third["rejected"]  # the deadline was waited for once
    wait_for("the end of the server's processes", lambda: not running(place / "state" / "server"), seconds=60)

    processes.client("cove", port, kinds["cove"])
    again = processes.server(port, *command)  # it waits for three clients, as it did at first
    assert again.wait(400) == 0, processes.log("server")
    after = RunFolder.open(run).records()
    assert after[:3] == [first, second, third]
    assert [record["round"] for record in after] == [1, 2, 3, 4]
    assert sorted(after[-1]["returned_ranks"]) == [*NAMES]
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def played(run: Path) -> int:
    return len(RunFolder.open(run).records()) if (run / "rounds.jsonl").exists() else 0


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # the worker outlives whoever starts it
def test_a_warm_worker_needs_neither_model_nor_data_again(place, tmp_path, capsys):
    """Both are gone from the disk when it trains. What it saves is measured, and printed."""
    model, data = tmp_path / "model", tmp_path / "bay.csv"
    shutil.copytree(place / "model", model)
    shutil.copy(place / "clients" / "bay.csv", data)
    recipe = anyrank.load_recipe(recipe_file(place, "hetlora"), {"model.name": str(model)})
    settings = {
        "client": "bay",
        "source": str(data),
        "folder": str(tmp_path / "state"),
        "kind": "weak",
        "profile": None,
    }
    values = {"recipe": recipe.model_dump(mode="json"), "compression": "none", "label_names": ["kind", "unkind"]}
    hello = Letter({"ask": "hello", "run": "r", **values})

    def timed(do: Callable[[], Letter]) -> tuple[float, Letter]:
        began = time.perf_counter()
        letter = do()
        return time.perf_counter() - began, letter

    cold, answer = timed(lambda: ask(settings, hello))
    shutil.rmtree(model)
    data.unlink()
    warm, again = timed(lambda: ask(settings, hello))
    assert again == answer
    assert "error" in Site("bay", str(data), tmp_path / "other", kind="weak").answer(hello).values

    method, spec = method_of(recipe), replace(Agreed.read(recipe, answer).spec, levels=(1,))
    (plan,) = method.assign(method.init(spec), [Device("bay", "weak", PROFILE, rank=1, num_examples=27, steps=3)])
    task = make_task(method, method.init(spec), plan)
    values = {"ask": "task", "run": "r", "levels": [1], "kind": "train", "round": 1}
    reply = ask(settings, Letter(values, pack_task(task, spec)))
    assert unpack_update(reply.payload, task).metrics["loss"] > 0
    ask(settings, Letter({"ask": "bye", "run": "r"}))
    with capsys.disabled():
        print(f"\na client's start {cold:.1f} s, with a warm worker {warm:.3f} s", flush=True)
