"""The benchmarks: tables are those of the committed results, contestants do the same work, memory of a tree is seen."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyrank.seeding import generator
from tiny import VOCABULARY, write_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import measure  # noqa: E402
import simulate  # noqa: E402
import tables  # noqa: E402
from peers import prepare  # noqa: E402
from peers.work import Work  # noqa: E402


def test_the_tables_are_those_of_the_results():
    page = tables.README.read_text(encoding="utf-8")
    assert tables.current(page) == page
    for file in measure.RESULTS.glob("*.json"):
        assert f"<!-- {json.loads(file.read_text())['benchmark']} -->" in page


def test_a_table_is_put_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    runs = [{"seconds": [3.0, 0.2, 0.1], "loss": 0.7, "plan": "", "wall_s": 9.0, "cpu_s": 5.0, "pss_mb": 400}] * 2
    row = simulate._row(simulate.SHAPES[2], "loop", runs) | {"difference": 0.0, "accuracy": None}
    measure.save("simulate", {}, [row])
    page = tables.current("before\n<!-- simulate -->\nold\n<!-- /simulate -->\nafter\n")
    assert page.startswith("before\n<!-- simulate -->\nMeasured on ")
    assert "| bare loop | 0.15 | 15.00 | 6.67 | 3 | 9.0 | 5.0 | 400 | 0.0e+00 |\n<!-- /simulate -->\nafter" in page


def test_functions_are_timed_in_turn():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = measure.median_of(functions, repeats=2)
    assert called == ["a", "b", "a", "b"]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_the_memory_of_a_tree_counts_children():
    grown = "x = bytearray(80_000_000); import subprocess, sys, time; print('grown'); {}"
    child = grown.format("time.sleep(1.5)")
    seen = measure.peak([sys.executable, "-c", grown.format(f"subprocess.run([sys.executable, '-c', {child!r}])")])
    assert seen["pss_mb"] > 2 * 80e6 / 2**20
    assert seen["output"] == "grown\ngrown\n"


def test_a_command_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"ended with 1:\n(.|\n)*ValueError: 7"):
        measure.peak([sys.executable, "-c", "raise ValueError(7)"])


def test_a_result_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    file = measure.save("work", {"quick": True}, [{"seconds": 1.5}])
    assert file.name == "work-quick.json"
    content = json.loads(file.read_text())
    assert content["results"] == [{"seconds": 1.5}]
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["cores"] == measure.cores()


@pytest.fixture
def work(tmp_path) -> Work:
    """Three clients, two rounds of two steps, on a tiny model; texts of mixed length."""
    model = write_model(tmp_path / "model")
    sizes = {"clients": 3, "steps": 2, "batch": 2, "length": 12, "rounds": 2}
    work = Work(tmp_path, str(model), **sizes, mixed=True, learning_rate=1e-2)
    rng = generator("benchmark")
    lengths = torch.randint(4, work.length + 1, (work.clients * work.per_client,), generator=rng).tolist()
    work.write_examples(
        [
            {"input_ids": torch.randint(5, len(VOCABULARY), (length,), generator=rng).tolist(), "labels": i % 2}
            for i, length in enumerate(lengths)
        ]
    )
    prepare.write_start(work)
    work.write()
    return work


@pytest.fixture(autouse=True)
def settings_of_torch():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_contestants_do_the_same_work(work):
    reference = simulate.CONTESTANTS["loop"].play(work)
    moved = max(float((tensor - work.start()[name]).abs().max()) for name, tensor in reference.state.items())
    assert moved > 1e-2
    for name, plan in {"forked": "", "anyrank-sequential": "1 x 1", "anyrank": "2 x 2"}.items():
        torch.set_num_threads(2)
        result = simulate.CONTESTANTS[name].play(work)
        assert result.plan == plan
        assert len(result.seconds) == work.rounds
        assert result.loss == pytest.approx(reference.loss, abs=1e-5), name
        assert simulate._difference(result.state, reference.state) < 1e-4, name


def test_padding_changes_nothing(work):
    loop = simulate.CONTESTANTS["loop"].play
    assert simulate._difference(loop(replace(work, pad_to=work.length)).state, loop(work).state) < 1e-4


def test_the_same_work_without_steps_changes_nothing(work):
    idle = replace(work, steps=0)
    for name in ("loop", "anyrank-sequential", "anyrank"):
        assert simulate._difference(simulate.CONTESTANTS[name].play(idle).state, work.start()) < 1e-6, name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Flower's simulation is not installed")
def test_flower_does_the_same_work(work):
    out = work.folder / "final.safetensors"
    command = [sys.executable, simulate.__file__, "--one", "flower-cached", "--work", work.folder, "--out", out]
    subprocess.run(command, env={**os.environ, **simulate.QUIET}, check=True, capture_output=True)
    reference = simulate.CONTESTANTS["loop"].play(work)
    assert simulate._difference(load_file(out), reference.state) < 1e-4


def test_examples_of_full_length_are_cut_from_the_texts_in_a_row():
    pairs = [{"input_ids": [1, 7, 8, 9, 2], "labels": 0}, {"input_ids": [1, 5, 6, 2], "labels": 1}]
    assert prepare._cut(pairs, 4) == [
        {"input_ids": [1, 7, 8, 2], "labels": 0},
        {"input_ids": [1, 9, 5, 2], "labels": 0},
    ]
