"""The server's door: what clients may ask for goes through to Flower's SuperLink, and nothing else.

A SuperLink has one port for everything. Its control interface, by which runs are started and clients' keys are registered,
asks for no credential, while clients have to prove who they are. So the SuperLink listens on loopback alone, and this door
stands on the public port, with the server's certificate: it lets `/v1/fleet/` through.
"""

import ssl
import threading
from pathlib import Path
from typing import Any

import httpx
import uvicorn

__all__ = ["Guard"]

_OPEN = "/v1/fleet/"
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"upgrade",
    b"host",
    b"content-length",
    b"te",
    b"trailer",
}
_LARGEST = 64 * 2**20  # of a request's body; Flower cuts what is larger than 5 MB into chunks


class Guard:
    """A door that is open while it is a context.

    Args:
        host: of the public side.
        port: likewise.
        inner: where the SuperLink listens, such as `127.0.0.1:8000`.
        keys: the folder that `keys.make_keys` made; None speaks without TLS, on both sides.
    """

    def __init__(self, host: str, port: int, inner: str, keys: Path | None):
        """The door is closed yet."""
        self._inner, self._keys, self._client = inner, keys, None
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._serve,
                host=host,
                port=port,
                ssl_certfile=keys and str(keys / "server.crt"),
                ssl_keyfile=keys and str(keys / "server.key"),
                log_level="warning",
                lifespan="off",
                interface="asgi3",
                ws="none",
                timeout_keep_alive=75,
            )
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "Guard":
        """Open the door.

        Raises:
            OSError: the port cannot be had.
        """
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError(f"the door on port {self._server.config.port} could not be opened")
            threading.Event().wait(0.02)
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self._server.should_exit = True
        self._thread.join(10)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] != "POST" or not scope["path"].startswith(_OPEN) or ".." in scope["path"]:
            await _answer(send, 403, b"this door is for clients alone")
            return
        body = bytearray()
        more = True
        while more:
            event = await receive()
            if event["type"] != "http.request":
                return  # the client is gone
            body += event.get("body", b"")
            more = event.get("more_body", False)
            if len(body) > _LARGEST:
                await _answer(send, 413, b"too large")
                return
        if self._client is None:
            trust = ssl.create_default_context(cafile=str(self._keys / "ca.crt")) if self._keys else True
            scheme = "https" if self._keys else "http"
            self._client = httpx.AsyncClient(
                base_url=f"{scheme}://{self._inner}", verify=trust, timeout=300, trust_env=False
            )
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP_BY_HOP]
        try:
            found = await self._client.post(scope["path"], content=bytes(body), headers=headers)
        except (TimeoutError, httpx.HTTPError):
            await _answer(send, 503, b"the server is not there")
            return
        kept = [
            (name, value)
            for name, value in found.headers.raw
            if name.lower() not in _HOP_BY_HOP | {b"content-encoding"}
        ]
        await _answer(send, found.status_code, found.content, kept)


async def _answer(send: Any, status: int, body: bytes, headers: Any = ()) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
