"""`anyrank flower server`, `run` and `status`: a SuperLink behind a door, the runs that it plays, and who may take part.

The server starts a SuperLink on loopback and the door before it. A run is handed to it with Flower's own command; someone who
knows Flower can do all of this by hand (docs/flower.md). The server's folder holds what Flower keeps (`state.db`), a
connection (`config.toml`), logs, and two files of ours: `clients.json`, whose keys are registered, and `runs.json`, which run
folder belongs to which of Flower's runs.
"""

import contextlib
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from anyrank.errors import AnyrankError, ConfigError, TransportError
from anyrank.flower.guard import Guard
from anyrank.flower.programs import LOOPBACK, check_there, environment, free_port, program, running
from anyrank.flower.server import recipe_of
from anyrank.paths import replace_file
from anyrank.record import RunFolder

__all__ = ["APP", "LINK", "Order", "Status", "play", "serving", "status"]

APP = Path(__file__).with_name("app")
"""The app that Flower runs."""

LINK = "anyrank"
"""What the connection to a server is called in its folder."""

_LOOK, _AGAIN = 2.0, 60.0  # seconds between looks at the folder of keys, and between tries with the same key


@dataclass(frozen=True, kw_only=True)
class Order:
    """A run that a server is to play.

    Args:
        recipe: what is played.
        out: the run folder on the server; a run that is there is gone on with.
        settings: `key=value`, over the recipe's.
        clients: how many to wait for; 0 for as many as the recipe samples in a round.
        deadline: seconds for a round; 0 for the recipe's, if it has one.
        patience: seconds to wait for clients; 0 for as long as it takes.
        compression: of what travels.
        times: whether a device is as fast as its work is `measured` to be, or as its `profile` says.
    """

    recipe: Path
    out: Path
    settings: Sequence[str] = ()
    clients: int = 0
    deadline: float = 0.0
    patience: float = 0.0
    compression: str = "none"
    times: str = "measured"

    def __post_init__(self):
        """Refuse what cannot be played before anything is started."""
        recipe_of(self.recipe, self.settings)
        for name, value, allowed in (
            ("compression", self.compression, ("none", "fp16", "int8")),
            ("times", self.times, ("measured", "profile")),
        ):
            if value not in allowed:
                raise ConfigError(f"--{name} {value}: expected one of {', '.join(allowed)}.")

    def config(self) -> str:
        """As the configuration of one of Flower's runs, in TOML."""
        told = asdict(self) | {"recipe": str(self.recipe.resolve()), "out": str(self.out.resolve())}
        told |= {"settings": json.dumps(list(self.settings))}
        told |= {"deadline": float(self.deadline), "patience": float(self.patience)}
        return "".join(f"{key} = {_toml(value)}\n" for key, value in told.items())


@dataclass(frozen=True)
class Status:
    """What a server knows.

    Args:
        clients: name, `online` or `offline`, and since when, of everyone whose key is registered.
        runs: number, run folder, state and seconds of every run, the newest first.
    """

    clients: Sequence[Mapping[str, Any]]
    runs: Sequence[Mapping[str, Any]]


def _toml(value: Any) -> str:
    """A value as TOML takes it, which has no halves of characters, and no DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextmanager
def serving(folder: Path, *, keys: Path | None, host: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """A server that clients can reach, as long as the block lasts; the SuperLink, without which it is none.

    Args:
        folder: where it keeps what it has to know when it is started anew.
        keys: the folder that `keys.make_keys` made; None speaks without TLS and lets everyone in, on loopback only. Whose
            public key lies in its folder `clients` may take part, also who is added or taken out later.
        host: where clients reach the server.
        port: likewise.

    Raises:
        ConfigError: a key or a port that cannot be used.
        TransportError: the SuperLink does not start.
    """
    if keys is None and host not in LOOPBACK:
        raise ConfigError(
            f"--insecure, --host {host}: without keys everyone may join and listen, so that only 127.0.0.1 is allowed. Make "
            "keys with `anyrank flower keys` and name them with --keys."
        )
    if keys:
        check_there(keys / "server.crt", keys / "server.key", keys / "ca.crt")
        if not _public(keys):
            raise ConfigError(
                f"{keys / 'clients'} holds no client's key; make one: anyrank flower keys {keys} --client NAME"
            )
    _check_free(host, port)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    inner, database = free_port(), folder / "state.db"
    trust = f"root-certificates = {_toml(str(keys.resolve() / 'ca.crt'))}" if keys else "insecure = true"
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "127.0.0.1:{inner}"\n{trust}\n',
        encoding="utf-8",
    )
    command = [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(inner)]
    command += ["--database", str(database), "--disable-runtime-dependency-installation"]
    if keys:
        command += ["--enable-supernode-auth", "--ssl-ca-certfile", str(keys / "ca.crt")]
        command += ["--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key")]
    else:
        command += ["--insecure"]
    log = folder / "superlink.log"
    with contextlib.ExitStack() as stack:
        superlink = stack.enter_context(running(command, environment(folder), log))
        _wait_for(inner, superlink, log)
        if keys:
            stack.enter_context(_Members(folder, keys))
        stack.enter_context(Guard(host, port, f"127.0.0.1:{inner}", keys, database))
        yield superlink


def play(folder: Path, order: Order, *, link: str = LINK) -> bool:
    """Have a server play a run, and show what it says, until it is over.

    Args:
        folder: the server's, or another one with Flower's connections.
        order: what is played.
        link: the connection's name.

    Returns:
        whether the run was played to its end.

    Raises:
        TransportError: the server is not there.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as config:
        config.write(order.config())
        config.flush()
        run = _flwr(folder, "run", str(APP), link, "--run-config", config.name)["run-id"]
    number = str(run)
    _note(folder / "runs.json", number, str(order.out.resolve()))
    subprocess.run([program("flwr"), "log", number, link, "--stream"], env=environment(folder), check=False)
    while True:  # the log may end a little before the run, or break off
        (found,) = _flwr(folder, "ls", link, "--run-id", number)["runs"]
        if found["status"].startswith("finished"):
            return found["status"] == "finished:completed"
        time.sleep(0.5)


def status(folder: Path, *, link: str = LINK) -> Status:
    """Who is there, and what is played.

    Args:
        folder: the server's, or another one with Flower's connections.
        link: the connection's name.

    Raises:
        TransportError: the server is not there.
    """
    names = {node["node"]: name for name, node in _noted(folder / "clients.json").items()}
    clients = [
        {
            "name": names.get(node["node-id"], node["node-id"]),
            "status": node["status"],
            "since": node["online-at"] if node["status"] == "online" else node["offline-at"],
        }
        for node in _flwr(folder, "supernode", "ls", link)["nodes"]
    ]
    where = _noted(folder / "runs.json")
    runs = [
        {
            "number": run["run-id"],
            "status": run["status"],
            "details": run["status-details"],
            "seconds": run["elapsed"],
            "folder": where.get(run["run-id"]),
            **_played(where.get(run["run-id"])),
        }
        for run in _flwr(folder, "ls", link)["runs"]
    ]
    return Status(sorted(clients, key=lambda client: client["name"]), runs)


def _played(out: str | None) -> dict[str, int | None]:
    """How far a run has come, where its folder is here."""
    if out is None or not (Path(out) / "run.json").exists():
        return {"round": None, "rounds": None}
    run = RunFolder.open(Path(out))
    return {"round": len(run.records()), "rounds": run.info["rounds"]}


class _Members:
    """Registers the keys that lie in a folder, and strikes off those that lie there no more, as long as it is a context."""

    def __init__(self, folder: Path, keys: Path):
        self._folder, self._keys, self._over = folder, keys, threading.Event()
        self._wrong = dict[
            str, tuple[str, float]
        ]()  # of a key that could not be dealt with: what it is, and when to try again
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._update()
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(_LOOK):
            self._update()

    def _update(self) -> None:
        """Each client by itself: what is wrong with the key of one is no matter of the others'."""
        known, files = _noted(self._folder / "clients.json"), {file.stem: file for file in _public(self._keys)}
        for name in sorted(known.keys() | files.keys()):
            key = _key(files[name]) if name in files else ""
            tried, again = self._wrong.get(name, (None, 0.0))
            if key == known.get(name, {}).get("key", "") or (key == tried and time.monotonic() < again):
                continue
            try:
                self._change(name, known.get(name), key)
                self._wrong.pop(name, None)
            except (AnyrankError, OSError) as error:
                if key != tried:
                    print(f"Client {name} could not be brought up to date: {error}", flush=True)
                self._wrong[name] = key, time.monotonic() + _AGAIN

    def _change(self, name: str, node: Mapping[str, Any] | None, key: str) -> None:
        """Strike off what was registered under a name, and register another key, if there is one."""
        if node is not None:
            if node["node"]:
                _flwr(self._folder, "supernode", "unregister", node["node"], LINK, let_pass="not found")
            _note(self._folder / "clients.json", name, None)
        if key:
            file = self._keys / "clients" / f"{name}.pub"
            try:
                load_ssh_public_key(key.encode())
            except (ValueError, UnsupportedAlgorithm) as error:
                raise ConfigError(f"{file} holds no public key; make one with `anyrank flower keys`.") from error
            found = _flwr(self._folder, "supernode", "register", str(file), LINK, let_pass="already in use")
            _note(self._folder / "clients.json", name, {"key": key, "node": str(found.get("node-id", ""))})


def _key(file: Path) -> str:
    """What is in a file; nothing if it is gone by now."""
    try:
        return file.read_bytes().decode(errors="replace").strip()
    except OSError:
        return ""


def _public(keys: Path) -> list[Path]:
    return sorted((keys / "clients").glob("*.pub"))


def _flwr(folder: Path, *arguments: str, let_pass: str = "") -> dict[str, Any]:
    """What Flower's own command answers.

    Args:
        folder: where its connections are.
        arguments: of the command.
        let_pass: what its error may say.
    """
    nobody = TransportError(f"no server answers for {folder}; is `anyrank flower server --state {folder}` running?")
    if not (folder / "config.toml").exists():  # Flower would make the folder
        raise nobody
    found = subprocess.run(
        [program("flwr"), *arguments, "--format", "json"],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    try:
        answer = json.loads(found.stdout[found.stdout.index("{") :])
    except ValueError:
        answer = {"success": False, "error-message": found.stdout + found.stderr}
    said = answer.get("error-message", "").strip()
    if not answer["success"] and not (let_pass and let_pass in said):
        if "unavailable" in said or "not found in" in said:
            raise nobody
        raise TransportError(f"flwr {arguments[0]}: {said[-500:]}")
    return answer


def _noted(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _note(file: Path, name: str, value: Any) -> None:
    """Put down a value under a name; None takes it out."""
    noted = {**_noted(file), name: value}
    replace_file(file, json.dumps({k: v for k, v in noted.items() if v is not None}, indent=1).encode())


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
