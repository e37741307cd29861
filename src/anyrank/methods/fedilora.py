"""FediLoRA: dimension-wise reweighting, the mean of each rank slot over the clients that own it.

Yang, Zhang, Nguygen, Hu, Shu, Chen, Sim. FediLoRA: Heterogeneous LoRA for Federated Multimodal Fine-tuning under
Missing Modalities. arXiv 2509.06984.

    A[j] = sum_{k: r_k > j} w_k A_k[j] / sum_{k: r_k > j} w_k        B[:, j] likewise        client k is sent r_k slots

Names: as in `rbla`. As a server rule this is RBLA's, and it is the same code.
Deviations: as in `rbla`. Without the paper's layer-wise editing, which repairs single layers of a client that lacks a
modality with the global adapter's; clients here are trained on text, and none lacks a modality.
"""

from anyrank.federation import Method
from anyrank.methods.rbla import rbla

__all__ = ["fedilora"]


def fedilora() -> Method:
    """Slot-wise factor averaging over the owners of each slot, under FediLoRA's name."""
    rule = rbla()
    return rule._replace(claims=rule.claims._replace(paper="Yang et al., arXiv 2509.06984"))
