"""A method of your own, outside the package, in twenty lines: clients with more rank count for more.

python examples/own_method.py [RECIPE]
"""

import sys
from pathlib import Path

import anyrank
from anyrank import lowrank
from anyrank.methods import METHODS
from anyrank.methods.rbla import rbla


def by_rank(*, power: float = 1.0):
    """RBLA with weights `n_k r_k^power`."""

    def aggregate(state, inbox, weights):
        layers = {}
        for layer, parts, shares, previous in state.holders(inbox, weights):
            ours = [share * part.rank**power for share, part in zip(shares, parts, strict=True)]
            layers[layer] = lowrank.by_slot(parts, ours, previous)
        return state.with_layers(layers)

    return rbla()._replace(aggregate=aggregate)


if __name__ == "__main__":
    METHODS["by_rank"] = by_rank
    recipe = anyrank.load_recipe(
        Path(sys.argv[1]) if sys.argv[1:] else None, {"method.name": "by_rank", "method.power": 0.5}
    )
    folder = anyrank.run(recipe, Path("runs/by_rank"))
    print(folder.path, folder.records()[-1]["score"])
