"""PreLort: each rank slot is averaged over its owners, and clients train all their prefixes at once.

Waseem, Tastan, Jovanovic, Lane, Lukas, Nandakumar, Horvath. PreLort: Prefix-Nested LoRA for Federated Fine-Tuning under
Rank Heterogeneity. arXiv 2606.15963.

    client:  in each step draw c from the levels up to r_k, the same in every layer;  forward with B[:, :c] A[:c]
    server:  A[j] = sum_{k: r_k > j} w_k A_k[j] / sum_{k: r_k > j} w_k        B[:, j] likewise
             client k is sent the first r_k slots

Names: levels = the truncations that are trained; the server's rule is RBLA's, and it is the same code (within one of
the paper's segments the slots have the same owners).
Our readings: the loss is its mean over the levels, estimated by one level a step, each equally likely. Slots from c on
have a gradient of zero in that step, as the estimate says; AdamW counts it, so they coast on their momentum and their
weights decay. The levels are the powers of two below r_k, and r_k itself, unless the recipe names them.
Cost: O(sum_k r_k (d_in + d_out)); up and down one adapter of the client's rank; a step costs no more than without.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge

from anyrank import lowrank
from anyrank.adapter import Adapter
from anyrank.federation import Method
from anyrank.local.lora import lora
from anyrank.methods.rbla import rbla

__all__ = ["prelort"]


def prelort(*, levels: Sequence[Annotated[int, Ge(1)]] = ()) -> Method:
    """RBLA's server step with prefix-nested training on the clients.

    Args:
        levels: the prefixes that are trained, those below the client's rank, and that rank itself; left out, the powers
            of two.
    """
    rule = rbla()

    def up_to(rank: int) -> list[int]:
        wanted = levels or [2**power for power in range(rank.bit_length())]
        return sorted({level for level in wanted if level < rank} | {rank})

    def form(live: Adapter, rng: torch.Generator) -> Adapter:
        choices = up_to(max(live.ranks.values()))
        level = choices[int(torch.randint(len(choices), (), generator=rng))]
        layers = {name: lowrank.truncate(part, level) for name, part in live.layers.items()}
        return Adapter(layers, live.dense)

    claims = rule.claims._replace(paper="Waseem et al., arXiv 2606.15963")
    return rule._replace(local=lora()._replace(form=form), claims=claims)
