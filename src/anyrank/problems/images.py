"""A class for each image."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from anyrank.data import Parts, absent_columns, lacks_labels
from anyrank.data.images import Depth, Images, pillow
from anyrank.errors import ConfigError
from anyrank.paths import expanded
from anyrank.plain import PLAIN
from anyrank.problem import ACCURACY, CLASSIFICATION, Metric, Problem
from anyrank.problems.given import Given
from anyrank.problems.scores import macro_f1

__all__ = ["image_classification"]

ROW = "row of its part"
"""A column that we add: split-off examples are still called by the row in which they came."""


IMAGES = CLASSIFICATION._replace(metrics=(ACCURACY, Metric("macro_f1", macro_f1)))


def image_classification(given: Given, *, image: str = "image", label: str = "label") -> Problem:
    """A class for each image, by a model of transformers or one of `PLAIN`.

    Args:
        given: model and data.
        image: the column of images, see `data.images.Images`.
        label: the column of classes: strings, integers or booleans.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    train, test, label_names = given.labelled(_numbered(_found(given, image, label)), label)
    images = [
        Images(part, image, where=where, folder=folder, rows=part[ROW][:])
        for part, where, folder in zip((train, test), ("training data", "test data"), _folders(given), strict=True)
    ]
    labels = [np.asarray(part["label"][:]) for part in (train, test)]
    plain = given.base.name in PLAIN
    prepare = _plain if plain else _pretrained
    # Also finds what is no image, before a model is loaded; our own models decode all of them in any case.
    fingerprint = _fingerprint(images, labels, label_names, depth="header" if plain else "coarse")
    majority = np.bincount(labels[0]).argmax()
    return Problem(
        objective=IMAGES,
        columns={name: train[name][:] for name in train.column_names if name != ROW and _is_simple(train, name)},
        label_names=label_names,
        references={"majority class": float(np.mean(labels[1] == majority))},
        fingerprint=fingerprint,
        **prepare(given, images, labels, label_names),
    )


class _Pixels:
    """Images in one tensor of a byte for each number; as floats from -1 to 1 when they are asked for.

    Fixed numbers, not the mean and deviation of some images, so that a model takes an image alike whatever lies beside it.
    """

    def __init__(self, pixels: Tensor, labels: np.ndarray, dtype: torch.dtype):
        self.pixels, self.labels, self.dtype = pixels, labels, dtype

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {"inputs": (self.pixels[index] / 127.5 - 1).to(self.dtype), "labels": int(self.labels[index])}


class _Processed:
    """Images as an image processor hands them to its model, each read and processed when it is asked for."""

    def __init__(self, images: Images, labels: np.ndarray, processor: Any, *, grey: bool):
        self.images, self.labels, self.processor, self.mode = images, labels, processor, "L" if grey else "RGB"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        pixels = self.images[index]
        picture = pillow().fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])
        processed = self.processor(picture.convert(self.mode), return_tensors="pt")
        return {"pixel_values": processed["pixel_values"][0], "labels": int(self.labels[index])}


def _plain(
    given: Given, images: Sequence[Images], labels: Sequence[np.ndarray], label_names: Sequence[str]
) -> dict[str, Any]:
    """What a problem with one of our own models is made of."""
    if given.loading.quantize:
        raise ConfigError(f"model.quantize: {given.base.name} is too small to be quantised; leave it out.")
    shape = images[0][0].shape
    train, test = (
        _Pixels(_held(part, shape, f"model.name: {given.base.name}"), own, given.loading.dtype)
        for part, own in zip(images, labels, strict=True)
    )
    return {"model": partial(_drawn, given, shape, len(label_names)), "train": train, "test": test}


def _drawn(given: Given, shape: tuple[int, int, int], classes: int) -> Any:
    return PLAIN[given.base.name](shape, classes).to(given.loading.dtype)


def _held(images: Images, shape: tuple[int, ...], who: str) -> Tensor:
    """All images in one tensor."""
    held = torch.empty(len(images), *shape, dtype=torch.uint8)
    for index, pixels in enumerate(images):
        if pixels.shape != shape:
            found, expected = (" x ".join(map(str, each)) for each in (pixels.shape, shape))
            raise ConfigError(
                f"{images.named(index)}: the image is {found} (channels, height, width) and the first one {expected}; {who} "
                "takes images of one shape. Bring them to one, or take a model with an image processor."
            )
        held[index] = torch.from_numpy(pixels.copy())
    return held


def _pretrained(
    given: Given, images: Sequence[Images], labels: Sequence[np.ndarray], label_names: Sequence[str]
) -> dict[str, Any]:
    """What a problem with a model of transformers is made of."""
    pillow()
    processor = given.image_processor()
    grey = getattr(given.config(), "num_channels", 3) == 1
    train, test = (_Processed(part, own, processor, grey=grey) for part, own in zip(images, labels, strict=True))
    names = dict(enumerate(label_names))
    arguments = {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }
    auto_class = "AutoModelForImageClassification"
    return {
        "model": given.load(auto_class, **arguments),
        "train": train,
        "test": test,
        "auto_class": auto_class,
        "model_arguments": arguments,
    }


def _found(given: Given, image: str, label: str) -> Parts:
    """The source's parts, once their columns are there."""
    if image in (label, "label"):
        raise ConfigError(
            "problem.image: expected neither the label column nor one named 'label'; rename it in the data"
        )
    found = given.parts([image], usable=lacks_labels(label))
    problems = []
    for where, part in {"training data": found.train, "test data": found.test}.items():
        if part is not None:
            problems += absent_columns(part, [image, label], where=where)
            problems += [] if len(part) else [f"{where}: there are no rows"]
    if problems:
        raise ConfigError(problems)
    return found


def _numbered(found: Parts) -> Parts:
    return Parts(*(part and part.add_column(ROW, list(range(1, len(part) + 1))) for part in found))  # pyright: ignore


def _folders(given: Given) -> list[Path]:
    """What paths of training and of test images are relative to."""
    source = expanded(given.source, key="data.source")
    test = source if given.test is None else expanded(given.test, key="data.test")
    return [path if path.is_dir() else path.parent for path in (source, test)]


def _is_simple(data: Dataset, column: str) -> bool:
    """Whether a partition can go by a column."""
    kind = data.features[column]
    return isinstance(kind, ClassLabel) or (isinstance(kind, Value) and "binary" not in kind.dtype)


def _fingerprint(
    images: Sequence[Images], labels: Sequence[np.ndarray], label_names: Sequence[str], *, depth: Depth
) -> str:
    digest = hashlib.sha256(json.dumps(list(label_names)).encode())
    for part, own in zip(images, labels, strict=True):
        digest.update(b"\n")
        for content, number in zip(part.contents(depth), own, strict=True):
            digest.update(f"{len(content)} {number}\n".encode() + content)
    return digest.hexdigest()
