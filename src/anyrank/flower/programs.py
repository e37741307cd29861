"""Flower's programs as children of ours: where they are, what they are told, and that they end with us."""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from anyrank.errors import ConfigError

__all__ = ["LOOPBACK", "check_name", "check_there", "environment", "free_port", "program", "running", "stop_when_told"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PR_SET_PDEATHSIG = 1


def environment(home: Path) -> dict[str, str]:
    """What Flower's programs find in their environment.

    Args:
        home: Flower's folder, with its connections and what it has installed.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds; it is 1 otherwise, which every message would wait for
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def program(name: str) -> str:
    """Where one of Flower's programs is.

    Raises:
        ConfigError: nowhere.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed; install it with `pip install 'anyrank[flower]'`.")
    return found


def check_name(option: str, name: str) -> None:
    """Refuse a client's name that cannot be a file's everywhere, or not be told from a public key's."""
    fits = re.fullmatch(r"[\w .@-]{1,100}", name) and len(name.encode()) <= 200  # a file system takes 255 bytes
    if not fits or name.startswith(".") or name.endswith(".pub"):
        raise ConfigError(
            f"{option} {name!r:.120}: expected up to 100 letters, digits, spaces and the signs _ . @ -, without a dot in "
            "front or .pub at the end."
        )


def check_there(*files: Path) -> None:
    """Refuse files of certificates and keys that are not there."""
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(f"there is no file {missing[0]}. `anyrank flower keys` makes certificates and keys.")


def free_port() -> int:
    """A port on loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_when_told() -> None:
    """Have the signal by which a system stops a service end this process as Ctrl-C does, with its children."""

    def stop(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def running(command: Sequence[str], env: dict[str, str], log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A program that ends with the block, and with this process, whatever ends it.

    Args:
        command: the program and its arguments.
        env: its environment.
        log: the file that what it says is added to; None leaves it to be read from the process's `stdout`.
    """
    with open(log or os.devnull, "a") as stream:  # noqa: PTH123
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream if log else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_bound_to_parent(),
        )
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind
            process.wait()


def _bound_to_parent() -> Callable[[], None] | None:
    """What a child calls so that the system ends it when its parent was killed, where the system can."""
    if not sys.platform.startswith("linux"):
        return None
    library, parent = ctypes.CDLL(None), os.getpid()

    def bind() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return bind
