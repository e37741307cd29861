"""The published methods, by name. File, function, recipe name and documentation page of a method are the same word."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from anyrank.federation import Method
from anyrank.methods.fedavg import fedavg
from anyrank.methods.flexlora import flexlora
from anyrank.methods.hetlora import hetlora
from anyrank.methods.hlora import hlora
from anyrank.methods.local_only import local_only
from anyrank.methods.rbla import rbla
from anyrank.methods.wrappers import proximal, server_optimizer
from anyrank.methods.zero_padding import zero_padding

__all__ = ["METHODS", "describe", "overview", "proximal", "server_optimizer"]

METHODS: Mapping[str, Callable[..., Method]] = {
    "fedavg": fedavg,
    "zero_padding": zero_padding,
    "hetlora": hetlora,
    "rbla": rbla,
    "flexlora": flexlora,
    "hlora": hlora,
    "local_only": local_only,
}


def describe(name: str) -> dict[str, Any]:
    """A method's name, claims, hyperparameters with defaults, and the text at the top of its file."""
    method = METHODS[name]
    parameters = inspect.signature(method).parameters.values()
    return {
        "name": name,
        **method().claims._asdict(),
        "arguments": {parameter.name: parameter.default for parameter in parameters},
        "text": inspect.getdoc(sys.modules[method.__module__]),
    }


def overview() -> list[list[str]]:
    """The table of all methods, its head first: what each one claims. Bytes are in numbers for each adapted layer."""
    head = ["method", "paper", "mixed ranks", "mixed depths", "exact", "folds", "no-op safe", "topologies"]
    rows = [[*head, "averages", "down", "up", "server cost"]]
    for name, make in METHODS.items():
        claims = make().claims
        flags = (claims.mixed_ranks, claims.mixed_depths, claims.exact, claims.folds, claims.keeps_no_op)
        averages = "nothing" if claims.cost == "none" else claims.space + "s"
        topologies = "all" if len(claims.topologies) == 4 else ", ".join(claims.topologies)
        marks = ["yes" if flag else "" for flag in flags]
        rows.append([name, claims.paper, *marks, topologies, averages, claims.down, claims.up, claims.cost])
    return rows
