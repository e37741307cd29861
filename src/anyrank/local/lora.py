"""LoRA: both factors and the dense tensors are trained together by AdamW.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022,
arXiv 2106.09685. Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019, arXiv 1711.05101.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.optim import AdamW, Optimizer

from anyrank.adapter import Adapter
from anyrank.federation import Local

__all__ = ["lora"]


def lora() -> Local:
    """AdamW on everything that is trained, fresh in every round."""

    def optimizer(parameters: Sequence[Tensor], learning_rate: float, weight_decay: float) -> Optimizer:
        return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def leave_alone(adapter: Adapter) -> None:
        pass

    return Local(optimizer, on_grad=leave_alone, on_step=leave_alone)
