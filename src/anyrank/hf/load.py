"""Loading models and tokenizers with transformers: from a local folder, or from the hub where it is in reach."""

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
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

_CAUSAL = "AutoModelForCausalLM"
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # what transformers takes beside the name of a device
_DRAWN = ("classifier", "score", "head", "fc", "pooler")  # of the parts of a model, those that are new for a task


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
        if attention == "flex_attention":
            raise ConfigError(
                'model.attention: what a step costs cannot be counted with flex_attention. Leave it out, or take "sdpa" or '
                '"eager".'
            )
        if attention is None and self.dtype == torch.bfloat16 and not torch.cuda.device_count():
            attention = "eager"  # on a CPU the backward pass of the fused kernel takes four times as long
        asked: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": attention}
        if self.device_map:
            _check_device_map(self.device_map)
            asked["device_map"] = self.device_map
        if self.quantize:
            asked["quantization_config"] = _quantization(self.quantize, self.dtype)
        return asked


def _check_device_map(wanted: str) -> None:
    """Refuse what is neither a way to spread a model nor a device of this machine."""
    try:
        device = None if wanted in _SPREAD or wanted == "disk" else torch.device(wanted)
    except RuntimeError:
        known = ", ".join(f'"{name}"' for name in _SPREAD)
        raise ConfigError(
            f'model.device_map: expected one of {known}, or a device such as "cuda:0"; got {wanted!r}.'
        ) from None
    count = torch.cuda.device_count()
    if device and device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"model.device_map: {wanted} is not there, as this machine has {count} GPUs. Leave it out, or name one that is."
        )


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
        ConfigError: there is none to be had, it has nothing to pad with, or tokens that the model does not know.
    """
    with _explained(model), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.location)
    _check_tokens(model, tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"model.name: the tokenizer of {model.name} has neither a padding token nor an end-of-text token, and batches "
                "need one to pad with. Give it one (`tokenizer.pad_token = ...`) and save it into the model's folder."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokens(model: Pretrained, tokenizer: Any) -> None:
    """Refuse tokens that have no row in the embedding: a text with one of them would stop a run in its middle."""
    rows = getattr(load_config(model).get_text_config(), "vocab_size", None)
    needed = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if rows is not None and needed > rows:
        raise ConfigError(
            f"model.name: the tokenizer of {model.name} has tokens up to number {needed - 1}, but the model's embedding has "
            f"{rows} rows. Give it more with `model.resize_token_embeddings({needed})` and save both into one folder, or take "
            "the tokenizer that belongs to the model."
        )


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
    """A model as transformers loads it, in evaluation mode; a head that it lacks is drawn at random.

    Args:
        model: where it is.
        auto_class: of transformers, such as `AutoModelForCausalLM`.
        loading: how it is put into memory.
        further: what else `from_pretrained` is told, such as `num_labels`.

    Raises:
        ConfigError: there is no such model, it lacks more than a head, it is to write and sees what comes next, or this
            machine cannot load it so.
    """
    arguments = loading.arguments()
    with _explained(model, loading.attention), quiet():
        loaded, found = getattr(transformers, auto_class).from_pretrained(
            model.location, ignore_mismatched_sizes=True, output_loading_info=True, **arguments, **further
        )
    if hasattr(loaded.config, "use_cache"):
        loaded.config.use_cache = False  # keys and values are kept for generation only
    loaded.eval()
    if auto_class == _CAUSAL:
        _check_causal(model, loaded, loading)
    _check_whole(model, loaded, found, has_head=auto_class == _CAUSAL)
    return loaded


def _check_causal(model: Pretrained, loaded: Any, loading: Loading) -> None:
    """Refuse a model in which a token changes what was answered before it, such as an encoder.

    It is tried, as configurations do not tell: `is_decoder` is false for BERT and for GPT-NeoX. An implementation of attention
    that may need a GPU, to which the model has not been moved yet, is not tried.
    """
    if loading.attention not in (None, "eager", "sdpa"):
        return
    some = torch.arange(1, 15) * loaded.get_input_embeddings().weight.shape[0] // 16  # from all over the vocabulary
    same, *others = some.split([2, 6, 6])
    ids = torch.stack([torch.cat([same, other]) for other in others]).to(next(loaded.parameters()).device)
    with _explained(model), torch.inference_mode():
        one, other = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    changed = (one - other).abs().amax(-1)
    # Rows of one batch can differ in their last digits, and in more where activations are quantised together.
    share = 0.1 if loading.quantize else torch.finfo(loading.dtype).eps ** 0.5
    if changed[:2].max() > share * changed[2:].max():
        raise ConfigError(
            f"model.name: {model.name} ({type(loaded).__name__}) sees the tokens that it is to predict, as an encoder does. "
            "Take a decoder, such as Llama, Qwen or GPT-2; an encoder can be trained for a problem such as classification."
        )


def _check_whole(model: Pretrained, loaded: Any, found: Mapping[str, Any], *, has_head: bool) -> None:
    """Refuse a model of which transformers has drawn more than a head at random.

    Args:
        model: where it is.
        loaded: what was made of it.
        found: what `from_pretrained` says of the tensors.
        has_head: its head must be there too.
    """
    prefix = loaded.base_model_prefix
    body = f"{prefix}." if prefix and hasattr(loaded, prefix) else ""  # of CLIP, say, one part stands alone
    odd = dict.fromkeys(found["missing_keys"], "is missing")
    odd |= {name: f"is {[*got]}, not {[*expected]}" for name, got, expected in found["mismatched_keys"]}
    if not has_head:
        odd = {
            name: fault
            for name, fault in odd.items()
            if name.startswith(body) and not any(part in _DRAWN for part in name.split("."))
        }
    if odd:
        first = [f"{name} {fault}" for name, fault in sorted(odd.items())[:3]]
        more = f" and {len(odd) - len(first)} more" if len(odd) > len(first) else ""
        raise ConfigError(
            f"model.name: the weights of {model.name} are not whole: {', '.join(first)}{more}. Expected all that "
            f"{type(loaded).__name__} has by its config.json, but for a new head; get or save the model again."
        )


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


_UNLOADABLE = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    safetensors.SafetensorError,
)  # all that files of foreign origin can set off in transformers


@contextlib.contextmanager
def _explained(model: Pretrained, attention: str | None = None) -> Iterator[None]:
    """Turn what transformers raises into an error of ours, about the implementation of attention if that is at fault."""
    try:
        yield
    except _UNLOADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, TypeError | AttributeError | LookupError):
            reason = f"one of its .json files is not as transformers writes it: {reason}"
        if attention and re.search("attention|attn|kernels", reason, re.IGNORECASE):
            raise ConfigError(
                f'model.attention: {attention} is not to be had ({reason.rstrip(".")}). Leave it out, or take "sdpa" or '
                '"eager".'
            ) from error
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
