"""`anyrank flower ...`: start Flower's programs with what a federation needs, and say how a run ended.

The server starts a SuperLink on loopback, the door before it, and the run; a client starts a SuperNode. Someone who knows
Flower can start these by hand (docs/flower.md).
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anyrank.errors import ConfigError, TransportError
from anyrank.flower.guard import Guard
from anyrank.flower.worker import OWNER
from anyrank.job import load_recipe

__all__ = ["APP", "join", "serve"]

APP = Path(__file__).with_name("app")
_LINK = "anyrank"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    recipe: Path,
    out: Path,
    *,
    keys: Path | None,
    host: str,
    port: int,
    settings: Sequence[str],
    clients: int,
    deadline: float,
    patience: float,
    compression: str,
) -> bool:
    """Start a server, play a recipe, and end it again.

    Args:
        recipe: what is played.
        out: the run folder; beside it lies a folder `OUT.flower` with Flower's database and logs. A run that is there is
            gone on with.
        keys: the folder that `keys.make_keys` made; None speaks without TLS and lets everyone in, on loopback only.
        host: where clients reach the server.
        port: likewise.
        settings: `key=value`, over the recipe's.
        clients: how many to wait for; 0 for as many as the recipe samples in a round.
        deadline: seconds for a round; 0 for the recipe's.
        patience: seconds to wait for clients; 0 for as long as it takes.
        compression: of what travels.

    Returns:
        whether the run was played to its end.

    Raises:
        ConfigError: a recipe, a key or a port that cannot be used.
        TransportError: the SuperLink does not start.
    """
    load_recipe(recipe, ["data.source=of each client", *settings])
    if keys is None and host not in _LOOPBACK:
        raise ConfigError(
            f"--insecure, --host {host}: without keys everyone may join and listen, so that only 127.0.0.1 is allowed. Make "
            "keys with `anyrank flower keys` and name them with --keys."
        )
    public = sorted((keys / "clients").glob("*.pub")) if keys else []
    if keys:
        _there(keys / "server.crt", keys / "server.key", keys / "ca.crt")
        if not public:
            raise ConfigError(
                f"{keys / 'clients'} holds no client's key; make one: anyrank flower keys {keys} --client NAME"
            )
    _check_free(host, port)
    place, inner = out.parent.resolve() / f"{out.name}.flower", _free_port()
    place.mkdir(parents=True, exist_ok=True)
    env = _environment(place)
    trust = f"root-certificates = {json.dumps(str(keys.resolve() / 'ca.crt'))}" if keys else "insecure = true"
    (place / "config.toml").write_text(
        f'[superlink]\ndefault = "{_LINK}"\n[superlink.{_LINK}]\naddress = "127.0.0.1:{inner}"\n{trust}\n'
    )
    link = [_program("flower-superlink"), "--host", "127.0.0.1", "--port", str(inner)]
    link += ["--database", str(place / "state.db"), "--disable-runtime-dependency-installation"]
    if keys:
        link += ["--enable-supernode-auth", "--ssl-ca-certfile", str(keys / "ca.crt")]
        link += ["--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key")]
    else:
        link += ["--insecure"]
    with _running(link, env, place / "superlink.log") as superlink:
        _wait_for(inner, superlink, place / "superlink.log")
        for key in public:
            _register(key, env)
        with Guard(host, port, f"127.0.0.1:{inner}", keys):
            return _played(recipe, out, env, settings, clients, deadline, patience, compression)


def _played(
    recipe: Path,
    out: Path,
    env: Mapping[str, str],
    settings: Sequence[str],
    clients: int,
    deadline: float,
    patience: float,
    compression: str,
) -> bool:
    chosen = {
        "recipe": str(recipe.resolve()),
        "out": str(out.resolve()),
        "settings": json.dumps(list(settings)),
        "clients": clients,
        "deadline": float(deadline),
        "patience": float(patience),
        "compression": compression,
    }
    said = " ".join(f"{key}={json.dumps(value)}" for key, value in chosen.items())
    before = {run["run-id"] for run in _runs(env)}  # of a server that is started anew
    subprocess.run([_program("flwr"), "run", str(APP), _LINK, "--stream", "-c", said], env=env, check=True)
    return [run["status"] for run in _runs(env) if run["run-id"] not in before] == ["finished:completed"]


def _runs(env: Mapping[str, str]) -> list[dict[str, Any]]:
    """What Flower says of its runs: `flwr run` itself ends with 0 whatever happened."""
    runs: list[dict[str, Any]] = []
    for _ in range(50):  # until it knows
        found = subprocess.run(
            [_program("flwr"), "ls", _LINK, "--format", "json"], env=env, check=True, capture_output=True, text=True
        )
        runs = json.loads(found.stdout)["runs"]
        if all(run["status"].startswith("finished") for run in runs):
            return runs
        time.sleep(0.2)
    return runs


def _register(key: Path, env: Mapping[str, str]) -> None:
    """Let a client in; one that is known from before stays."""
    found = subprocess.run(
        [_program("flwr"), "supernode", "register", str(key), _LINK, "--name", key.stem, "--format", "json"],
        env=env,
        capture_output=True,
        text=True,
    )
    said = found.stdout + found.stderr
    if '"success": true' not in said and "already" not in said:
        raise TransportError(f"the key {key} could not be registered: {said.strip()[-500:]}")


def join(
    server: str,
    *,
    name: str,
    data: str,
    ca: Path | None,
    key: Path | None,
    device: str | None,
    profile: Path | None,
    state: Path | None,
) -> int:
    """Be a client until interrupted.

    Args:
        server: `HOST:PORT`.
        name: of this client.
        data: its examples.
        ca: the authority's certificate; None, with `key`, speaks without TLS, on loopback only.
        key: this client's private key.
        device: its device class.
        profile: what `anyrank probe` printed.
        state: a folder for what it keeps.

    Returns:
        the SuperNode's exit status.

    Raises:
        ConfigError: a file or an address that cannot be used.
    """
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--server {server}: expected HOST:PORT, such as fed.example.org:9443.")
    if ca is None or key is None:
        if ca or key or host not in _LOOPBACK:
            raise ConfigError(
                "--ca, --key: name both, or --insecure on one machine alone, with --server 127.0.0.1:PORT."
            )
    else:
        _there(ca, key)
    if profile:
        _there(profile)
    state = (state or Path.home() / ".cache" / "anyrank" / "clients" / name).expanduser().resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    node = {"client": name, "data": str(Path(data).resolve()) if Path(data).exists() else data, "state": str(state)}
    node |= {"device": device} if device else {}
    node |= {"profile": str(profile.resolve())} if profile else {}
    command = [_program("flower-supernode"), "--superlink", server, "--port", str(_free_port())]
    command += ["--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())]
    if ca and key:
        command += ["--root-certificates", str(ca.resolve()), "--auth-supernode-private-key", str(key.resolve())]
    else:
        command += ["--insecure"]
    env = {**_environment(state), OWNER: str(os.getpid())}
    with _running(command, env, None) as node_process:
        return node_process.wait()


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed; install it with `pip install 'anyrank[flower]'`.")
    return found


def _there(*files: Path) -> None:
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(f"there is no file {missing[0]}. `anyrank flower keys` makes certificates and keys.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host}, --port {port}: cannot be used ({error.strerror}); choose another port."
            ) from error


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TransportError(f"Flower's SuperLink did not start; see {log}.")


@contextmanager
def _running(command: Sequence[str], env: Mapping[str, str], log: Path | None) -> Iterator[subprocess.Popen]:
    """A program that ends with the block, and with everything that it started."""
    with open(log, "a") if log else open(os.devnull, "w") as stream:  # noqa: PTH123
        process = subprocess.Popen(
            command, env=env, stdout=stream if log else None, stderr=stream if log else None, start_new_session=True
        )
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind
            process.wait()
