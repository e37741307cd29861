"""A server and its clients on this machine, for `deploy.py`: what is played on them, and what is seen of each letter.

Flower's app is in the folder `deployed`: its server notes when letters go and come, its clients when they are asked and have
answered. The door notes what goes through it. All of their clocks are this machine's.
"""

import contextlib
import csv
import json
import os
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from anyrank.data.stdlib_docs import stdlib_docs
from anyrank.flower import link
from anyrank.flower.guard import Guard
from anyrank.flower.keys import make_keys
from anyrank.flower.programs import environment, free_port, program, running
from anyrank.flower.worker import OWNER

__all__ = ["Played", "Stage", "played", "staged"]

Played = list[dict[str, Any]]
"""The letters of a run, and what was seen of them."""

_APP = Path(__file__).with_name("deployed")
_EXAMPLES = 96  # of each client
_RECIPE = """
rounds = {rounds}
[method]
name = "fedavg"
[model]
name = "all-MiniLM-L6-v2"
[problem]
name = "classification"
text = ["signature", "docstring"]
max_length = 64
[train]
batch_size = 8
steps = {steps}
[server]
quorum = {clients}
[fleet]
per_round = {clients}
[fleet.classes.laptop]
device = "laptop"
rank = {rank}
[evaluate]
every = 1000
[compute]
threads = 1
"""
_LONGEST = 900.0  # seconds of a run, after which it is given up
_EMPTY = 64  # bytes: an answer to a look that is not larger brings nothing


# --- the door -----------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A request that came through the door, and its answer.

    Args:
        path: what was asked for, without `/v1/fleet/`.
        key: the client's public key, as it came.
        began: when the request came.
        ended: when it was answered.
        bodies: bytes of both.
        answer: bytes of the answer's alone.
        headers: bytes of both's headers.
    """

    path: str
    key: bytes
    began: float
    ended: float = 0.0
    bodies: int = 0
    answer: int = 0
    headers: int = 0


class Counting(Guard):
    """The door, which notes what goes through it."""

    calls: list[Call] = []  # noqa: RUF012 - of all doors: it is `link.serving` that makes them

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        key = dict(scope["headers"]).get(b"flwr-public-key", b"")
        call = Call(scope["path"].removeprefix("/v1/fleet/"), key, time.time(), headers=_size(scope["headers"]))

        async def receiving() -> Any:
            event = await receive()
            call.bodies += len(event.get("body", b""))
            return event

        async def sending(event: Any) -> None:
            call.bodies += len(event.get("body", b""))
            call.answer += len(event.get("body", b""))
            call.headers += _size(event.get("headers", ()))
            await send(event)

        await super()._serve(scope, receiving, sending)
        call.ended = time.time()
        self.calls.append(call)


def _size(headers: Any) -> int:
    """Bytes of headers, with a colon, a space and the end of the line."""
    return sum(len(name) + len(value) + 4 for name, value in headers)


# --- the stage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A server and its clients that are running.

    Args:
        folder: of everything.
        clients: their names, with their public keys as they come through the door.
    """

    folder: Path
    clients: Mapping[str, bytes]

    @property
    def logs(self) -> str:
        """The ends of all logs."""
        files = sorted(self.folder.glob("*/*.log"))
        return "\n".join(f"{f.parent.name}/{f.name}:\n{f.read_text(errors='replace')[-2000:]}" for f in files)


@contextmanager
def staged(count: int) -> Iterator[Stage]:
    """Start a server and so many clients, and end them."""
    names = [f"client-{i + 1}" for i in range(count)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        keys, port = folder / "keys", free_port()
        make_keys(keys, hosts=["localhost"], clients=names)
        stack.enter_context(patch.object(link, "Guard", Counting))
        stack.enter_context(link.serving(folder / "server", keys=keys, host="127.0.0.1", port=port))
        for number, name in enumerate(names):
            (folder / name).mkdir()
            _write_texts(folder / name / "texts.csv", number)
            stack.enter_context(_supernode(name, folder / name, keys, port))
        yield Stage(folder, {name: _as_sent(keys / "clients" / f"{name}.pub") for name in names})


def _supernode(name: str, state: Path, keys: Path, port: int) -> AbstractContextManager[Any]:
    """A client's SuperNode, as `anyrank.flower.join` starts it."""
    node = {"client": name, "data": str(state / "texts.csv"), "state": str(state)}
    command = [program("flower-supernode"), "--superlink", f"localhost:{port}", "--port", str(free_port())]
    command += ["--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())]
    command += ["--root-certificates", str(keys / "ca.crt")]
    command += ["--auth-supernode-private-key", str(keys / "clients" / name)]
    return running(command, {**environment(state), OWNER: str(os.getpid())}, state / "supernode.log")


def _as_sent(public: Path) -> bytes:
    """A client's public key as its requests name it."""
    key: Any = load_ssh_public_key(public.read_bytes())
    return b64encode(public_key_to_bytes(key))


def _write_texts(file: Path, number: int) -> None:
    """A client's examples: others for each."""
    texts = stdlib_docs()["train"].shuffle(seed=number).select(range(_EXAMPLES))
    label = texts.features["label"]
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["signature", "docstring", "label"])
        rows.writerows([text["signature"], text["docstring"], label.int2str(text["label"])] for text in texts)


# --- runs ---------------------------------------------------------------------------------------------------------


def played(
    stage: Stage,
    contestant: str,
    *,
    rounds: int,
    steps: int = 3,
    rank: int = 8,
    compression: str = "none",
    size: int = 0,
) -> Played:
    """Play a run.

    Args:
        stage: where.
        contestant: who.
        rounds: how many.
        steps: of training in a round; not of echo, as the next two.
        rank: of the adapters.
        compression: of what travels.
        size: bytes of a task's payload; of echo only.

    Returns:
        of each letter, in order:
        `ask`: what it is, `train` for a training task; `round`; `client`;
        `seconds`: of its training; `sent`, `came`: when; `overhead`: seconds between them, less the training;
        `parts`: the same in seven parts, one after another; the training is left out of `answered`;
        `down`, `up`: bytes of the letter and of its answer, of what they pack, and of the tensors in that;
        `door`: what went through the door for either: `bodies` by path, `headers`, how many `calls`;
        `idle`: bytes, and those of headers, of the SuperNode's looks that brought nothing.
    """
    with tempfile.TemporaryDirectory(dir=stage.folder) as name:
        folder, clients = Path(name), len(stage.clients)
        (folder / "recipe.toml").write_text(_RECIPE.format(rounds=rounds, clients=clients, rank=rank, steps=steps))
        settings = {"contestant": contestant, "clients": clients, "rounds": rounds, "bytes": size}
        settings |= {"recipe": str(folder / "recipe.toml"), "compression": compression, "out": str(folder / "run")}
        settings |= {"notes": str(folder / "notes.json")}
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        (folder / "settings.toml").write_text("".join(lines))
        subprocess.run(
            [program("flwr"), "run", str(_APP), link.LINK, "--run-config", str(folder / "settings.toml")],
            env=environment(stage.folder / "server"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        letters = _noted(folder / "notes.json", stage)
    marks = _marks(stage)
    return [_joined(letter, marks[letter["number"]], stage) for letter in letters]


def _noted(file: Path, stage: Stage) -> Played:
    """What the server writes down at the end; Flower's commands are not asked, since each takes a second of a core."""
    until = time.monotonic() + _LONGEST
    while not file.exists():
        if time.monotonic() > until:
            raise SystemExit(f"a run did not end in {_LONGEST:.0f} s:\n{stage.logs}")
        time.sleep(0.2)
    noted = json.loads(file.read_text())
    while _busy(noted["process"]):  # so that it is not in the next one's way
        time.sleep(0.2)
    errors = [noted["problem"], *(letter["error"] for letter in noted["letters"])]
    if any(errors):
        raise SystemExit(f"{next(error for error in errors if error)}\n{stage.logs}")
    return noted["letters"]


def _busy(process: int) -> bool:
    """Whether a process has not ended; one that has, and that its parent has not asked for, has no command line."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def _marks(stage: Stage) -> dict[str, dict[str, float]]:
    """What the clients have noted, by the letter's number."""
    files = [stage.folder / name / "marks.jsonl" for name in stage.clients]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {marks["number"]: marks for marks in lines}


def _joined(letter: Mapping[str, Any], marks: Mapping[str, float], stage: Stage) -> dict[str, Any]:
    """A letter with what the door and the client have seen of it."""
    key, sent, came, seconds = stage.clients[letter["client"]], letter["sent"], letter["came"], letter["seconds"]
    seen = [call for call in [*Counting.calls] if call.key == key and sent < call.ended and call.began < came]
    looks = [call for call in seen if call.path == "pull-messages"]
    task, update = _task(seen), _update(seen)
    parts = {
        "asked": task[0].ended - sent,
        "started": marks["started"] - task[0].ended,
        "read": marks["began"] - marks["started"],
        "answered": marks["answered"] - marks["began"] - seconds,
        "announced": update[0].began - marks["answered"],
        "delivered": max(call.ended for call in update) - update[0].began,
        "collected": came - max(call.ended for call in update),
    }
    return {
        **letter,
        "overhead": came - sent - seconds,
        "parts": parts,
        "door": {"down": _summed(task), "up": _summed(update)},
        "idle": [(call.bodies, call.headers) for call in looks if call.answer <= _EMPTY],
    }


def _task(seen: Sequence[Call]) -> list[Call]:
    """The calls by which a task came: the look that brought it, its parts, its confirmation."""
    look = next(call for call in seen if call.path == "pull-messages" and call.answer > _EMPTY)
    last = next(call.ended for call in seen if call.path == "confirm-message-received")
    return [look, *(c for c in seen if c.path in ("pull-object", "confirm-message-received") and c.ended <= last)]


def _update(seen: Sequence[Call]) -> list[Call]:
    """The calls by which an answer was brought: its announcement, its parts."""
    first = next(call for call in seen if call.path == "push-messages")
    return [first, *(call for call in seen if call.path == "push-object" and call.began >= first.began)]


def _summed(calls: Sequence[Call]) -> dict[str, Any]:
    bodies: dict[str, int] = {}
    for call in calls:
        bodies[call.path] = bodies.get(call.path, 0) + call.bodies
    return {"bodies": bodies, "headers": sum(call.headers for call in calls), "calls": len(calls)}
