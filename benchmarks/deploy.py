"""What a run on several machines costs beside the training: seconds and bytes of a task.

    python benchmarks/deploy.py [--quick] [--only times sizes]

All on this machine, over loopback: a SuperLink behind anyrank's door, SuperNodes as `anyrank flower client` starts them, TLS, a
key for each client. Each client has a CSV file of 96 pairs, signatures and docstrings of the standard library. The model is
all-MiniLM-L6-v2, with rank 8 on query and value and a head that is trained whole; a task is 3 steps of 8 pairs of up to 64
tokens, with one thread for each client.

Seconds. The overhead of a task is the time from sending it to having its answer, less the seconds of its training, which the
client measures itself. Three contestants take turns, the whole of it repeated:
- `echo`: a client that answers at once with as many bytes, which is the least that Flower's deployment engine takes;
- `anyrank`: as it is, with a worker that keeps model and data loaded;
- `reload`: Flower starts a process for each message, and this one imports torch, transformers and PEFT, loads and tokenises,
  trains, and ends. It is anyrank's client without the worker, so that letters and training are the same; of the agreement
  it does some over again that the plainest client would not: a hash of the weights, counting the work of an example.
The same for everyone: server, door, SuperNodes and Flower's settings, which are anyrank's; looking for answers every 0.1 s;
two letters before the first task; bytes of a task.

`warm` is the median over the tasks from the second round on. `cold` is from the first letter to the last answer of the first
round, less the training of that one. With 3 clients three processes start at once and want the same cores, and one client's
training is in the way of another's start: between machines of their own it is not.

The parts of a warm task, each a median, so that they do not quite add up:
- `asked`: until the door hands the SuperNode the task, for which it has been waiting there since its last answer. At a
  SuperLink without the door it would ask at once, and when there is nothing, again in 3 s;
- `started`: until a process is started for the message. Flower's executor looks every 0.1 s here, 1 s by default;
- `read`: until this process has imported Flower and its app, and has the message;
- `answered`: until it has the answer, the training left out: with anyrank, the way to the worker and back, with all that the
  worker does beside the training;
- `announced`: until the SuperNode, which looks every 0.5 s, says that there is an answer;
- `delivered`: until it is with the server, in five parts;
- `collected`: until the server has it. If it looks while some of the parts are not there, Flower waits 1 s.

Bytes. The door counts bodies of requests and answers. TLS is not in them, and HTTP headers are reported apart. Of a task all
counts from the look that brings it to its confirmation, of an update from its announcement to its last part. Looks that
bring nothing are reported apart. `tensors` are the numbers themselves, with the scales of `int8`; `names` is what else
anyrank sends: names and shapes of the tensors, the plan, the metrics; the rest is Flower's.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import measure
from anyrank.flower.programs import stop_when_told

CONTESTANTS = ("anyrank", "echo", "reload")  # the first says how large the tasks of the second have to be
PARTS = ("asked", "started", "read", "answered", "announced", "delivered", "collected")
MORE_S = 1.0  # that a warm task may take more than echo's
MORE_SHARE, MORE_BYTES = 0.02, 4096  # beside the tensors, whichever is more
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Letter = Mapping[str, Any]  # see peers.deployment.played
Row = Mapping[str, Any]


# --- seconds ------------------------------------------------------------------------------------------------------


def times(clients: int, *, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each contestant."""
    from peers.deployment import played, staged

    print(f"\nseconds, {_counted(clients)}", flush=True)
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in CONTESTANTS}
    size = 0
    with staged(clients) as stage:
        for repeat in range(repeats):
            for name in CONTESTANTS:
                began, load = time.monotonic(), os.getloadavg()[0]
                run = played(stage, name, rounds=rounds, size=size)
                size = size or _tasks(run)[0]["down"]["payload"]
                runs[name].append(run)
                took = f"load before {load:.1f}, took {time.monotonic() - began:.0f} s"
                print(f"  {repeat + 1} {name}: {_brief(run)}; {took}", flush=True)
    rows = [_times_row(name, clients, of_name) for name, of_name in runs.items()]
    (echo,) = (row["warm_s"] for row in rows if row["contestant"] == "echo")
    return [row | {"above_echo_s": row["warm_s"] - echo} for row in rows]


def _tasks(run: Sequence[Letter], *, warm: bool = False) -> list[Letter]:
    return [letter for letter in run if letter["ask"] == "train" and (letter["round"] > 1 or not warm)]


def _cold(run: Sequence[Letter]) -> float:
    last = max((task for task in _tasks(run) if task["round"] == 1), key=lambda task: task["came"])
    return last["came"] - min(letter["sent"] for letter in run) - last["seconds"]


def _brief(run: Sequence[Letter]) -> str:
    warm = _tasks(run, warm=True)
    overheads = " ".join(f"{task['overhead']:.2f}" for task in warm)
    trained = statistics.median(task["seconds"] for task in warm)
    return f"overhead {overheads} s, cold {_cold(run):.1f} s, training {trained:.2f} s"


def _times_row(name: str, clients: int, runs: Sequence[Sequence[Letter]]) -> dict[str, Any]:
    warm = [task for run in runs for task in _tasks(run, warm=True)]
    overheads = [task["overhead"] for task in warm]
    return {
        "about": "times",
        "clients": clients,
        "contestant": name,
        "runs": len(runs),
        "tasks": len(warm),
        "warm_s": statistics.median(overheads),
        "warm_from_s": min(overheads),
        "warm_to_s": max(overheads),
        "cold_s": statistics.median(_cold(run) for run in runs),
        "training_s": statistics.median(task["seconds"] for task in warm),
        "parts_s": {part: statistics.median(task["parts"][part] for task in warm) for part in PARTS},
    }


# --- bytes --------------------------------------------------------------------------------------------------------


def sizes(choices: Sequence[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """Rows of a task and of an update, for each rank and compression."""
    from peers.deployment import played, staged

    print("\nbytes", flush=True)
    with staged(1) as stage:
        for rank, compression in choices:
            run = played(stage, "anyrank", rounds=2, steps=1, rank=rank, compression=compression)
            (task,) = _tasks(run, warm=True)
            idle = [look for letter in run for look in letter["idle"]]
            for direction in ("down", "up"):
                row = {"about": "sizes", "rank": rank, "compression": compression, **_sizes_row(task, direction)}
                said = f"{row['bodies']:,}, of which tensors {row['tensors']:,}"
                print(f"  rank {rank}, {compression}, {direction}: {said}", flush=True)
                yield row | {"idle": statistics.mode(idle) if idle else None}


def _sizes_row(task: Letter, direction: str) -> dict[str, Any]:
    door, letter = task["door"][direction], task[direction]
    bodies, tensors = sum(door["bodies"].values()), letter["tensors"]
    if not tensors:
        raise SystemExit("the tensors of a letter cannot be counted; see `_sizes` of deployed/contestants/server.py")
    return {
        "direction": direction,
        "tensors": tensors,
        "letter": letter["letter"],
        "bodies": bodies,
        "more": bodies - tensors,
        "allowed": max(MORE_BYTES, round(MORE_SHARE * tensors)),
        "by_path": door["bodies"],
        "headers": door["headers"],
        "calls": door["calls"],
    }


# --- tables -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Seconds, their parts, and bytes."""
    of_times, of_sizes = ([row for row in rows if row["about"] == about] for about in ("times", "sizes"))
    counts = dict.fromkeys(row["clients"] for row in of_times)
    made = [_times_table(count, [row for row in of_times if row["clients"] == count]) for count in counts]
    return "\n".join([*made, *([_sizes_table(of_sizes)] if of_sizes else [])])


def _times_table(clients: int, rows: Sequence[Row]) -> str:
    names = ["", "warm", "from", "to", "above echo", "cold", "training", "tasks"]
    seconds = [
        [
            row["contestant"],
            *(f"{row[key]:.2f}" for key in ("warm_s", "warm_from_s", "warm_to_s")),
            f"{row['above_echo_s']:+.2f}",
            f"{row['cold_s']:.1f}",
            f"{row['training_s']:.2f}",
            str(row["tasks"]),
        ]
        for row in rows
    ]
    parts = [[row["contestant"], *(f"{row['parts_s'][part]:.3f}" for part in PARTS)] for row in rows]
    (ours,) = (row["above_echo_s"] for row in rows if row["contestant"] == "anyrank")
    kept = f"Target: anyrank at most {MORE_S:g} s above echo: {'met' if ours <= MORE_S else 'missed'}."
    return (
        f"**Seconds of a task beside the training, {_counted(clients)}**\n\n"
        f"{_lines(names, seconds)}\n{kept} Parts of a warm task, in seconds:\n\n{_lines(['', *PARTS], parts)}"
    )


def _sizes_table(rows: Sequence[Row]) -> str:
    names = ["rank", "compression", "", "tensors", "names", "Flower", "together", "more", "allowed", "", "HTTP headers"]
    cells = [
        [
            str(row["rank"]),
            row["compression"],
            {"down": "task", "up": "update"}[row["direction"]],
            f"{row['tensors']:,}",
            f"{row['letter'] - row['tensors']:,}",
            f"{row['bodies'] - row['letter']:,}",
            f"{row['bodies']:,}",
            f"{row['more']:,}",
            f"{row['allowed']:,}",
            "met" if row["more"] <= row["allowed"] else "missed",
            f"{row['headers']:,}",
        ]
        for row in rows
    ]
    target = f"Allowed beside the tensors: {MORE_SHARE:.0%} or {MORE_BYTES:,}, whichever is more."
    looks = [row["idle"] for row in rows if row["idle"]]
    idle = f" A look that brings nothing: {looks[0][0]}, and {looks[0][1]} of HTTP headers." if looks else ""
    return f"**Bytes of a task and of an update**\n\n{_lines(names, cells)}\n{target}{idle}\n"


def _lines(names: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in [names, *cells]]
    rule = "".join("|---" if name in ("", "compression") else "|---:" for name in names) + "|"
    return "\n".join([head, rule, *body]) + "\n"


def _counted(clients: int) -> str:
    return f"{clients} client" + "s" * (clients > 1)


# --- command line -------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, once; two ranks")
    parser.add_argument("--only", nargs="+", choices=("times", "sizes"), help="one of both")
    arguments = parser.parse_args()
    if not importlib.util.find_spec("flwr"):
        print("Flower is not installed; it comes with the extra anyrank[flower].")
        return
    stop_when_told()
    os.environ.update(QUIET)
    load, quick, only = os.getloadavg()[0], arguments.quick, arguments.only or ("times", "sizes")
    rows: list[dict[str, Any]] = []
    if "times" in only:
        for clients in (1, 3):
            rows += times(clients, rounds=3 if quick else 4, repeats=1 if quick else 3)
    if "sizes" in only:
        every = [(rank, compression) for rank in (1, 8, 64) for compression in ("none", "fp16", "int8")]
        rows += sizes([(1, "none"), (8, "int8")] if quick else every)
    settings = {"quick": quick or bool(arguments.only), "load_average_before": load}
    print(f"\n{table(rows)}\n{measure.save('deploy', settings, rows)}")


if __name__ == "__main__":
    main()
