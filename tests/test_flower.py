"""The parts of a federation over Flower that can be tried without starting it: keys, the door, letters, the warm worker."""

import http.server
import os
import ssl
import threading
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

pytest.importorskip("flwr")

from anyrank.errors import ConfigError
from anyrank.flower.client_app import settings_of
from anyrank.flower.commands import join, serve
from anyrank.flower.grid import from_flower, to_flower
from anyrank.flower.guard import Guard
from anyrank.flower.keys import make_keys
from anyrank.flower.letter import Letter
from anyrank.flower.worker import ask
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
    with pytest.raises(ConfigError, match="can be a file's"):
        make_keys(tmp_path / "b", hosts=["h"], clients=["../x"])


# --- the door -----------------------------------------------------------------------------------------------------


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the path and the body, and the header `x-node`."""

    def do_POST(self):
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
        with Guard("127.0.0.1", port, f"127.0.0.1:{inner.server_address[1]}", keys):
            client = httpx.Client(base_url=f"http{'s' * secure}://127.0.0.1:{port}", verify=trust, trust_env=False)
            with client:
                large = os.urandom(6_000_000)
                found = client.post("/v1/fleet/push-object", content=large, headers={"x-node": "7"})
                assert (found.status_code, found.content) == (207, b"/v1/fleet/push-object 7 " + large)
                for path in ("/v1/control/start-run", "/v1/runtime/get-nodes", "/", "/v1/fleet/../control/start-run"):
                    assert client.post(path, headers={"x-node": "7"}).status_code == 403
                assert client.get("/v1/fleet/pull-messages").status_code == 403
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


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # it outlives us
def test_a_worker_starts_stays_and_ends_with_the_run(tmp_path):
    """The same process answers twice; a question without the key is not answered; after the end another one starts."""
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(write_model(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv", rows=20)))
    import anyrank

    recipe = anyrank.load_recipe(file).model_dump(mode="json")
    settings = {
        "client": "ann",
        "source": str(tmp_path / "reviews.csv"),
        "folder": str(tmp_path / "state"),
        "kind": "weak",
        "profile": None,
    }
    hello = Letter({"ask": "hello", "run": "r", "recipe": recipe, "compression": "none"})
    first = ask(settings, hello)
    assert first.values["client"] == "ann"
    assert first.values["num_examples"] == 18
    agreed = ask(settings, Letter({"ask": "agree", "run": "r", "label_names": ["kind", "unkind"]}))
    assert agreed.values["labels"] == [*agreed.values["labels"]]
    assert sum(agreed.values["labels"]) == 18  # the process that read the data still knows it
    assert "expected one of hello" in ask(settings, Letter({"ask": "nonsense"})).values["error"]
    assert ask(settings, Letter({"ask": "bye", "run": "r"})).values["client"] == "ann"
    again = ask(settings, Letter({"ask": "task", "run": "r"}))
    assert "started anew" in again.values["error"]
    ask(settings, Letter({"ask": "bye", "run": "r"}))
    assert (tmp_path / "state" / "key").stat().st_mode & 0o777 == 0o600


# --- commands -----------------------------------------------------------------------------------------------------

OPTIONS = {"settings": [], "clients": 0, "deadline": 0.0, "patience": 0.0, "compression": "none"}


def test_what_a_server_cannot_start_with(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(write_model(tmp_path / "model"), write_reviews(tmp_path / "reviews.csv", rows=20)))
    with pytest.raises(ConfigError, match=r"only 127\.0\.0\.1"):
        serve(file, tmp_path / "run", keys=None, host="0.0.0.0", port=1, **OPTIONS)
    with pytest.raises(ConfigError, match=r"there is no file .*server\.crt"):
        serve(file, tmp_path / "run", keys=tmp_path, host="127.0.0.1", port=1, **OPTIONS)
    make_keys(tmp_path / "keys", hosts=["h"], clients=[])
    with pytest.raises(ConfigError, match="holds no client's key"):
        serve(file, tmp_path / "run", keys=tmp_path / "keys", host="127.0.0.1", port=1, **OPTIONS)
    with (
        http.server.HTTPServer(("127.0.0.1", 0), Echo) as taken,
        pytest.raises(ConfigError, match="choose another port"),
    ):
        serve(file, tmp_path / "run", keys=None, host="127.0.0.1", port=taken.server_address[1], **OPTIONS)


@pytest.mark.parametrize(
    ("server", "changes", "said"),
    [
        ("nowhere", {}, "expected HOST:PORT"),
        ("fed.example.org:1", {"ca": None, "key": None}, "on one machine alone"),
        ("fed.example.org:1", {"ca": Path("/no/ca.crt")}, "there is no file /no/ca.crt"),
    ],
)
def test_what_a_client_cannot_start_with(tmp_path, server, changes, said):
    make_keys(tmp_path, hosts=["h"], clients=["ann"])
    files = {"ca": tmp_path / "ca.crt", "key": tmp_path / "clients" / "ann"} | changes
    with pytest.raises(ConfigError, match=said):
        join(server, name="ann", data="d.csv", device=None, profile=None, state=tmp_path / "state", **files)
