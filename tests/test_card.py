"""Model cards: what the hub reads of them, what people read, and code that works."""

import copy
import re
import tomllib

import peft
import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForSequenceClassification

import anyrank
from anyrank.card import licence_of, model_card, recipe_toml
from anyrank.methods import describe
from tiny import write_model

RECIPE = {
    "seed": 0,
    "rounds": 7,
    "baseline": None,
    "compare": ["centralised"],
    "track": ["tensorboard"],
    "method": {"name": "hlora", "oversample": None},
    "model": {"name": "all-MiniLM-L6-v2", "dtype": "float32"},
    "data": {"source": 'C:\\texts\\tickets "new".csv', "held_out": 0.1},
    "train": {"learning_rate": 1e-05, "epochs": 1, "group_by_length": False},
    "fleet": {
        "per_round": 5,
        "classes": {
            "phone": {"device": "phone", "share": 3.0, "rank": 2},
            "the lab's": {"device": "laptop", "share": 1.0, "rank": 16},
        },
    },
    "devices": {},
    "clock": {"deadline": None, "changes": [{"round": 3, "kind": "phone", "slowdown": 2.0, "dropout": None}]},
    "compute": {"threads": 2, "workers": 1},
}
INFO = {
    "anyrank": "0.1.0",
    "command": "anyrank run tickets.toml",
    "started": "2025-01-01T00:00:00+00:00",
    "recipe": RECIPE,
    "rounds": 7,
    "method": "hlora",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "base": "sentence-transformers/all-MiniLM-L6-v2",
    "data": {"fingerprint": "ab" * 32, "train": 900, "test": 100, "label_names": ["late", "lost"]},
    "references": {"majority class": 0.5, "word overlap": None},
    "metric": {"name": "accuracy", "higher_is_better": True},
    "fleet": {
        **{f"client-{i}": {"kind": "phone", "rank": 2, "num_examples": 100} for i in range(3)},
        "client-3": {"kind": "the lab's", "rank": 16, "num_examples": 600},
    },
    "modules_to_save": ["classifier"],
}
RECORD = {
    "round": 7,
    "score": 0.829912345,
    "loss": 0.4,
    "metrics": {"macro F1": 0.75, "perplexity": None},
    "class_scores": {"2": 0.8, "16": 0.83},
    "federated": {"score": 0.81, "std": 0.05, "min": 0.7, "max": 0.9, "clients": 4},
}


def card(info=INFO, record=RECORD, **changes) -> str:
    usual = {
        "rank": 16,
        "licence": "apache-2.0",
        "method": describe("hlora"),
        "auto_class": "AutoModelForSequenceClassification",
        "num_labels": 2,
        "compared": {"centralised": 0.8029},
    }
    return model_card(info, record, **{**usual, **changes})


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n\n")[1].split("\n\n## ")[0]


def test_the_front_matter_is_what_the_hub_reads():
    front = ModelCard(card(dataset="ann/tickets")).data
    assert front.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert front["base_model_relation"] == "adapter"
    assert (front.library_name, front.license, front.pipeline_tag) == ("peft", "apache-2.0", "text-classification")
    assert front.tags == ["lora", "federated-learning", "anyrank"]
    assert (front.datasets, front.metrics) == (["ann/tickets"], ["accuracy"])
    assert front.eval_results is not None
    assert [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in front.eval_results] == [
        ("ann/tickets", "test", "accuracy", 0.8299),
        ("ann/tickets", "test", "macro-f1", 0.75),
    ]


def test_a_card_says_what_was_reached_and_against_what():
    results = section(card(), "Results")
    assert "On the 100 test examples, after round 7; higher is better." in results
    rows = re.findall(r"^\| (.*) \| (.*) \|$", results, flags=re.MULTILINE)
    assert [row for row in rows if "-" not in row[0]] == [
        ("", "accuracy"),
        ("**hlora**", "0.8299"),
        ("centralised", "0.8029"),
        ("majority class", "0.5000"),
        ("further metric", "value"),
        ("macro F1", "0.7500"),
        ("rank", "accuracy"),
        ("2", "0.8000"),
        ("16", "0.8300"),
    ]
    assert "On what 4 clients held out of their own data: accuracy 0.8100" in results


def test_a_card_says_how_it_came_about():
    text = card()
    assert text.split("---\n")[2].startswith(
        "\n# A LoRA adapter of rank 16 for sentence-transformers/all-MiniLM-L6-v2\n"
    )
    assert "900 training and 100 test examples; SHA-256 `abab" in section(text, "Data")
    assert "Labels: 0 = late, 1 = lost." in section(text, "Data")
    assert "[arXiv 2503.00813](https://arxiv.org/abs/2503.00813)" in section(text, "Method")
    assert "| phone | phone | 3 | 2 | 300 |" in section(text, "Fleet")
    assert "| the lab's | laptop | 1 | 16 | 600 |" in section(text, "Fleet")
    assert section(text, "Limitations").strip().count("\n") == 1


def test_the_same_run_gives_the_same_bytes_whenever_and_however_it_was_played():
    other = copy.deepcopy(INFO)
    other["started"], other["command"] = "2026-02-02T00:00:00+00:00", ""
    other["recipe"]["compute"]["threads"], other["recipe"]["track"] = 8, []
    assert card(other) == card()


def test_an_adapter_that_was_not_scored_claims_nothing():
    text = card(record=None, compared={})
    assert section(text, "Results") == "This adapter was not scored."
    front = ModelCard(text).data
    assert front.eval_results is None
    assert front.metrics is None
    unmeasured = {**RECORD, "score": None, "metrics": None, "class_scores": None, "federated": None}
    assert section(card(record=unmeasured), "Results") == "This adapter was not scored."


def test_a_baseline_has_no_method():
    assert "no averaging" in section(card({**INFO, "method": "centralised"}, method=None), "Method")


@pytest.mark.parametrize(
    ("licence", "front", "said"),
    [
        (None, (None, None), "Licence: not stated by the base model."),
        ("mit", ("mit", None), "Licence: mit."),
        ("other (some-licence)", ("other", "some-licence"), "Licence: other (some-licence)."),
        ("Model Licence, v2", ("other", "model-licence-v2"), "Licence: Model Licence, v2."),
    ],
)
def test_the_licence_is_the_base_models(licence, front, said):
    text = card(licence=licence)
    data = ModelCard(text).data
    assert (data.license, data.license_name) == front
    assert said in section(text, "Base model")


def test_a_mixture_is_loaded_by_anyrank():
    text = card(experts=["runs/one/adapter", "runs/two/adapter"])
    assert "# A mixture of 2 LoRA adapters for" in text
    assert ModelCard(text).data.library_name == "anyrank"
    assert "from anyrank.hf import load_mixture" in section(text, "How to load it")


def test_a_model_of_ones_own_has_no_task():
    text = card(auto_class=None, num_labels=None)
    front = ModelCard(text).data
    assert front.pipeline_tag is None
    assert front.eval_results is not None
    assert front.eval_results[0].task_type == "other"
    assert "PeftModel.from_pretrained(base," in section(text, "How to load it")


def test_a_run_with_data_of_ones_own_names_no_source():
    info = {**INFO, "recipe": {**RECIPE, "data": {"source": None, "held_out": 0.1}}}
    text = card(info)
    assert section(text, "Data").startswith("Given to the run from Python: 900 training")
    assert section(text, "Recipe").startswith("The run was given its model and data from Python")
    results = ModelCard(text).data.eval_results
    assert results is not None
    assert results[0].dataset_name == "own data"


def test_the_code_of_a_card_works(tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(write_model(tmp_path / "model"), num_labels=2)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    text = card({**INFO, "base": str(tmp_path / "model")})
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "adapter")), names)
    assert names["model"].peft_config["default"].r == 2


def test_the_recipe_of_a_card_is_the_recipe():
    (written,) = re.findall(r"```toml\n(.*?)```", card(), flags=re.DOTALL)
    wanted = {key: value for key, value in RECIPE.items() if key not in ("compute", "track")}
    assert tomllib.loads(written) == without_nulls(wanted)


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def test_a_recipe_can_be_read_again(tmp_path):
    recipe = anyrank.load_recipe(overrides={"method.name": "florist", "clock.dropout": 0.1})
    (tmp_path / "recipe.toml").write_text(recipe_toml(recipe.model_dump(mode="json")), encoding="utf-8")
    assert anyrank.load_recipe(tmp_path / "recipe.toml") == recipe


# Licences


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: apache-2.0\n---\n# A model\n", "LICENSE": "MIT License\n"}, "apache-2.0"),
        ({"README.md": "---\nlicense: [mit, cc-by-4.0]\n---\n"}, "mit, cc-by-4.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: some-licence\n---\n"}, "other (some-licence)"),
        ({"README.md": "---\nlanguage: en\n---\n", "LICENSE.md": "\n# Some Licence\n\nAll of it.\n"}, "Some Licence"),
        ({"README.md": "---\nlicense: [\n---\n", "LICENSE": "   Apache License\n   Version 2.0\n"}, "Apache License"),
        ({"README.md": "no front matter\n", "LICENSE": "\n"}, None),
    ],
)
def test_the_licence_of_a_model_folder(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(str(tmp_path)) == licence


def test_the_licence_of_a_model_on_the_hub_is_only_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert licence_of("ann/model") is None
    assert licence_of("no name at all") is None
    snapshot = tmp_path / "models--ann--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "models--ann--model" / "refs").mkdir()
    (tmp_path / "models--ann--model" / "refs" / "main").write_text("abc")
    assert licence_of("ann/model") == "mit"
