"""What a client's half of a run refuses, and that it says why: a server is not trusted with the client's machine."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import anyrank
from anyrank.federation import Device, Profile, Task
from anyrank.flower.letter import Letter
from anyrank.flower.site import Site
from anyrank.messages import pack_task
from tiny import recipe_toml, write_model, write_reviews


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write_model(folder / "model")
    write_reviews(folder / "reviews.csv", rows=40)
    return folder


def site_of(material: Path, folder: Path, source: str = "reviews.csv") -> Site:
    return Site("ann", str(material / source), folder / "ann" / "runs", kind="weak")


def recipe_of(material: Path, method: str = "hlora", **changes: Any) -> dict[str, Any]:
    file = material / f"{method}.toml"
    file.write_text(recipe_toml(material / "model", material / "reviews.csv", method=method))
    recipe = anyrank.load_recipe(file).model_dump(mode="json")
    for key, value in changes.items():
        table, name = key.split("__")
        recipe[table] = {**recipe[table], name: value}
    return recipe


def hello(recipe: dict[str, Any], run: Any = "r") -> Letter:
    return Letter({"ask": "hello", "run": run, "recipe": recipe, "compression": "none"})


def agree(run: str = "r") -> Letter:
    return Letter({"ask": "agree", "run": run, "label_names": ["kind", "unkind"]})


@pytest.mark.parametrize("run", ["../../x", "/elsewhere/x", "", ".", "a b", "x" * 65, "ä", "x\n", 5, None, ["x"]])
@pytest.mark.parametrize("ask", ["hello", "agree", "task", "own", "bye"])
def test_a_run_is_a_name_and_no_path(material, tmp_path, ask, run):
    site, theirs = site_of(material, tmp_path), tmp_path / "x"
    theirs.mkdir()
    answer = site.answer(Letter({"ask": ask, "run": run, "recipe": {}, "compression": "none"}))
    assert "expected a name of up to 64" in answer.values["error"]
    assert theirs.exists()


def test_only_the_run_that_was_greeted_is_removed(material, tmp_path):
    site = site_of(material, tmp_path)
    folders = {run: tmp_path / "ann" / "runs" / run for run in ("r", "other")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    site.answer(hello(recipe_of(material)))
    assert "error" not in site.answer(Letter({"ask": "bye", "run": "other"})).values
    assert folders["other"].exists()
    assert site.run == "r"  # the worker goes on
    assert "is busy with another run" in site.answer(agree("other")).values["error"]
    assert "error" not in site.answer(agree()).values
    site.answer(Letter({"ask": "bye", "run": "r"}))
    assert not folders["r"].exists()
    assert site.run == ""


def test_whatever_goes_wrong_is_answered(material, tmp_path, capsys):
    site = site_of(material, tmp_path)
    for ask in ("agree", "task", "own"):
        answer = site.answer(Letter({"ask": ask, "run": "r"}))
        assert "knows nothing of the run; it has been started anew" in answer.values["error"]
        assert answer.values["anew"] is True
    assert "error" in site.answer(Letter({"ask": ["hello"]})).values
    assert "KeyError when asked for hello" in site.answer(Letter({"ask": "hello", "run": "r"})).values["error"]
    assert "KeyError: 'recipe'" in capsys.readouterr().err  # that is the worker's log
    site.answer(hello(recipe_of(material)))
    assert site.answer(Letter({"ask": "task", "run": "r", "levels": [4]})).values["anew"] is True
    long = site.answer(Letter({"ask": "\x1b[2J" + "x" * 1000})).values["error"]
    assert len(long) <= 500
    assert long.isprintable()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora__start": "/home/ann/adapter"}, "lora.start: clients on machines of their own"),
        ({"local__name": "mole", "local__experts": ["/a", "/b"]}, "open no adapters for mole"),
        ({"problem__name": "own"}, "own"),
    ],
)
def test_a_recipe_gets_at_nothing_else_on_the_machine(material, tmp_path, changes, said):
    answer = site_of(material, tmp_path).answer(hello(recipe_of(material, **changes)))
    assert said in answer.values["error"]


def test_texts_are_no_label_names(material, tmp_path):
    with (material / "unique.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("note", "sentence"), *((f"secret {i}", i % 2) for i in range(30))])
    with (material / "mixed.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("sentence", "label"), ("secret 1", "0.5"), ("secret 2", "secret 3")])
    asked = recipe_of(material, problem__label="note")
    answer = site_of(material, tmp_path, "unique.csv").answer(hello(asked))
    assert "column 'note' has 30 different labels in 30 rows" in answer.values["error"]
    assert "secret" not in json.dumps(answer.values)
    numbers = recipe_of(material)
    numbers["problem"] = {**anyrank.load_recipe(material / "hlora.toml").problem, "name": "regression"}
    numbers["problem"].pop("metric")
    answer = site_of(material, tmp_path, "mixed.csv").answer(hello(numbers))
    assert "worker.log" in answer.values["error"]
    assert "secret" not in json.dumps(answer.values)


def test_what_a_method_lets_a_client_keep_does_not_leave(material, tmp_path):
    """Also when a task asks for it."""
    site = site_of(material, tmp_path)
    site.answer(hello(recipe_of(material, "fedsa_lora")))
    site.answer(agree())
    method, spec = site._method, site._spec
    spec = replace(spec, levels=(2,))
    device = Device("ann", "weak", Profile(1.0, 1.0, 1.0, 1.0, 1.0), 2, 36, 1)
    state = method.init(spec)
    (plan,) = method.assign(state, [device])
    for up, fits in (("A", True), ("AB", False), ("B", False)):
        asked = replace(plan, up=up)
        task = Task("train", 1, asked, method.dispatch(state, plan))
        values = {"ask": "task", "run": "r", "kind": "train", "round": 1, "levels": [2]}
        answer = site.answer(Letter(values, pack_task(task, spec)))
        assert ("error" not in answer.values) == fits, answer.values
        assert fits or "only 'A' leave a client" in answer.values["error"]
