"""BeamLoRA: slots compete; a gate says how much each counts, and weak ones are overwritten by copies of strong ones.

Gu, Zhang, Liu, Fu, Lin, Wang, Sun, Wu, Wang, Wang. BeamLoRA: Beam-Constraint Low-Rank Adaptation. ACL 2025,
arXiv 2502.13604.

    W x + scale * B diag(q) A x,      q = r softmax(gate / temperature),      gate = 0 at the start
    what is sent: B diag(q) and A

    at the steps interval, 2 interval, ... below `end`:
        p = 1 - (1 - top_p) (1 + cos(pi step / end)) / 2
        of all slots of all layers, sorted by q: the largest stay, as many as sum to at most p of the whole; the rest is weak
        in each layer, the weakest slot gets the strongest one's A row, B column and moments, as they were interval / 2
        steps ago; the next weakest those of the next strongest; and so on
        both gates of such a pair become their mean, and the gates' moments zero

Names: gate = the paper's score of a slot, `gate/<layer>` among the dense tensors; r = the layer's rank; step = of this round,
from 0.
Our readings: a client's round is a whole run of BeamLoRA. The gates are folded into B when it ends, so the next round starts
with equal gates and at p = top_p. Weakest is paired with strongest, where the released code draws the pairs. At most half of a
layer's slots are weak. Slots are copied only where both factors are trained; where B is frozen, the gates rest.
Traps: a copy moves a direction to another slot, so means of factors, slot by slot, mix what does not belong together. Methods
that average products do not mind.
Cost: r numbers more to train for each layer, and a second copy of factors and moments to remember.
"""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Generator, Tensor
from torch.optim import Optimizer

from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Local
from anyrank.local.lora import lora

__all__ = ["beamlora"]


def beamlora(
    *,
    interval: Annotated[int, Ge(2)] = 4,
    end: Annotated[int, Ge(1)] = 16,
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95,
    temperature: Annotated[float, Gt(0)] = 0.05,
) -> Local:
    """AdamW on gated slots, the weak ones of which are replaced from time to time.

    Args:
        interval: local steps between replacements.
        end: the local step from which on nothing is replaced.
        top_p: share of the sum of all q that stays, at first; 1 never replaces.
        temperature: of the softmax over a layer's gates.
    """

    def shares(gate: Tensor) -> Tensor:
        return len(gate) * torch.softmax(gate / temperature, 0)

    def gated(name: str, part: LowRank, adapter: Adapter) -> LowRank:
        return LowRank(part.A, part.B * shares(adapter.dense[_gate(name)]))

    def enter(received: Adapter) -> Adapter:
        gates = {_gate(name): part.B.new_zeros(part.rank) for name, part in received.layers.items()}
        return Adapter(received.layers, {**received.dense, **gates})

    def form(live: Adapter, rng: Generator) -> Adapter:
        layers = {name: gated(name, part, live) if part.B.requires_grad else part for name, part in live.layers.items()}
        return Adapter(layers, live.dense)

    def leave(trained: Adapter) -> Adapter:
        layers = {name: gated(name, part, trained) for name, part in trained.layers.items()}
        gates = {_gate(name) for name in layers}
        return Adapter(layers, {name: tensor for name, tensor in trained.dense.items() if name not in gates})

    def on_step(live: Adapter, optimizer: Optimizer, step: int) -> None:
        beams = {
            name: (part, live.dense[_gate(name)])
            for name, part in live.layers.items()
            if part.A.requires_grad and part.B.requires_grad
        }
        if step % interval == interval // 2:
            for part, _ in beams.values():
                _remember(part, optimizer)
        p = 1 - (1 - top_p) * (1 + math.cos(math.pi * min(step / end, 1))) / 2
        if step > 0 and step % interval == 0 and p < 1 and beams:
            weak = _weak([shares(gate) for _, gate in beams.values()], p)
            for (part, gate), count in zip(beams.values(), weak, strict=True):
                _overwrite(part, gate, optimizer, min(count, part.rank // 2))

    return lora()._replace(enter=enter, form=form, leave=leave, on_step=on_step)


def _gate(layer: str) -> str:
    return f"gate/{layer}"


def _weak(shares: list[Tensor], p: float) -> list[int]:
    """How many slots of each layer are not among the largest, which sum to at most `p` of the whole."""
    flat = torch.cat(shares).double().cpu()  # sums along a list have no deterministic form on a GPU
    values, order = flat.sort(descending=True, stable=True)
    weak = torch.ones_like(flat, dtype=torch.bool)
    weak[order[values.cumsum(0) <= p * flat.sum()]] = False
    return [int(own.sum()) for own in weak.split([len(share) for share in shares])]


def _remember(part: LowRank, optimizer: Optimizer) -> None:
    for factor in (part.A, part.B):
        memory = optimizer.state[factor]
        memory["earlier"] = [tensor.clone() for tensor in (factor, memory["exp_avg"], memory["exp_avg_sq"])]


def _overwrite(part: LowRank, gate: Tensor, optimizer: Optimizer, count: int) -> None:
    """Overwrite the `count` weakest slots with what the `count` strongest were."""
    if count == 0:
        return
    order = gate.argsort(descending=True, stable=True)
    strong, weak = order[:count], order.flip(0)[:count]
    for slots, factor in enumerate((part.A, part.B)):  # slots are rows of A and columns of B
        memory = optimizer.state[factor]
        now = (factor, memory["exp_avg"], memory["exp_avg_sq"])
        for tensor, earlier in zip(now, memory["earlier"], strict=True):
            tensor.index_copy_(slots, weak, earlier.index_select(slots, strong))
    gate[weak] = gate[strong] = (gate[weak] + gate[strong]) / 2
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[gate][moment].zero_()
