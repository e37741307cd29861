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

__all__ = ["METHODS", "describe", "proximal", "server_optimizer"]

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
