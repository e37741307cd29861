"""FedEx-LoRA: factors are averaged, and what their product misses of the mean product goes into the base model.

Singhal, Ponkshe, Vepakomma. FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models.
ACL 2025, arXiv 2410.09432.

    A = sum_k w_k pad(A_k)        B = sum_k w_k pad(B_k)        client k is sent the first r_k slots
    W := W + scale * (sum_k w_k B_k A_k - B A)
       = W + scale * sum_{k < K} w_k (pad(B_k) - B) (pad(A_k) - pad(A_K))

Names: w_k = weights, divided by the sum that arrived; K = clients in the round, and the last of them; the residual is a
fold, see `Fold`. The second form has rank (K - 1) r, where stacking the terms of the first gives (K + 1) r. They are
equal: sum_k w_k (pad(B_k) - B) is zero, so one matrix may be taken off all pad(A_k), and the last leaves nothing.
Our readings: the paper has one rank and equal weights; smaller adapters are padded, weights go by data size.
Deviations: slots above the largest rank of the round keep their value; the residual stays in factors, beside the base.
Traps: exact is not lossless: of a slot held by clients of total weight w, w is left; the fold keeps w - w^2 for good.
Cost: O(K r (d_in + d_out)); down an adapter of the client's rank and the folds at rank (K - 1) r, up one adapter.
"""

from collections.abc import Sequence

from anyrank import lowrank
from anyrank.adapter import LowRank
from anyrank.federation import Inbox, Method, State
from anyrank.methods.zero_padding import zero_padding

__all__ = ["fedex_lora"]


def fedex_lora() -> Method:
    """Factor averaging, with the residual of the products in the base model."""
    baseline = zero_padding()

    def aggregate(state: State, inbox: Inbox, weights: Sequence[float]) -> State:
        means, residuals = {}, {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            means[layer] = lowrank.padded_mean(parts, shares, previous)
            if len(parts) > 1:  # of one client there is no residual
                residuals[layer] = _residual(parts, shares, means[layer])
        after = state.with_layers(means)
        return after.with_fold(residuals) if residuals else after

    claims = baseline.claims._replace(
        paper="Singhal et al., arXiv 2410.09432",
        cost="O(K r (d_in + d_out))",
        down="(m + n) (r_k + (K - 1) r)",
        exact=True,
        folds=True,
        topologies=("star",),
        needs="folds are numbered by one server",
    )
    return baseline._replace(aggregate=aggregate, claims=claims)


def _residual(parts: Sequence[LowRank], weights: Sequence[float], mean: LowRank) -> LowRank:
    """`sum_{k < K} w_k (B_k - B) (A_k - A_K)`, all of them padded to the largest rank."""
    rank = max(part.rank for part in parts)
    *others, last = [lowrank.pad(part, rank) for part in parts]
    away = [LowRank(part.A - last.A, part.B - mean.B[:, :rank]) for part in others]
    return lowrank.stack(away, [weight / sum(weights) for weight in weights[:-1]])
