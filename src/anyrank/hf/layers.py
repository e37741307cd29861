"""What stands in an adapted layer: factors of one client or of many at once, dropout, changed weights, mixtures."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from anyrank.adapter import Adapter, LowRank
from anyrank.errors import ConfigError
from anyrank.federation import Weights

__all__ = [
    "ADAPTABLE",
    "FROZEN",
    "LINEAR",
    "TOGETHER",
    "TRAINED",
    "DownConvolution",
    "Dropout",
    "Factor",
    "FactorLayer",
    "Mixture",
    "UpConvolution",
    "dropping",
    "injected",
    "mixed",
    "put",
    "shape_of",
    "unfit",
]

TRAINED, FROZEN = "default", "frozen"  # what is trained, and what is only applied
# The second is GPT-2's, a linear layer whose weight is stored transposed; a convolution is a linear layer on patches.
LINEAR = (nn.Linear, Conv1D, nn.Conv2d)
ADAPTABLE = "Linear, GPT-2's Conv1D, and Conv2d with groups=1 and padding_mode='zeros'"
"""What `unfit` lets through, in words."""


def unfit(module: nn.Module) -> str:
    """What a module is that cannot be adapted, such as `Conv2d with groups=4`; empty if it can be."""
    if not isinstance(module, LINEAR):
        return type(module).__name__
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"Conv2d with groups={module.groups}"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":  # PEFT pads with zeros whatever the base does
        return f"Conv2d with padding_mode={module.padding_mode!r}"
    return ""


class FactorLayer(nn.Module):
    """A factor in place of PEFT's linear layer, in the dtype of its input: of one client, or a stack of many clients' ones."""

    weight: Tensor
    parts: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the factor of whoever it is of."""
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else _linear_together(self, {"weight": weight}, x)


class DownConvolution(FactorLayer):
    """A down projection `[r, channels * height * width of a patch]` in front of a convolution: it cuts patches as that does."""

    stride: Any
    padding: Any
    dilation: Any
    groups, padding_mode = 1, "zeros"

    def __init__(self, base: Any):
        """Cut patches as this convolution does."""
        super().__init__()
        self.patch = base.weight.shape[1:]
        self.stride, self.padding, self.dilation = base.stride, base.padding, base.dilation

    def forward(self, x: Tensor) -> Tensor:
        """From images `[examples, channels, height, width]` to as many of `r` channels."""
        weight = self.weight.to(x.dtype).unflatten(-1, self.patch)
        if weight.ndim == 5:
            return _conv_together(self, {"weight": weight}, x)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding, dilation=self.dilation)


class UpConvolution(FactorLayer):
    """An up projection `[d_out, r]` of the channels at each place."""

    def forward(self, x: Tensor) -> Tensor:
        """From images of `r` channels to as many of `d_out`."""
        weight = self.weight.to(x.dtype)
        if weight.ndim == 2:
            return F.conv2d(x, weight[..., None, None])
        return (_of_each_example(self, weight) @ x.flatten(2)).unflatten(-1, x.shape[2:])


class Dropout(nn.Module):
    """Dropout in front of a factor (Srivastava et al., JMLR 2014): entries are zero with a chance, the others scaled up for it.

    Each client draws with its own generator, and, where what enters is `[examples, tokens, width]`, for its own tokens only: so
    neither who shares the pass nor how far its texts are padded changes what is dropped.
    """

    parts: Sequence[int] = ()
    rngs: Sequence[torch.Generator] = ()
    attended: Tensor | None = None

    def __init__(self, share: float):
        """Drop this share of the entries."""
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """`x` as it is, or in training with entries dropped and the others scaled up."""
        if not self.rngs:
            return x
        positions = torch.ones(x.shape[:-1], dtype=torch.bool)
        if self.attended is not None and self.attended.shape == positions.shape:
            positions = self.attended.bool().cpu()
        tokens = [int(own.sum()) for own in positions.split(list(self.parts) or len(x))]
        drawn = [
            torch.empty(count, x.shape[-1], dtype=torch.bool).bernoulli_(self.share, generator=rng)
            for count, rng in zip(tokens, self.rngs, strict=True)
        ]
        dropped = torch.ones(x.shape, dtype=torch.bool)
        dropped[positions] = torch.cat(drawn)
        return x.masked_fill(dropped.to(x.device), 0) / (1 - self.share)


def dropping(module: Any, share: float) -> Dropout:
    """The dropout that an adapted layer now has."""
    module.lora_dropout[TRAINED] = drop = Dropout(share)
    return drop


def _linear_together(module: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A linear layer of each client on its own part of the batch."""
    weight, x = own["weight"], x.to(own["weight"].dtype)
    if len(set(module.parts)) > 1:
        each = zip(x.split(list(module.parts)), *(tensor.unbind() for tensor in own.values()), strict=True)
        return torch.cat([F.linear(*mine) for mine in each])
    y = x.reshape(len(weight), -1, x.shape[-1]) @ weight.mT
    y = y + own["bias"][:, None] if "bias" in own else y
    return y.reshape(*x.shape[:-1], -1)


def _conv_together(module: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A convolution of each client on its own part of the batch: groups of channels of one image for each of their examples."""
    weight, x, padding = own["weight"], x.to(own["weight"].dtype), module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    convolve = partial(F.conv2d, stride=module.stride, padding=padding, dilation=module.dilation)
    if len(set(module.parts)) > 1:
        each = zip(x.split(list(module.parts)), *(tensor.unbind() for tensor in own.values()), strict=True)
        return torch.cat([convolve(*mine, groups=module.groups) for mine in each])
    side_by_side = x.unflatten(0, (len(weight), -1)).transpose(0, 1).flatten(1, 2)
    y = convolve(side_by_side, *(tensor.flatten(0, 1) for tensor in own.values()), groups=module.groups * len(weight))
    return y.unflatten(1, (len(weight), -1)).transpose(0, 1).flatten(0, 1)


def _norm_together(module: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A layer norm of each client on its own part of the batch."""
    weight = own["weight"]
    y = F.layer_norm(x.to(weight.dtype), weight.shape[1:], eps=module.eps)
    shape = (len(x), *[1] * (x.ndim - 2), -1)
    weight, *bias = (_of_each_example(module, tensor).view(shape) for tensor in own.values())
    return y * weight + bias[0] if bias else y * weight


def _of_each_example(module: Any, tensor: Tensor) -> Tensor:
    """What is stacked by client, stacked by example."""
    return tensor.repeat_interleave(torch.tensor(module.parts, device=tensor.device), dim=0)


TOGETHER: Mapping[type, Callable[..., Tensor]] = {
    nn.Linear: _linear_together,
    nn.Conv2d: _conv_together,
    nn.LayerNorm: _norm_together,
}


class _Changed(nn.Module):
    """A weight with a change that is trained, `W0 + change`, `[d_out, d_in]` however the layer stores its weight."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.stored_transposed = isinstance(module, Conv1D)
        self.change = nn.Parameter(torch.zeros(shape_of(module)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.change.T if self.stored_transposed else self.change.view_as(weight))


class Mixture(nn.Module):
    """A linear layer with finished adapters, each applied as much as a gate says: `W0 x + sum_i g_i E_i(x)`."""

    def __init__(self, base: nn.Module, experts: Sequence[LowRank], scale: float, tau: float):
        """All gates alike at first."""
        super().__init__()
        d_out, count = experts[0].B.shape[0], len(experts)
        self.base_layer = base
        self.experts = nn.ModuleList(nn.Sequential(_linear(E.A), _linear(scale * E.B)) for E in experts)
        self.gate = nn.Parameter(torch.zeros(count, count * d_out))
        self.log_tau = nn.Parameter(torch.tensor([math.log(tau)]))
        self.gates = torch.full((1, count), 1 / count)  # of the last forward pass, by token

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output and the gated ones of the experts."""
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        logits = F.linear(F.normalize(outputs.flatten(-2), dim=-1), self.gate)
        self.gates = torch.softmax(logits / self.log_tau.exp(), dim=-1)
        return self.base_layer(x) + (self.gates[..., None] * outputs).sum(-2)


def _linear(factor: Tensor) -> nn.Linear:
    """A factor as a layer, so that what it costs is counted."""
    linear = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(factor)
    return linear


def shape_of(module: Any) -> tuple[int, int]:
    """`d_out, d_in` of a linear layer; of a convolution its channels, and the numbers in a patch."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a quantised weight is stored in another shape
    rows, columns = module.weight.flatten(1).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def injected(model: Any, names: Sequence[str], scale: float, weights: Weights) -> Any:
    """The model with what is trained, and with plain LoRA a second adapter for what is only applied."""
    if weights == "whole":
        for name in names:
            module = model.get_submodule(name)
            parametrize.register_parametrization(module, "weight", _Changed(module))
        return model
    config = peft.LoraConfig(r=1, lora_alpha=scale, target_modules=list(names), use_dora=weights == "dora")  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # first values are drawn, which `load` replaces
        warnings.filterwarnings("ignore", message="Already found a `peft_config`|fan_in_fan_out is set to")
        for adapter in [TRAINED, FROZEN] if weights == "lora" else [TRAINED]:
            model = peft.inject_adapter_in_model(config, model, adapter_name=adapter)
            for module in map(model.get_submodule, names):
                module.lora_A[adapter], module.lora_B[adapter] = _factor_layers(module.base_layer)
                module.cast_input_dtype_enabled = False  # factors stay in float32 and are cast to a base's smaller type
    return model


def _factor_layers(base: nn.Module) -> tuple[FactorLayer, FactorLayer]:
    """What stands in for PEFT's `lora_A` and `lora_B`."""
    return (DownConvolution(base), UpConvolution()) if isinstance(base, nn.Conv2d) else (FactorLayer(), FactorLayer())


Factor = tuple[Tensor, Tensor]


def put(module: Any, part: Factor | None, fixed: LowRank | Factor | None) -> None:
    """Have an adapted layer apply these, `A` and `B` each; what is None is switched off."""
    module._active_adapter = [TRAINED] * bool(part) + [FROZEN] * bool(fixed)
    if part:
        module.lora_A[TRAINED].weight, module.lora_B[TRAINED].weight = part
    if fixed:
        A, B = (fixed.A, fixed.B) if isinstance(fixed, LowRank) else fixed
        device = module.weight.device
        module.lora_A[FROZEN].weight, module.lora_B[FROZEN].weight = A.to(device), B.to(device)


def mixed(model: Any, names: Sequence[str], scale: float, experts: Sequence[Adapter], tau: float) -> Any:
    """The model with finished adapters in these layers, and a gate over them.

    Raises:
        ConfigError: a layer is a convolution, whose gate would have to look at every place of an image.
    """
    if convolutions := [name for name in names if isinstance(model.get_submodule(name), nn.Conv2d)]:
        raise ConfigError(
            f"lora.target_modules: {convolutions[0]} is a Conv2d, and finished adapters can only be mixed in linear layers. "
            "Leave it out."
        )
    for name in names:
        parts = [expert.layers[name] for expert in experts]
        model.set_submodule(name, Mixture(model.get_submodule(name), parts, scale, tau))
    return model
