"""The one adapter type: what is sent, what comes back, what the server keeps.

An adapted layer computes `W x + scale * B (A x)`. `scale` is one number for the whole run (see `federation.Spec`), so no
adapter carries it. A client's rank is `A.shape[0]`; its depth is which layers are present.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from anyrank.errors import ShapeError

__all__ = ["CHANGE", "GATE", "LOG_TAU", "MAGNITUDE", "NOTHING", "Adapter", "LowRank", "Stack"]

MAGNITUDE, CHANGE, GATE, LOG_TAU = ".magnitude", ".change", ".gate", ".log_tau"
"""After a layer's name, the dense tensors that it may have of its own: norms of its rows; a change of its whole weight; a gate
over finished adapters, and the logarithm of the gate's temperature."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product `B A` of two thin factors. Slot `j` is row `j` of `A` with column `j` of `B`.

    Args:
        A: the down projection, `[r, d_in]`.
        B: the up projection, `[d_out, r]`.

    Raises:
        ShapeError: `A` and `B` disagree about the rank.
    """

    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]

    def __post_init__(self):
        """Refuse factors that cannot be multiplied."""
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ShapeError(
                f"A is {list(self.A.shape)} and B is {list(self.B.shape)}; expected [r, d_in] and [d_out, r]"
            )

    @property
    def rank(self) -> int:
        """Number of slots `r`."""
        return self.A.shape[0]

    @property
    def product(self) -> Float[Tensor, "o i"]:
        """The dense `B A`, `[d_out, d_in]`. For tests and small layers; methods stay with the factors."""
        return self.B @ self.A

    def map(self, f: Callable[[Tensor], Tensor]) -> "LowRank":
        """Apply `f`, which keeps the rank, to both factors."""
        return LowRank(f(self.A), f(self.B))


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank factors per layer and the dense tensors trained beside them.

    Args:
        layers: factors by layer name; a layer that is absent is not adapted.
        dense: whole tensors by parameter name (a classification head), averaged by example counts by every method.
    """

    layers: Mapping[str, LowRank]
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by layer name."""
        return {name: part.rank for name, part in self.layers.items()}

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter holds, dense tensors included."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def map(self, f: Callable[[Tensor], Tensor]) -> "Adapter":
        """Apply `f`, which keeps shapes, to every tensor."""
        return Adapter(
            {name: part.map(f) for name, part in self.layers.items()},
            {name: f(tensor) for name, tensor in self.dense.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a flat name: `A/<layer>`, `B/<layer>`, `dense/<parameter>`; the inverse is `from_tensors`."""
        flat = {}
        for name, part in self.layers.items():
            flat[f"A/{name}"] = part.A
            flat[f"B/{name}"] = part.B
        return flat | {f"dense/{name}": tensor for name, tensor in self.dense.items()}

    @staticmethod
    def from_tensors(flat: Mapping[str, Tensor]) -> "Adapter":
        """Rebuild an adapter from the flat names of `tensors`, in their order.

        Raises:
            ShapeError: a name is none of ours, or a factor lacks its partner.
        """
        layers, dense = {}, {}
        for key, tensor in flat.items():
            kind, _, name = key.partition("/")
            if kind == "dense":
                dense[name] = tensor
            elif kind == "A" and f"B/{name}" in flat:
                layers[name] = LowRank(tensor, flat[f"B/{name}"])
            elif not (kind == "B" and f"A/{name}" in flat):
                raise ShapeError(f"tensor {key!r}: expected 'A/<layer>' with 'B/<layer>', or 'dense/<parameter>'")
        return Adapter(layers, dense)


NOTHING = Adapter({})
"""An adapter that changes nothing and trains nothing."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The adapters of several clients side by side, as batched products take them; smaller ranks end in zero slots.

    Args:
        A: down projections by layer, `[clients, r, d_in]`.
        B: up projections by layer, `[clients, d_out, r]`.
        dense: whole tensors by parameter name, `[clients, ...]`.
    """

    A: Mapping[str, Float[Tensor, "c r i"]]
    B: Mapping[str, Float[Tensor, "c o r"]]
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(adapters: Sequence[Adapter]) -> "Stack":
        """Stack adapters that have the same layers and dense tensors."""
        A, B = {}, {}
        for name in adapters[0].layers:
            parts = [adapter.layers[name] for adapter in adapters]
            most = max(part.rank for part in parts)
            A[name] = torch.stack([F.pad(part.A, (0, 0, 0, most - part.rank)) for part in parts])
            B[name] = torch.stack([F.pad(part.B, (0, most - part.rank)) for part in parts])
        return Stack(A, B, {name: torch.stack([a.dense[name] for a in adapters]) for name in adapters[0].dense})
