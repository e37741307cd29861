"""MSPLoRA: the product of a layer is a sum of three, of which it shares one with all layers and one with its neighbours.

Zhao, Yu, Yang. MSPLoRA: A Multi-Scale Pyramid Low-Rank Adaptation for Efficient Model Fine-Tuning. arXiv 2503.21838.

    W_l x + scale (B A + 2 B_g A_g + 4 B_l A_l) x        ranks R0, R0 / 2, R0 / 4, with R0 = 4 r

    B A        shared by all layers of the same role (all queries, say) and the same shape
    B_g A_g    shared by those of one of `groups` runs of consecutive layers
    B_l A_l    the layer's own

Names: r = the client's rank, that of the layer's own pair; g = the group of layer l. The factors 2 and 4 are the paper's one
alpha over three ranks.
A shared pair is trained, sent and averaged once. To keep one rank for all, so that every method applies as it is, a pair is
laid in bricks of rank r: four of them are B A, two are B_g A_g. A brick is a layer of the run, named by the layers that it
stands for: `shared.2 encoder.layer.{0,1,2,3}.attention.self.query`.
Our readings: rank r stands for R0 = 4 r. Methods that work on products approximate each brick, not the sum of the bricks.
Traps: a brick sits in the lowest block that uses it, so who trains only the last blocks does not hold the shared pair.
Cost: (d_in + d_out) r (4 + 2 groups + layers) numbers for each role, against (d_in + d_out) r 4 layers for LoRA of rank R0.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge
from torch import Generator

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Layer, Local
from anyrank.local.lora import lora

__all__ = ["msplora"]

_BRICKS = {"shared": 4, "group": 2, "own": 1}  # of a pair at each level


def msplora(*, groups: Annotated[int, Ge(1)] = 3) -> Local:
    """AdamW on pairs that layers share.

    Args:
        groups: how many runs of consecutive layers share a pair of the middle level.
    """

    def layers(of_model: tuple[Layer, ...]) -> tuple[Layer, ...]:
        roles: dict[tuple[str, int, int], list[Layer]] = {}
        for layer in of_model:
            roles.setdefault((_role(layer.name), layer.d_in, layer.d_out), []).append(layer)
        return tuple(brick for members in roles.values() for brick in _pyramid(members, groups))

    def form(live: Adapter, rng: Generator) -> Adapter:
        return _spread(live)

    return lora()._replace(layers=layers, spread=_spread, form=form)


def _role(name: str) -> str:
    """A layer's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _pyramid(members: Sequence[Layer], groups: int) -> Iterator[Layer]:
    """The bricks of the layers of one role."""
    runs: dict[int, list[Layer]] = {}
    for i, layer in enumerate(members):
        runs.setdefault(i * groups // len(members), []).append(layer)
    for level, sets in (("shared", [members]), ("group", runs.values()), ("own", [[layer] for layer in members])):
        for some in sets:
            for number in range(_BRICKS[level]):
                yield replace(
                    some[0], name=f"{level}.{number} {_joined(some)}", block=min(layer.block for layer in some)
                )


def _joined(layers: Sequence[Layer]) -> str:
    """One name for layers that differ in the number of their block alone; `_members` is the inverse."""
    numbers = [match[1] for layer in layers if (match := re.search(r"\.(\d+)\.", layer.name))]
    return _role(layers[0].name).replace("*", f"{{{','.join(numbers)}}}", 1)


def _members(name: str) -> list[str]:
    before, brace, rest = name.partition("{")
    numbers, _, after = rest.partition("}")
    return [before + number + after for number in numbers.split(",")] if brace else [name]


def _spread(adapter: Adapter) -> Adapter:
    """The adapter in the model's layers: each gets the bricks of which it is a member, side by side."""
    bricks = []
    for name, part in adapter.layers.items():
        place, _, joined = name.partition(" ")
        factor = _BRICKS["shared"] / _BRICKS[place.partition(".")[0]]
        bricks += [Adapter({member: LowRank(part.A, factor * part.B)}) for member in _members(joined)]
    return Adapter(lowrank.together(bricks).layers, adapter.dense)
