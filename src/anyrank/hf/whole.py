"""Ordinary models of transformers: adapters merged into them, and what they write."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from anyrank.adapter import MAGNITUDE, Adapter
from anyrank.errors import ConfigError
from anyrank.hf.layers import shape_of, unfit
from anyrank.hf.load import quiet
from anyrank.paths import replaced

__all__ = ["generate", "merged", "unlike", "write_whole"]


def unlike(adapter: Adapter, model: nn.Module) -> list[str]:
    """What of an adapter has no place in a model, one sentence each."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    problems = []
    for name, part in adapter.layers.items():
        layer = modules.get(name)
        there = "no such layer" if layer is None or unfit(layer) else _size(shape_of(layer))
        if there != (own := _size((part.B.shape[0], part.A.shape[1]))):
            problems.append(f"{name} is {own} in the adapter, and in the model there is {there}")
    for name, tensor in adapter.dense.items():
        there = _size(parameters[name].shape) if name in parameters else "no such tensor"
        if not name.endswith(MAGNITUDE) and there != (own := _size(tensor.shape)):
            problems.append(f"{name} is {own} in the adapter, and in the model there is {there}")
    return problems


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def merged(model: nn.Module, adapter: Path) -> nn.Module:
    """The model with the adapter of a PEFT directory added to its weights.

    Args:
        model: the base model, whose weights are changed.
        adapter: a PEFT directory.
    """
    with _silent():
        return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore


def write_whole(out: Path, model: Any, processor: Any, beside: Mapping[str, str]) -> None:
    """Write a model with its tokenizer or image processor, so that a folder with this name is never half written.

    Args:
        out: a folder that does not exist or is empty.
        model: of transformers, as `load_model` loads it.
        processor: its tokenizer or image processor.
        beside: content of further files, by name.
    """
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True  # `load_model` turned it off
    with replaced(out) as folder:
        with _silent():
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        for name, content in beside.items():
            (folder / name).write_text(content, encoding="utf-8")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what nobody can act upon: what libraries will change, and how PEFT corrects itself about GPT-2."""
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
    """What a causal language model goes on with, greedily, up to its end-of-text token or another at which it ends.

    Args:
        model: of transformers.
        tokenizer: its tokenizer.
        prompts: in tokens; they are answered one after another.
        max_new_tokens: of each answer; fewer where the model has fewer positions left.

    Raises:
        ConfigError: a prompt without tokens, or one that leaves no position for an answer.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    device, answers = next(model.parameters()).device, []
    own = model.generation_config.eos_token_id  # of a chat model, what ends a turn
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    for prompt in prompts:
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
        if not prompt or room < 1:
            limit = "" if positions is None else f" to {positions - 1}, as the model has {positions} positions"
            raise ConfigError(f"prompt: it has {len(prompt)} tokens; expected 1 or more{limit}.")
        ids = torch.tensor([list(prompt)], device=device)
        with torch.inference_mode(), quiet():
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(ends) or None,
            )
        answers.append(tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True))
    return answers
