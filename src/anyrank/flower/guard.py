"""The server's door: what clients may ask for goes through to Flower's SuperLink, and nothing else.

A SuperLink has one port for everything. Its control interface, by which runs are started and clients' keys are registered,
asks for no credential, while clients have to prove who they are. So the SuperLink listens on loopback alone, and this door
stands on the public port, with the server's certificate: it lets `/v1/fleet/` through.

A SuperNode that asks for work and gets none asks again in 3 s. So the door lets it wait, and answers when there is some: it
asks the SuperLink again whenever that has written to its database.
"""

import asyncio
import contextlib
import re
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx
import uvicorn

__all__ = ["Guard"]

_OPEN = re.compile(r"/v1/fleet/[a-z-]+")
_FOR_WORK = "/v1/fleet/pull-messages"
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"upgrade",
    b"host",
    b"content-length",
    b"te",
    b"trailer",
    b"forwarded",  # what proxies say of who asks, others can say too
}
_LARGEST = 16 * 2**20  # of a request's body; Flower cuts what is larger than 5 MB into chunks
_PATIENCE = 60.0  # seconds that a body may take
_AT_ONCE = 256  # requests under way; who waits for work does not count, nor do connections without a request
_WAIT = 10.0  # seconds for which a client may wait for work; it gives a request up after 30
_LOOK, _LOOK_ANYWAY = (
    0.1,
    2.0,
)  # seconds between two looks for work: when there may be some, and when nothing tells of it
_LOOKS = 50  # a second, for all who wait together: each takes the SuperLink 14 ms of a core


class Guard:
    """A door that is open while it is a context.

    Args:
        host: of the public side.
        port: likewise.
        inner: where the SuperLink listens, such as `127.0.0.1:8000`.
        keys: the folder that `keys.make_keys` made; None speaks without TLS, on both sides.
        database: the SuperLink's.
    """

    def __init__(self, host: str, port: int, inner: str, keys: Path | None, database: Path):
        """The door is closed yet."""
        self._inner, self._keys, self._client = inner, keys, None
        self._written = [database, database.with_name(f"{database.name}-wal")]
        self._unanswered = self._waiting = 0
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
                proxy_headers=False,
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
        if scope["method"] != "POST" or not _OPEN.fullmatch(scope["path"]) or scope["query_string"]:
            await _answer(send, 403, b"this door is for clients alone")
        elif self._unanswered - self._waiting >= _AT_ONCE:
            await _answer(send, 503, b"too many requests at once")
        else:
            self._unanswered += 1
            try:
                await self._pass(scope, receive, send)
            finally:
                self._unanswered -= 1

    async def _pass(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand a request on, and its answer back."""
        try:
            body = await asyncio.wait_for(_body(receive), _PATIENCE)
        except TimeoutError:
            await _answer(send, 408, b"too slow")
            return
        if body is None:
            return  # the client is gone
        if len(body) > _LARGEST:
            await _answer(send, 413, b"too large")
            return
        if self._client is None:
            trust = ssl.create_default_context(cafile=str(self._keys / "ca.crt")) if self._keys else True
            scheme = "https" if self._keys else "http"
            self._client = httpx.AsyncClient(
                base_url=f"{scheme}://{self._inner}", verify=trust, timeout=300, trust_env=False
            )
        named = (
            b",".join(value for name, value in scope["headers"] if name.lower() == b"connection").lower().split(b",")
        )
        drop = _HOP_BY_HOP | {name.strip() for name in named}
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name.lower() not in drop and not name.lower().startswith(b"x-forwarded-")
        ]
        try:
            found = await self._client.post(scope["path"], content=body, headers=headers)
        except (TimeoutError, httpx.HTTPError):
            await _answer(send, 503, b"the server is not there")
            return
        if scope["path"] == _FOR_WORK and _is_empty(found):
            found = await self._work(found, receive, body, headers)
        kept = [
            (name, value)
            for name, value in found.headers.raw
            if name.lower() not in _HOP_BY_HOP | {b"content-encoding"}
        ]
        await _answer(send, found.status_code, found.content, kept)

    async def _work(self, found: httpx.Response, receive: Any, body: bytes, headers: Any) -> httpx.Response:
        """What there is to do for a client within a while; or nothing, as was found."""
        assert self._client
        gone, now = asyncio.ensure_future(receive()), asyncio.get_running_loop().time
        begun = looked = now()
        seen = None  # what it was before it was first asked is not known
        self._waiting += 1
        try:
            while _is_empty(found) and now() - begun < _WAIT and not self._server.should_exit:
                if (await asyncio.wait([gone], timeout=max(_LOOK, self._waiting / _LOOKS)))[0]:
                    break  # work that it was handed now would be lost
                if (state := self._state()) == seen and now() - looked < _LOOK_ANYWAY:
                    continue
                seen, looked = state, now()
                again = await self._client.post(_FOR_WORK, content=body, headers=headers)
                if again.status_code != 200:
                    break  # such as that its signature is too old by now
                found = again
        except (TimeoutError, httpx.HTTPError):
            pass  # it is told so when it asks again
        finally:
            self._waiting -= 1
            gone.cancel()
        return found

    def _state(self) -> list[tuple[int, int]]:
        """What is another one after the SuperLink has written something."""
        found = []
        for file in self._written:
            with contextlib.suppress(FileNotFoundError):
                found.append((file.stat().st_mtime_ns, file.stat().st_size))
        return found


def _is_empty(found: httpx.Response) -> bool:
    """Whether there is nothing to do: a message without fields has no bytes."""
    return found.status_code == 200 and not found.content


async def _body(receive: Any) -> bytes | None:
    """A request's body, or its beginning where it is too large; None if the client is gone."""
    body, more = bytearray(), True
    while more and len(body) <= _LARGEST:
        event = await receive()
        if event["type"] != "http.request":
            return None
        body += event.get("body", b"")
        more = event.get("more_body", False)
    return bytes(body)


async def _answer(send: Any, status: int, body: bytes, headers: Any = ()) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
