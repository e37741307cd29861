"""The published methods, by name. File, function, recipe name and documentation page of a method are the same word."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from anyrank.federation import Method
from anyrank.methods.adf_lora import adf_lora
from anyrank.methods.anyrank import anyrank
from anyrank.methods.fed_hello import fed_hello
from anyrank.methods.fed_plora import fed_plora
from anyrank.methods.fedavg import fedavg
from anyrank.methods.fedex_lora import fedex_lora
from anyrank.methods.fedilora import fedilora
from anyrank.methods.fedsa_lora import fedsa_lora
from anyrank.methods.ffa_lora import ffa_lora
from anyrank.methods.flexlora import flexlora
from anyrank.methods.flora import flora
from anyrank.methods.florist import florist
from anyrank.methods.fslora import fslora
from anyrank.methods.galore import galore
from anyrank.methods.hetlora import hetlora
from anyrank.methods.hier_fedlora import hier_fedlora
from anyrank.methods.hlora import hlora
from anyrank.methods.hra_lora import hra_lora
from anyrank.methods.legend import legend
from anyrank.methods.local_only import local_only
from anyrank.methods.lora_fair import lora_fair
from anyrank.methods.prelort import prelort
from anyrank.methods.rac_lora import rac_lora
from anyrank.methods.raflora import raflora
from anyrank.methods.rb_lora import rb_lora
from anyrank.methods.rbla import rbla
from anyrank.methods.rolora import rolora
from anyrank.methods.tad_lora import tad_lora
from anyrank.methods.wrappers import proximal, server_optimizer
from anyrank.methods.zero_padding import zero_padding

__all__ = ["METHODS", "describe", "overview", "proximal", "server_optimizer"]

METHODS: dict[str, Callable[..., Method]] = {
    "fedavg": fedavg,
    "zero_padding": zero_padding,
    "hetlora": hetlora,
    "rbla": rbla,
    "flexlora": flexlora,
    "hlora": hlora,
    "raflora": raflora,
    "rb_lora": rb_lora,
    "fedilora": fedilora,
    "prelort": prelort,
    "fslora": fslora,
    "fed_plora": fed_plora,
    "florist": florist,
    "flora": flora,
    "fedex_lora": fedex_lora,
    "rac_lora": rac_lora,
    "lora_fair": lora_fair,
    "legend": legend,
    "hier_fedlora": hier_fedlora,
    "fed_hello": fed_hello,
    "hra_lora": hra_lora,
    "ffa_lora": ffa_lora,
    "rolora": rolora,
    "fedsa_lora": fedsa_lora,
    "adf_lora": adf_lora,
    "tad_lora": tad_lora,
    "galore": galore,
    "anyrank": anyrank,
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
