"""What a training step of any model costs: operations and bytes, counted in a step that is traced, not computed.

The model's tensors are replaced by fake ones, which have shapes and no values, and every operation of a forward and
a backward pass is watched. Bytes are those of the tensors that live at one time; what kernels need inside themselves
is not seen. Two depths are traced; their difference is what a block costs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from anyrank.federation import ModelCost

__all__ = ["Watched", "footprint", "watched"]

_ATEN = torch.ops.aten
_SOON_DONE = 3e9  # operations, at most: a step of fewer takes less time than its trace


def footprint(
    model: nn.Module,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    batch: Mapping[str, Tensor],
    train: Callable[[int], object],
    depths: tuple[int, int],
    num_blocks: int,
    adapted: Sequence[nn.Module],
    passes: int = 1,
) -> ModelCost:
    """Trace a step of a model in evaluation mode at two depths.

    A small step is computed instead, as is one that looks at values which do not follow from the batch alone: fake
    tensors have none. Either way the model is left with what `train` put into it last, and without gradients.

    Args:
        model: all tensors that `loss` works with are in the batch, or parameters, buffers or attributes of its modules.
        loss: a scalar from a batch, as in training.
        batch: of the sizes that one pass has in training.
        train: puts adapters of rank 1 into the last so many blocks and takes them out of the others.
        depths: the two to trace, the smaller first; nothing but what is outside of blocks need be trained at depth 0.
        num_blocks: of the model.
        adapted: the layers that get adapters; one row of what enters them is a token.
        passes: of batches of this size in a step, one after the other; they multiply the operations.
    """
    rows = [1]
    with contextlib.ExitStack() as stack:
        for layer in adapted:
            stack.enter_context(layer.register_forward_pre_hook(partial(_count_rows, rows), with_kwargs=True))
        shallow, deep = (_traced(model, loss, batch, train, depth) for depth in depths)
    blocks = depths[1] - depths[0]
    of_block = max(0, deep.peak_bytes - shallow.peak_bytes) // blocks
    return ModelCost(
        forward_flops=passes * deep.forward_flops,
        block_backward_flops=passes * max(0, deep.backward_flops - shallow.backward_flops) // blocks,
        num_blocks=num_blocks,
        base_bytes=_frozen_bytes(model),
        block_activation_bytes=of_block,
        working_bytes=deep.peak_bytes - depths[1] * of_block + sum(tensor.nbytes for tensor in batch.values()),
        tokens_per_step=max(rows),
    )


@dataclass(frozen=True)
class Watched:
    """What a step did.

    Args:
        forward_flops: floating-point operations of matrix products, convolutions and attention until the loss.
        backward_flops: those after it.
        peak_bytes: the most that lived at one time of what the step made, finished gradients apart.
    """

    forward_flops: int
    backward_flops: int
    peak_bytes: int


def watched(model: nn.Module, loss: Callable[[], Tensor]) -> Watched:
    """Compute a loss and its gradients, which are removed again, and watch.

    Args:
        model: whose tensors get gradients.
        loss: to compute; a scalar.
    """
    live = _Live()
    trained = [tensor for _, _, tensor in _tensors(model) if tensor.requires_grad and tensor.is_leaf]
    hooks = [tensor.register_post_accumulate_grad_hook(live.settle) for tensor in trained]
    try:
        with torch.enable_grad(), live:
            value = loss()
            forward = live.flops
            if value.requires_grad:
                value.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for tensor in trained:
            tensor.grad = None
    return Watched(forward, live.flops - forward, live.peak)


def _count_rows(rows: list[int], layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    entering = inputs[0] if inputs else next(iter(named.values()))
    rows.append(entering.numel() // entering.shape[-1])


def _traced(
    model: nn.Module,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    batch: Mapping[str, Tensor],
    train: Callable[[int], object],
    depth: int,
) -> Watched:
    train(depth)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if 6 * parameters * max(tensor.numel() for tensor in batch.values()) > _SOON_DONE:
        # Looking at a value is a RuntimeError under fake tensors, and a quantised weight is more than a tensor; any other error
        # the computed step raises again.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with contextlib.suppress(RuntimeError, AttributeError), fake, _OfBatch(), _faked(model, fake):
            return watched(model, lambda: loss(batch))
    return watched(model, lambda: loss(batch))


class _OfBatch(TorchDispatchMode):
    """Computes, among fake tensors, what follows from the batch alone: masks and the like, at which models look."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _ATEN.index.Tensor:
            args = (args[0], [each for index in args[1] for each in _by_number(index)])
        return func(*args, **kwargs)


def _by_number(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index by a mask as one by positions, of which there is a number to be known."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)


class _Live(TorchDispatchMode):
    """Follows the bytes of the tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # by address of what holds the bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := _FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        if not _only_looks(func):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            finalize(storage, self._freed, storage._cdata)

    def _freed(self, address: int) -> None:
        self.now -= self._sizes.pop(address)

    def settle(self, tensor: Tensor) -> None:
        """Stop counting a gradient that is finished: it is the optimizer's."""
        address = tensor.grad.untyped_storage()._cdata if tensor.grad is not None else 0
        if address in self._sizes:
            self.now -= self._sizes[address]
            self._sizes[address] = 0


def _only_looks(func: Any) -> bool:
    """Whether what an operation returns lies in what it was given."""
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None for each in returns)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 5 * _attention_flops(query, key, value) // 2  # the scores are computed again


_FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _tensors(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """All tensors of a model: where they are, under which name; shared ones more than once."""
    for module in model.modules():
        for place in (module._parameters, module._buffers, vars(module)):
            for name, value in list(place.items()):
                if isinstance(value, Tensor):
                    yield place, name, value


@contextlib.contextmanager
def _faked(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Have a model's tensors be fake for a while."""
    real = list(_tensors(model))
    fakes = {id(tensor): mode.from_tensor(tensor) for _, _, tensor in real}
    try:
        for place, name, tensor in real:
            place[name] = fakes[id(tensor)]
        yield
    finally:
        for place, name, tensor in real:
            place[name] = tensor


def _frozen_bytes(model: nn.Module) -> int:
    """Bytes of a model without what is trained."""
    held = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for _, _, tensor in _tensors(model)
        if not tensor.requires_grad
    }
    return sum(held.values())
