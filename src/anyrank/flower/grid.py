"""Letters as Flower's messages, and Flower's grid as a post."""

from collections.abc import Collection, Mapping

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from anyrank.flower.letter import Letter

__all__ = ["GridPost", "from_flower", "to_flower"]

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
    """

    def __init__(self, grid: Grid):
        """Nothing is sent yet."""
        self._grid = grid

    def nodes(self) -> Collection[int]:
        """Who is connected now."""
        return list(self._grid.get_node_ids())

    def send(self, letters: Mapping[int, Letter]) -> Mapping[str, int]:
        """Send a letter to each node, one after another: a request of all of them at once may be too large."""
        numbers = {}
        for node, letter in letters.items():
            kind = _KINDS.get(str(letter.values.get("kind")), MessageType.QUERY)
            (number,) = self._grid.push_messages([Message(to_flower(letter), dst_node_id=node, message_type=kind)])
            if number is not None:
                numbers[number] = node
        return numbers

    def collect(self, numbers: Collection[str]) -> Mapping[str, Letter]:
        """The answers that have come; one that Flower gives in place of a client says what is wrong."""
        found = {}
        for message in self._grid.pull_messages(list(numbers)) if numbers else ():
            number = message.metadata.reply_to_message_id  # of an error the sender need not be the node
            if message.has_error():
                found[number] = Letter({"error": f"Flower reports: {message.error.reason} (code {message.error.code})"})
                continue
            try:
                found[number] = from_flower(message.content)
            except ValueError as error:
                found[number] = Letter({"error": str(error)})
        return found
