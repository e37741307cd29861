"""What server and clients send each other: a few plain values, and bytes. This file needs nothing but Python."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Letter"]


@dataclass(frozen=True)
class Letter:
    """A message in either direction.

    Args:
        values: plain values by name, as JSON holds them. `ask` names what a client is asked for: `hello`, `agree`, `task`,
            `own`, `refused` or `bye`; `error` says why an answer holds nothing else.
        payload: bytes, as `wire` or `messages` packed them.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes = b""

    def packed(self) -> bytes:
        """As one piece: the length of the values, the values as JSON, the payload."""
        head = json.dumps(self.values, sort_keys=True).encode()
        return len(head).to_bytes(8, "little") + head + self.payload

    @staticmethod
    def unpacked(packed: bytes) -> "Letter":
        """What `packed` made.

        Raises:
            ValueError: it is something else.
        """
        length = int.from_bytes(packed[:8], "little")
        try:
            values = json.loads(packed[8 : 8 + length])
        except RecursionError as error:  # a list in a list in a list, thousands deep
            raise ValueError("not a letter") from error
        if not isinstance(values, dict) or len(packed) < 8 + length:
            raise ValueError("not a letter")
        return Letter(values, packed[8 + length :])
