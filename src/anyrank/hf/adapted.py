"""One frozen base model into which adapters of any rank and depth are swapped."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import peft
import torch
from torch import Tensor, nn

from anyrank.adapter import CHANGE, GATE, LOG_TAU, MAGNITUDE, NOTHING, Adapter, LowRank, Stack
from anyrank.errors import ConfigError
from anyrank.federation import Factors, Layer, ModelCost, Weights
from anyrank.footprint import footprint
from anyrank.hf.blocks import BLOCK, ENTERING, Blocks, Entered, Stem, block_of, entering
from anyrank.hf.folder import misfits
from anyrank.hf.layers import (
    ADAPTABLE,
    TOGETHER,
    TRAINED,
    FactorLayer,
    dropping,
    injected,
    mixed,
    put,
    shape_of,
    unfit,
)

__all__ = ["AdaptedModel"]

_HEADS = ("classifier", "score")  # what transformers calls the head of a sequence classifier
_NO_INPUTS = ("labels", ENTERING, BLOCK)
_IGNORED = -100  # the label of a token that is no target, in transformers


class AdaptedModel:
    """One frozen base model into which adapters of any rank and depth are swapped.

    Args:
        model: the base model; what is trained is injected in place.
        scale: the run's scale in front of `B A`.
        target_modules: names (or last parts of names) of the linear layers and convolutions to adapt; None takes PEFT's default
            for the model, or where there is none all of them, without those outside of its blocks if it is of transformers.
        modules_to_save: names of modules trained whole beside the classification head.
        weights: what becomes of an adapted layer's weight, as in `Local.weights`.
        experts: by folder, the finished adapters of a mixture.
        tau: the first temperature of its gates.
        dropout: share of what goes into the factors that is dropped in training, for `weights` of plain LoRA.
        checkpointed: have blocks keep their inputs alone, and compute the rest again in the backward pass.

    Attributes:
        layers: the adapted layers, input to output.
        patches: of those that are convolutions, what one row of `A` is laid over: channels, height, width.
        unbatched: why clients cannot be trained together, as far as known (see `probe`); empty if they can.
        device: where the model is.
        dense: current values of the tensors trained whole, by parameter name, with the adapted layers' own ones.

    Raises:
        ConfigError: target modules that match nothing, or something that cannot be adapted; experts that do not fit.
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
        checkpointed: bool = False,
    ):
        """Inject what is trained, freeze the rest."""
        self.modules_to_save = sorted({*_heads(model), *modules_to_save})
        self._scale, self._has_factors = scale, weights in ("lora", "dora")
        names = _targets(model, target_modules, self.modules_to_save)
        bare = {name: model.get_submodule(name) for name in names}
        shapes = {name: shape_of(module) for name, module in bare.items()}
        self.patches = {name: tuple(m.weight.shape[1:]) for name, m in bare.items() if isinstance(m, nn.Conv2d)}
        _check_experts(experts, shapes)
        self.model = (
            mixed(model, names, scale, list(experts.values()), tau)
            if weights == "mole"
            else injected(model, names, scale, weights)
        )
        self.model.requires_grad_(False).eval()
        self.device = next(self.model.parameters()).device
        self._modules = {name: self.model.get_submodule(name) for name in names}
        self._dropouts = [dropping(module, dropout) for module in self._modules.values()] if dropout else []
        self._blocks = Blocks.around(self.model, names)
        if checkpointed:
            self._blocks.checkpoint(self._drawing)
        self._spread = len({*getattr(self.model, "hf_device_map", {}).values()}) > 1
        self._own = _own(self._modules, weights)
        self._trained = dict(_owners(self.model, self.modules_to_save))
        self._head = _language_head(self.model, {*self._modules, *self._trained})
        _keep_in_float32(self._trained, self.modules_to_save)
        self.unbatched = "the base is spread over devices" if self._spread else _unbatched(weights, self._trained)
        self._shared = [*self._trained.values(), *(m for m in self.model.modules() if isinstance(m, FactorLayer))]
        self._dense = {name: p.requires_grad_(True) for name, p in _saved(self.model, self.modules_to_save)} | self._own
        self.layers = tuple(
            Layer(name, d_in, d_out, block)
            for (name, (d_out, d_in)), block in zip(shapes.items(), _blocks(names, _last_block(model)), strict=True)
        )

    def to(self, device: torch.device) -> None:
        """Move the model, unless it is spread over devices."""
        if not self._spread:
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
                module.scaling[TRAINED] = self._scale * scale
                put(module, part and (_leaf(part.A, module, "A" in train), _leaf(part.B, module, "B" in train)), fixed)
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
            module.scaling[TRAINED] = self._scale
            put(module, part, fixed)
        for owner, module in self._trained.items():
            own = {name: stack.dense[f"{owner}.{name}"] for name, _ in module.named_parameters(recurse=False)}
            module.forward = partial(TOGETHER[type(module)], module, own)

    def _live(self, name: str, part: LowRank) -> LowRank:
        """A layer's factors as the model has them, if it has any."""
        module = self._modules[name]
        return LowRank(module.lora_A[TRAINED].weight, module.lora_B[TRAINED].weight) if self._has_factors else part

    def form(self, layers: Mapping[str, LowRank]) -> None:
        """Have the next forward pass use these factors, which may be computed from others that are trained."""
        for name, part in layers.items():
            module = self._modules[name]
            module.lora_A[TRAINED].weight, module.lora_B[TRAINED].weight = part.A, part.B

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
        alone = (inputs.pop("inputs"),) if "inputs" in inputs else ()
        wanted = _wanted(batch) if self._head else None
        with _only(self._head, wanted):
            output = self.model(*alone, **inputs)
        logits = getattr(output, "logits", output)
        return (logits[:, :-1][wanted] if wanted is not None and logits.ndim == 3 else logits).float()

    @contextlib.contextmanager
    def _drawing(self, states: list[Tensor] | None) -> Iterator[list[Tensor]]:
        """Note the states of what draws dropout, or go back to those noted and afterwards to where it was."""
        rngs = [rng for module in self._dropouts[:1] for rng in module.rngs]
        now = [rng.get_state() for rng in rngs]
        for rng, state in zip(rngs, states or [], strict=False):
            rng.set_state(state)
        try:
            yield now
        finally:  # computing again ends with an exception as soon as it has what it needs
            if states is not None:
                for rng, state in zip(rngs, now, strict=True):
                    rng.set_state(state)

    def _below(self, block: int) -> list[Any]:
        """The adapted layers in the blocks below one."""
        numbers = {name: block_of(name) for name in self._modules}
        return [self._modules[name] for name, number in numbers.items() if number is not None and number < block]

    @torch.no_grad()
    def entering(self, batch: Mapping[str, Tensor], block: int) -> Tensor:
        """The hidden states that enter a block, `[examples, tokens, width]`; adapters below it are switched off.

        Args:
            batch: what the model takes.
            block: at most `Stem.blocks`.
        """
        for module in self._below(block):
            put(module, None, None)
        with self._blocks.watched(upto=block) as seen, contextlib.suppress(Entered):
            self._pass(batch)
        return seen[block]

    def stem(self, batch: Mapping[str, Tensor]) -> "Stem":
        """How much of a pass can be left out, found out by trying; the adapter in the model is replaced.

        Args:
            batch: a few examples, best of different lengths.
        """
        if not self._has_factors or not self._blocks.modules or getattr(batch.get("attention_mask"), "ndim", 0) != 2:
            return Stem()
        outside = {layer.name: layer for layer in self.layers if block_of(layer.name) is None}
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
    def num_blocks(self) -> int:
        """Blocks of the model; where none are numbered, each adapted layer is one."""
        return 1 + max(_last_block(self.model) or 0, *(layer.block for layer in self.layers))

    @property
    def depths(self) -> tuple[int, int]:
        """The least and the largest depth at which something is adapted; 0 for the least where there is only one."""
        used = [layer.block for layer in self.layers]
        least, most = self.num_blocks - max(used), self.num_blocks - min(used)
        return (least if least < most else 0), most

    def rehearse(self, depth: int) -> None:
        """Put adapters of rank 1 into the last so many blocks, and none below."""
        parts = {
            layer.name: LowRank(torch.zeros(1, layer.d_in), torch.zeros(layer.d_out, 1))
            for layer in self.layers
            if layer.block >= self.num_blocks - depth
        }
        self.load(Adapter(parts, self.dense))

    def cost(
        self,
        batch: Mapping[str, Tensor],
        loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        *,
        passes: int = 1,
    ) -> ModelCost:
        """What one local step costs; the model's adapter is replaced.

        Args:
            batch: of one pass.
            loss: of each example, from logits and batch.
            passes: in a step.
        """
        return footprint(
            self.model,
            lambda batch: loss(self.logits(batch), batch).sum(),
            batch=batch,
            train=self.rehearse,
            depths=self.depths,
            num_blocks=self.num_blocks,
            adapted=list(self._modules.values()),
            passes=passes,
        )


def _own(modules: Mapping[str, Any], weights: Weights) -> dict[str, nn.Parameter]:
    """By name, what layers train besides their factors: magnitudes of rows, changes of weights, or gates."""
    if weights == "dora":
        return {name + MAGNITUDE: module.lora_magnitude_vector[TRAINED].weight for name, module in modules.items()}
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
    odd = [f"{name} ({type(module).__name__})" for name, module in trained.items() if type(module) not in TOGETHER]
    return f"there is no stacked form of {', '.join(odd)}" if odd else ""


def _leaf(tensor: Tensor, module: Any, trained: bool) -> Tensor:
    return tensor.to(module.weight.device, copy=True).requires_grad_(trained)


def _language_head(model: Any, changed: set[str]) -> nn.Module | None:
    """What makes logits over a vocabulary out of hidden states, unless it is itself adapted or trained."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = {name for name, module in model.named_modules() if module is head}
    return None if names & changed else head


def _wanted(batch: Mapping[str, Tensor]) -> Tensor | None:
    """After which tokens the next one is a target, if labels are tokens."""
    labels = batch.get("labels")
    return labels[:, 1:] != _IGNORED if labels is not None and labels.ndim == 2 else None


@contextlib.contextmanager
def _only(head: nn.Module | None, wanted: Tensor | None) -> Iterator[None]:
    """Have a language model's head see only hidden states from which a target is to be predicted: `[targets, width]`.

    A vocabulary is large, and prompts and padding have no targets.
    """
    if head is None or wanted is None:
        yield
        return
    with head.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, :-1][wanted.to(inputs[0].device)],)):
        yield


def _is_added(name: str) -> bool:
    return "lora_" in name or name.endswith((CHANGE, GATE, LOG_TAU))


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
    """Names of the layers to adapt; modules that are trained whole are not adapted besides."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not any(name == owner or name.startswith(owner + ".") for owner in saved)
    }
    linear = [name for name, module in modules.items() if not unfit(module)]
    if not linear:
        raise ConfigError(
            f"lora.target_modules: this model has no layer that can be adapted. What can be: {ADAPTABLE}."
        )
    if wanted is None and not hasattr(model, "config"):
        return linear
    if wanted is None:
        wanted = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if not wanted:
            return [name for name in linear if block_of(name) is not None] or linear
    odd = {
        target: f"lora.target_modules: {target} matches {name}, a {unfit(module)}. What can be adapted: {ADAPTABLE}."
        for target in wanted
        for name, module in modules.items()
        if _matches(name, target) and unfit(module) and [*module.parameters(recurse=False)]
    }
    if odd:
        raise ConfigError([*odd.values()])
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
    """What transformers draws anew for a task; of other models nobody knows."""
    return [name for name, _ in model.named_modules() if name in _HEADS] if hasattr(model, "config") else []


def _saved(model: nn.Module, modules: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    found = set()
    for name, parameter in model.named_parameters():
        owner = next((m for m in modules if name.startswith(m + ".")), None)
        if owner:
            found.add(owner)
            yield name, parameter
    _check_buffers(model, found)
    if set(modules) - found:
        children = sorted(name for name, _ in model.named_children())
        raise ConfigError(
            f"lora.modules_to_save: {', '.join(sorted(set(modules) - found))} names no module with parameters. "
            f"At the top of this model there are: {', '.join(children)}."
        )


def _check_buffers(model: nn.Module, saved: set[str]) -> None:
    """Refuse to train what also keeps running means, say: PEFT would want these in what is saved, and they are not trained."""
    buffers = [name for name, _ in model.named_buffers() if any(name.startswith(owner + ".") for owner in saved)]
    if lasting := [name for name in buffers if name in model.state_dict()]:
        raise ConfigError(
            f"lora.modules_to_save: {lasting[0]} is kept beside what is trained, as batch norms do, and cannot be averaged. "
            "Name modules without such numbers."
        )


def _last_block(model: nn.Module) -> int | None:
    return max((number for name, _ in model.named_parameters() if (number := block_of(name)) is not None), default=None)


def _blocks(names: Sequence[str], last: int | None) -> list[int]:
    """The number in each name is its block; what has none (a pooler) goes with the last, or each layer is one block."""
    if last is None:
        return list(range(len(names)))
    numbers = [block_of(name) for name in names]
    return [last if number is None else number for number in numbers]
