"""RB-LoRA: rank-one components weighted by who holds their rank, redistributed by SVD.

Ha, Oh, Jeon. RB-LoRA: Rank-Balanced Aggregation for Low-Rank Adaptation with Federated Fine-Tuning.
Findings of EACL 2026.

    D = sum_k sum_{j < r_k} (n_k / n) (n / sum_{i: r_i > j} n_i) b_kj a_kj^T = U S V^T        client k is sent r_k slots

Names: n_k / n = weights; b_kj, a_kj = slot j of client k. n cancels: this is raFLoRA's sum, and it is the same code.
Deviations: as in `raflora`.
"""

from anyrank.federation import Method
from anyrank.methods.raflora import raflora

__all__ = ["rb_lora"]


def rb_lora() -> Method:
    """Product averaging over the owners of each slot, under RB-LoRA's name."""
    rule = raflora()
    return rule._replace(claims=rule.claims._replace(paper="Ha et al., Findings of EACL 2026"))
