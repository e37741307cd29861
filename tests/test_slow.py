"""The long tests, the longest first: the embedded default from beginning to end, kills, memory, every recipe."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import anyrank
from anyrank.data.stdlib_docs import stdlib_docs
from anyrank.record import RunFolder
from tiny import recipe_toml, write_model, write_reviews

pytestmark = pytest.mark.slow

RECIPES = [  # those of other data are played in test_recipes.py
    file
    for file in sorted((Path(__file__).parents[1] / "recipes").rglob("*.toml"))
    if "$ANYRANK_DATA" not in file.read_text()
]
ANYRANK = [sys.executable, "-c", "from anyrank.cli import main; main()"]


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*ANYRANK, *map(str, arguments)], capture_output=True, text=True, check=False)


def result(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "adapter").iterdir())}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slow")
    file = folder / "recipe.toml"
    text = recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv"), method="hetlora")
    file.write_text(text.replace("rounds = 3", "rounds = 12"))
    return file


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> RunFolder:
    return anyrank.run(anyrank.load_recipe(recipe), tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, str]:
    """Some rows of the embedded data set, as recipe keys."""
    folder = tmp_path_factory.mktemp("pairs")
    splits = stdlib_docs()
    splits["train"].shuffle(seed=0).select(range(1200)).to_csv(folder / "train.csv")
    splits["test"].shuffle(seed=0).select(range(40)).to_csv(folder / "test.csv")
    return {"data.source": str(folder / "train.csv"), "data.test": str(folder / "test.csv")}


@pytest.mark.skipif("ANYRANK_LONG" not in os.environ, reason="ten minutes of a core; ANYRANK_LONG=1 has it run")
def test_the_embedded_default_reaches_what_it_promises(tmp_path):
    done = command("run", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(tmp_path / "run")
    central = RunFolder.open(tmp_path / "run" / "compare" / "centralised")
    accuracy, reference = run.records()[-1]["score"], central.records()[-1]["score"]
    assert accuracy >= 0.78
    assert accuracy >= reference - 0.05
    assert accuracy > run.info["references"]["word overlap"] > run.info["references"]["majority class"]
    examples = [sum(record["steps"] for record in folder.records()) for folder in (run, central)]
    assert examples[1] <= examples[0]
    assert "centralised baseline" in done.stdout
    assert len(run.info["fleet"]) == 24


@pytest.mark.parametrize("kill", range(10))
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(recipe, uninterrupted, tmp_path, kill):
    """SIGKILL somewhere between the first byte of the run folder and the last."""
    out = tmp_path / "killed"
    process = subprocess.Popen([*ANYRANK, "run", recipe, "--out", out], stdout=subprocess.DEVNULL)
    while not (out / "run.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    duration = sum(record["real_seconds"] for record in uninterrupted.records())
    time.sleep(random.Random(kill).uniform(0, duration))
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    resumed = command("run", "--resume", out)
    assert resumed.returncode == 0, resumed.stderr
    assert result(out) == result(uninterrupted.path)


def test_memory_does_not_grow_with_the_number_of_clients(tmp_path, pairs):
    """Peak resident memory on the real model: 500 clients against 12, eight of them sampled."""
    code = (
        "import resource, sys; sys.argv = ['anyrank', *sys.argv[1:]]; from anyrank.cli import app; "
        "app(standalone_mode=False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak = {}
    for clients in (12, 500):
        settings = [
            f'partition={{name = "iid", clients = {clients}}}',
            "compare=[]",
            "rounds=2",
            "evaluate.every=2",
            "train.steps=2",
            *(f"{key}={file}" for key, file in pairs.items()),
        ]
        options = [part for setting in settings for part in ("--set", setting)]
        done = subprocess.run(
            [sys.executable, "-c", code, "run", "--out", tmp_path / str(clients), *options],
            capture_output=True,
            text=True,
            check=True,
        )
        peak[clients] = int(done.stdout.split()[-1])
    assert peak[500] < 1.1 * peak[12]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_runs_on_the_real_model(tmp_path, pairs, file):
    """Shortened: each runs to its end in about a minute, which is too long for all of them."""
    quick = {"rounds": 2, "evaluate.every": 2, "train.steps": 1, "train.batch_size": 8, "fleet.per_round": 3}
    folder = anyrank.run(anyrank.load_recipe(file, quick | pairs | {"compare": []}), tmp_path / "run")
    assert len(folder.records()) == 2
    assert folder.records()[-1]["score"] > 0.4
    personal = anyrank.METHODS[folder.info["method"]]().claims.personal
    assert (folder.path / ("clients" if personal else "adapter")).is_dir()


def test_the_command_line_in_an_empty_home(recipe, tmp_path):
    """No cache, no configuration, no hub: what a fresh machine has."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*ANYRANK, "run", recipe, "--set", "rounds=1", "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "run" / "rounds.jsonl").read_text())["round"] == 1
