"""FlexLoRA: average the products, redistribute by SVD.

Bai, Chen, Qian, Yao, Li. Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources.
NeurIPS 2024, arXiv 2402.11505.

    D = sum_k w_k B_k A_k = U S V^T        A = V^T[:R],  B = (U S)[:, :R]        client k is sent the first r_k slots

Names: w_k = weights, divided by the sum that arrived; R = the server's rank. The run has one scale, so s_k drops out.
Traps: what only some clients can hold shrinks by the others' weight in every round (rank collapse, arXiv 2602.13486).
Deviations: the SVD is taken of the stacked factors (`lowrank.svd`), equal to the dense one, or of a random sketch of them;
rows of A for directions the product lacks are drawn at random with B zero, so that they can learn.
Cost: O((d_in + d_out) R^2 + R^3), R = sum_k r_k; up and down one adapter of the client's rank.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge

from anyrank import lowrank
from anyrank.federation import Inbox, Method, State
from anyrank.methods.zero_padding import zero_padding
from anyrank.seeding import generator

__all__ = ["flexlora"]


def flexlora(*, oversample: Annotated[int, Ge(1)] | None = None) -> Method:
    """Product averaging with truncated SVD.

    Args:
        oversample: take the SVD of a random sketch with this many rows more than the server's rank, and note its relative
            error, the largest over layers, as `truncation_error`; left out, the SVD is exact.
    """
    baseline = zero_padding()

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        layers, errors = {}, []
        for layer, parts, shares, previous in state.holders(inbox, weights):
            mean = parts, [share / sum(shares) for share in shares]
            rank, rng = previous.rank, generator(state.spec.seed, "flexlora", state.round, layer)
            if oversample is None:
                layers[layer] = lowrank.svd(lowrank.weighted_sum(*mean), rank, rng)
            else:
                layers[layer], error = lowrank.randomized_svd(lowrank.stack(*mean), rank, rng, oversample=oversample)
                errors.append(error)
        after = state.with_layers(layers)
        return after.with_notes(truncation_error=max(errors)) if errors else after

    claims = baseline.claims._replace(
        paper="Bai et al., arXiv 2402.11505",
        cost="O((d_in + d_out) R^2 + R^3)",
        space="product",
        exact=True,
        keeps_uncovered=False,
    )
    return baseline._replace(aggregate=aggregate, claims=claims)
