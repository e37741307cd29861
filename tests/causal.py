"""A real but tiny causal language model, and tokenizers made on the spot: one of bytes, one of words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from anyrank.hf import Loading
from anyrank.pretrained import resolve
from anyrank.problem import Problem
from anyrank.problems import Given
from anyrank.problems.texts import IGNORED

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
POSITIONS = 256
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def of_bytes(*, begins: bool = True, ends: bool = False, end: str = "</s>", chat_template: str | None = None) -> Any:
    """A token for each byte, so that labels can be read; it may put its own tokens before and behind a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, begins, ends, end, chat_template)


def of_words(words: Sequence[str]) -> Any:
    """A token for each word between spaces."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, True, False, "</s>", None)


def in_pieces(kind: str, *, end: str = "</s>", chat_template: str | None = None) -> Any:
    """Tokens of several letters, as Llama 2 has them (`metaspace`: words begin with a space) or Llama 3 (`bytes`)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", fuse_unk=True, unk_token="<pad>"))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [*"\n\u2581!?.#:"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(
        ["user assistant system the film was good\n\n  and long.\n\nyes it was\n"] * 3, trainer
    )
    return _finished(tokenizer, True, False, end, chat_template)


def _finished(tokenizer: Tokenizer, begins: bool, ends: bool, end: str, chat_template: str | None) -> Any:
    tokenizer.add_special_tokens(SPECIAL)
    around = f"{'<s> ' * begins}$A{' </s>' * ends}"
    whole = processors.TemplateProcessing(around, special_tokens=[("<s>", 1), ("</s>", 2)])
    byte_level = isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    # Where a token is is then said without the spaces around it.
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), whole]) if byte_level else whole
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=end,
        pad_token="<pad>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def write_causal(folder: Path, tokenizer: Any) -> Path:
    """A decoder of two layers with random weights, the same ones each time, and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def given(model: Path, source: Path, **changes: Any) -> Given:
    """What a recipe would say of model and data; half of the examples are for testing."""
    usual = {"loading": Loading(), "test": None, "test_share": 0.5, "seed": 0}
    return Given(**{**usual, "base": resolve(str(model)), "source": str(source), **changes})


def read(tokenizer: Any, example: Any) -> str:
    """An example as text, with what is to be learned in brackets."""
    text, labelled, run = "", False, list[int]()
    for token, label in [*zip(example["input_ids"], example["labels"], strict=True), (None, None)]:
        if token is None or (label != IGNORED) != labelled:
            said = tokenizer.decode(run)
            text += f"[{said}]" if labelled else said
            run, labelled = [], label != IGNORED
        run.append(token)
    return text


def texts(tokenizer: Any, problem: Problem) -> list[str]:
    """All training examples, as `read` has them."""
    return [read(tokenizer, problem.train[i]) for i in range(len(problem.train))]
