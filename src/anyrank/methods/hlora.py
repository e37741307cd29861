"""HLoRA: reconstruct the updates, average them, redistribute by SVD.

Liu, Zhang, Yao, Liu. HLoRA: Efficient Federated Learning System for LLM Heterogeneous Fine-Tuning. arXiv 2503.00813.

    D = sum_k (n_k / n) B_k A_k = U S V^T        A = V^T[:R],  B = (U S)[:, :R]        client k is sent the first r_k slots

Names: as in `flexlora`; n_k / n = weights. As a server rule this is FlexLoRA's, and it is the same code. What HLoRA adds is
how ranks are given out: by data size, `[ranks] name = "data_size"`, or by capacity, the default `per_class`.
"""

from typing import Annotated

from annotated_types import Ge

from anyrank.federation import Method
from anyrank.methods.flexlora import flexlora

__all__ = ["hlora"]


def hlora(*, oversample: Annotated[int, Ge(1)] | None = None) -> Method:
    """Product averaging with truncated SVD, under HLoRA's name.

    Args:
        oversample: as of `flexlora`.
    """
    rule = flexlora(oversample=oversample)
    return rule._replace(claims=rule.claims._replace(paper="Liu et al., arXiv 2503.00813"))
