"""Images as data sets have them: files, encoded or raw bytes, arrays; decoded when they are asked for."""

import io
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from jaxtyping import UInt8

from anyrank.errors import ConfigError

__all__ = ["Depth", "Images", "folders_of_images", "pillow"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SIGNATURES = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
)  # with which encoded images begin, and raw ones hardly ever
PARTS = ("train", "test", "validation")

Pixels = UInt8[np.ndarray, "channels height width"]
Depth = Literal["header", "coarse", "whole"]
"""How much of an encoded image is decoded. A coarse image is thrown away: it costs a tenth, and shows that all is there."""


def folders_of_images(path: Path) -> dict[str, Dataset] | None:
    """The parts of a folder with image files in a folder for each class.

    Args:
        path: with `train/CLASS/*.png`, and maybe `test` or `validation` likewise; or with `CLASS/*.png`, all for training.

    Returns:
        by part, the columns `image` (paths) and `label` (class names in the order of the alphabet); None if there are no such
        files.

    Raises:
        ConfigError: a class has no training examples.
    """
    folders = {part: path / part for part in PARTS if (path / part).is_dir()}
    if "train" not in folders:
        folders = {"train": path}
    files = {part: _image_files(folder) for part, folder in folders.items()}
    if not files["train"]:
        return None
    names = sorted({name for name, _ in files["train"]})
    strangers = [file for found in files.values() for name, file in found if name not in names]
    if strangers:
        raise ConfigError(
            f"data {path}: {strangers[0]} is of a class without training images; expected one of {', '.join(names)}. Rename or "
            f"remove its folder, or add such images to {folders['train']}"
        )
    classes = ClassLabel(names=names)
    features = Features({"image": Value("string"), "label": classes})
    return {
        part: Dataset.from_dict(
            {"image": [str(file) for _, file in found], "label": [name for name, _ in found]}, features
        )
        for part, found in files.items()
        if found
    }


def _image_files(folder: Path) -> list[tuple[str, Path]]:
    """The image files in the folders of a folder, each with that folder's name."""
    files = sorted(file.absolute() for file in folder.glob("[!.]*/**/*") if file.suffix.lower() in SUFFIXES)
    return [(file.relative_to(folder.absolute()).parts[0], file) for file in files]


class Images:
    """The images of a data set, each decoded anew when it is asked for: `[channels, height, width]`, of one or three channels.

    Args:
        data: examples.
        column: of images: paths, encoded bytes, the raw bytes of square images in grey, what `datasets` calls an image, or
            arrays of numbers from 0 to 255 or, with a point, from 0 to 1.
        where: what the examples are, to begin an error with.
        folder: what paths are relative to.
        rows: the number by which each example is called in an error.
    """

    def __init__(self, data: Dataset, column: str, *, where: str, folder: Path, rows: list[int]):
        """Decode nothing yet."""
        kind = data.features[column]
        data = data.select_columns(column)
        if isinstance(kind, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
        elif not isinstance(kind, Value):
            data = data.with_format("numpy")
        self._data, self._column, self._where, self._folder, self._rows = data, column, where, folder, rows

    def __len__(self) -> int:
        """How many there are."""
        return len(self._data)

    def __getitem__(self, index: int, /) -> Pixels:
        """One image.

        Raises:
            ConfigError: it cannot be decoded.
        """
        return self._read(index, self._data[index][self._column])[1]

    def __iter__(self) -> Iterator[Pixels]:
        """All images in their order, read faster than one by one."""
        return (pixels for _, pixels in self._each("whole"))

    def contents(self, depth: Depth) -> Iterator[bytes]:
        """What is stored of each image, as a fingerprint takes it; that it is an image is checked as far as it is decoded.

        Raises:
            ConfigError: there is none, or it is no image.
        """
        return (content for content, _ in self._each(depth))

    def named(self, index: int) -> str:
        """What an image is called in an error."""
        return f"{self._where}: row {self._rows[index]}, column {self._column!r}"

    def _each(self, depth: Depth) -> Iterator[tuple[bytes, Any]]:
        index = 0
        for batch in self._data.iter(256):
            for value in batch[self._column]:  # pyright: ignore[reportCallIssue, reportArgumentType]
                yield self._read(index, value, depth)
                index += 1

    def _read(self, index: int, value: Any, depth: Depth = "whole") -> tuple[bytes, Any]:
        """What is stored of an image, and the image."""
        file = ""
        try:
            if isinstance(value, dict):
                value = value["path"] if value["bytes"] is None else value["bytes"]
            elif isinstance(value, bytes) and not value.startswith(SIGNATURES):
                return value, _square(value)
            if isinstance(value, str):
                file, value = f" {value}", (self._folder / value).read_bytes()
            if isinstance(value, bytes):
                return value, _decoded(value, depth)
            if value is None:
                raise ValueError("there is none")
            pixels = _of_numbers(np.asarray(value))
            return str(pixels.shape).encode() + pixels.tobytes(), pixels
        except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise
            raise ConfigError(
                f"{self.named(index)}: the image{file} cannot be read ({error}); mend or remove it"
            ) from error


def pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "encoded images need Pillow, which is not installed: `pip install 'anyrank[images]'`"
        ) from error
    return Image


def _decoded(content: bytes, depth: Depth) -> Any:
    """An encoded image, upright as a camera noted it; None, if it is only to be seen whether it can be had."""
    PIL = pillow()
    try:
        image = PIL.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError as error:  # which speaks of a place in memory
        raise ValueError("cannot identify image file") from error
    except PIL.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode is {image.mode}; expected 8 bits for each channel")
    if depth == "coarse":
        image.draft(None, (1, 1))  # of a JPEG all is read, but an eighth of its width and height worked out
        image.load()
    if depth != "whole":
        return None
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _square(content: bytes) -> Pixels:
    side = isqrt(len(content))
    if side * side != len(content) or not side:
        raise ValueError(
            f"{len(content)} bytes are no encoded image (PNG, JPEG, GIF, WebP), and no square one with a byte a pixel"
        )
    return np.frombuffer(content, np.uint8).reshape(1, side, side)


def _of_numbers(array: np.ndarray) -> Pixels:
    if array.ndim == 1 and isqrt(array.size) ** 2 == array.size:
        array = array.reshape(isqrt(array.size), -1)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or not array.size:
        raise ValueError(
            f"its shape is {list(array.shape)}; expected height x width, and one or three channels before or behind them"
        )
    if array.dtype.kind == "f":
        array = np.rint(255 * array)
    if array.dtype.kind not in "uif" or not (array.min() >= 0 and array.max() <= 255):
        raise ValueError("expected whole numbers from 0 to 255, or numbers with a point from 0 to 1")
    return np.ascontiguousarray(array, np.uint8)
