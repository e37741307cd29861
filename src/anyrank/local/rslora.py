"""rsLoRA: the product is scaled by 1 / sqrt(r) instead of 1 / r, so that large ranks learn as fast as small ones.

Kalajdzievski. A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. arXiv 2312.03732.

    a client of rank r computes   W x + (alpha / sqrt(r)) B' A x,   alpha = scale sqrt(rank)
    that is                       W x + scale (c B') A x,           c = sqrt(rank / r)
    it starts from B' = B / c, trains A and B', and sends B = c B'

Names: scale = `lora.scale`, the run's; rank = the reference at which both scales are the same; r = a layer's rank.
Our readings: what LoRA calls alpha / r is here one number for all ranks, so rsLoRA's alpha is given by the rank at which it
agrees with that number. rsLoRA's law relates ranks to each other; which rank stays as it was is a choice.
Traps: a client of rank `rank` trains exactly as with `lora`; under Adam the others differ as if B's learning rate were c times
the run's, since Adam does not see how large a gradient is.
Cost: one product of B with a number, at every step.
"""

import math
from typing import Annotated

from annotated_types import Ge
from torch import Generator

from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Local
from anyrank.local.lora import lora

__all__ = ["rslora"]


def rslora(*, rank: Annotated[int, Ge(1)] = 8) -> Local:
    """AdamW on A and B', with B = sqrt(rank / r) B' in the forward pass and in what is sent.

    Args:
        rank: the rank at which the product's scale is the run's.
    """

    def times(adapter: Adapter, power: int) -> Adapter:
        layers = {
            name: LowRank(part.A, part.B * math.sqrt(rank / part.rank) ** power)
            for name, part in adapter.layers.items()
        }
        return Adapter(layers, adapter.dense)

    def enter(received: Adapter) -> Adapter:
        return times(received, -1)

    def form(live: Adapter, rng: Generator) -> Adapter:
        return times(live, 1)

    def leave(trained: Adapter) -> Adapter:
        return times(trained, 1)

    return lora()._replace(enter=enter, form=form, leave=leave)
