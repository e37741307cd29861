"""The command line: what a person types, sees and gets as an exit code."""

import json
import sys
from pathlib import Path

import pytest

from anyrank.cli import main
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
        (["run", "x.toml", "--resume", "y"], 2, "leave out RECIPE and --out"),
        (["run", "--set", "=3"], 2, "--set =3: expected key=value"),
        (["report", "nowhere", "-o", "x"], 1, "nowhere"),
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


def test_an_interrupted_run_says_how_to_go_on(anyrank, recipe, monkeypatch):
    from anyrank import display

    def interrupt(self, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(display.LiveObserver, "finished_round", interrupt)
        code, _, error = anyrank("run", recipe, "--out", "stopped")
    assert code == 130
    assert "anyrank run --resume stopped" in error
    assert anyrank("run", "--resume", "stopped")[0] == 0
