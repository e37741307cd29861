"""Reading back a mixture of finished adapters, for which PEFT has no form."""

import json
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import nn

from anyrank.adapter import Adapter
from anyrank.errors import ConfigError
from anyrank.hf.adapted import AdaptedModel
from anyrank.hf.folder import read_adapter
from anyrank.hf.load import load_classifier
from anyrank.pretrained import resolve

__all__ = ["load_mixture"]


def load_mixture(folder: Path, *, base: str | None = None) -> nn.Module:
    """The model that `write_mixture` wrote down, with its experts, ready to answer.

    Args:
        folder: what was written.
        base: where the base model is, if its name in there does not lead to it.

    Raises:
        ConfigError: no mixture there, or its base model or an expert is not to be had.
    """
    try:
        about = json.loads((folder / "mixture.json").read_text(encoding="utf-8"))
        dense = load_file(folder / "mixture.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{folder}: no mixture of adapters can be read there ({error}).") from error
    model = AdaptedModel(
        load_classifier(resolve(base or about["base"]), label_names=about["labels"], seed=0),
        scale=about["scale"],
        target_modules=about["target_modules"],
        modules_to_save=about["modules_to_save"],
        weights="mole",
        experts={name: read_adapter(Path(name), scale=about["scale"]) for name in about["experts"]},
    )
    model.load(Adapter({}, dense))
    return model.model
