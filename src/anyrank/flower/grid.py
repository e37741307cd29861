"""Letters as Flower's messages, and Flower's grid as a post."""

from collections.abc import Collection, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from anyrank.flower.letter import Letter

__all__ = ["GridPost", "from_flower", "to_flower"]

_BRISK = 0.5  # seconds that one answer may hold up the others

_KINDS = {"train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}


def to_flower(letter: Letter) -> RecordDict:
    """A letter as the content of a message. Flower cuts large ones into chunks by itself."""
    packed = letter.packed()
    array = Array(dtype="uint8", shape=(len(packed),), stype="anyrank.letter", data=packed)
    return RecordDict({"letter": ArrayRecord({"packed": array})})


def from_flower(content: RecordDict) -> Letter:
    """The letter in a message.

    Raises:
        ValueError: there is none.
    """
    try:
        return Letter.unpacked(content.array_records["letter"]["packed"].data)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"not a message of anyrank's ({error!r})") from error


class GridPost:
    """Flower's grid as a `Post`.

    Args:
        grid: of a ServerApp.
        ttl: seconds until Flower gives up a message; None for its twelve hours.
        trusted: the nodes are our own, and answers are fetched together. Of others each is fetched alone: Flower forgets what
            it fetches before it reads it, so that one that it cannot read would take those that came with it along.
    """

    def __init__(self, grid: Grid, *, ttl: float | None = None, trusted: bool = False):
        """Nothing is sent yet."""
        self._grid, self._ttl, self._trusted = grid, ttl, trusted
        self._coming: dict[str, Future[Sequence[Any]]] = {}  # answers that are still being brought

    def nodes(self) -> Set[int]:
        """Who is connected now."""
        return set(self._grid.get_node_ids())

    def send(self, letters: Mapping[int, Letter]) -> Mapping[str, int]:
        """Send a letter to each node, one after another: a request of all of them at once may be too large.

        A letter that Flower refuses, as one that is too large itself, has no number.
        """
        numbers = {}
        for node, letter in letters.items():
            kind = _KINDS.get(str(letter.values.get("kind")), MessageType.QUERY)
            message = Message(to_flower(letter), dst_node_id=node, message_type=kind, ttl=self._ttl)
            numbers |= {number: node for number in self._grid.push_messages([message]) if number}
        return numbers

    def collect(self, numbers: Collection[str]) -> Mapping[str, Letter]:
        """The answers that have come; one that cannot be read, or that Flower gives in place of a client, says so."""
        if self._trusted:  # of an error the sender need not be the node
            messages = self._grid.pull_messages([*numbers]) if numbers else ()
            return {message.metadata.reply_to_message_id: _read(message) for message in messages}
        # Which number an answer was fetched by counts: a node could name one that another was asked under.
        return {number: _read(message) for number in numbers for message in self._fetched(number)}

    def _fetched(self, number: str) -> Sequence[Any]:
        """The answer, if all of it has come; what Flower raises over it, if it cannot read it.

        Of an answer that is being brought Flower waits for the rest, for minutes if its client has gone meanwhile. That is
        left to a thread, so that a deadline holds and the others are heard.
        """
        known = self._coming.pop(number, None)
        coming = known or self._fetch(number)
        if not wait([coming], 0.0 if known else _BRISK).done:
            self._coming[number] = coming
            return []
        try:
            return coming.result()
        except httpx.HTTPError:  # it is the SuperLink that does not answer
            raise
        except Exception as error:
            return [error]

    def _fetch(self, number: str) -> Future[Sequence[Any]]:
        future: Future[Sequence[Any]] = Future()

        def fetch() -> None:
            try:
                future.set_result([*self._grid.pull_messages([number])])
            except BaseException as error:
                future.set_exception(error)

        Thread(target=fetch, daemon=True).start()
        return future


def _read(came: Any) -> Letter:
    try:
        if isinstance(came, Exception):
            raise came
        if came.has_error():
            return Letter({"error": f"Flower reports: {came.error.reason} (code {came.error.code})"})
        return from_flower(came.content)
    except Exception as error:
        return Letter({"error": str(error) or repr(error)})
