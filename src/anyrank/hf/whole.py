"""Ordinary models of transformers: adapters merged into them, and what they write."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from anyrank.errors import ConfigError
from anyrank.hf.load import quiet

__all__ = ["generate", "merged", "write_whole"]


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
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True  # `load_model` turned it off
    with _silent():
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    for name, content in beside.items():
        (temporary / name).write_text(content, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)


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
