"""The client: answers as one of the three contestants, and notes when.

echo      at once, with as many bytes as came, and nothing imported that Flower has not imported anyhow
anyrank   by `anyrank.flower.client_app`, which asks a worker that is warm
reload    in this process, which Flower has started for this one message: torch, transformers and PEFT are imported, data
          and model loaded and tokenised, then the task is carried out
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from anyrank.flower.client_app import answer, settings_of
from anyrank.flower.grid import from_flower, to_flower
from anyrank.flower.letter import Letter

app = ClientApp()

_EARLIER = {"agree": ["hello"], "task": ["hello", "agree"]}  # what a client has to be told before
_TICKS = os.sysconf("SC_CLK_TCK")


@app.query()
def query(message: Message, context: Context) -> Message:
    """Greetings."""
    return _noted(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A training task."""
    return _noted(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """An evaluation."""
    return _noted(message, context)


def _noted(message: Message, context: Context) -> Message:
    ways: dict[str, Callable[[Message, Context], Message]] = {"echo": _echo, "anyrank": answer, "reload": _reload}
    number, began = message.metadata.message_id, time.time()
    reply = ways[str(context.run_config["contestant"])](message, context)
    marks = {"number": number, "started": _started(), "began": began, "answered": time.time()}
    with (Path(str(context.node_config["state"])) / "marks.jsonl").open("a") as file:
        file.write(json.dumps(marks) + "\n")
    return reply


def _started() -> float:
    """When this process was started, to a hundredth of a second."""
    after_boot = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / _TICKS
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + after_boot


def _echo(message: Message, context: Context) -> Message:
    # Other bytes than came: Flower does not send again what the server has.
    payload = os.urandom(len(from_flower(message.content).payload))
    return Message(to_flower(Letter({"client": str(context.node_config["client"])}, payload)), reply_to=message)


def _reload(message: Message, context: Context) -> Message:
    from anyrank.flower.site import Site

    settings = settings_of(context.node_config, context.node_id)
    folder, letter = Path(settings["folder"]), from_flower(message.content)
    site, ask = (
        Site(settings["client"], settings["source"], folder / "runs", kind=settings["kind"]),
        letter.values["ask"],
    )
    if ask in ("hello", "agree"):
        (folder / f"{ask}.letter").write_bytes(letter.packed())
    for earlier in _EARLIER.get(ask, []):
        site.answer(Letter.unpacked((folder / f"{earlier}.letter").read_bytes()))
    return Message(to_flower(site.answer(letter)), reply_to=message)
