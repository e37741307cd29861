"""How a client trains, by name. A method that needs a certain way of training brings its own."""

from collections.abc import Callable, Mapping

from anyrank.federation import Local
from anyrank.local.beamlora import beamlora
from anyrank.local.dora import dora
from anyrank.local.lora import lora
from anyrank.local.lora_plus import lora_plus
from anyrank.local.lora_pro import lora_pro
from anyrank.local.lora_rite import lora_rite
from anyrank.local.mole import mole
from anyrank.local.msplora import msplora
from anyrank.local.rslora import rslora

__all__ = ["LOCALS"]

LOCALS: Mapping[str, Callable[..., Local]] = {
    "lora": lora,
    "rslora": rslora,
    "lora_plus": lora_plus,
    "lora_pro": lora_pro,
    "lora_rite": lora_rite,
    "beamlora": beamlora,
    "dora": dora,
    "msplora": msplora,
    "mole": mole,
}
