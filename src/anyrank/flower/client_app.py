"""What Flower starts on a client's machine for each message: it asks the worker, and loads nothing heavy itself."""

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
    """Have the worker answer a message; what goes wrong is said in the answer."""
    try:
        reply = ask(settings_of(context.node_config, context.node_id), from_flower(message.content))
    except (AnyrankError, OSError, ValueError) as error:
        reply = Letter({"error": str(error), "client": str(context.node_config.get("client", context.node_id))})
    return Message(to_flower(reply), reply_to=message)


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
        return {name: float(profile[name]) for name in _FIELDS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"profile {file}: cannot be read ({error!r}). Expected what `anyrank probe` prints: a table [devices.NAME] with "
            f"{', '.join(_FIELDS)}."
        ) from error


_FIELDS = ("forward_flops", "backward_flops", "memory_bytes", "up_bps", "down_bps")
