"""What a round costs against the clients that are sampled and the clients that are known.

    python benchmarks/scale.py [--quick]

Whole runs through `anyrank.run`, each in a fresh process: recipe, data, fleet, rounds, checkpoints. The model is a transformer
of two layers, 32 wide, and a sampled client trains one step of four sentences, so that what is not training shows. All runs
have the same 60,000 sentences, dealt to the clients: more clients have fewer each, six at 10,000. One process does everything,
so that its memory is all there is, and ten clients share a pass, so that a pass takes the same memory everywhere.

- a round: the median of all but the first and the last one, each with its checkpoint;
- rise: the largest memory that the process had in these rounds, less what it had before the first;
- start: from the recipe to the first round, loading and tokenising the data included;
- evaluation: what the last round takes longer, in which every known client scores its own held-out part.

The second table is one aggregation of 1,000 updates, 12 layers of 768 x 768 at rank 16 (1,125 MiB): with updates on disk
beyond the limit, as in every run, and with all of them in memory. Seconds include drawing the updates.
"""

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]
from transformers.utils.logging import disable_progress_bar

import anyrank
import measure
from anyrank import api, spool
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Layer, ModelCost, Plan, Spec, State, Task, Update
from anyrank.seeding import generator

KNOWN, SAMPLED, ROUNDS, ROWS = (10, 100, 1_000, 10_000), (10, 100, 1_000), 5, 60_000
METHODS = ("rbla", "flexlora")
LIMITS = {"on disk beyond 256 MiB": spool.IN_MEMORY, "in memory": float("inf")}

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
RECIPE = """
[method]
name = "rbla"
[data]
text = ["sentence"]
max_length = 16
test_share = 0.005
[partition]
name = "iid"
[lora]
target_modules = ["query", "value"]
[train]
steps = 1
batch_size = 4
[compute]
workers = 1
cohort = 10
[fleet.classes.weak]
device = "phone"
rank = 4
[fleet.classes.strong]
device = "laptop"
rank = 8
"""


# --- a run --------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """The model, its tokenizer and the sentences."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    disable_progress_bar()
    BertModel(config).save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    rng = random.Random(0)
    with (folder / "sentences.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["sentence", "label"])
        for _ in range(ROWS):
            words = rng.choices(WORDS, k=8)
            table.writerow([" ".join(words), "kind" if "good" in words else "other"])
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")


class Watch(api.Observer):
    """Notes seconds and memory as a run goes on."""

    def __init__(self):
        """Start the clock."""
        self.began, self.times, self.peaks = time.perf_counter(), list[float](), list[int]()

    def started(self, job: Any, folder: Any, progress: Any) -> None:
        """Before the first round: the largest memory so far is forgotten."""
        self.start_kb = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self.times.append(time.perf_counter())

    def finished_round(self, record: Mapping[str, Any]) -> None:
        """After a round and its checkpoint."""
        self.peaks.append(_status("VmHWM"))
        self.times.append(time.perf_counter())


def play(folder: Path, known: int, sampled: int) -> dict[str, Any]:
    """One run; its row."""
    watch = Watch()
    settings = {
        "rounds": ROUNDS,
        "evaluate.every": ROUNDS,
        "model.name": str(folder / "model"),
        "data.source": str(folder / "sentences.csv"),
        "partition.clients": known,
        "fleet.per_round": sampled,
    }
    with tempfile.TemporaryDirectory() as out:
        run = anyrank.run(anyrank.load_recipe(folder / "recipe.toml", settings), Path(out) / "run", observer=watch)
        checkpoint = (run.path / "checkpoint" / "state.safetensors").stat().st_size
    seconds = [after - before for before, after in zip(watch.times, watch.times[1:], strict=False)]
    usual = statistics.median(seconds[1:-1])
    return {
        "part": "rounds",
        "known": known,
        "sampled": sampled,
        "start_s": watch.times[0] - watch.began,
        "round_s": usual,
        "first_s": seconds[0],
        "evaluation_s": seconds[-1] - usual,
        "start_mb": watch.start_kb / 1024,
        "rise_mb": (max(watch.peaks[:-1]) - watch.start_kb) / 1024,
        "checkpoint_kb": checkpoint / 1024,
    }


def _status(key: str) -> int:
    """A line of `/proc/self/status`, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


# --- an aggregation -----------------------------------------------------------------------------------------------


def aggregate(method: str, limit: str) -> dict[str, Any]:
    """One aggregation of 1,000 updates; its row."""
    spool.IN_MEMORY = LIMITS[limit]
    layers = tuple(Layer(f"layer {i}", 768, 768, i) for i in range(12))
    rule = anyrank.METHODS[method]()
    state = rule.init(Spec(layers, (16,), 1.0, 0, Adapter({}), ModelCost(1, 1, 12, 0, 0, 0, 1)))
    before, began = _status("VmRSS"), time.perf_counter()
    with spool.Spool() as kept:
        inbox = [_updated(state, kept, client) for client in range(1000)]
        rule.aggregate(state, inbox, [0.001] * len(inbox))
    return {
        "part": "aggregation",
        "method": method,
        "updates": limit,
        "seconds": time.perf_counter() - began,
        "rise_mb": (_status("VmHWM") - before) / 1024,
    }


def _updated(state: State, kept: spool.Spool, client: int) -> tuple[Task, Update]:
    rng = generator("scale", client)
    trained = {
        name: LowRank(torch.randn(part.A.shape, generator=rng), torch.randn(part.B.shape, generator=rng))
        for name, part in state.adapter.layers.items()
    }
    plan = Plan(str(client), state.adapter.ranks, 1)
    return Task("train", 1, plan, state.adapter), Update(str(client), 1, kept.keep(Adapter(trained)), 1, {"loss": 1.0})


# --- tables -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rounds against clients known and sampled; aggregations with updates on disk and in memory."""
    played = [row for row in rows if row["part"] == "rounds"]
    reduced = [row for row in rows if row["part"] == "aggregation"]
    lines = [
        "| sampled | known | s a round | rise MB | checkpoint kB | start s | memory before MB | evaluation s |",
        "|---:" * 8 + "|",
    ]
    for row in sorted(played, key=lambda row: (row["sampled"], row["known"])):
        lines.append(
            f"| {row['sampled']:,} | {row['known']:,} | {row['round_s']:.3f} | {row['rise_mb']:.0f} | "
            f"{row['checkpoint_kb']:.0f} | {row['start_s']:.1f} | {row['start_mb']:.0f} | {row['evaluation_s']:.1f} |"
        )
    if reduced:
        lines += ["", "| 1,000 updates of 1.1 MiB | updates | rise MB | s |", "|---|---|---:|---:|"]
    for row in reduced:
        lines.append(f"| {row['method']} | {row['updates']} | {row['rise_mb']:.0f} | {row['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


# --- command line -------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure everything, or be one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 and 100 clients known, 10 sampled")
    parser.add_argument("--play", nargs=3, help="FOLDER KNOWN SAMPLED: play one run in this process")
    parser.add_argument("--aggregate", nargs=2, help="METHOD LIMIT: aggregate once in this process")
    arguments = parser.parse_args()
    if arguments.play:
        folder, known, sampled = arguments.play
        print(json.dumps(play(Path(folder), int(known), int(sampled))))
    elif arguments.aggregate:
        print(json.dumps(aggregate(*arguments.aggregate)))
    else:
        rows = list(_measured(quick=arguments.quick))
        print(f"\n{table(rows)}\n{measure.save('scale', {'quick': arguments.quick, 'rounds': ROUNDS}, rows)}")


def _measured(*, quick: bool) -> Iterator[dict[str, Any]]:
    known, sampled = (KNOWN[:2], SAMPLED[:1]) if quick else (KNOWN, SAMPLED)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for per_round, clients in product(sampled, known):
            if per_round <= clients:
                yield _fresh("--play", folder, str(clients), str(per_round))
    for method, limit in [] if quick else product(METHODS, LIMITS):
        yield _fresh("--aggregate", method, limit)


def _fresh(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(
        "  " + ", ".join(f"{key} {value if isinstance(value, str) else round(value, 3)}" for key, value in row.items())
    )
    return row


if __name__ == "__main__":
    main()
