"""What Flower starts on the server: it plays a recipe with the clients that are connected."""

import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid
from rich.console import Console

from anyrank.display import LiveObserver, summary
from anyrank.errors import ConfigError
from anyrank.flower.grid import GridPost
from anyrank.flower.server import Clients, play, recipe_of
from anyrank.record import RunFolder

__all__ = ["main"]


def main(grid: Grid, context: Context) -> None:
    """Play the recipe of the run's configuration, see `app/pyproject.toml`.

    Raises:
        AnyrankError: see `server.play`.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    settings = context.run_config
    if not settings["recipe"] or not settings["out"]:
        raise ConfigError("recipe, out: the run's configuration has to name both, as absolute paths on the server.")
    recipe = recipe_of(Path(str(settings["recipe"])), json.loads(str(settings["settings"])))
    out = Path(str(settings["out"]))
    console = Console(markup=False, force_terminal=False, width=128)
    with LiveObserver(console) as observer:
        clients = Clients(
            GridPost(grid),
            recipe,
            run=_name(out),
            compression=_one_of(str(settings["compression"])),
            deadline=float(settings["deadline"]) or recipe.clock.deadline,
            patience=float(settings["patience"]) or float("inf"),
            measured=settings["times"] == "measured",
            name_of=_name_of,
            noticed=observer.noticed,
        )
        folder = play(
            recipe,
            out,
            clients,
            count=int(settings["clients"]) or recipe.fleet.per_round,
            observer=observer,
            command="on Flower",
        )
    console.print(*summary(folder), sep="\n")


def _end_with(parent: int) -> None:
    """End with whoever started this process, at once: Flower would first try for minutes to reach a SuperLink that is gone.

    What was played is kept, and the run folder is free for the server that goes on with it.
    """
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _name_of(node: int) -> str | None:
    """The name under which a node's key is registered, where `link.serving` has registered it."""
    file = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "clients.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    return next((name for name, client in known.items() if client["node"] == str(node)), None)


def _name(out: Path) -> str:
    """The run's name among its clients, the same when it is gone on with."""
    return RunFolder.open(out).info["run"] if (out / "run.json").exists() else uuid.uuid4().hex


def _one_of(compression: str) -> Any:
    if compression not in ("none", "fp16", "int8"):
        raise ConfigError(f"compression: expected none, fp16 or int8, got {compression!r}.")
    return compression
