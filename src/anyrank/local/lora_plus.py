"""LoRA+: B learns at a higher rate than A.

Hayou, Ghosh, Yu. LoRA+: Efficient Low Rank Adaptation of Large Models. ICML 2024, arXiv 2402.12354.

    A = A - eta Adam(grad_A)        B = B - ratio eta Adam(grad_B)

Names: eta = `train.learning_rate`; ratio = the paper's lambda.
Our readings: tensors trained whole (the head) learn at A's rate.
Traps: weight decay is multiplied by the learning rate, so B decays `ratio` times as fast too. A rate that suits `lora` is
often too high here.
Cost: that of `lora`.
"""

from typing import Annotated

from annotated_types import Gt
from torch.optim import AdamW, Optimizer

from anyrank.adapter import Adapter
from anyrank.federation import Local
from anyrank.local.lora import lora, trained

__all__ = ["lora_plus"]


def lora_plus(*, ratio: Annotated[float, Gt(0)] = 16.0) -> Local:
    """AdamW with a learning rate of its own for B.

    Args:
        ratio: B's learning rate divided by the run's.
    """

    def optimizer(live: Adapter, learning_rate: float, weight_decay: float) -> Optimizer:
        ups = [part.B for part in live.layers.values() if part.B.requires_grad]
        fast = {id(B) for B in ups}
        rest = [tensor for tensor in trained(live) if id(tensor) not in fast]
        groups = [{"params": rest}, {"params": ups, "lr": ratio * learning_rate}]
        return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)

    return lora()._replace(optimizer=optimizer)
