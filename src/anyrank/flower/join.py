"""`anyrank flower client`: take part with this machine's data. It starts a SuperNode, and says what keeps it out."""

import fcntl
import http.client
import json
import os
import re
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from anyrank.errors import ConfigError, TransportError
from anyrank.flower.programs import LOOPBACK, check_name, check_there, environment, free_port, program, running
from anyrank.flower.worker import OWNER

__all__ = ["join"]

_TOLERANCE = timedelta(minutes=4)  # Flower refuses signatures that are 5 minutes old
_NOT_YET, _EXPIRED, _OTHER_HOST = 9, 10, 62  # OpenSSL's numbers
_NOT_LET_IN = "[code: 2004]"  # Flower's, for two things
_LET_IN, _SURELY_IN = "SuperNode ID", 60.0  # what a SuperNode says that was let in, and seconds that no other lasts
_PATIENCE, _AGAIN = (
    100.0,
    5.0,
)  # seconds; Flower takes up to 60 to notice that a node was killed, and keeps its place for it


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
) -> NoReturn:
    """Be a client until interrupted. A server that is not there, or no longer, is waited for.

    Args:
        server: `HOST:PORT`.
        name: of this client.
        data: its examples.
        ca: the authority's certificate; None, with `key`, speaks without TLS, on loopback only.
        key: this client's private key.
        device: its device class.
        profile: what `anyrank probe` printed.
        state: a folder for what it keeps.

    Raises:
        ConfigError: a file, a name or an address that cannot be used, a folder in which another client keeps its own, a server
            that is another one, a clock that is wrong.
        TransportError: the server does not let this client in, or Flower's SuperNode cannot run.
    """
    check_name("--name", name)
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--server {server}: expected HOST:PORT, such as fed.example.org:9443.")
    if ca is None or key is None:
        if ca or key or host not in LOOPBACK:
            raise ConfigError(
                "--ca, --key: name both, or --insecure on one machine alone, with --server 127.0.0.1:PORT."
            )
    else:
        check_there(ca, key)
        _check_key(key)
    if profile and not profile.is_file():
        raise ConfigError(f"--profile {profile}: there is no such file. `anyrank probe > {profile}` makes one.")
    if not Path(data).exists():
        raise ConfigError(f"--data {data}: there is no such file or folder.")
    state = (state or Path.home() / ".cache" / "anyrank" / "clients" / name).expanduser().resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    node = {"client": name, "data": str(Path(data).resolve()), "state": str(state)}
    node |= {"device": device} if device else {}
    node |= {"profile": str(profile.resolve())} if profile else {}
    command = [program("flower-supernode"), "--superlink", server, "--port", str(free_port())]
    command += ["--node-config", " ".join(f"{key}={_quoted(key, value)}" for key, value in node.items())]
    if ca and key:
        command += ["--root-certificates", str(ca.resolve()), "--auth-supernode-private-key", str(key.resolve())]
    else:
        command += ["--insecure"]
    # A recipe names a model; what is not here already is not fetched because a server says so.
    env = {"HF_HUB_OFFLINE": "1", **environment(state), OWNER: str(os.getpid())}
    with (state / "client.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--state {state}: another client on this machine keeps its own there; name another folder, or end that client."
            ) from error
        _meet(host.strip("[]"), int(port), ca)
        _take_part(command, env, f"the server at {server} does not let this client in", name, key)


def _take_part(command: Sequence[str], env: dict[str, str], refused: str, name: str, key: Path | None) -> NoReturn:
    """Have one SuperNode run after another. Each ends when the server is another one, which does not know it.

    Raises:
        TransportError: it is not let in, or ends before that for another reason.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        began = time.monotonic()
        status, said = _supernode(command, env)
        ended = f"Flower's SuperNode has ended ({f'signal {-status}' if status < 0 else f'exit status {status}'})"
        was_in = time.monotonic() - began > _SURELY_IN or any(_LET_IN in line for line in said)
        if was_in:
            until = time.monotonic() + _PATIENCE
        if any(_NOT_LET_IN in line for line in said):
            reason = (
                f"{refused}. Either it does not know --key {key}: its public half, "
                f"{name}.pub, has to lie in the folder clients/ of the server's keys. Or this client was killed a moment ago, "
                "and the server has not noticed yet"
            )
            if time.monotonic() > until:
                raise TransportError(f"{reason}.")
            print(f"anyrank: {reason}: trying again, for {until - time.monotonic():.0f} s", flush=True)
        elif was_in:
            print(f"anyrank: {ended}; it is started anew", flush=True)
        else:
            raise TransportError(f"{ended} before the server let it in; see what it has said above.")
        time.sleep(_AGAIN)


def _quoted(key: str, value: str) -> str:
    """A value as Flower reads it: in TOML, but without quotes inside."""
    if re.search(r'["\x00-\x1f\x7f\ud800-\udfff]', value):
        raise ConfigError(
            f"--{key} {value!r}: Flower takes no quotes and control characters here; choose another name."
        )
    return json.dumps(value, ensure_ascii=False)


def _supernode(command: Sequence[str], env: dict[str, str]) -> tuple[int, Collection[str]]:
    """Have a SuperNode run: how it ended, and its last words."""
    last = deque[str](maxlen=50)
    with running(command, env) as process:
        assert process.stdout
        shown = threading.Thread(target=_show, args=(process.stdout, last), daemon=True)
        shown.start()
        status = process.wait()  # not for the end of what it says: a process that it has started may outlive it
        shown.join(1)
    return status, last


def _show(said: IO[str], last: deque[str]) -> None:
    for line in said:
        sys.stdout.write(line)
        sys.stdout.flush()
        last.append(line)


def _check_key(file: Path) -> None:
    try:
        key = load_ssh_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"--key {file}: not a private key without a password ({error}). Expected the file keys/clients/NAME that "
            "`anyrank flower keys` made."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"--key {file}: expected a key on an elliptic curve, as `anyrank flower keys` makes them; this is another kind."
        )


def _meet(host: str, port: int, ca: Path | None) -> None:
    """Wait for the server, and see that it is the one that is meant, and that its clock and ours agree."""
    at, told = f"{host}:{port}", False
    try:
        trust = ssl.create_default_context(cafile=ca) if ca else None
    except ssl.SSLError as error:
        raise ConfigError(f"--ca {ca}: not a certificate. Expected the file ca.crt of the server's keys.") from error
    while True:
        try:
            _check_clock(_date(host, port, trust), at)
            return
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(_why_not(error, host, at, ca)) from error
        except ssl.SSLError as error:
            raise ConfigError(f"--server {at}: does not speak TLS there ({error.reason}). Check the port.") from error
        except (OSError, http.client.HTTPException) as error:
            if not told:
                print(f"The server at {at} is not there yet ({error}); waiting for it.", flush=True)
                told = True
            time.sleep(1)


def _date(host: str, port: int, trust: ssl.SSLContext | None) -> str | None:
    """What the server's clock shows."""
    if trust:
        connection = http.client.HTTPSConnection(host, port, timeout=10, context=trust)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().getheader("date")
    finally:
        connection.close()


def _check_clock(date: str | None, at: str) -> None:
    here, there = datetime.now(UTC), parsedate_to_datetime(date) if date else None
    if there and abs(here - there) > _TOLERANCE:
        raise ConfigError(
            f"the clocks differ: here it is {here:%Y-%m-%d %H:%M:%S} UTC, at {at} {there:%Y-%m-%d %H:%M:%S}. Set the one that "
            "is wrong; the server refuses signatures that are five minutes old."
        )


def _why_not(error: ssl.SSLCertVerificationError, host: str, at: str, ca: Path | None) -> str:
    """Why a certificate is not accepted, and what to do."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return {
        _NOT_YET: f"the certificate of {at} is not valid yet by the clock of this machine, {now}; set it.",
        _EXPIRED: f"the certificate of {at} has expired by the clock of this machine, {now}. If that is right, make a new one "
        "on the server: anyrank flower keys DIR --host NAME.",
        _OTHER_HOST: f"the certificate of {at} does not name {host}. Use a name that it has, or make one for this name on the "
        f"server: anyrank flower keys DIR --host {host}.",
    }.get(
        error.verify_code,
        f"--ca {ca}: not the authority of the server at {at} ({error.verify_message}). Take ca.crt from the server's keys.",
    )
