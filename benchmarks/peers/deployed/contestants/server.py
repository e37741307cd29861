"""The server: the same post for all contestants, which notes when letters go and answers come, and how large they are."""

import json
import os
import time
import traceback
import uuid
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from anyrank.flower.grid import GridPost
from anyrank.flower.letter import Letter
from anyrank.flower.server import Clients, Post, play, recipe_of

app = ServerApp()

_PAUSE = 0.1  # seconds between looks at what has come, as in anyrank.flower.server


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play a run, and write down what was noted."""
    settings, post, problem = context.run_config, Noting(GridPost(grid)), None
    try:
        if settings["contestant"] == "echo":
            _echo(post, int(settings["clients"]), int(settings["rounds"]), int(settings["bytes"]))
        else:
            _play(post, settings)
    except BaseException:
        problem = traceback.format_exc()
        raise
    finally:
        told = {"problem": problem, "process": os.getpid(), "letters": [] if problem else post.letters()}
        made = Path(f"{settings['notes']}.part")
        made.write_text(json.dumps(told))
        made.replace(str(settings["notes"]))


class Noting:
    """A post that notes times and sizes."""

    def __init__(self, post: Post):
        """Nothing is sent yet."""
        self._post, self._sent, self._came = post, dict[str, Any](), dict[str, Any]()

    def nodes(self) -> Set[int]:
        """Who is connected now."""
        return self._post.nodes()

    def send(self, letters: Mapping[int, Letter]) -> Mapping[str, int]:
        """Send one letter after another, as `GridPost` does it too."""
        numbers = {}
        for node, letter in letters.items():
            began = time.time()
            sent = self._post.send({node: letter})
            self._sent |= dict.fromkeys(sent, (began, letter))
            numbers |= sent
        return numbers

    def collect(self, numbers: Collection[str]) -> Mapping[str, Letter]:
        """The answers that have come."""
        found = self._post.collect(numbers)
        self._came |= {number: (time.time(), letter) for number, letter in found.items()}
        return found

    def letters(self) -> list[dict[str, Any]]:
        """What was noted, by letter, in order."""
        return [
            {
                "number": number,
                "ask": asked.values.get("kind", asked.values["ask"]),
                "round": asked.values.get("round"),
                "client": answered.values.get("client"),
                "sent": sent,
                "came": came,
                "seconds": answered.values.get("seconds", 0.0),
                "error": answered.values.get("error"),
                "down": _sizes(asked),
                "up": _sizes(answered),
            }
            for number, (sent, asked) in self._sent.items()
            if number in self._came
            for came, answered in [self._came[number]]
        ]


def _sizes(letter: Letter) -> dict[str, int]:
    """Bytes: of the letter; of what it packs; of the tensors in that, which come after a header and its length."""
    packed = letter.payload
    tensors = len(packed) - 8 - int.from_bytes(packed[:8], "little")
    return {"letter": len(letter.packed()), "payload": len(packed), "tensors": max(tensors, 0)}


def _echo(post: Noting, clients: int, rounds: int, size: int) -> None:
    """Two small letters, in place of anyrank's greeting and agreement, then rounds."""
    while len(nodes := sorted(post.nodes())) < clients:
        time.sleep(_PAUSE)
    tasks = [{"ask": "task", "kind": "train", "round": i + 1} for i in range(rounds)]
    asked: list[dict[str, Any]] = [{"ask": "hello"}, {"ask": "agree"}, *tasks]
    for values in asked:
        payload = os.urandom(size if "round" in values else 1000)
        open_numbers = set(post.send({node: Letter(values, payload) for node in nodes}))
        while open_numbers:
            came = post.collect(open_numbers)
            open_numbers -= came.keys()
            if not came:
                time.sleep(_PAUSE)


def _play(post: Noting, settings: Mapping[str, Any]) -> None:
    recipe = recipe_of(Path(settings["recipe"]), [])
    clients = Clients(post, recipe, run=uuid.uuid4().hex, compression=settings["compression"], measured=True)
    play(recipe, Path(settings["out"]), clients, count=int(settings["clients"]))
