"""DoRA: the direction of each row is adapted by LoRA, its length by a number of its own.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen. DoRA: Weight-Decomposed Low-Rank Adaptation. ICML 2024, arXiv 2402.09353.

    W' = diag(mag / norm) (W0 + scale B A)        norm_i = ||row i of W0 + scale B A||, a constant for the gradient
    mag = the row norms of W0 at the start, trained with A and B, averaged by the server like a head

Names: mag = `<layer>.magnitude` among the dense tensors, `[d_out]`. The forward pass is PEFT's, and so is the exported form.
Our readings: weight decay leaves the magnitudes alone, since it would shrink the base weights. A client that skips a layer
applies W0 there, and returns the magnitudes as it received them.
Traps: W' is no linear function of B A: an exact mean of products is not the mean of the clients' weights.
Cost: d_out numbers more for each layer, both ways; the dense B A at every step.
"""

from torch.optim import AdamW, Optimizer

from anyrank.adapter import MAGNITUDE, Adapter
from anyrank.federation import Local
from anyrank.local.lora import lora

__all__ = ["dora"]


def dora() -> Local:
    """AdamW on factors, magnitudes and the dense tensors, without weight decay on the magnitudes."""

    def optimizer(live: Adapter, learning_rate: float, weight_decay: float) -> Optimizer:
        trained = {name: tensor for name, tensor in live.tensors().items() if tensor.requires_grad}
        lengths = [tensor for name, tensor in trained.items() if name.endswith(MAGNITUDE)]
        rest = [tensor for name, tensor in trained.items() if not name.endswith(MAGNITUDE)]
        groups = [{"params": rest}, {"params": lengths, "weight_decay": 0.0}]
        return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)

    return lora()._replace(optimizer=optimizer, weights="dora")
