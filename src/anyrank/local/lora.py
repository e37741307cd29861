"""LoRA: both factors and the dense tensors are trained together by AdamW.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022,
arXiv 2106.09685. Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019, arXiv 1711.05101.
"""

from torch import Tensor
from torch.optim import AdamW, Optimizer

from anyrank.adapter import Adapter
from anyrank.federation import Layer, Local

__all__ = ["lora", "trained"]


def lora() -> Local:
    """AdamW on everything that is trained, fresh in every round."""

    def optimizer(live: Adapter, learning_rate: float, weight_decay: float) -> Optimizer:
        return AdamW(trained(live), lr=learning_rate, weight_decay=weight_decay, fused=True)

    def unchanged(adapter: Adapter) -> Adapter:
        return adapter

    def layers(of_model: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return of_model

    return Local(
        optimizer,
        on_grad=None,
        on_step=None,
        enter=unchanged,
        form=None,
        leave=unchanged,
        layers=layers,
        spread=unchanged,
    )


def trained(live: Adapter) -> list[Tensor]:
    """The tensors that require a gradient."""
    return [tensor for tensor in live.tensors().values() if tensor.requires_grad]
