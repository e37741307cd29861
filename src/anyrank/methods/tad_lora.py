"""TAD-LoRA: phases of one trained factor, as long as the graph of the peers needs them.

Wang, Li, Zhou, Li, Liu. Stabilizing Decentralized Federated Fine-Tuning via Topology-Aware Alternating LoRA.
arXiv 2602.00451.

    phase p = 0, 1, ... is rounds p T + 1 .. (p + 1) T:  everyone trains B if p is even, A if p is odd
    every round:  A_i = sum_j w_ij A_j        B_i = sum_j w_ij B_j        best T grows like 1 / sqrt(1 - rho)

Names: as in `adf_lora`; rho = what a round of mixing leaves of the peers' disagreement, near 0 in a dense graph and near 1
in a sparse one. The rule is ADF-LoRA's, and it is the same code. What TAD-LoRA adds is the analysis: a long phase gives
peers the time to agree on the frozen factor, a short one keeps the two factors fitted to each other.
Our readings and deviations: those of `adf_lora`; `period` is set by hand.
"""

from typing import Annotated

from annotated_types import Ge

from anyrank.federation import Method
from anyrank.methods.adf_lora import adf_lora

__all__ = ["tad_lora"]


def tad_lora(*, period: Annotated[int, Ge(1)] = 5) -> Method:
    """Averaging of both factors while one at a time is trained, under TAD-LoRA's name.

    Args:
        period: rounds of a phase; longer ones for sparser graphs.
    """
    rule = adf_lora(period=period)
    return rule._replace(claims=rule.claims._replace(paper="Wang et al., arXiv 2602.00451"))
