"""What clients keep for themselves between their rounds. It never crosses the wire."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from anyrank.adapter import Adapter
from anyrank.wire import decode, encode

__all__ = ["Memory"]


class Memory:
    """A folder with a file for each client and round, the two newest of each client.

    Two, because a round that is played again after a kill must not see what its first try left.

    Args:
        folder: where the files are; it is made when it is first needed.
    """

    def __init__(self, folder: Path):
        """Nothing is read or written yet."""
        self.folder = folder

    def read(self, client: str, *, before: int) -> Adapter | None:
        """The newest that was kept in a round below `before`."""
        rounds = [round for round in self._rounds(client) if round < before]
        return decode(self._file(client, max(rounds)).read_bytes())[0]["kept"] if rounds else None

    def write(self, client: str, round: int, adapter: Adapter) -> None:
        """Keep an adapter of a round, and forget all but the two newest."""
        file = self._file(client, round)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(encode({"kept": adapter}, {}))
        temporary.replace(file)
        for old in sorted(self._rounds(client))[:-2]:
            self._file(client, old).unlink()

    def _rounds(self, client: str) -> Iterator[int]:
        return (int(file.stem) for file in self._file(client, 0).parent.glob("*.safetensors"))

    def _file(self, client: str, round: int) -> Path:
        # A client's name comes from the user's data: whatever it holds, it stays one folder.
        return self.folder / quote(client, safe=" ").replace(".", "%2E") / f"{round}.safetensors"
