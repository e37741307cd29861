"""The work that every contestant gets, and one client's share of it with plain PEFT.

A folder holds it: `work.json` (the settings), `train.safetensors` (token ids and labels, so that nobody tokenises) and
`start/` (a PEFT directory: the adapter and head from which the first round starts). `prepare` writes it.
Clients are numbered from 0; each has `per_client` examples in a row.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyrank.seeding import generator

__all__ = ["Result", "Work", "build", "collate", "get", "put", "train"]

Example = Mapping[str, Any]
State = Mapping[str, Tensor]  # adapter and head under PEFT's names


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Args:
        folder: where the examples and the start are.
        model: folder of the base model.
        clients: all of them take part in every round.
        steps: local steps of a client in a round.
        batch: examples a step.
        length: tokens of every example, or of the longest where they are mixed.
        rounds: how many.
        pad_to: length to which every batch is padded; None pads to the longest of the batch.
        mixed: the examples are of mixed length.
        device: where the model is.
    """

    folder: Path
    model: str
    clients: int
    steps: int
    batch: int
    length: int
    rounds: int
    pad_to: int | None = None
    mixed: bool = False
    device: str = "cpu"
    rank: int = 8
    scale: float = 2.0
    targets: Sequence[str] = ("query", "value")
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def per_client(self) -> int:
        """Examples of a client: a round goes through them once."""
        return max(1, self.steps) * self.batch

    def write(self) -> None:
        """Write the settings into the folder."""
        settings = {key: value for key, value in asdict(self).items() if key != "folder"}
        (self.folder / "work.json").write_text(json.dumps(settings), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Work":
        """The settings in a folder."""
        return cls(folder, **json.loads((folder / "work.json").read_text(encoding="utf-8")))

    def write_examples(self, examples: Sequence[Example], part: str = "train") -> None:
        """Write examples of `input_ids` and `labels`."""
        tensors = {
            "tokens": torch.tensor([token for example in examples for token in example["input_ids"]]),
            "lengths": torch.tensor([len(example["input_ids"]) for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }
        save_file(tensors, self.folder / f"{part}.safetensors")

    def examples(self, part: str = "train") -> list[Example]:
        """All examples of all clients: `input_ids`, `length`, `labels`."""
        tensors = load_file(self.folder / f"{part}.safetensors")
        rows = tensors["tokens"].split(tensors["lengths"].tolist())
        labelled = zip(rows, tensors["labels"].tolist(), strict=True)
        return [{"input_ids": row, "length": len(row), "labels": label} for row, label in labelled]

    def start(self) -> State:
        """The adapter and head to start from."""
        return load_file(self.folder / "start" / "adapter_model.safetensors", device=self.device)

    def batches(self, examples: Sequence[Example], round: int, client: int) -> Iterator[Mapping[str, Tensor]]:
        """A client's batches of a round (counted from 1), in the order that anyrank draws."""
        order = torch.randperm(self.per_client, generator=generator(self.seed, "batches", round, str(client)))
        mine = [examples[client * self.per_client + i] for i in order.tolist()]
        for first in range(0, self.steps * self.batch, self.batch):
            batch = collate(mine[first : first + self.batch], pad_to=self.pad_to)
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}


@dataclass
class Result:
    """What a contestant reports.

    Args:
        state: the final adapter and head.
        seconds: of each round.
        loss: mean training loss of the last round.
        plan: processes x clients that share a pass, where there is a choice.
    """

    state: State
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    plan: str = ""


def collate(items: Sequence[Example], *, pad_to: int | None) -> dict[str, Tensor]:
    """A batch, padded to a length or to its longest example."""
    rows = [item["input_ids"] for item in items]
    width = pad_to or max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def build(work: Work) -> peft.PeftModel:
    """The base model in float32 with an adapter in it, in evaluation mode: no dropout."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        work.model, num_labels=2, dtype=torch.float32
    )
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=work.rank,
        lora_alpha=int(work.scale * work.rank),
        target_modules=list(work.targets),
        modules_to_save=["classifier"],
    )
    return peft.get_peft_model(base, config).to(work.device).eval()


def get(model: peft.PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter and head."""
    return {name: tensor.detach().clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def put(model: peft.PeftModel, state: State) -> None:
    """Replace the adapter and head."""
    peft.set_peft_model_state_dict(model, dict(state))


def train(
    model: peft.PeftModel, state: State, batches: Iterator[Mapping[str, Tensor]], work: Work
) -> tuple[dict[str, Tensor], float]:
    """One client's local training from `state`, with a fresh optimizer: its adapter and head, and its mean loss."""
    put(model, state)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.learning_rate, weight_decay=work.weight_decay, fused=True)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return get(model), sum(losses) / max(1, len(losses))
