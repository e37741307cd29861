"""Uploads, to a server on this machine that answers as the Hugging Face hub does."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from anyrank.errors import AnyrankError, ConfigError
from anyrank.hub import push


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; refuses with `refusal`, a status and a message."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refusal: tuple[int, str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.partition("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refusal:
            self.answer(hub.refusal[0], {"error": hub.refusal[1]})
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer(200, {"url": f"{hub.address}/ann/tickets", "id": "ann/tickets"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/models/ann/tickets/preupload/main":
            modes = {
                f["path"]: "lfs" if f["path"].endswith("safetensors") else "regular" for f in json.loads(body)["files"]
            }
            answers = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.answer(200, {"files": answers})
        elif path == "/ann/tickets.git/info/lfs/objects/batch":
            actions = [
                {**wanted, "actions": {"upload": {"href": f"{hub.address}/large/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": actions})
        elif path == "/api/models/ann/tickets/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.large[line["value"]["oid"]]
            self.answer(200, {"commitUrl": f"{hub.address}/ann/tickets/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer(404, {"error": path})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        self.server.large[self.path.removeprefix("/large/")] = content
        self.answer(200, {})

    def do_GET(self):
        self.answer(200, {"id": "ann/tickets", "sha": "0", "siblings": []})

    def answer(self, status: int, content: dict):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HF_HUB_DISABLE_XET", True
        )  # large files go by Git LFS, which is simple to answer
        yield server
        server.shutdown()


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder.parent / "run.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# An adapter\n")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:Use 'content=")  # of how huggingface_hub calls its HTTP client
@pytest.mark.parametrize("run", [True, False])
def test_an_adapter_is_uploaded_whole(hub, adapter, run):
    address = push(adapter.parent if run else adapter, "ann/tickets", private=True, token="hf_secret")
    assert address == f"{hub.address}/ann/tickets"
    assert hub.files == content(adapter)
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("ann", "tickets")
    assert created.get("private") or created.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.filterwarnings("ignore:Use 'content=")
def test_a_repository_is_public_unless_asked_otherwise(hub, adapter):
    push(adapter, "ann/tickets", token="hf_secret")
    assert not hub.created[0].get("private")
    assert hub.created[0].get("visibility") != "private"


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, "Invalid credentials"), "the token is not valid"),
        ((403, "Forbidden"), "may not write there"),
        ((400, "No more room in this account"), "No more room in this account"),
    ],
)
def test_a_refusal_says_what_to_do(hub, adapter, refusal, said):
    hub.refusal = refusal
    with pytest.raises(AnyrankError, match=rf"refused ann/tickets: .*{said}.*status {refusal[0]}"):
        push(adapter, "ann/tickets", token="hf_secret")
    assert hub.files == {}


def test_an_upload_that_breaks_off(hub, adapter, monkeypatch):
    monkeypatch.setattr(Answers, "do_PUT", lambda self: self.answer(404, {"error": "no such place"}))
    with pytest.raises(AnyrankError, match=r"the upload to http://127.0.0.1:\d+ failed: .*adapter_model.safetensors"):
        push(adapter, "ann/tickets", token="hf_secret")


def test_without_a_network(hub, adapter, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AnyrankError, match="HF_HUB_OFFLINE is set"):
        push(adapter, "ann/tickets", token="hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(AnyrankError, match=r"http://127.0.0.1:1 failed: .*refused"):
        push(adapter, "ann/tickets", token="hf_secret")


def test_without_a_token_nothing_is_asked(hub, adapter, monkeypatch):
    monkeypatch.setattr("anyrank.hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"no token .* `hf auth login`"):
        push(adapter, "ann/tickets")
    assert not hub.tokens


def test_a_name_that_no_repository_can_have(hub, adapter):
    with pytest.raises(ConfigError, match="'ann/tickets/of/mine' is no name for a repository"):
        push(adapter, "ann/tickets/of/mine", token="hf_secret")


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(ConfigError, match="holds no adapter: expected a finished run"):
        push(tmp_path, "ann/tickets", token="hf_secret")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="no adapter yet: finish it with `anyrank run --resume"):
        push(tmp_path, "ann/tickets", token="hf_secret")
    (tmp_path / "clients").mkdir()
    with pytest.raises(ConfigError, match="no global adapter: name that of one client"):
        push(tmp_path, "ann/tickets", token="hf_secret")
