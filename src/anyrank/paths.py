"""Paths as recipes write them, and files and folders that are there whole or not at all."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from anyrank.errors import ConfigError

__all__ = ["expanded", "replace_file", "replaced", "writing"]


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


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Say where it was that a write failed: Python does not for a full disk, and libraries in Rust raise errors of their own.

    Raises:
        OSError: with the place as its file name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(place)) from error


def replace_file(file: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the new one, never half of it, even after a power cut."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with writing(file), temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `out` in the end, so that one with this name is never half written.

    It is beside `out`, and does not stay where the writing fails.
    """
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(out):
            yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)
