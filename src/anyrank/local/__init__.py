"""How a client trains, by name. A method that needs a certain way of training brings its own."""

from collections.abc import Callable, Mapping

from anyrank.federation import Local
from anyrank.local.lora import lora

__all__ = ["LOCALS"]

LOCALS: Mapping[str, Callable[..., Local]] = {"lora": lora}
