"""What clients keep for themselves between their rounds. It never crosses the wire."""

import hashlib
from pathlib import Path
from urllib.parse import quote

from anyrank.adapter import Adapter
from anyrank.wire import decode, encode

__all__ = ["Memory", "folder_name"]

_LONGEST = 100  # file systems take 255 bytes; what is written beside a folder ends in a few more


def folder_name(client: str) -> str:
    """The name of a client's folder: its own, quoted, and of a long one the beginning and a hash.

    A client's name comes from the user's data. Whatever it holds, it stays one folder, and another one for each client.
    """
    quoted = quote(client, safe=" ").replace(".", "%2E")
    if len(quoted) <= _LONGEST:
        return quoted
    return f"{quoted[:_LONGEST]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"


class Memory:
    """A folder with a file for each client, round and phase; of the two newest rounds of each client.

    Two, because a round that is played again after a kill must not see what its first try left.

    Args:
        folder: where the files are; it is made when it is first needed.
    """

    def __init__(self, folder: Path):
        """Nothing is read or written yet."""
        self.folder = folder

    def read(self, client: str, *, before: tuple[int, int]) -> Adapter | None:
        """The newest that was kept before a round and phase."""
        kept = [when for when in self._kept(client) if when < before]
        return decode(self._file(client, max(kept)).read_bytes())[0]["kept"] if kept else None

    def write(self, client: str, when: tuple[int, int], adapter: Adapter) -> None:
        """Keep an adapter of a round and phase, and forget all but the two newest rounds."""
        file = self._file(client, when)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(encode({"kept": adapter}, {}))
        temporary.replace(file)
        newest = sorted({round for round, _ in self._kept(client)})[-2:]
        for old in self._kept(client):
            if old[0] not in newest:
                self._file(client, old).unlink()

    def _kept(self, client: str) -> list[tuple[int, int]]:
        names = [file.stem.split("-") for file in self._file(client, (0, 0)).parent.glob("*-*.safetensors")]
        return [(int(round), int(phase)) for round, phase in names]

    def _file(self, client: str, when: tuple[int, int]) -> Path:
        return self.folder / folder_name(client) / f"{when[0]}-{when[1]}.safetensors"
