"""What a plan costs on a device: seconds, and bytes of memory.

A local step takes `f + k mu` seconds: `f` for the forward pass of the whole model and `mu` for the backward
pass through each of the `k` trained blocks. Depth decides the time; rank hardly changes it, but decides the
bytes sent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from anyrank.federation import Device, Layer, ModelCost, Plan, Profile, Spec, Times

__all__ = [
    "PROFILES",
    "compute_seconds",
    "memory_bytes",
    "reply_seconds",
    "too_small",
    "trained_blocks",
    "transformer_cost",
    "undisturbed",
]

_FLOAT = 4  # bytes of a float32


def transformer_cost(
    *,
    matrix_parameters_per_block: int,
    matrix_parameters_outside_blocks: int,
    num_blocks: int,
    hidden: int,
    heads: int,
    intermediate: int,
    batch_size: int,
    tokens: int,
    base_bytes: int,
) -> ModelCost:
    """Estimate the work and the memory of an encoder like BERT, in float32, base frozen, from its sizes alone.

    What a model at hand costs `footprint` counts; published times of models that are not at hand are read by this.

    A forward pass takes 2 operations per matrix parameter and token, and `4 tokens² hidden` per example and
    block for attention's scores and mixing. On the way back the matrices cost as much again, since a frozen
    weight has no gradient; attention costs twice its forward, since both of its operands have one.

    Per token a block keeps query, key, value and the inputs of two norms (5 `hidden`), the input of its
    non-linearity (`intermediate`), and attention's weights (`heads * tokens`, eager) or its output (`hidden`,
    fused), whichever is larger. A block that is not trained keeps nothing. For a moment, a step needs the
    widest tensor and its gradient, the residual stream, and the logits.

    Args:
        matrix_parameters_per_block: weights of one block's matrices.
        matrix_parameters_outside_blocks: those of head and pooler, as if every token passed; no embeddings.
        num_blocks: blocks.
        hidden: width of the residual stream.
        heads: attention heads.
        intermediate: width of the feed-forward layer.
        batch_size: examples per step.
        tokens: tokens per example, padding included.
        base_bytes: size of all frozen weights, embeddings included.
    """
    rows = batch_size * tokens
    matrices = 2 * matrix_parameters_per_block * rows
    attention = 4 * tokens * hidden * rows
    kept = 5 * hidden + max(hidden, heads * tokens) + intermediate
    widest = max(intermediate, heads * tokens)
    logits = matrix_parameters_outside_blocks // hidden
    return ModelCost(
        forward_flops=num_blocks * (matrices + attention) + 2 * matrix_parameters_outside_blocks * rows,
        block_backward_flops=matrices + 2 * attention,
        num_blocks=num_blocks,
        base_bytes=base_bytes,
        block_activation_bytes=_FLOAT * rows * kept,
        working_bytes=_FLOAT * rows * (2 * widest + hidden + logits),
        tokens_per_step=rows,
    )


# The board timings name BERT-base and a batch of 32 but no length: 64 tokens is our assumption.
_BERT_BASE = transformer_cost(
    matrix_parameters_per_block=4 * 768 * 768 + 2 * 768 * 3072,
    matrix_parameters_outside_blocks=768 * 768 + 768 * 2,
    num_blocks=12,
    hidden=768,
    heads=12,
    intermediate=3072,
    batch_size=32,
    tokens=64,
    base_bytes=_FLOAT * 109_483_778,
)


def _board(f: float, mu: float, *, gigabytes: int) -> Profile:
    """A Jetson that takes `f + k mu` seconds for a step of BERT-base with `k` trained blocks."""
    return Profile(
        forward_flops=_BERT_BASE.forward_flops / f,
        backward_flops=_BERT_BASE.block_backward_flops / mu,
        memory_bytes=gigabytes * 1e9,
        up_bps=1e6,
        down_bps=15e6,
    )


def _estimate(flops: float, *, gigabytes: int, up: float, down: float) -> Profile:
    """A device by rule of thumb: one speed for both passes, network in bytes a second."""
    return Profile(flops, flops, gigabytes * 1e9, up, down)


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "jetson-tx2": _board(1.32, 0.058, gigabytes=4),
        "jetson-nx": _board(0.73, 0.030, gigabytes=6),
        "jetson-agx": _board(0.42, 0.028, gigabytes=8),
        "phone": _estimate(5e10, gigabytes=2, up=1e6, down=5e6),
        "laptop": _estimate(3e11, gigabytes=8, up=2.5e6, down=12.5e6),
        "workstation": _estimate(1e13, gigabytes=16, up=12.5e6, down=125e6),
        "server": _estimate(5e13, gigabytes=64, up=125e6, down=1.25e9),
    }
)
"""Profiles by name.

The three Jetson boards are fitted to the seconds per batch of BERT-base on SST-2 in the tables of LEGEND's
prototype (arXiv 2412.20004), at all 12 layers and at the 1, 2 and 6 that the boards train there. Memory
classes and bandwidth are that prototype's; upload is the centre of its distribution, the lower end of the 1
to 3 MB/s it is clipped to. The other profiles are estimates, good to an order of magnitude.
"""


def trained_blocks(plan: Plan, layers: Sequence[Layer], *, num_blocks: int) -> int:
    """A plan's depth: blocks from the lowest it adapts up to the model's last, 0 if it adapts none."""
    return num_blocks - min((layer.block for layer in layers if layer.name in plan.ranks), default=num_blocks)


def undisturbed(profile: Profile, model: ModelCost) -> Times:
    """What one would measure of a device that nothing slows down."""
    return Times(
        forward=model.forward_flops / profile.forward_flops,
        backward=model.block_backward_flops / profile.backward_flops,
        up=1 / profile.up_bps,
    )


def compute_seconds(plan: Plan, times: Times, *, model: ModelCost, layers: Sequence[Layer]) -> float:
    """Seconds that a plan's local steps take.

    Args:
        plan: what is trained, for how many steps.
        times: of the device.
        model: what a step costs.
        layers: the run's adapted layers.
    """
    blocks = trained_blocks(plan, layers, num_blocks=model.num_blocks)
    return plan.steps * (times.forward + blocks * times.backward)


def reply_seconds(plan: Plan, device: Device, spec: Spec) -> float:
    """Seconds that a device should take for a plan's local steps and for sending the result, `steps (f + k mu) + up bytes`.

    Args:
        plan: what is trained and sent.
        device: with what was measured of it; before its first reply, its profile counts.
        spec: of the run.
    """
    times = device.times or undisturbed(device.profile, spec.cost)
    planned = [layer for layer in spec.layers if layer.name in plan.ranks]
    sent = _parameters(planned, plan) + sum(tensor.numel() for tensor in spec.start.dense.values())
    return compute_seconds(plan, times, model=spec.cost, layers=spec.layers) + times.up * _FLOAT * sent


def _parameters(planned: Sequence[Layer], plan: Plan) -> int:
    return sum(plan.ranks[layer.name] * (layer.d_in + layer.d_out) for layer in planned)


def memory_bytes(plan: Plan, *, model: ModelCost, layers: Sequence[Layer], dense_parameters: int) -> int:
    """Bytes that training a plan needs: base, activations of the trained blocks, AdamW's state.

    With a cost from `footprint`, this was within 6 % of the most bytes of tensors that live at one time, in
    transformers and small convolutional networks, at ranks up to 64 and any depth. Not in it are Python, the
    libraries, and what kernels and allocators need inside.

    Args:
        plan: what is trained.
        model: what a step costs.
        layers: the run's adapted layers.
        dense_parameters: parameters trained beside the adapter (the head).
    """
    planned = [layer for layer in layers if layer.name in plan.ranks]
    blocks = trained_blocks(plan, layers, num_blocks=model.num_blocks)
    trained = dense_parameters + _parameters(planned, plan)
    # The inputs of adapters are among a block's activations; their images under `A` are as wide as the rank.
    images = _FLOAT * model.tokens_per_step * sum(plan.ranks[layer.name] for layer in planned)
    optimizer = 4 * _FLOAT * trained  # value, gradient and AdamW's two moments
    return model.base_bytes + model.working_bytes + blocks * model.block_activation_bytes + images + optimizer


def too_small(
    plans: Sequence[Plan],
    devices: Sequence[Device],
    *,
    model: ModelCost,
    layers: Sequence[Layer],
    dense_parameters: int,
) -> list[str]:
    """A sentence for each class of devices whose memory does not hold their plans; none if all fit.

    Args:
        plans: what each client is asked to train.
        devices: the fleet, with every client of the plans.
        model: what a step costs.
        layers: the run's adapted layers.
        dense_parameters: parameters trained beside the adapter (the head).
    """
    fleet = {device.client: device for device in devices}
    needed = partial(memory_bytes, model=model, layers=layers, dense_parameters=dense_parameters)
    groups: dict[tuple[str, int], list[Plan]] = {}
    for plan in plans:
        device = fleet[plan.client]
        if needed(plan) > device.profile.memory_bytes:
            groups.setdefault((device.kind, plan.rank), []).append(plan)
    return [
        _does_not_fit([fleet[plan.client] for plan in group], group[0], layers, needed) for group in groups.values()
    ]


def _does_not_fit(devices: Sequence[Device], plan: Plan, layers: Sequence[Layer], needed: Callable[[Plan], int]) -> str:
    """Say by how much a plan exceeds the devices of a class, and what can be done."""
    device = devices[0]
    names = ", ".join(repr(each.client) for each in devices[:5]) + ", ..." * (len(devices) > 5)
    return (
        f"{len(devices)} x {device.kind} ({names}): training rank {plan.rank} on {len(plan.ranks)} layers needs "
        f"{needed(plan) / 1e6:,.1f} MB, but the device has {device.profile.memory_bytes / 1e6:,.1f} MB; use "
        "a smaller batch, shorter texts, a smaller model or a lower rank, or give the clients a larger device"
        f"{_what_fits(device, plan, layers, needed)}"
    )


def _what_fits(device: Device, plan: Plan, layers: Sequence[Layer], needed: Callable[[Plan], int]) -> str:
    """How deep the device could train the plan's layers at rank 1."""
    blocks = sorted({layer.block for layer in layers if layer.name in plan.ranks})
    for lowest in blocks:
        ranks = {layer.name: 1 for layer in layers if layer.name in plan.ranks and layer.block >= lowest}
        if needed(replace(plan, ranks=ranks)) <= device.profile.memory_bytes:
            depth = sum(block >= lowest for block in blocks)
            return f"; it holds rank 1 in the last {depth} of {len(blocks)} blocks"
    return ""
