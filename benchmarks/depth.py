"""Seconds of a local step against trained depth, with and without the hidden states below it kept.

    python benchmarks/depth.py [--quick]

The model is all-MiniLM-L6-v2 in float32, with rank 8 on query and value of the last k of its 6 blocks and a head that is
trained whole. One client takes steps of 8 examples of 64 tokens, texts of the standard library, through the function that
trains every client. Without anything kept, a step passes through all blocks and back through k; with it, it begins at the
lowest of the k. At 6 there is nothing to keep. All variants take turns, the whole of it repeated; medians.

Filling is what keeping costs: before a client's first step, all of its examples pass through the blocks below. It stands
beside what is saved each time that an example is used; the quotient is how often it must be used until that is made up for.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

import measure
from anyrank import hf
from anyrank.adapter import Adapter
from anyrank.compute import devices
from anyrank.federation import Plan, Task
from anyrank.local import LOCALS
from anyrank.methods import METHODS
from anyrank.prefix import Prefix
from anyrank.pretrained import Pretrained
from anyrank.seeding import generator
from anyrank.train import Examples, Training, train
from peers.prepare import LABELS, MODEL, model_folder, write
from peers.work import Work, collate

BLOCKS, BATCH, STEPS = 6, 8, 8


class Client:
    """One client that is asked to train at one depth after another."""

    def __init__(self, folder: Path):
        """Write the texts, load the model."""
        work = Work(folder, model_folder(), clients=1, steps=STEPS, batch=BATCH, length=64, rounds=1)
        write(work)
        base = hf.load_classifier(Pretrained(work.model, MODEL), label_names=LABELS, seed=work.seed)
        self.model = hf.AdaptedModel(base, scale=work.scale, target_modules=work.targets)
        self.start = hf.read_adapter(folder / "start", scale=work.scale)
        rows = np.arange(work.per_client)
        self.plain = Subset(work.examples(), rows.tolist())  # pyright: ignore[reportArgumentType]
        self.training = Training(
            local=LOCALS["lora"](),
            learning_rate=work.learning_rate,
            weight_decay=work.weight_decay,
            batch_size=BATCH,
            collate=partial(collate, pad_to=None),
        )
        prefix = Prefix.of(
            self.model,
            self.training,
            layers=self.model.layers,
            data=self.plain,
            lengths=np.full(len(rows), work.length),
            shards={"client": rows},
            per_round=1,
            in_memory=10**9,
            folder=folder,
        )
        assert prefix
        self.prefix, self.kept = prefix, self.plain
        self.model.to(devices()[0])

    def task(self, depth: int) -> Task:
        """To train the last blocks."""
        names = [layer.name for layer in self.model.layers if layer.block >= BLOCKS - depth]
        start = Adapter({name: self.start.layers[name] for name in names}, self.start.dense)
        return Task("train", 1, Plan("client", start.ranks, STEPS), start)

    def fill(self, task: Task) -> None:
        """Keep the states below a depth in place of those below another one."""
        self.kept = self.prefix.examples(task, self.plain)

    def train(self, task: Task, data: Callable[[], Examples]) -> None:
        """Take all steps."""
        rng, method = generator("batches"), METHODS["fedavg"]()
        train(self.model, task, task.start, data(), training=self.training, method=method, rng=rng)


def run(depths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each depth."""
    with tempfile.TemporaryDirectory() as folder:
        client = Client(Path(folder))
        variants: dict[str, Callable[[], None]] = {}
        for task, depth in ((client.task(depth), depth) for depth in depths):
            if depth < BLOCKS:
                variants[f"fill {depth}"] = partial(client.fill, task)
                variants[f"kept {depth}"] = partial(client.train, task, lambda: client.kept)
            variants[f"plain {depth}"] = partial(client.train, task, lambda: client.plain)
        measure.median_of(variants, 1)  # the first pass of a process takes longer
        seconds = {name: statistics.median(each) for name, each in measure.median_of(variants, repeats).items()}
    return [
        {
            "depth": depth,
            "plain_s": seconds[f"plain {depth}"] / STEPS,
            "kept_s": seconds.get(f"kept {depth}", seconds[f"plain {depth}"]) / STEPS,
            "fill_s": seconds.get(f"fill {depth}", 0.0) / (STEPS * BATCH),
        }
        for depth in depths
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds against depth."""
    lines = [
        "| trained blocks | ms a step, all blocks | ms a step, begun at the lowest | | filling, ms an example "
        "| saved, ms an example | made up for after uses |",
        "|---:" * 7 + "|",
    ]
    for row in rows:
        plain, kept, fill = (1000 * row[key] for key in ("plain_s", "kept_s", "fill_s"))
        saved = (plain - kept) / BATCH
        rest = (
            [f"{kept:.1f}", f"{plain / kept:.2f}x", f"{fill:.2f}", f"{saved:.2f}", f"{fill / saved:.1f}"]
            if fill
            else []
        )
        lines.append(f"| {' | '.join([str(row['depth']), f'{plain:.1f}', *(rest or ['-'] * 5)])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all depths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three depths, once")
    quick = parser.parse_args().quick
    torch.use_deterministic_algorithms(True)  # as in every run
    load = os.getloadavg()[0]
    rows = run((1, 3, 6), 1) if quick else run(range(1, BLOCKS + 1), 9)
    settings = {"quick": quick, "batch": BATCH, "tokens": 64, "steps": STEPS, "load_average_before": load}
    print(f"{table(rows)}\n{measure.save('depth', settings, rows)}")


if __name__ == "__main__":
    main()
