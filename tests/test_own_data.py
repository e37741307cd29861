"""Examples without a recipe: what is to be learned from them is told by their columns."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, Value

import anyrank
from anyrank.config import Recipe
from anyrank.errors import ConfigError
from anyrank.own_data import recipe_for
from causal import CHATML, of_bytes, write_causal, write_rows
from tiny import write_model, write_reviews

SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
LLAMA = {"model.name": "some/llama"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def told(folder: Path, row: dict, overrides: dict[str, Any], *, rows: int = 40) -> Recipe:
    return recipe_for(str(write_rows(folder / "a.jsonl", [row] * rows)), overrides)


def refused(folder: Path, row: dict, overrides: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        told(folder, row, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SAID},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "text": "x", "label": 1},
        {"prompt": "hi", "completion": "yo"},
        {"instruction": "hi", "response": "yo"},
        {"instruction": "hi", "input": "x", "output": "yo", "text": "all of it"},
    ],
)
def test_conversations(tmp_path, row):
    recipe = told(tmp_path, row, LLAMA)
    assert recipe.problem["name"] == "instruction"
    assert recipe.model.name == "some/llama"
    text = refused(tmp_path, row, {})
    assert (
        f"--data: examples with the columns {', '.join(row)} are for instruction, which needs a causal language" in text
    )
    assert "Name one with --model" in text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "good", "label": "up"}, {"name": "classification", "text": ["text"], "label": "label"}),
        ({"sentence": "good", "target": 1}, {"name": "classification", "text": ["sentence"], "label": "target"}),
        (
            {"sentence1": "a", "sentence2": "b", "label": True},
            {"name": "classification", "text": ["sentence1", "sentence2"], "label": "label"},
        ),
        (
            {"premise": "a", "hypothesis": "b", "text": "c", "labels": 2},
            {"name": "classification", "text": ["premise", "hypothesis"], "label": "labels"},
        ),
        ({"content": "good", "label": 0.5}, {"name": "regression", "text": ["content"], "label": "label"}),
    ],
)
def test_labelled_texts_can_do_with_the_packaged_encoder(tmp_path, row, expected):
    recipe = told(tmp_path, row, {})
    assert recipe.problem.items() >= expected.items()
    assert recipe.model.name == "all-MiniLM-L6-v2"
    assert told(tmp_path, row, LLAMA).model.name == "some/llama"


@pytest.mark.parametrize(
    ("row", "expected", "needs"),
    [
        ({"text": "good", "who": "ann"}, {"name": "language", "text": "text"}, "a causal language model"),
        (
            {"tokens": ["a"], "ner_tags": ["O"]},
            {"name": "token_classification", "words": "tokens", "label": "ner_tags"},
            "an encoder",
        ),
        (
            {"words": ["a"], "labels": [1], "text": "a"},
            {"name": "token_classification", "words": "words", "label": "labels"},
            "an encoder",
        ),
        (
            {"question": "a", "choices": ["b", "c"], "answer": 1},
            {"name": "multiple_choice", "question": "question", "choices": ["choices"], "label": "answer"},
            "an encoder",
        ),
        (
            {"image": "a.png", "label": 1},
            {"name": "image_classification", "label": "label"},
            "a model for images, or mlp",
        ),
    ],
)
def test_what_needs_a_model_that_is_named(tmp_path, row, expected, needs):
    assert told(tmp_path, row, LLAMA).problem.items() >= expected.items()
    assert f"which needs {needs}" in refused(tmp_path, row, {})


def test_columns_that_do_not_tell(tmp_path):
    text = refused(tmp_path, {"review": "good", "stars": 3}, {})
    assert "--data: its columns (review, stars) do not tell what is to be learned. Expected messages" in text
    named = {"problem.name": "classification", "problem.text": ["review"], "problem.label": "stars"}
    recipe = told(tmp_path, {"review": "good", "stars": 3}, named)
    assert (recipe.problem["text"], recipe.model.name) == (["review"], "all-MiniLM-L6-v2")
    whole = {"problem": {"name": "language", "text": "review"}}
    assert "are for language, which needs a causal" in refused(tmp_path, {"review": "good"}, whole)
    assert told(tmp_path, {"review": "good"}, {**whole, **LLAMA}).problem["text"] == "review"
    assert "there is no 'languish' (did you mean language?)" in refused(
        tmp_path, {"a": 1}, {"problem.name": "languish"}
    )


def test_what_is_wrong_with_overrides_is_said(tmp_path):
    row = {"text": "good", "label": "up"}
    assert "rouds: unknown key (did you mean rounds?)" in refused(tmp_path, row, {"rouds": 3})
    assert told(tmp_path, row, {"rounds": 3, "partition.name": "iid", "partition.clients": 5}).partition["clients"] == 5


@pytest.mark.parametrize(("rows", "clients", "per_round"), [(400, 8, 4), (13, 3, 3), (2, 1, 1)])
def test_without_a_column_that_names_clients_there_are_eight_at_most(tmp_path, rows, clients, per_round):
    recipe = told(tmp_path, {"text": "good", "label": "up", "client": "ann"}, {}, rows=rows)
    assert recipe.partition == {"name": "iid", "clients": clients}
    assert recipe.fleet.per_round == per_round


def test_clients_by_a_column_that_names_them(tmp_path):
    rows = [{"text": "good", "label": "up", "user": f"u{number % 3}"} for number in range(30)]
    alone = [{"text": "good", "label": "up", "user": user} for user in ("once", None, "", "")]
    recipe = recipe_for(str(write_rows(tmp_path / "a.jsonl", [*rows, *alone])), {})
    assert recipe.partition == {"name": "by_column", "column": "user", "min_examples": 2}
    assert recipe.fleet.per_round == 3
    rows = [{"text": "good", "label": "up", "author": {"name": "ann"}, "site": number % 2} for number in range(10)]
    assert recipe_for(str(write_rows(tmp_path / "b.jsonl", rows)), {}).partition["column"] == "site"


def test_every_row_its_own_author_is_no_client(tmp_path):
    rows = [{"text": "good", "label": "up", "author": f"a{number}"} for number in range(30)]
    assert recipe_for(str(write_rows(tmp_path / "a.jsonl", rows)), {}).partition["name"] == "iid"


def test_numbers_in_a_table_are_classes_unless_they_have_a_point(tmp_path):
    features = Features({"text": Value("string"), "label": Value("float32")})
    Dataset.from_dict({"text": ["a"] * 8, "label": [1.0] * 8}, features=features).to_parquet(tmp_path / "a.parquet")
    assert recipe_for(str(tmp_path / "a.parquet"), {}).problem["name"] == "regression"
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,2\n")
    assert recipe_for(str(tmp_path / "a.csv"), {}).problem["name"] == "classification"


@pytest.mark.parametrize(("odd", "row"), [("NA", 7), ("?", 7), ("", None), ("nan", 7)])
def test_one_gap_in_numbers_does_not_make_classes_of_them(tmp_path, odd, row):
    labels = [f"{number / 7:.3f}" for number in range(1, 31)]
    labels[6] = odd
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"good,{label}\n" for label in labels))
    if row is None:
        assert recipe_for(str(tmp_path / "a.csv"), {}).problem["name"] == "regression"
        return
    text = rf"column 'label': nearly all labels are numbers, and some have a point, but row {row} has '{odd}'. Mend or"
    with pytest.raises(ConfigError, match=text.replace("?", r"\?")):
        recipe_for(str(tmp_path / "a.csv"), {})
    assert recipe_for(str(tmp_path / "a.csv"), {"problem.name": "classification"}).problem["label"] == "label"


def test_classes_may_look_like_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"good,{label}\n" for label in ["1", "2", "NA"] * 9))
    assert recipe_for(str(tmp_path / "a.csv"), {}).problem["name"] == "classification"
    (tmp_path / "b.csv").write_text("text,label\n" + "".join(f"good,{label}\n" for label in ["1.5", "2.5", "NA"] * 9))
    assert recipe_for(str(tmp_path / "b.csv"), {}).problem["name"] == "classification"
    assert told(tmp_path, {"text": "good", "label": "3.12"}, {}).problem["name"] == "classification"


@pytest.mark.parametrize(
    ("row", "named", "expected"),
    [
        ({"text": "good", "stars": 3, "target": 2}, "regression", {"text": ["text"], "label": "target"}),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "classification", {"text": ["sentence1", "sentence2"]}),
        ({"text": "good", "label": 1}, "language", {"text": "text"}),
        ({"content": "good", "label": 1}, "language", {"text": "content"}),
        ({"words": ["a"], "labels": [1]}, "token_classification", {"words": "words", "label": "labels"}),
    ],
)
def test_the_columns_of_a_problem_that_is_named(tmp_path, row, named, expected):
    recipe = told(tmp_path, row, {"problem.name": named, **LLAMA})
    assert recipe.problem.items() >= {"name": named, **expected}.items()
    own = {"problem.name": named, "problem.max_length": 32, **LLAMA}
    assert told(tmp_path, row, own).problem.items() >= {"max_length": 32, **expected}.items()


def test_texts_that_no_column_tells_are_asked_for(tmp_path):
    text = refused(tmp_path, {"review": "good", "label": 3}, {"problem.name": "regression"})
    assert "--data: its columns (review, label) do not tell which are the texts. Name them, such as --set" in text


QUICK = {"rounds": 1, "compute.threads": 1, "compute.workers": 1}


def test_reviews_are_run_without_a_recipe(tmp_path):
    model, reviews = write_model(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv")
    settings = {"model.name": str(model), "problem.max_length": 16, **QUICK}
    folder = anyrank.run(recipe_for(str(reviews), settings), tmp_path / "run")
    assert folder.records()[-1]["metrics"].keys() == {"accuracy", "f1", "matthews"}


def test_chats_in_a_file_for_each_client_are_run_without_a_recipe(tmp_path):
    for client in ("ann", "bob", "cy"):
        write_rows(tmp_path / "chats" / f"{client}.jsonl", [{"messages": SAID}] * 6)
    model = write_causal(tmp_path / "model", of_bytes(chat_template=CHATML))
    settings = {"model.name": str(model), "problem.max_length": 64, "problem.max_new_tokens": 2, **QUICK}
    recipe = recipe_for(str(tmp_path / "chats"), settings)
    assert recipe.partition["column"] == "file"
    assert anyrank.run(recipe, tmp_path / "run").records()[-1]["metrics"].keys() == {"perplexity", "accuracy", "rougeL"}
