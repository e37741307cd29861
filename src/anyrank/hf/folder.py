"""PEFT directories: adapters as they are kept and handed on.

Inside, a layer is called as in the base model (`encoder.layer.0.attention.self.query`) and the run's one scale is in
front of every product. In a PEFT directory the same tensors are `base_model.model.<layer>.lora_A.weight`, and
`lora_alpha = scale * r` per layer says the same thing; of a convolution they have four dimensions there, `[r, channels,
height, width]` and `[d_out, r, 1, 1]`. What a layer trains besides its factors is a dense tensor of its
own: `<layer>.magnitude` with DoRA (`<layer>.lora_magnitude_vector` there), `<layer>.change` where weights are trained whole,
`<layer>.gate` and `<layer>.log_tau` over a mixture of finished adapters, for which PEFT has no form.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyrank import lowrank
from anyrank.adapter import CHANGE, MAGNITUDE, Adapter, LowRank
from anyrank.errors import ConfigError
from anyrank.pretrained import Pretrained

__all__ = ["factored", "misfits", "read_adapter", "write_adapter", "write_mixture"]

_PREFIX = "base_model.model."
_SAVED_MAGNITUDE = ".lora_magnitude_vector"  # in a PEFT directory


def misfits(where: str, adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What is wrong with the layers of an adapter that was read.

    Args:
        where: the recipe's key and the folder, to begin each sentence with.
        adapter: as read.
        shapes: `d_out, d_in` of the layers that the recipe adapts.
    """
    problems = []
    for name, part in adapter.layers.items():
        if not all(torch.isfinite(factor).all() for factor in (part.A, part.B)):
            problems.append(f"{where}: {name} holds a number that is not finite.")
        if name not in shapes:
            problems.append(f"{where} adapts {name}, which lora.target_modules does not.")
        elif shapes[name] != (part.B.shape[0], part.A.shape[1]):
            problems.append(f"{where}: {name} is {part.B.shape[0]} x {part.A.shape[1]}, not {shapes[name]}.")
    return problems


def write_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    scale: float,
    base: Pretrained,
    modules_to_save: Sequence[str],
    label_names: Sequence[str],
    card: str,
    patches: Mapping[str, Sequence[int]] = MappingProxyType({}),
    task_type: str | None = "SEQ_CLS",
) -> None:
    """Write a PEFT directory that `PeftModel.from_pretrained` loads, with a model card beside it.

    The same adapter gives the same bytes. An adapter with magnitudes becomes one of DoRA.

    Args:
        folder: where to; made if it is not there.
        adapter: what is written.
        scale: the run's.
        base: whose adapter it is.
        modules_to_save: names of the modules that are trained whole.
        label_names: in label order, for `labels.json`; without any there is no such file.
        card: the text of `README.md`.
        patches: of the layers that are convolutions, `AdaptedModel.patches`.
        task_type: PEFT's name for what the model does, if it has one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = dict(sorted(adapter.ranks.items()))
    top = max(ranks.values())
    config = peft.LoraConfig(
        task_type=task_type,  # pyright: ignore[reportArgumentType]
        base_model_name_or_path=base.name,
        r=top,
        lora_alpha=scale * top,  # pyright: ignore[reportArgumentType]
        rank_pattern={_pattern(name, ranks): rank for name, rank in ranks.items() if rank != top},
        alpha_pattern={_pattern(name, ranks): scale * rank for name, rank in ranks.items() if rank != top},
        target_modules=list(ranks),
        modules_to_save=list(modules_to_save),
        use_dora=any(name.endswith(MAGNITUDE) for name in adapter.dense),
        inference_mode=True,
    ).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    _write_json(folder / "adapter_config.json", plain)
    if label_names:
        _write_json(folder / "labels.json", {str(i): name for i, name in enumerate(label_names)})
    (folder / "README.md").write_text(card, encoding="utf-8")
    flat = {f"{_PREFIX}{_saved_name(name)}": tensor for name, tensor in adapter.dense.items()}
    for name, part in adapter.layers.items():
        patch = patches.get(name)
        flat[f"{_PREFIX}{name}.lora_A.weight"] = part.A.unflatten(1, patch) if patch else part.A
        flat[f"{_PREFIX}{name}.lora_B.weight"] = part.B[..., None, None] if patch else part.B
    contiguous = {name: tensor.detach().contiguous() for name, tensor in flat.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_mixture(
    folder: Path,
    adapter: Adapter,
    *,
    experts: Sequence[str],
    scale: float,
    base: Pretrained,
    modules_to_save: Sequence[str],
    label_names: Sequence[str],
    card: str,
) -> None:
    """Write the gates of a mixture and what else was trained, with the folders of its experts; `load_mixture` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "base": base.name,
        "experts": list(experts),
        "labels": list(label_names),
        "modules_to_save": list(modules_to_save),
        "scale": scale,
        "target_modules": list(adapter.layers),
    }
    _write_json(folder / "mixture.json", about)
    (folder / "README.md").write_text(card, encoding="utf-8")
    dense = {name: tensor.detach().contiguous() for name, tensor in adapter.dense.items()}
    save_file(dense, folder / "mixture.safetensors", metadata={"format": "pt"})


def _pattern(name: str, names: Iterable[str]) -> str:
    """What PEFT takes for this layer alone: unless a name says where it begins, it stands for longer ones that end in it."""
    return f"^{name}" if any(other.endswith("." + name) for other in names) else name


def _saved_name(dense: str) -> str:
    """What a PEFT directory calls a dense tensor."""
    return dense.removesuffix(MAGNITUDE) + _SAVED_MAGNITUDE if dense.endswith(MAGNITUDE) else dense


def factored(adapter: Adapter, *, scale: float) -> Adapter:
    """The same adapter with the changes of whole weights as products of their exact rank, which PEFT can load."""
    layers, dense = dict(adapter.layers), {}
    for name, tensor in adapter.dense.items():
        if name.endswith(CHANGE):
            d_out, d_in = tensor.shape
            change, one = tensor / scale, torch.eye(min(d_out, d_in), dtype=tensor.dtype)
            part = LowRank(change, one) if d_out < d_in else LowRank(one, change)
            layers[name.removesuffix(CHANGE)] = lowrank.compact(part)
        else:
            dense[name] = tensor
    return Adapter(layers, dense)


def read_adapter(folder: Path, *, scale: float) -> Adapter:
    """Read a PEFT LoRA or DoRA directory, its scale folded into `B` so that the run's `scale` stands in front.

    Raises:
        ConfigError: no adapter there, or more than LoRA on linear layers and convolutions (trained biases, embeddings).
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        flat = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{folder}: no PEFT adapter can be read there ({error}). Expected adapter_config.json and "
            "adapter_model.safetensors, as PEFT's save_pretrained writes them."
        ) from error
    _check_alphas(folder / "adapter_config.json", config)
    magnitudes = any(key.endswith(_SAVED_MAGNITUDE) for key in flat)
    if (
        config.get("peft_type") != "LORA"
        or config.get("bias", "none") != "none"
        or bool(config.get("use_dora")) != magnitudes
    ):
        raise ConfigError(
            f"{folder}: expected LoRA, or DoRA with its magnitudes, without trained biases; got another kind."
        )
    layers, dense = {}, {}
    for key, tensor in sorted(flat.items()):
        name = key.removeprefix(_PREFIX)
        if name.endswith(_SAVED_MAGNITUDE):
            dense[name.removesuffix(_SAVED_MAGNITUDE) + MAGNITUDE] = tensor.float()
        elif ".lora_" not in name:
            dense[name] = tensor.float()
        elif not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ConfigError(
                f"{folder}: {key} is no factor of LoRA on a linear layer or a Conv2d, which is all that is read."
            )
        elif (partner := _other_factor(key)) not in flat:
            raise ConfigError(
                f"{folder / 'adapter_model.safetensors'}: {key} is there without {partner}, so the adapter is not whole. "
                "Save it again."
            )
        elif name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            A, B = _flattened(tensor, flat[partner], f"{folder}: {layer}")
            factor = _scale_of(config, layer, len(A)) / scale
            layers[layer] = LowRank(A.float(), B.float() * factor)
    return Adapter(layers, dense)


def _check_alphas(file: Path, config: Any) -> None:
    """Refuse a configuration that does not say what stands in front of each product."""
    if not isinstance(config, dict) or "lora_alpha" not in config:
        raise ConfigError(f"{file}: there is no lora_alpha; expected what PEFT's LoraConfig saves.")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{file}: alpha_pattern: expected a number for each layer's pattern; got {patterns!r}.")
    for key, value in [("lora_alpha", config["lora_alpha"]), *patterns.items()]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{file}: {key}: expected a finite number; got {value!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{file}: alpha_pattern: expected regular expressions; got {pattern!r} ({error})."
            ) from error


def _other_factor(key: str) -> str:
    """What the partner of a layer's factor is called."""
    layer, _, rest = key.rpartition(".lora_")
    return f"{layer}.lora_{'B' if rest[0] == 'A' else 'A'}{rest[1:]}"


def _flattened(A: Tensor, B: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The factors of a linear layer as they are, of a convolution in two dimensions each."""
    linear = A.ndim == B.ndim == 2
    convolution = A.ndim == B.ndim == 4 and B.shape[2:] == (1, 1)
    if not (linear or convolution) or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise ConfigError(
            f"{where}: expected factors of a linear layer, [r, d_in] and [d_out, r], or of a Conv2d with groups=1, "
            f"[r, channels, height, width] and [d_out, r, 1, 1]; got {list(A.shape)} and {list(B.shape)}."
        )
    return A.flatten(1), B.flatten(1)


def _scale_of(config: dict, layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
