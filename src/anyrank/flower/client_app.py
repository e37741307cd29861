"""What Flower starts on a client's machine for each message: it asks the worker, and loads nothing heavy itself."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from anyrank.errors import AnyrankError, ConfigError
from anyrank.flower.grid import from_flower, to_flower
from anyrank.flower.letter import Letter
from anyrank.flower.worker import ask

__all__ = ["answer", "settings_of"]


def answer(message: Message, context: Context) -> Message:
    """Have the worker answer a message; what goes wrong is said in the answer, and here."""
    letter = Letter()
    try:
        letter = from_flower(message.content)
        reply = ask(settings_of(context.node_config, context.node_id), letter)
    except (AnyrankError, OSError, ValueError) as error:
        name = str(context.node_config.get("client", context.node_id))
        reply = Letter({"error": str(error), "client": name, "anew": True})  # the next worker knows nothing of the run
    if said := _said(letter.values, reply.values):
        print(f"anyrank: {said}", flush=True)
    return Message(to_flower(reply), reply_to=message)


def _said(asked: Mapping[str, Any], answered: Mapping[str, Any]) -> str:
    """What whoever watches this client should know of an exchange."""
    if "error" in answered:
        return f"error: {answered['error']}"
    match asked.get("ask"):
        case "hello":
            return f"the server asks for {asked['recipe']['method']['name']}; {answered['num_examples']} examples here"
        case "task" if asked["kind"] == "train":
            return f"round {asked['round']}: trained in {answered['seconds']:.1f} s"
        case "own":
            return f"this client's own adapter: {answered['written']}"
        case "refused":
            return f"the server does not let this client in: {asked['reason']}"
        case "bye":
            return "the run is over"
    return ""


def settings_of(node: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What the SuperNode's `--node-config` says of this client: `client`, `data`, `device`, `profile`, `state`.

    Raises:
        ConfigError: it names no data, or a profile that cannot be read.
    """
    name = str(node.get("client", number))
    if "data" not in node:
        raise ConfigError(f'client {name}: its node configuration names no data; start it with data="PATH".')
    state = Path(str(node.get("state", Path.home() / ".cache" / "anyrank" / "clients" / str(number)))).expanduser()
    return {
        "client": name,
        "source": str(node["data"]),
        "folder": str(state),
        "kind": str(node.get("device", "")),
        "profile": _profile(str(node["profile"])) if "profile" in node else None,
    }


def _profile(file: str) -> dict[str, float]:
    """The one device in a file that `anyrank probe` has written."""
    try:
        ((_, profile),) = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))["devices"].items()
        found = {name: float(profile[name]) for name in _FIELDS}
        if odd := [name for name, value in found.items() if not 0 < value < math.inf]:
            raise ValueError(f"{odd[0]}: expected a number above 0, got {found[odd[0]]}")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"profile {file}: cannot be read ({error!r}). Expected what `anyrank probe` prints: a table [devices.NAME] with "
            f"{', '.join(_FIELDS)}."
        ) from error


_FIELDS = ("forward_flops", "backward_flops", "memory_bytes", "up_bps", "down_bps")
