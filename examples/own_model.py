"""A model, a loss, a metric and data of your own: how fast does a noisy wave swing?

python examples/own_model.py
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import anyrank

RECIPE = {
    "rounds": 4,
    "problem": {"name": "own"},  # handed over to `run`, with its model and its data
    "method": {"name": "hlora"},
    "partition": {"name": "by_column", "column": "site"},
    "train": {"steps": 20, "learning_rate": 1e-2},
    "lora": {"modules_to_save": ["answer"]},  # trained whole; the other linear layers get adapters
    "fleet": {
        "per_round": 8,
        "classes": {"weak": {"device": "phone", "rank": 4}, "strong": {"device": "laptop", "rank": 16}},
    },
}


class Waves:
    """A map-style data set: 16 readings of a wave, and how fast it swings, which is not the same everywhere."""

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        self.site = rng.integers(12, size=count)
        self.speed = rng.uniform(0.2, 1.0, count) + self.site / 20
        turns = self.speed[:, None] * np.arange(16) + rng.uniform(0, 2 * np.pi, (count, 1))
        self.readings = np.sin(turns) + rng.normal(0, 0.1, turns.shape)

    def __len__(self):
        return len(self.speed)

    def __getitem__(self, index):
        return torch.tensor(self.readings[index]).float(), torch.tensor(self.speed[index]).float()


class Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.hear, self.remember = nn.Linear(4, 64), nn.GRU(64, 64, batch_first=True)
        self.think, self.answer = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, readings):
        _, last = self.remember(torch.relu(self.hear(readings.unflatten(1, (4, 4)))))
        return self.answer(torch.relu(self.think(last[0])))[:, 0]


def mean_error(answers: anyrank.Answers) -> float:
    return float(np.abs(answers.predictions - answers.labels).mean())


def problem() -> anyrank.Problem:
    train, test = Waves(1200, seed=0), Waves(300, seed=1)
    objective = anyrank.Objective(
        loss=lambda output, batch: (output - batch["labels"]) ** 2,  # of each example
        predict=lambda output, batch: (output, batch["labels"]),
        metrics=[anyrank.Metric("mean error", mean_error, higher_is_better=False)],
    )
    return anyrank.Problem(
        model=Listener,
        train=train,
        test=test,
        objective=objective,
        columns={"site": train.site},
        references={"always the mean": float(np.abs(test.speed - train.speed.mean()).mean())},
    )


if __name__ == "__main__":
    folder = anyrank.run(anyrank.load_recipe(RECIPE), Path("runs/own_model"), problem=problem())
    print(folder.path, *(round(record["score"], 3) for record in folder.records()), folder.info["references"])
