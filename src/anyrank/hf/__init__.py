"""The boundary to PEFT and transformers: the only package that knows their names for an adapter's parts.

load        models and tokenizers
adapted     the base model into which adapters are swapped
layers      what stands in an adapted layer
blocks      a pass that begins or ends at a block
folder      PEFT directories, written and read
mixture     a mixture of finished adapters, read
whole       ordinary models: adapters merged into them, and what they write
"""

from anyrank.hf.adapted import AdaptedModel
from anyrank.hf.blocks import BLOCK, ENTERING, Stem, entering
from anyrank.hf.folder import factored, misfits, read_adapter, write_adapter, write_mixture
from anyrank.hf.load import (
    Loading,
    load_classifier,
    load_config,
    load_image_processor,
    load_model,
    load_processor,
    load_tokenizer,
)
from anyrank.hf.mixture import load_mixture
from anyrank.hf.whole import generate, merged, unlike, write_whole

__all__ = [
    "BLOCK",
    "ENTERING",
    "AdaptedModel",
    "Loading",
    "Stem",
    "entering",
    "factored",
    "generate",
    "load_classifier",
    "load_config",
    "load_image_processor",
    "load_mixture",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "merged",
    "misfits",
    "read_adapter",
    "unlike",
    "write_adapter",
    "write_mixture",
    "write_whole",
]
