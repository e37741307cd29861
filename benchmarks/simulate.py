"""Rounds of federated LoRA in simulation: seconds, memory and CPU seconds of anyrank, Flower, a loop and a forked loop.

    python benchmarks/simulate.py [--quick] [--only NAME ...] [--clients N --steps S --batch B --length L --rounds K]

The same for everyone:
- the model (all-MiniLM-L6-v2), rank 8 on query and value, scale 2, a classification head that is trained whole;
- start, token ids and order of the examples, all read from one folder; nobody tokenises; the base in evaluation mode;
- AdamW made anew by each client in each round, and the mean of what the clients return. The final adapters are compared:
  the column `difference` is the largest difference of a number from the bare loop's (without one, the first row's);
- a fresh process for each run, one contestant after another in turn, the whole of it repeated; nobody evaluates.

Not the same:
- Flower has an actor of one thread for each core; the forked loop a process of one thread for each core; the bare loop one
  process with all threads; anyrank is as it runs by itself, or one client after another (`sequential`), and says how many
  processes it has x how many clients share a pass;
- anyrank's rounds go through its engine, which checks updates and counts bytes; checkpoints are written by nobody;
- anyrank's processes have the C library keep memory that is freed; everyone else has its defaults;
- `bfloat16`: anyrank with the base model in bfloat16, everyone else in float32; see the accuracy in its table;
- texts in the first tables have exactly the stated length, so that nobody gains by padding less. Where they are of mixed
  length, the tables say who pads to the full length and who to the longest example of a batch; `batches by length` puts
  examples of about the same length together, so its batches, and its adapters, are other ones.

A round's seconds are from the end of one to the end of the next, the median of all but the first. Memory is the largest sum
of all processes' proportional set sizes; memory, CPU seconds and seconds of the whole run include starting and loading.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import measure
from peers.work import Result, State, Work, build, collate, put

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


# --- contestants ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """One way to play the rounds.

    Args:
        label: in the tables.
        threads: of each of its processes; None for all cores.
        play: carries the work out; imports only then what it needs, so that nobody's memory holds another's modules.
    """

    label: str
    threads: int | None
    play: Callable[[Work], Result]


def _at(module: str, function: str, **settings: Any) -> Callable[[Work], Result]:
    return lambda work: getattr(import_module(module), function)(work, **settings)


_flower, _anyrank = partial(_at, "peers.flower", "flower", cores=measure.cores()), partial(_at, "ours", "anyrank")
CONTESTANTS = {
    "flower": Contestant("Flower, model built per task", 1, _flower(cached=False)),
    "flower-cached": Contestant("Flower, model cached in the actor", 1, _flower(cached=True)),
    "loop": Contestant("bare loop", None, _at("peers.bare", "loop")),
    "forked": Contestant("forked loop", 1, _at("peers.bare", "forked", workers=measure.cores())),
    "anyrank-sequential": Contestant("anyrank, sequential", None, _anyrank(sequential=True)),
    "anyrank": Contestant("anyrank", None, _anyrank()),
    "anyrank-bf16": Contestant("anyrank, bfloat16", None, _anyrank(dtype="bfloat16")),
    "anyrank-by-length": Contestant(
        "anyrank, bfloat16, batches by length", None, _anyrank(dtype="bfloat16", group_by_length=True)
    ),
}
PEERS, OURS = ("flower", "flower-cached", "loop", "forked"), ("anyrank-sequential", "anyrank", "anyrank-bf16")


# --- shapes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What is played, and by whom.

    Args:
        title: in the tables.
        rounds: of each run; the first is reported apart.
        repeats: runs of each contestant.
        entries: names of contestants; `NAME/full` pads every batch to the full length.
        scored: the final adapters are scored on the test pairs, in float32.
        against: whose seconds are divided by everyone's.
    """

    title: str
    clients: int
    steps: int
    batch: int
    length: int
    rounds: int = 4
    repeats: int = 3
    entries: Sequence[str] = (*PEERS, *OURS)
    mixed: bool = False
    device: str = "cpu"
    scored: bool = False
    against: Sequence[str] = ("flower-cached", "forked")


ON_PADDING = ["flower-cached/full", "flower-cached", "forked/full", "forked", *OURS[1:], "anyrank-by-length"]
SHAPES = [
    Shape("10 clients, 2 steps of 8 x 64 tokens", 10, 2, 8, 64),
    Shape("100 clients, 1 step of 4 x 32 tokens", 100, 1, 4, 32),
    Shape("10 clients, no training", 10, 0, 1, 32, rounds=6, repeats=1),
    Shape("100 clients, no training", 100, 0, 1, 32, rounds=6, repeats=1),
    Shape(
        "10 clients, 2 steps of 8 texts of mixed length, up to 64 tokens", 10, 2, 8, 64, entries=ON_PADDING, mixed=True
    ),
    Shape(
        *("Accuracy: 20 clients, 12 steps of 16 texts of mixed length, up to 64 tokens", 20, 12, 16, 64, 3, 1),
        entries=["forked", *OURS[1:], "anyrank-by-length"],
        mixed=True,
        scored=True,
    ),
]
ON_GPU = Shape(
    *("On the GPU: 64 clients, 1 step of 4 x 32 tokens", 64, 1, 4, 32),
    entries=["loop", "anyrank-sequential", "anyrank"],
    device="cuda",
    against=("loop", "anyrank-sequential"),
)
QUICK = [replace(shape, rounds=2, repeats=1) for shape in (SHAPES[0], SHAPES[2])]


# --- running -------------------------------------------------------------------------------------------------------


def play_one(name: str, work: Work, out: Path | None) -> None:
    """Be one contestant: print its seconds, and write its final adapter."""
    result = CONTESTANTS[name].play(work)
    if out:
        save_file({key: tensor.float().cpu().contiguous() for key, tensor in result.state.items()}, out)
    print(json.dumps({"seconds": result.seconds, "loss": result.loss, "plan": result.plan}))


def run_shape(shape: Shape) -> list[dict[str, Any]]:
    """The rows of a shape: every contestant in turn, the whole of it repeated."""
    print(f"\n{shape.title}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = _written(shape, Path(folder))
        runs: dict[str, list[dict]] = {entry: [] for entry in shape.entries}
        for repeat in range(shape.repeats):
            for entry in shape.entries:
                runs[entry].append(_run(entry, work))
                print(f"  {repeat + 1} {entry}: {_brief(runs[entry][-1])}", flush=True)
        finals = {entry: load_file(_final(work, entry)) for entry in shape.entries}
        accuracy = {entry: _accuracy(work, final) for entry, final in finals.items()} if shape.scored else {}
        reference = finals.get("loop") or finals[shape.entries[0]]
    rows = [
        _row(shape, entry, runs[entry])
        | {"difference": _difference(finals[entry], reference), "accuracy": accuracy.get(entry)}
        for entry in shape.entries
    ]
    seconds = {row["contestant"]: row["round_s"] for row in rows}
    others = [other for other in shape.against if other in seconds]
    return [row | {f"against {other}": seconds[other] / row["round_s"] for other in others} for row in rows]


def _written(shape: Shape, folder: Path) -> Work:
    from peers.prepare import model_folder, write

    sizes = (shape.clients, shape.steps, shape.batch, shape.length, shape.rounds)
    work = Work(folder, model_folder(), *sizes, mixed=shape.mixed, device=shape.device)
    write(work)
    return work


def _run(entry: str, work: Work) -> dict[str, Any]:
    """A contestant in a process of its own, watched."""
    name, _, padding = entry.partition("/")
    replace(work, pad_to=work.length if padding == "full" else None).write()
    threads = str(CONTESTANTS[name].threads or measure.cores())
    env = {**QUIET, "OMP_NUM_THREADS": threads, "FLWR_HOME": str(work.folder / "flwr")}
    if work.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, "--one", name, "--work", str(work.folder), "--out", str(_final(work, entry))]
    seen = measure.peak(command, env)
    return seen | json.loads(seen.pop("output").splitlines()[-1])


def _final(work: Work, entry: str) -> Path:
    return work.folder / f"final-{entry.replace('/', '-')}.safetensors"


def _brief(run: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{each:.2f}" for each in run["seconds"])
    return f"rounds {seconds} s; whole run {run['wall_s']:.1f} s; {run['pss_mb']} MB; loss {run['loss']:.4f}"


def _row(shape: Shape, entry: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    later = [each for run in runs for each in run["seconds"][1:]]
    name, _, padding = entry.partition("/")
    return {
        "shape": shape.title,
        "contestant": entry,
        "label": CONTESTANTS[name].label,
        "plan": runs[-1]["plan"],
        "padding": ("full length" if padding else "longest of the batch") if shape.mixed else None,
        "clients": shape.clients,
        "steps": shape.steps,
        "runs": len(runs),
        "round_s": statistics.median(later),
        "fastest_s": min(later),
        "first_s": statistics.median(run["seconds"][0] for run in runs),
        "loss": runs[-1]["loss"],
        **{key: statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s", "pss_mb")},
    }


def _difference(final: State, reference: State) -> float:
    if final.keys() != reference.keys():
        raise SystemExit(f"other tensors than the reference: {sorted(final.keys() ^ reference.keys())[:3]}")
    return max(float((tensor - reference[name]).abs().max()) for name, tensor in final.items())


@torch.inference_mode()
def _accuracy(work: Work, final: State) -> float:
    """Share of the test pairs that a float32 model with the final adapter gets right."""
    model, test, right = build(work), sorted(work.examples("test"), key=lambda e: len(e["input_ids"])), 0
    put(model, final)
    for first in range(0, len(test), 64):
        batch = collate(test[first : first + 64], pad_to=None)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(test)


# --- tables --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each shape."""
    return "\n".join(
        f"**{title}**\n\n{_table(list(some))}" for title, some in groupby(rows, key=lambda row: row["shape"])
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    idle, scored = not rows[0]["steps"], rows[0]["accuracy"] is not None
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda row: row["label"] + f" ({row['plan']})" * bool(row["plan"]),
        **({"pads to": lambda row: row["padding"]} if rows[0]["padding"] else {}),
        "s a round": lambda row: f"{row['round_s']:.3g}",
        **({"ms a client": lambda row: f"{1000 * row['round_s'] / row['clients']:.2f}"} if idle else {}),
        "rounds/s": lambda row: f"{1 / row['round_s']:.3g}",
        **{key: lambda row, key=key: f"{row[key]:.2f}x" for key in rows[0] if key.startswith("against ")},
        "first round s": lambda row: f"{row['first_s']:.3g}",
        "whole run s": lambda row: f"{row['wall_s']:.1f}",
        "CPU s": lambda row: f"{row['cpu_s']:.1f}",
        "peak MB": lambda row: f"{row['pss_mb']:.0f}",
        "difference": lambda row: f"{row['difference']:.1e}",
        **({"test accuracy": lambda row: f"{row['accuracy']:.4f}"} if scored else {}),
    }
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" + "|---:" * (len(columns) - 1) + "|", *body]) + "\n"


# --- command line --------------------------------------------------------------------------------------------------

SIZES = ("clients", "steps", "batch", "length", "rounds", "repeats")


def main() -> None:
    """Run all shapes, or one of the user's, or be a contestant."""
    arguments = _arguments()
    sizes = {size: getattr(arguments, size) for size in SIZES if getattr(arguments, size) is not None}
    title = ", ".join(f"{count} {size}" for size, count in sizes.items())
    own = replace(SHAPES[0], title=title, entries=tuple(CONTESTANTS), **sizes)
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            work = Work.read(arguments.work) if arguments.work else _written(own, Path(folder))
            play_one(arguments.one, work, arguments.out)
        return
    load, wanted = os.getloadavg()[0], arguments.only or list(CONTESTANTS)
    if not importlib.util.find_spec("flwr"):
        print("Flower is not installed, so its rows are left out; it comes with the extra anyrank[bench].")
        wanted = [name for name in wanted if "flower" not in name]
    shapes = [own] if sizes else QUICK if arguments.quick else [*SHAPES, *[ON_GPU] * torch.cuda.is_available()]
    chosen = [replace(shape, entries=[e for e in shape.entries if e.partition("/")[0] in wanted]) for shape in shapes]
    rows = [row for shape in chosen if shape.entries for row in run_shape(shape)]
    settings = {"quick": bool(sizes or arguments.quick or arguments.only), "load_average_before": load}
    print(f"\n{table(rows)}\n{measure.save('simulate', settings, rows)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, two rounds, once")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="some contestants")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, help="one shape, like the first one but for this")
    parser.add_argument("--one", choices=CONTESTANTS, help="be this contestant, in this process")
    parser.add_argument("--work", type=Path, help="with --one: the folder that holds its work")
    parser.add_argument("--out", type=Path, help="with --one: where to write the final adapter")
    return parser.parse_args()


if __name__ == "__main__":
    main()
