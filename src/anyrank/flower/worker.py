"""The process on a client's machine that keeps model and data loaded while Flower's processes come and go.

It listens on a local socket in a folder that only its user may enter, and answers those who know the key that lies there. It
is started by the first who asks, and ends with the run, with the process named by `ANYRANK_OWNER`, after an hour without a
question, or when one with other settings is asked for in the same folder.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from anyrank.errors import TransportError
from anyrank.flower.letter import Letter

__all__ = ["OWNER", "ask"]

OWNER = "ANYRANK_OWNER"
"""The environment variable with the number of the process with which workers end."""

_START = 120.0  # seconds that a worker may take until it listens: it loads torch first
_IDLE = 3600.0


def ask(settings: Mapping[str, Any], letter: Letter) -> Letter:
    """Have the worker with these settings answer; it is started if there is none.

    Args:
        settings: of `Site`: `client`, `source`, `folder`, `kind`, `profile`.
        letter: what is asked.

    Raises:
        TransportError: it cannot be started, or ended before it answered.
    """
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, socket = _key(folder), _socket(settings)
    try:
        connection = _connected(settings, folder, socket, key)
        with connection:
            connection.send_bytes(letter.packed())
            return Letter.unpacked(connection.recv_bytes())
    except (EOFError, OSError) as error:
        raise TransportError(
            f"the worker of client {settings['client']} ended before it answered ({error!r}); see {folder / 'worker.log'}."
        ) from error


def _key(folder: Path) -> bytes:
    """What those who ask have to know; made when it is first needed."""
    file = folder / "key"
    with contextlib.suppress(FileExistsError):
        made = file.with_name(f"key.{os.getpid()}")
        made.touch(mode=0o600)
        made.write_bytes(secrets.token_bytes(32))
        try:
            os.link(made, file)  # all at once, and only if there is none
        finally:
            made.unlink()
    return file.read_bytes()


def _socket(settings: Mapping[str, Any]) -> str:
    """Where the worker with these settings and this owner listens: a short path, as systems take about 100 characters."""
    place = Path(tempfile.gettempdir()) / f"anyrank-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid() or place.stat().st_mode & 0o077:
        raise TransportError(f"{place} is not a folder of this user alone; remove it, or set TMPDIR to another place.")
    told = {**settings, "folder": str(Path(settings["folder"]).resolve()), OWNER: os.environ.get(OWNER)}
    return str(place / hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24])


def _connected(settings: Mapping[str, Any], folder: Path, socket: str, key: bytes) -> Any:
    with contextlib.suppress(FileNotFoundError, ConnectionError):
        return Client(socket, "AF_UNIX", authkey=key)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several who ask at once, one starts it
        until, process = time.monotonic() + _START, None
        while time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError, ConnectionError):
                return Client(socket, "AF_UNIX", authkey=key)
            if process is None:
                process = _started(settings, folder)
            elif process.poll() is not None:
                break
            time.sleep(0.05)
    raise TransportError(f"the worker of client {settings['client']} did not start; see {folder / 'worker.log'}.")


def _started(settings: Mapping[str, Any], folder: Path) -> subprocess.Popen:
    with (folder / "worker.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "anyrank.flower.worker", json.dumps(dict(settings))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives who started it
        )


def _main(settings: Mapping[str, Any]) -> None:
    from anyrank.federation import Profile
    from anyrank.flower.site import Site

    folder, profile = Path(settings["folder"]), settings["profile"]
    socket = _socket(settings)
    site = Site(
        settings["client"],
        settings["source"],
        folder / "runs",
        kind=settings["kind"],
        profile=profile and Profile(**profile),
    )
    current = folder / "current"
    current.write_text(socket)
    with current.open() as alone, contextlib.ExitStack() as stack:
        fcntl.flock(alone, fcntl.LOCK_EX)  # until the one before has seen that it is not current, and ended
        Path(socket).unlink(missing_ok=True)  # of one that was killed
        listener = stack.enter_context(Listener(socket, "AF_UNIX", backlog=8, authkey=_key(folder)))
        last = [time.monotonic()]
        threading.Thread(target=_end_alone, args=(current, socket, last), daemon=True).start()
        over = False
        while not over:
            try:
                with listener.accept() as connection:
                    letter = Letter.unpacked(connection.recv_bytes())
                    last[0] = float("inf")
                    answer = site.answer(letter)
                    over = letter.values.get("ask") == "bye" and not site.run  # or else it was of another run
                    connection.send_bytes(answer.packed())
            except (EOFError, OSError, ValueError) as error:  # whoever asked is gone, or had no key
                print(f"a question was not answered: {error!r}", flush=True)
            except Exception:
                import traceback

                traceback.print_exc()
            last[0] = time.monotonic()


def _end_alone(current: Path, socket: str, last: list[float]) -> None:
    """End the process with its owner, or when nobody has asked for long, or for the sake of one with other settings."""
    owner = int(os.environ.get(OWNER, "0"))
    while (_alive(owner) if owner else time.monotonic() - last[0] < _IDLE) and _read(current) in ("", socket):
        time.sleep(1)
    Path(socket).unlink(missing_ok=True)
    os._exit(0)


def _read(file: Path) -> str:
    """What is in a file; nothing while it is being written, or when it is gone."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
