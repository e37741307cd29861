"""Real but tiny models, one with a tokenizer, and a labelled csv file, made on the spot."""

import csv
import random
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from anyrank.job import Job
from anyrank.memory import Memory
from anyrank.transport import InProcess

WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "actor",
    "scene",
    "was",
    "is",
    "very",
    "quite",
    "good",
    "great",
    "fine",
    "bad",
    "poor",
    "dull",
    "long",
    "short",
]


LABELS = {0: "kind", 1: "unkind", 2: "unsure"}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
# Two layers, width 32; feed-forward 48 wide, so that not every matrix is square.
BERT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # an untrained model at the usual 0.02 hardly passes anything on
}
GPT2 = {
    "vocab_size": len(VOCABULARY),
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 48,
    "n_positions": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def bare_model(family: str) -> torch.nn.Module:
    """A classifier of three classes with random weights, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "bert":
            return BertForSequenceClassification(BertConfig(**BERT, id2label=LABELS)).eval()
        return GPT2ForSequenceClassification(GPT2Config(**GPT2, id2label=LABELS)).eval()


def write_model(folder: Path) -> Path:
    """A BERT without a head, and its tokenizer."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(**BERT)).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_reviews(file: Path, *, rows: int = 240, seed: int = 0) -> Path:
    """Short sentences; the label says whether the one adjective is a kind one; `critic` is a natural client."""
    rng = random.Random(seed)
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["critic", "sentence", "label"])
        for row in range(rows):
            kind = rng.random() < 0.5
            adjective = rng.choice(["good", "great", "fine"] if kind else ["bad", "poor", "dull"])
            sentence = (
                f"the {rng.choice(['film', 'plot', 'actor', 'scene'])} was {rng.choice(['very', 'quite'])} {adjective}"
            )
            table.writerow([f"critic-{row % 6}", sentence, "kind" if kind else "unkind"])
    return file


def recipe_toml(model: Path, reviews: Path, *, method: str = "hlora") -> str:
    """A recipe that runs in a second or two."""
    return f"""
rounds = 3
[method]
name = "{method}"
[model]
name = "{model}"
[problem]
name = "classification"
text = ["sentence"]
max_length = 16
[data]
source = "{reviews}"
[partition]
name = "iid"
clients = 6
[lora]
target_modules = ["query", "value", "intermediate.dense"]
[train]
learning_rate = 1e-2
batch_size = 8
epochs = 4
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
"""


def in_process(job: Job, memory: Path, **changes) -> InProcess:
    """A job's clients in this process; a fifth of each one's examples is held out."""
    usual = {
        "model": job.model,
        "method": job.method,
        "training": job.training,
        "data": job.problem.train,
        "shards": job.cohort.shards,
        "test": job.problem.test,
        "held_out": 0.2,
        "seed": 0,
        "memory": Memory(memory),
    }
    return InProcess(**{**usual, **changes})
