"""Paths as recipes write them."""

import os
from pathlib import Path

from anyrank.errors import ConfigError

__all__ = ["expanded"]


def expanded(path: str, *, key: str) -> Path:
    """A path with `~` and variables of the environment filled in.

    Args:
        path: as it is written.
        key: of the recipe, for the message.

    Raises:
        ConfigError: a variable is not set.
    """
    full = os.path.expandvars(path)
    if "$" in full:
        raise ConfigError(
            f"{key}: {path} names a variable that is not set in the environment; set it, or write the path."
        )
    return Path(full).expanduser()
