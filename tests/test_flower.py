"""The parts of a federation over Flower that can be tried without starting it: keys, the door, letters, the warm worker."""

import fcntl
import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

import httpx
import psutil
import pytest
import typer
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

pytest.importorskip("flwr")

from flwr.common.config import parse_config_args
from typer.testing import CliRunner

import anyrank.flower.guard
import anyrank.flower.join
import anyrank.flower.keys
import anyrank.flower.link
import anyrank.flower.programs
from anyrank import cli
from anyrank.errors import ConfigError, TransportError
from anyrank.flower.client_app import settings_of
from anyrank.flower.grid import from_flower, to_flower
from anyrank.flower.guard import Guard
from anyrank.flower.join import _quoted, _take_part, join
from anyrank.flower.keys import make_keys
from anyrank.flower.letter import Letter
from anyrank.flower.link import Order, _Members, serving, status
from anyrank.flower.programs import environment, running
from anyrank.flower.server import recipe_of
from anyrank.flower.worker import _socket, ask
from tiny import recipe_toml, write_model, write_reviews


def free_port() -> int:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        return server.server_address[1]


# --- keys ---------------------------------------------------------------------------------------------------------


def test_keys_are_private_fit_each_other_and_are_kept(tmp_path):
    written = make_keys(tmp_path, hosts=["fed.example.org", "10.0.0.5"], clients=["ann"])
    assert {file.name for file in written} == {"ca.crt", "ca.key", "server.crt", "server.key", "ann", "ann.pub"}
    for private in ("ca.key", "server.key", "clients/ann"):
        assert (tmp_path / private).stat().st_mode & 0o777 == 0o600
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"{name}.crt").read_bytes()) for name in ("ca", "server"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5", "127.0.0.1"]
    key = load_ssh_private_key((tmp_path / "clients" / "ann").read_bytes(), password=None)
    public = load_ssh_public_key((tmp_path / "clients" / "ann.pub").read_bytes())
    assert key.public_key().public_numbers() == public.public_numbers()
    before = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    more = make_keys(tmp_path, hosts=[], clients=["ann", "bob"])
    assert [file.name for file in more] == ["bob", "bob.pub"]
    assert all((tmp_path.rglob(name).__next__()).read_bytes() == content for name, content in before.items())


def test_keys_need_a_host_and_names_that_are_names(tmp_path):
    with pytest.raises(ConfigError, match="--host"):
        make_keys(tmp_path / "a", hosts=[], clients=[])
    for name in ("../x", "", ".x", "a/b", "x" * 101, "语" * 90, "a.pub", 'a"b', "a\n"):
        with pytest.raises(ConfigError, match="expected up to 100 letters"):
            make_keys(tmp_path / "b", hosts=["h"], clients=[name])
    for host in ("", "a b", "a..b", "ä" * 70, "\ud800"):
        with pytest.raises(ConfigError, match="expected a name or an address"):
            make_keys(tmp_path / "b", hosts=[host], clients=[])


def test_new_names_of_the_server_are_added_to_the_old_ones(tmp_path):
    def names() -> list[str]:
        found = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
        named = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [*named.get_values_for_type(x509.DNSName), *map(str, named.get_values_for_type(x509.IPAddress))]

    make_keys(tmp_path, hosts=["fed.example.org", "10.0.0.5"], clients=["Zoë Ähm"])
    make_keys(tmp_path, hosts=["bücher.example"], clients=[])
    assert names() == ["xn--bcher-kva.example", "fed.example.org", "10.0.0.5", "127.0.0.1"]
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"{name}.crt").read_bytes()) for name in ("ca", "server"))
    assert ca.not_valid_after_utc - server.not_valid_after_utc > timedelta(days=10 * 365)


# --- the door -----------------------------------------------------------------------------------------------------


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the path and the body, and the header `x-node`."""

    seen: ClassVar[list[str]] = []

    def do_POST(self):
        self.seen[:] = [name.lower() for name in self.headers]
        body = self.rfile.read(int(self.headers["content-length"]))
        answer = self.path.encode() + b" " + self.headers["x-node"].encode() + b" " + body
        self.send_response(207)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("secure", [True, False])
def test_only_what_clients_ask_for_goes_through_the_door(tmp_path, secure):
    keys = tmp_path if secure else None
    if secure:
        make_keys(tmp_path, hosts=["127.0.0.1"], clients=[])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as inner:
        if secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
            inner.socket = context.wrap_socket(inner.socket, server_side=True)
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        port = free_port()
        trust = ssl.create_default_context(cafile=str(tmp_path / "ca.crt")) if secure else True
        with Guard("127.0.0.1", port, f"127.0.0.1:{inner.server_address[1]}", keys, tmp_path / "state.db"):
            client = httpx.Client(base_url=f"http{'s' * secure}://127.0.0.1:{port}", verify=trust, trust_env=False)
            with client:
                large = os.urandom(6_000_000)
                found = client.post("/v1/fleet/push-object", content=large, headers={"x-node": "7"})
                assert (found.status_code, found.content) == (207, b"/v1/fleet/push-object 7 " + large)
                for path in ("/v1/control/start-run", "/v1/runtime/get-nodes", "/", "/v1/fleet/../control/start-run"):
                    assert client.post(path, headers={"x-node": "7"}).status_code == 403
                for odd in ("%00", "a%0d", "%252e%252e/control/start-run", "a/b", "", "a?b=c", "A", "a\u0430"):
                    assert client.post(f"/v1/fleet/{odd}", headers={"x-node": "7"}).status_code == 403
                assert client.get("/v1/fleet/pull-messages").status_code == 403
                claims = {
                    "x-forwarded-for": "10.0.0.1",
                    "forwarded": "for=x",
                    "x-odd": "1",
                    "connection": "close, X-Odd",
                }
                assert client.post("/v1/fleet/pull", headers={"x-node": "7", **claims}).status_code == 207
                assert "x-node" in Echo.seen
                assert not {"x-forwarded-for", "forwarded", "x-odd"} & {*Echo.seen}
                assert client.post("/v1/fleet/pull", content=bytes(2**24 + 1)).status_code == 413
        inner.shutdown()


def test_the_door_waits_only_so_long_and_for_so_many(tmp_path, monkeypatch):
    monkeypatch.setattr(anyrank.flower.guard, "_PATIENCE", 1.0)
    monkeypatch.setattr(anyrank.flower.guard, "_AT_ONCE", 1)
    port = free_port()
    with (
        Guard("127.0.0.1", port, "127.0.0.1:1", None, tmp_path / "state.db"),
        socket.create_connection(("127.0.0.1", port)) as slow,
    ):
        slow.sendall(b"POST /v1/fleet/push HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc")
        time.sleep(0.2)
        assert httpx.post(f"http://127.0.0.1:{port}/v1/fleet/push", trust_env=False).text == "too many requests at once"
        slow.settimeout(20)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        found = httpx.post(f"http://127.0.0.1:{port}/v1/fleet/push", trust_env=False)
        assert found.text == "the server is not there"


class Link(http.server.BaseHTTPRequestHandler):
    """Hands out work where there is some, and refuses to answer from some time on."""

    work: ClassVar[bytes] = b""
    asked: ClassVar[int] = 0
    refuses_from: ClassVar[int] = 1000

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        Link.asked += 1
        self.send_response(401 if Link.asked >= Link.refuses_from else 200)
        self.send_header("content-length", str(len(self.work)))
        self.end_headers()
        self.wfile.write(self.work)

    def log_message(self, *_):
        pass


def test_who_asks_for_work_gets_it_when_it_is_there(tmp_path, monkeypatch):
    port, database = free_port(), tmp_path / "state.db"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Link) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        with Guard("127.0.0.1", port, f"127.0.0.1:{inner.server_address[1]}", None, database):

            def ask(path: str = "pull-messages") -> httpx.Response:
                Link.asked = 0
                return httpx.post(f"http://127.0.0.1:{port}/v1/fleet/{path}", content=b"x", trust_env=False)

            def order() -> None:
                Link.work = b"work"
                database.touch()

            begun = time.monotonic()
            threading.Timer(0.5, order).start()
            assert ask().content == b"work"
            assert time.monotonic() - begun < 1.5  # Flower's own SuperNode would have slept for 3 s
            assert Link.asked == 3  # at once, to know the state of the database, and after that has changed

            monkeypatch.setattr(Link, "work", b"")
            assert ask("push-object").content == b""  # nothing else waits
            assert Link.asked == 1

            monkeypatch.setattr(Link, "refuses_from", 2)
            found = ask()
            assert (found.status_code, found.content) == (200, b"")  # as it was when it was asked

            monkeypatch.setattr(Link, "refuses_from", 1)
            assert ask().status_code == 401  # who may not ask does not wait
            assert Link.asked == 1

            monkeypatch.setattr(Link, "refuses_from", 1000)
            Link.asked = 0
            with socket.create_connection(("127.0.0.1", port)) as gone:
                gone.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
                while Link.asked < 2:
                    time.sleep(0.01)
            time.sleep(0.1)
            database.unlink()
            time.sleep(0.5)
            assert Link.asked == 2  # nothing is fetched for who is gone

            monkeypatch.setattr(anyrank.flower.guard, "_WAIT", 0.0)
            assert ask().content == b""
            assert Link.asked == 1
        inner.shutdown()


# --- letters and the worker ---------------------------------------------------------------------------------------


def test_a_letter_survives_flower():
    letter = Letter({"ask": "task", "round": 3, "text": "ä"}, os.urandom(1000))
    assert from_flower(to_flower(letter)) == letter
    assert len(letter.packed()) < 1100
    for junk in (b"", b"\xff" * 20, (5).to_bytes(8, "little") + b"[1,2]"):
        with pytest.raises(ValueError, match=r"^.+"):
            Letter.unpacked(junk)


def test_what_a_node_says_of_its_client(tmp_path):
    profile = tmp_path / "p.toml"
    numbers = {"forward_flops": 1e9, "backward_flops": 1e9, "memory_bytes": 1e9, "up_bps": 1e6, "down_bps": 1e6}
    profile.write_text("[devices.here]\n" + "\n".join(f"{key} = {value}" for key, value in numbers.items()))
    node = {"client": "ann", "data": "/d.csv", "state": str(tmp_path / "s"), "profile": str(profile)}
    assert settings_of(node, 7) == {
        "client": "ann",
        "source": "/d.csv",
        "folder": str(tmp_path / "s"),
        "kind": "",
        "profile": numbers,
    }
    with pytest.raises(ConfigError, match="names no data"):
        settings_of({"client": "ann"}, 7)
    with pytest.raises(ConfigError, match="anyrank probe"):
        settings_of(node | {"profile": "/nowhere"}, 7)
    for odd in ("0.0", "-1.0", "nan", "inf"):
        profile.write_text("[devices.here]\n" + "\n".join(f"{key} = {odd}" for key in numbers))
        with pytest.raises(ConfigError, match="expected a number above 0"):
            settings_of(node, 7)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # it outlives us
def test_a_worker_starts_stays_and_ends_with_the_run(tmp_path):
    """The same process answers again; one with other settings takes its place; after the end there is none."""
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(write_model(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv", rows=20)))
    recipe = anyrank.load_recipe(file).model_dump(mode="json")
    hello = Letter({"ask": "hello", "run": "r", "recipe": recipe, "compression": "none"})
    agree = Letter({"ask": "agree", "run": "r", "label_names": ["kind", "unkind"]})
    settings = {"client": "ann", "source": str(tmp_path / "reviews.csv"), "folder": str(tmp_path / "state")}
    settings |= {"kind": "weak", "profile": None}

    first = ask(settings, hello).values
    assert (first["client"], first["kind"], first["num_examples"]) == ("ann", "weak", 18)
    agreed = ask(settings, agree).values
    assert agreed["labels"] == [*agreed["labels"]]
    assert sum(agreed["labels"]) == 18  # the process that read the data still knows it
    assert "expected one of hello" in ask(settings, Letter({"ask": "nonsense"})).values["error"]
    assert (tmp_path / "state" / "key").stat().st_mode & 0o777 == 0o600

    other = {**settings, "source": str(write_reviews(tmp_path / "more.csv", rows=40)), "kind": "strong"}
    assert "started anew" in ask(other, Letter({"ask": "task", "run": "r"})).values["error"]
    assert not Path(_socket(settings)).exists()  # it has ended
    second = ask(other, hello).values
    assert (second["kind"], second["num_examples"]) == ("strong", 36)
    ask(other, Letter({"ask": "bye", "run": "elsewhere"}))
    assert "error" not in ask(other, agree).values
    assert ask(other, Letter({"ask": "bye", "run": "r"})).values["client"] == "ann"
    until = time.monotonic() + 30
    while Path(_socket(other)).exists():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- commands -----------------------------------------------------------------------------------------------------


def serve(folder: Path, keys: Path | None, *, host: str = "127.0.0.1", port: int = 1) -> None:
    with serving(folder, keys=keys, host=host, port=port):
        raise AssertionError("it started")


def test_what_a_server_cannot_start_with(tmp_path):
    with pytest.raises(ConfigError, match=r"only 127\.0\.0\.1"):
        serve(tmp_path / "state", None, host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"there is no file .*server\.crt"):
        serve(tmp_path / "state", tmp_path)
    make_keys(tmp_path / "keys", hosts=["h"], clients=[])
    with pytest.raises(ConfigError, match="holds no client's key"):
        serve(tmp_path / "state", tmp_path / "keys")
    with (
        http.server.HTTPServer(("127.0.0.1", 0), Echo) as taken,
        pytest.raises(ConfigError, match="choose another port"),
    ):
        serve(tmp_path / "state", None, port=taken.server_address[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": Path("/no/recipe.toml")}, "recipe /no/recipe.toml"),
        ({"settings": ["rounds=none"]}, "rounds"),
        ({"compression": "zip"}, "--compression zip: expected one of none, fp16, int8"),
        ({"times": "guessed"}, "--times guessed: expected one of measured, profile"),
    ],
)
def test_what_a_run_cannot_be_ordered_with(tmp_path, changes, said):
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(write_model(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv", rows=20)))
    with pytest.raises(ConfigError, match=said):
        Order(**{"recipe": file, "out": tmp_path / "run"} | changes)


def test_no_server_to_hand_a_run_to(tmp_path):
    (tmp_path / "config.toml").write_text(
        f'[superlink.anyrank]\naddress = "127.0.0.1:{free_port()}"\ninsecure = true\n'
    )
    with pytest.raises(TransportError, match=rf"no server answers for {tmp_path}"):
        status(tmp_path)
    with pytest.raises(TransportError, match=r"no server answers for .*typo"):
        status(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_the_recipe_of_the_walk_through(tmp_path):
    """It names neither source nor partition, and those that are named are the clients' affair."""
    page = Path(anyrank.__file__).parents[2] / "docs" / "flower.md"
    text = page.read_text().partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "recipe.toml").write_text(text)
    (tmp_path / "parted.toml").write_text(f'{text}\n[partition]\nname = "iid"\nclients = 7\n')
    recipe = recipe_of(tmp_path / "recipe.toml", ["rounds=3"])
    assert recipe == recipe_of(tmp_path / "parted.toml", ["rounds=3"])
    assert (recipe.rounds, recipe.partition["name"], recipe.data.source) == (3, "by_column", "the clients")


def test_a_key_that_is_none_keeps_nobody_else_out(tmp_path, monkeypatch, capsys):
    make_keys(tmp_path / "keys", hosts=["h"], clients=["ann", "bob", "cid"])
    (tmp_path / "keys" / "clients" / "ann.pub").write_bytes(b"\xff\xfe")
    asked = []

    def flwr(folder: Path, *arguments: str, let_pass: str = "") -> dict[str, str]:
        asked.append(Path(arguments[2]).name)
        if asked[-1] == "bob.pub":
            raise TransportError("flwr supernode: refused")
        return {"node-id": "7"}

    monkeypatch.setattr(anyrank.flower.link, "_flwr", flwr)
    monkeypatch.setattr(anyrank.flower.link, "_LOOK", 0.05)
    with _Members(tmp_path, tmp_path / "keys"):
        make_keys(tmp_path / "keys", hosts=[], clients=["dan"])
        until = time.monotonic() + 20
        while "dan" not in (tmp_path / "clients.json").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.2)
    assert json.loads((tmp_path / "clients.json").read_text()).keys() == {"cid", "dan"}
    assert asked == ["bob.pub", "cid.pub", "dan.pub"]
    said = capsys.readouterr().out
    assert said.count("Client ann") == said.count("holds no public key") == said.count("Client bob") == 1


def test_a_server_without_its_superlink_ends(tmp_path, monkeypatch):
    @contextmanager
    def dead(*_, **__):
        with running([sys.executable, "-c", ""], environment(tmp_path), tmp_path / "log") as process:
            yield process

    monkeypatch.setattr(anyrank.flower.link, "serving", dead)
    monkeypatch.setattr(anyrank.flower.programs, "stop_when_told", lambda: None)
    found = CliRunner().invoke(cli.app, ["flower", "server", "--state", str(tmp_path), "--insecure"])
    assert isinstance(found.exception, TransportError)
    assert "SuperLink has ended" in str(found.exception)


def test_what_a_run_is_ordered_with_survives_toml(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(write_model(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv", rows=20)))
    out = tmp_path / 'a "run" 😀 of\x7f\tZoë'
    assert tomllib.loads(Order(recipe=file, out=out).config())["out"] == str(out)


def client(folder: Path, server: str, **changes) -> int:
    """Take part, with files that are as they should be but for the changes."""
    make_keys(folder / "keys", hosts=["127.0.0.1"], clients=["ann"])
    data = write_reviews(folder / "data.csv", rows=5)
    files = {"ca": folder / "keys" / "ca.crt", "key": folder / "keys" / "clients" / "ann", "profile": None}
    usual = {"name": "ann", "data": str(data), "device": None, "state": folder / "state"}
    return join(server, **usual | files | changes)


@pytest.mark.parametrize(
    ("server", "changes", "said"),
    [
        ("nowhere", {}, "expected HOST:PORT"),
        ("fed.example.org:99999", {}, "expected HOST:PORT"),
        ("fed.example.org:1", {"ca": None, "key": None}, "on one machine alone"),
        ("fed.example.org:1", {"ca": Path("/no/ca.crt")}, "there is no file /no/ca.crt"),
        ("fed.example.org:1", {"name": "../ann"}, "--name '../ann': expected up to 100 letters"),
        ("fed.example.org:1", {"data": "/no/data.csv"}, "--data /no/data.csv: there is no such file"),
        ("fed.example.org:1", {"profile": Path("/no/p.toml")}, "--profile /no/p.toml: there is no such file"),
        ("fed.example.org:1", {"key": "clients/ann.pub"}, "--key .*ann.pub: not a private key"),
        ("fed.example.org:1", {"ca": "clients/ann"}, "--ca .*ann: not a certificate"),
    ],
)
def test_what_a_client_cannot_start_with(tmp_path, server, changes, said):
    changes = {k: tmp_path / "keys" / v if k in ("key", "ca") and isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=said):
        client(tmp_path, server, **changes)


def test_a_client_has_its_folder_for_itself(tmp_path):
    (tmp_path / "state").mkdir()
    with (tmp_path / "state" / "client.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"--state .*another client on this machine"):
            client(tmp_path, "fed.example.org:1")
    (tmp_path / 'a "b"').mkdir()
    with pytest.raises(ConfigError, match=r"--data .*Flower takes no quotes"):
        client(tmp_path, "fed.example.org:1", data=str(tmp_path / 'a "b"'))


def test_what_a_supernode_is_told_is_what_it_reads(tmp_path):
    for value in ("Zoë 😀", "a 'b' = c\\d", " ", "x=1 y=2"):
        assert parse_config_args([f"client={_quoted('name', value)}"]) == {"client": value}


def test_patience_begins_anew_with_a_supernode_that_was_let_in(tmp_path, monkeypatch):
    refused = [0, 0, 1, 0, 0]  # whether it had been let in before
    monkeypatch.setattr(anyrank.flower.join, "_PATIENCE", 0.5)
    monkeypatch.setattr(anyrank.flower.join, "_AGAIN", 0.2)

    def supernode(command, env):
        said = ["... [code: 2004]"]
        return 1, [*said, "SuperNode ID: 5"] if refused and refused.pop(0) else said

    monkeypatch.setattr(anyrank.flower.join, "_supernode", supernode)
    with pytest.raises(TransportError, match="it is not let in"):
        _take_part([], {}, "it is not let in", "ann", None)
    assert not refused


def test_a_supernode_that_ends_is_started_anew(monkeypatch, capsys):
    """It does so when a server comes up in which it is not known yet, or when somebody kills it."""
    ends = [(0, ["SuperNode ID: 5", "401 Unauthorized"]), (-9, ["SuperNode ID: 5"]), (1, ["... [code: 2004]"]), (3, [])]
    monkeypatch.setattr(anyrank.flower.join, "_AGAIN", 0.0)
    monkeypatch.setattr(anyrank.flower.join, "_supernode", lambda command, env: ends.pop(0))
    with pytest.raises(TransportError, match=r"exit status 3\) before the server let it in"):
        _take_part([], {}, "it is not let in", "ann", None)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2][:60] for line in said] == [
        "Flower's SuperNode has ended (exit status 0); it is started ",
        "Flower's SuperNode has ended (signal 9); it is started anew",
        "it is not let in. Either it does not know --key None: its pu",
    ]


class Clock(http.server.BaseHTTPRequestHandler):
    """Says what time it is, an hour late."""

    def do_GET(self):
        self.send_response(403)
        self.end_headers()

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() - 3600)

    def log_message(self, *_):
        pass


@contextmanager
def somebody(keys: Path | None, handler: type[http.server.BaseHTTPRequestHandler] = Echo) -> Iterator[int]:
    """The port of a server with these keys."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # whoever does not trust it hangs up
        if keys:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(keys / "server.crt", keys / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_client_says_what_is_wrong_with_the_server(tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    make_keys(keys, hosts=["127.0.0.1"], clients=[])
    make_keys(tmp_path / "other", hosts=["127.0.0.1"], clients=[])
    with somebody(tmp_path / "other") as port, pytest.raises(ConfigError, match=r"--ca .*ca\.crt: not the authority"):
        client(tmp_path, f"127.0.0.1:{port}")
    with somebody(keys) as port, pytest.raises(ConfigError, match="does not name localhost"):
        client(tmp_path, f"localhost:{port}")
    with somebody(None) as port, pytest.raises(ConfigError, match="does not speak TLS"):
        client(tmp_path, f"127.0.0.1:{port}")
    with somebody(keys, Clock) as port, pytest.raises(ConfigError, match="the clocks differ: here it is"):
        client(tmp_path, f"127.0.0.1:{port}")


@pytest.mark.parametrize(("years", "said"), [(1, "is not valid yet by the clock of this machine"), (-3, "has expired")])
def test_a_client_whose_clock_is_years_off(tmp_path, monkeypatch, years, said):
    class Off(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=365 * years)

    make_keys(tmp_path / "keys", hosts=["127.0.0.1"], clients=["ann"])
    (tmp_path / "keys" / "server.crt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(anyrank.flower.keys, "datetime", Off)
        make_keys(tmp_path / "keys", hosts=["127.0.0.1"], clients=[])
    with somebody(tmp_path / "keys") as port, pytest.raises(ConfigError, match=said):
        client(tmp_path, f"127.0.0.1:{port}")


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_program_ends_with_whoever_started_it(tmp_path):
    """Also when that is killed."""
    script = (
        "import sys, time; from pathlib import Path; from anyrank.flower.programs import running, environment\n"
        f"with running([sys.executable, '-c', 'import time; time.sleep(600)'], environment(Path({str(tmp_path)!r}))) as p:\n"
        "    print(p.pid, flush=True); time.sleep(600)"
    )
    for end in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as ours:
            assert ours.stdout
            child = int(ours.stdout.readline())
            ours.send_signal(end)
            for _ in range(400):  # looks, not seconds, which a machine that stands still lets pass
                if not runs(child):
                    break
                time.sleep(0.05)
            else:
                raise AssertionError("it goes on without who started it")


# --- examples -----------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[1] / "examples" / "federation"


def commands_of_the_examples() -> list[str]:
    units = [line for file in EXAMPLES.glob("*.service") for line in file.read_text().splitlines()]
    started = [
        line.removeprefix("ExecStart=/opt/anyrank/bin/anyrank ") for line in units if line.startswith("ExecStart")
    ]
    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]
    return started + [service["command"] for service in services.values()]


@pytest.mark.parametrize("line", commands_of_the_examples())
def test_the_examples_use_commands_and_options_that_there_are(line):
    group, name, *arguments = line.split()
    command = typer.main.get_command(cli.app).commands[group].commands[name]
    assert command.make_context(name, arguments).params["keys" if name == "server" else "key"]


def test_the_units_are_ones_that_systemd_reads():
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd here")
    for file in EXAMPLES.glob("*.service"):
        found = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True)
        said = [line for line in found.stderr.splitlines() if "is not executable" not in line]
        assert not said
