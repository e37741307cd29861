"""The command line: what a person types, sees and gets as an exit code."""

import json
import re
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from anyrank.api import load_recipe, run
from anyrank.cli import main
from anyrank.display import LiveObserver
from test_record import files_of_at_most
from tiny import recipe_toml, write_model, write_reviews


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv")))
    return file


@pytest.fixture
def anyrank(monkeypatch, capsys, tmp_path):
    """Call the command line in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anyrank", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1 if exit.code else 0
        return code, *capsys.readouterr()

    return call


def test_a_run_ends_with_tables_the_folder_and_the_command_for_a_report(anyrank, recipe):
    code, out, _ = anyrank("run", recipe, "--set", "rounds=2", "--set", 'compare=["centralised"]')
    assert code == 0
    for text in (
        "round   1/2",
        "round   2/2",
        "centralised baseline",
        "majority class",
        "weak",
        "strong",
        "simulated time",
    ):
        assert text in out
    assert "Run folder: runs/hlora-1" in out
    assert "anyrank report runs/hlora-1" in out
    assert "anyrank run" in json.loads(Path("runs/hlora-1/run.json").read_text())["command"]

    code, out, _ = anyrank("run", recipe, "--set", "rounds=1")
    assert "Run folder: runs/hlora-2" in out

    code, out, _ = anyrank("run", "--resume", "runs/hlora-2", "--set", "rounds=2")
    assert code == 0
    assert "continuing after round 1 of 2" in out

    code, out, _ = anyrank("report", "runs/hlora-1", "runs/hlora-2", "-o", "page.html")
    assert code == 0
    assert "hlora-2" in Path("page.html").read_text()

    code, out, _ = anyrank("export", "runs/hlora-1", "--rank", "2", "-o", "small")
    assert code == 0
    assert Path("small/adapter_model.safetensors").exists()


def test_late_replies_are_named_when_they_are_missed_and_when_they_come(anyrank, recipe):
    rest = "memory_bytes = 1e9, up_bps = 1e6, down_bps = 1e6"
    devices = [
        f"devices.{x}={{forward_flops = {f}, backward_flops = {f}, {rest}}}" for x, f in [("a", 1e6), ("b", 1e7)]
    ]
    classes = ["fleet.classes.weak.device=a", "fleet.classes.strong.device=b"]
    settings = [*devices, *classes, "method.name=anyrank", "clock.deadline=9", "train.steps=1"]
    code, out, _ = anyrank("run", recipe, *(part for setting in settings for part in ("--set", setting)))
    assert code == 0
    first, second = out.split("round   1/")[1].split("round   2/")
    late = re.findall(r"(client-0\d) late: after", first)
    assert late
    assert re.findall(r"(client-0\d) replied to round 1", second) == late


def test_check_prints_a_table_and_remarks(anyrank, recipe):
    code, out, _ = anyrank("check", recipe, "--set", "method.name=fedavg")
    assert code == 0
    assert "seconds" in out
    assert "note: fedavg has no mixed ranks" in out


def test_methods_are_listed_and_explained(anyrank):
    code, out, _ = anyrank("methods")
    assert code == 0
    assert "hetlora" in out
    code, out, _ = anyrank("methods", "hetlora")
    assert "nu_k = ||B_k A_k||_F" in out
    assert "method.gamma = 0.99" in out
    code, out, _ = anyrank("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["rbla"]["keeps_no_op"] is True
    code, out, _ = anyrank("methods", "rbla", "--json")
    assert json.loads(out) == rows["rbla"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "nowhere.toml"], 2, "recipe nowhere.toml: cannot be read"),
        (["run", "--set", "rouns=2"], 2, "did you mean rounds?"),
        (["run", "--rounds", "2"], 2, "No such option"),
        (["run", "--resume", "nowhere"], 1, "nowhere holds no run"),
        (["run", "x.toml", "--resume", "y"], 2, "leave out everything but --set"),
        (["run", "--set", "=3"], 2, "--set =3: expected key=value"),
        (["report", "nowhere", "-o", "x"], 1, "nowhere"),
        (["run", "--rank", "²"], 2, "--rank ²: expected a whole number from 1 on, or auto."),
        (["methods", "magic"], 2, "there is no method 'magic'"),
        (["report", "nowhere"], 1, "nowhere"),
        (["export", "nowhere", "--rank", "1", "-o", "x"], 1, "nowhere holds no run"),
        (["export", "nowhere"], 2, "Missing option"),
    ],
)
def test_a_mistake_is_one_message_and_a_true_exit_code(anyrank, arguments, code, said):
    got, _, error = anyrank(*arguments)
    assert got == code
    assert said in " ".join(error.split())
    assert "Traceback" not in error


def test_a_place_that_cannot_be_written_is_named(anyrank, recipe):
    Path("file").write_text("in the way")
    code, _, error = anyrank("run", recipe, "--set", "rounds=1", "--out", "file/run")
    assert code == 1
    assert "file/run: Not a directory" in error
    assert "Traceback" not in error


def test_only_a_run_that_was_begun_is_said_to_go_on(anyrank, recipe):
    anyrank("run", recipe, "--set", "rounds=1", "--out", "run")
    code, _, error = anyrank("report", "run", "-o", ".")
    assert code == 1
    assert "Is a directory" in error
    assert "--resume" not in error


def test_a_baseline_that_is_not_evaluated_yet_is_said_so(anyrank, recipe):
    anyrank("run", recipe, "--set", "rounds=1", "--set", 'compare=["strong_only"]', "--out", "run")
    file = Path("run/compare/strong_only/rounds.jsonl")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score": None, "metrics": None}) + "\n")
    code, out, _ = anyrank("run", "--resume", "run")
    assert code == 0
    assert "not evaluated" in next(line for line in out.splitlines() if "strong_only baseline" in line)


@pytest.mark.parametrize(
    "changes",
    [["clock.dropout=0.5"], ["topology.name=hierarchy", "topology.repeats=2"]],
    ids=["dropouts", "repeats"],
)
def test_the_bar_is_full_when_the_rounds_are_over(recipe, tmp_path, changes):
    class Watched(LiveObserver):
        def replied(self, reply):
            super().replied(reply)
            shown.append(self._bar.tasks[0].completed)

        def finished_round(self, record):
            super().finished_round(record)
            assert self._bar.tasks[0].completed == 4 * record["round"]

    shown = []
    run(load_recipe(recipe, changes), tmp_path / "run", observer=Watched(Console(file=StringIO())))
    assert shown == sorted(shown)
    assert shown[-1] <= 12


def test_names_of_the_user_are_no_markup(anyrank, recipe):
    classes = 'fleet.classes={"[/x]"={device="phone",rank=1}}'
    code, out, _ = anyrank("run", recipe, "--set", "rounds=1", "--set", classes, "--out", "[red]x[/red]")
    assert code == 0
    assert "[/x]" in out
    assert "Run folder: [red]x[/red]" in out


def test_debug_shows_the_traceback(anyrank):
    from anyrank.errors import RecordError

    with pytest.raises(RecordError):
        anyrank("--debug", "run", "--resume", "nowhere")
    anyrank("methods")


@pytest.mark.parametrize(("stop", "exit"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)])
def test_an_interrupted_run_says_how_to_go_on(anyrank, recipe, monkeypatch, stop, exit):
    def interrupt(self, record):
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(LiveObserver, "finished_round", interrupt)
        code, _, error = anyrank("run", recipe, "--out", "stopped")
    assert code == exit
    assert "anyrank run --resume stopped" in error
    assert anyrank("run", "--resume", "stopped")[0] == 0


def test_a_report_that_finds_no_room_leaves_the_old_one(anyrank, recipe):
    anyrank("run", recipe, "--set", "rounds=1", "--out", "run")
    Path("page.html").write_text("the old one")
    with files_of_at_most(1000):
        code, _, error = anyrank("report", "run", "-o", "page.html")
    assert (code, "page.html: File too large" in error) == (1, True), error
    assert {path.name for path in Path().iterdir()} == {"page.html", "run"}
    assert Path("page.html").read_text() == "the old one"


def test_a_run_that_finds_no_room_says_where_and_how_to_go_on(anyrank, recipe):
    half = ["--set", "rounds=1", "--set", "compute.workers=1"]
    assert anyrank("run", recipe, *half, "--out", "whole")[0] == 0
    with files_of_at_most(Path("whole/checkpoint/state.safetensors").stat().st_size - 1):
        code, _, error = anyrank("run", recipe, *half, "--out", "run")
    assert code == 1
    assert "Continue with: anyrank run --resume run" in error
    assert "state.safetensors: File too large" in error
    assert anyrank("run", "--resume", "run")[0] == 0
