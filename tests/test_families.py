"""Models of many families, adapted as by default: what a run leaves behind means the same to every program."""

import csv
import dataclasses
import json
import random
import runpy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

import anyrank
from anyrank import answers, hf
from anyrank.config import Recipe
from anyrank.errors import ConfigError, RecordError
from anyrank.job import Job, prepare
from anyrank.record import RunFolder
from tiny import BERT, WORDS, write_model, write_reviews

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT = (
    "{% for each in messages %}{{ '<' + each['role'] + '>' + each['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# A decoder of two layers, width 32; the vocabulary is all bytes, the special tokens, and what is merged from the words.
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,  # an untrained model at the usual 0.02 hardly passes anything on
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48, "n_positions": 96, "initializer_range": 0.2}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.2,
}


class Family(NamedTuple):
    """How a model and its tokenizer are made.

    Attributes:
        model: of transformers.
        config: what its configuration is told.
        special: tokens by their role.
        chat_template: of the tokenizer.
    """

    model: str
    config: Mapping[str, Any]
    special: Mapping[str, str]
    chat_template: str | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM", SIZES, {"bos_token": "<s>", "eos_token": "</s>"}),
    "qwen2": Family(
        "Qwen2ForCausalLM", SIZES, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, chat_template=CHAT
    ),
    "gemma": Family("GemmaForCausalLM", SIZES, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "gpt2": Family("GPT2LMHeadModel", GPT2, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "roberta": Family(
        "RobertaModel",
        {**BERT, "max_position_embeddings": 34},
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "unk_token": "<unk>",
        },
    ),
}


def write_tokenizer(folder: Path, family: Family) -> transformers.PreTrainedTokenizerFast:
    """Pairs of bytes, merged as in some words; a text begins with a special token, if there is one for that."""
    special, beginning = family.special, family.special.get("bos_token")
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    if beginning and beginning != special["eos_token"]:  # GPT-2 begins with nothing
        ends = f" {special['sep_token']}" if "sep_token" in special else ""
        tokens = [(token, backend.token_to_id(token)) for token in (beginning, special["eos_token"])]
        backend.post_processor = processors.TemplateProcessing(single=f"{beginning} $A{ends}", special_tokens=tokens)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = family.chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_family(folder: Path, name: str) -> Path:
    """A model with random weights, the same ones each time, and its tokenizer or image processor."""
    if name == "bert":
        return write_model(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "vit":
            transformers.ViTModel(transformers.ViTConfig(**VIT)).save_pretrained(folder)
            transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
            return folder
        family = FAMILIES[name]
        tokenizer = write_tokenizer(folder, family)
        ids = {f"{role}_id": getattr(tokenizer, f"{role}_id") for role in ("bos_token", "eos_token", "pad_token")}
        made = getattr(transformers, family.model)
        config = made.config_class(**{**family.config, "vocab_size": len(tokenizer), **ids})
        made(config).save_pretrained(folder)
    return folder


def write_instructions(file: Path, *, rows: int = 60, seed: int = 0) -> Path:
    """Of a few words, which one is an adjective."""
    rng = random.Random(seed)
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["instruction", "response"])
        for _ in range(rows):
            adjective = rng.choice(["good", "bad", "dull"])
            table.writerow([f"the {rng.choice(['film', 'plot'])} was {adjective}", adjective])
    return file


def write_images(folder: Path, *, each: int, seed: int = 0) -> None:
    """Dark images in one folder, light ones in another."""
    rng = np.random.default_rng(seed)
    for name, least in (("dark", 0), ("light", 120)):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(least, least + 130, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def write_data(folder: Path, problem: str) -> Path:
    """A training and a test part."""
    folder.mkdir()
    if problem == "image_classification":
        write_images(folder / "train", each=20)
        write_images(folder / "test", each=10, seed=1)
        return folder
    write = write_instructions if problem == "instruction" else write_reviews
    write(folder / "train.csv", rows=60)
    write(folder / "test.csv", rows=20, seed=1)
    return folder


PROBLEMS = {
    "instruction": 'template = "alpaca"\nmax_length = 64\nanswers = 2\nmax_new_tokens = 4',
    "chat": "max_length = 64\nanswers = 2\nmax_new_tokens = 4",
    "classification": 'text = ["sentence"]\nmax_length = 16',
    "image_classification": "",
}


def recipe(folder: Path, model: Path, source: Path, problem: str, **changes: Any) -> Recipe:
    """A run of a second; no target modules are named."""
    name = "instruction" if problem == "chat" else problem
    file = folder / "recipe.toml"
    file.write_text(f"""
rounds = 2
[method]
name = "rbla"
[model]
name = "{model}"
[problem]
name = "{name}"
{PROBLEMS[problem]}
[data]
source = "{source}"
[partition]
name = "iid"
clients = 4
[train]
learning_rate = 1e-2
batch_size = 8
steps = 3
[fleet]
per_round = 4
[fleet.classes.weak]
device = "phone"
rank = 1
[fleet.classes.strong]
device = "laptop"
rank = 4
[compute]
threads = 1
workers = 1
""")
    return anyrank.load_recipe(file, {key.replace("__", "."): value for key, value in changes.items()})


CASES = [
    ("llama", "instruction"),
    ("qwen2", "chat"),
    ("gemma", "instruction"),
    ("gpt2", "instruction"),
    ("qwen2", "classification"),
    ("bert", "classification"),
    ("roberta", "classification"),
    ("vit", "image_classification"),
]


def test_a_resumed_decoder_ends_like_an_unbroken_one(tmp_path):
    chosen = recipe(
        tmp_path, write_family(tmp_path / "model", "llama"), write_data(tmp_path / "data", "instruction"), "instruction"
    )
    whole, cut = anyrank.run(chosen, tmp_path / "whole"), tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        anyrank.run(chosen, cut, observer=Stops())
    anyrank.resume(cut)
    records = [
        [{key: value for key, value in record.items() if key != "real_seconds"} for record in folder.records()]
        for folder in (whole, RunFolder.open(cut))
    ]
    assert records[0] == records[1]
    for file in ("adapter/adapter_model.safetensors", "checkpoint/state.safetensors"):
        assert (cut / file).read_bytes() == (whole.path / file).read_bytes()


class Stops(anyrank.Observer):
    """Ends a run after its first round, as a kill would."""

    def finished_round(self, record):
        raise KeyboardInterrupt


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "problem"), CASES, ids=[" ".join(case) for case in CASES])
def test_what_a_run_leaves_means_the_same_everywhere(family, problem, tmp_path):
    base = write_family(tmp_path / "model", family)
    source = write_data(tmp_path / "data", "instruction" if problem == "chat" else problem)
    chosen = recipe(tmp_path, base, source, problem)
    run = anyrank.run(chosen, tmp_path / "run")
    last, first = run.records()[-1], run.records()[0]
    assert set(last["returned_ranks"].values()) == {1, 4}
    assert last["train_loss"] < first["train_loss"]

    means_the_same(run, prepare(chosen), base, source, tmp_path / "merged")


@torch.no_grad()
def means_the_same(run: RunFolder, job: Job, base: Path, source: Path, merged: Path) -> None:
    """To us, to stock PEFT, as a merged model, and to `answers.score`."""
    last = run.records()[-1]
    batch = dict(job.problem.collate([job.problem.test[i] for i in range(6)]))
    batch.pop("labels")
    load = getattr(transformers, job.problem.auto_class).from_pretrained
    job.model.load(run.final_adapter())
    ours = job.model.model(**batch).logits
    for adapter in (run.path / "adapter", *sorted((run.path / "classes").iterdir())):
        job.model.load(hf.read_adapter(adapter, scale=2.0))
        read = job.model.model(**batch).logits
        bare = load(base, **job.problem.model_arguments).eval()
        before = bare(**batch).logits
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="fan_in_fan_out is set to"
            )  # of GPT-2, which PEFT then gets right
            stock = peft.PeftModel.from_pretrained(bare, str(adapter)).eval()
        assert close(stock(**batch).logits, read), adapter
        assert not torch.allclose(before, read, atol=1e-2), adapter
        assert close(read, ours) == (adapter.name in ("adapter", "rank-4")), adapter

    answers.merge(run.path, merged)
    assert close(load(merged).eval()(**batch).logits, ours)

    for folder in (run.path, run.path / "adapter", merged):
        score = answers.score(folder, str(source))
        assert score.num_examples == 20
        assert score.metrics == pytest.approx(last["metrics"], rel=1e-4), folder
    for rank, expected in last["class_scores"].items():
        score = answers.score(run.path / "classes" / f"rank-{rank}", str(source))
        assert score.metrics[run.info["metric"]["name"]] == pytest.approx(expected, rel=1e-4), rank


# --- models that need care ----------------------------------------------------------------------------------------


def test_a_model_that_peft_has_no_default_for_is_adapted_in_all_of_its_blocks(tmp_path):
    job = prepare(
        recipe(
            tmp_path,
            write_family(tmp_path / "model", "vit"),
            write_data(tmp_path / "data", "image_classification"),
            "image_classification",
        )
    )
    names = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    assert [layer.name for layer in job.spec.layers] == [f"vit.layers.{i}.{name}" for i in range(2) for name in names]


def test_what_cannot_be_adapted_is_named_with_what_can(tmp_path):
    base, source = write_family(tmp_path / "model", "llama"), write_data(tmp_path / "data", "instruction")
    with pytest.raises(
        ConfigError, match=r"target_modules: embed_tokens matches model.embed_tokens, a Embedding. What"
    ):
        prepare(recipe(tmp_path, base, source, "instruction", lora__target_modules=["q_proj", "embed_tokens"]))


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tmp_path):
    base = write_family(tmp_path / "model", "gpt2")
    assert transformers.AutoTokenizer.from_pretrained(base).pad_token is None
    chosen = recipe(tmp_path, base, write_data(tmp_path / "data", "classification"), "classification")
    job = prepare(chosen)
    assert job.model.model.config.pad_token_id == job.model.model.config.eos_token_id == 0


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    base, source = write_family(tmp_path / "model", "gpt2"), write_data(tmp_path / "data", "instruction")
    about = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": None, "bos_token": None}))
    with pytest.raises(
        ConfigError, match=r"the tokenizer of model has neither a padding token nor an end-of-text token"
    ):
        prepare(recipe(tmp_path, base, source, "instruction"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_of_mixed_types_is_brought_to_one(dtype, tmp_path):
    base, source = write_family(tmp_path / "model", "llama"), write_data(tmp_path / "data", "instruction")
    tensors = load_file(base / "model.safetensors")
    mixed = {name: each if "norm" in name else each.bfloat16() for name, each in tensors.items()}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    run = anyrank.run(recipe(tmp_path, base, source, "instruction", model__dtype=dtype, rounds=1), tmp_path / "run")
    expected = run.records()[-1]["metrics"]
    assert answers.score(run.path, str(source)).metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_base_that_changed_is_not_trained_on(family, tmp_path):
    problem = "instruction" if family == "llama" else "classification"
    base, source = write_family(tmp_path / "model", family), write_data(tmp_path / "data", problem)
    with pytest.raises(KeyboardInterrupt):
        anyrank.run(recipe(tmp_path, base, source, problem), tmp_path / "run", observer=Stops())
    tensors = load_file(base / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RecordError, match=r"run was started on another base model: SHA-256 .* Bring model back as it was"
    ):
        anyrank.resume(tmp_path / "run")


# --- models of one's own ------------------------------------------------------------------------------------------


def test_the_example_of_a_model_of_ones_own_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = runpy.run_path(str(EXAMPLES / "own_model.py"), run_name="__main__")["folder"]
    last, references = folder.records()[-1], folder.info["references"]
    assert last["score"] < 0.5 * references["always the mean"] < references["before training"]
    assert set(last["returned_ranks"].values()) == {4, 16}
    assert "runs/own_model" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was handed over in Python, and can be scored only there"):
        answers.score(folder.path, "anything")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the example defines."""
    return runpy.run_path(str(EXAMPLES / "own_model.py"))


def test_a_problem_and_a_recipe_that_names_another_do_not_go_together(example, tmp_path):
    changes = {"problem.name": "regression", "model.name": "x", "data.source": "y"}
    with pytest.raises(
        ConfigError, match=r'problem.name: a problem is handed over; expected "own", got \'regression\''
    ):
        anyrank.run(anyrank.load_recipe(example["RECIPE"], changes), tmp_path / "run", problem=example["problem"]())
    with pytest.raises(ConfigError, match=r"own stands for one that is handed over in Python"):
        anyrank.run(anyrank.load_recipe(example["RECIPE"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test": []}, r"problem.test: there are no examples"),
        ({"columns": {"site": [1, 2]}}, r"a value for each of 1200 training examples, site has 2"),
        (
            {"model": torch.nn.Linear(16, 1)},
            r"expected what makes a model, such as its class; got a model that is made",
        ),
        ({"metrics": []}, r"problem.objective: expected at least one metric"),
        (
            {"loss": lambda output, batch: (output - batch["labels"]).square().mean()},
            r"a loss for each example.*got \[\]",
        ),
        ({"model": lambda: torch.nn.Flatten()}, r"this model has no layer that can be adapted. What can be: Linear"),
        ({"train.group_by_length": True}, r"train.group_by_length: the examples of this problem are all of one size"),
        ({"lora.target_modules": ["remember"]}, r"remember matches remember, a GRU. What can be adapted: Linear"),
    ],
)
def test_a_problem_that_no_run_can_use_is_refused(example, change, said):
    own = example["problem"]()
    objective = own.objective._replace(**{key: value for key, value in change.items() if key in ("loss", "metrics")})
    parts = {key: value for key, value in change.items() if hasattr(own, key)}
    settings = {key: value for key, value in change.items() if "." in key}
    with pytest.raises(ConfigError, match=said):
        prepare(
            anyrank.load_recipe(example["RECIPE"], settings),
            dataclasses.replace(own, objective=objective, **parts),
        )


class Mixed(torch.nn.Module):
    """A body in bfloat16 between norms and a head in float32."""

    def __init__(self):
        super().__init__()
        self.hear, self.think = (torch.nn.Linear(size, 64, dtype=torch.bfloat16) for size in (16, 64))
        self.norm, self.answer = torch.nn.LayerNorm(64), torch.nn.Linear(64, 1)

    def forward(self, readings):
        heard = self.norm(self.hear(readings.bfloat16()).float()).relu()
        return self.answer(self.think(heard.bfloat16()).float().relu())[:, 0]


@pytest.mark.parametrize("saved", [["answer"], ["norm", "answer"], ["hear", "norm"]])
def test_a_model_of_ones_own_may_mix_types(example, saved, tmp_path):
    changes = {"rounds": 1, "lora.modules_to_save": saved}
    own = dataclasses.replace(example["problem"](), model=Mixed)
    run = anyrank.run(anyrank.load_recipe(example["RECIPE"], changes), tmp_path / "run", problem=own)
    assert run.records()[-1]["score"] < run.info["references"]["always the mean"]
    assert {tensor.dtype for tensor in run.final_adapter().tensors().values()} == {torch.float32}
