"""MoLE: finished adapters are frozen experts; what is trained is a gate that says how much each one counts.

Wu, Huang, Wei. Mixture of LoRA Experts. ICLR 2024, arXiv 2404.13628.

    W0 x + sum_i g_i E_i(x)          E_i(x) = scale * B_i A_i x, frozen
    g = softmax(gate z / tau)        z = (E_1(x), ..., E_N(x)) / ||(E_1(x), ..., E_N(x))||
    loss + balance * (-log prod_i q_i)        q_i = the mean of g_i over the step's tokens and the layers

Names: gate = `<layer>.gate`, `[N, N d_out]`, and log tau = `<layer>.log_tau` among the dense tensors, averaged by the server
like a head; N = number of experts.
Our readings: a block is an adapted layer, and every token has gates of its own. All experts count alike at the start (gate =
0). To normalise is to divide by the length. The logarithm of tau is trained, which keeps tau above 0.
Deviations: there are no factors: every layer has rank 0, whatever a device affords, and all methods that do no more than
average are one. The experts' own heads are not used; a head is trained with the gates.
Traps: a gate belongs to these experts in this order.
Cost: every expert's forward pass in every layer; N^2 d_out + 1 numbers for each layer to train and to send, both ways. The
experts never travel: like the base model, clients have them.
"""

from typing import Annotated

from annotated_types import Ge, Gt, MinLen
from torch import Tensor

from anyrank.errors import ConfigError
from anyrank.federation import Local, Mixture
from anyrank.local.lora import lora

__all__ = ["mole"]


def mole(
    *,
    experts: Annotated[list[str], MinLen(2)],
    tau: Annotated[float, Gt(0)] = 1.0,
    balance: Annotated[float, Ge(0)] = 0.01,
) -> Local:
    """AdamW on gates over finished adapters, on their temperatures and on the dense tensors.

    Args:
        experts: folders of plain LoRA adapters, as PEFT saves them, on the layers that the recipe adapts.
        tau: the first temperature of every gate.
        balance: weight of the term that keeps every expert in use; 0 leaves it out.

    Raises:
        ConfigError: a folder is named twice.
    """
    if len(set(experts)) < len(experts):
        raise ConfigError("local.experts: a folder is named twice; expected different adapters.")

    def penalty(q: Tensor) -> Tensor:
        return -balance * q.log().sum()

    return lora()._replace(weights="mole", mixture=Mixture(tuple(experts), tau, penalty if balance else None))
