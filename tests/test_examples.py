"""The examples run."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from anyrank.methods import METHODS
from tiny import recipe_toml, write_model, write_reviews

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(write_model(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv")))
    monkeypatch.chdir(tmp_path)
    return file


def test_a_method_of_ones_own_is_chosen_like_any_other(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_method.py", str(recipe)])
    before = dict(METHODS)
    try:
        own = runpy.run_path(str(EXAMPLES / "own_method.py"), run_name="__main__")
    finally:
        METHODS.clear()
        METHODS.update(before)
    info = json.loads(Path("runs/by_rank/run.json").read_text())
    assert info["recipe"]["method"] == {"name": "by_rank", "power": 0.5}
    assert own["folder"].records()[-1]["score"] > 0.7
    assert "runs/by_rank" in capsys.readouterr().out


def test_the_own_method_is_twenty_lines():
    text = (EXAMPLES / "own_method.py").read_text()
    lines = text[text.index("def by_rank") : text.index("if __name__")].strip().splitlines()
    assert len(lines) <= 20
