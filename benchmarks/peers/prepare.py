"""Writing the folder that holds the work: texts of the standard library as token ids, and an adapter to start from."""

from collections.abc import Sequence

from anyrank import data, hf, lowrank
from anyrank.adapter import Adapter
from anyrank.data.stdlib_docs import stdlib_docs
from anyrank.pretrained import Pretrained, resolve
from anyrank.seeding import generator, numpy_generator
from peers.work import Example, Work

__all__ = ["LABELS", "MODEL", "model_folder", "write", "write_start"]

MODEL, LABELS = "all-MiniLM-L6-v2", ("mismatch", "match")


def model_folder() -> str:
    """Where the packaged base model is."""
    return resolve(MODEL).location


def write(work: Work) -> None:
    """Write everything: settings, start, examples to train and to test on."""
    work.write()
    write_start(work)
    write_texts(work)


def write_start(work: Work) -> None:
    """Write a fresh adapter of the work's rank and a fresh head, as a PEFT directory."""
    base = Pretrained(work.model, MODEL)
    classifier = hf.load_classifier(base, label_names=LABELS, seed=work.seed)
    model = hf.AdaptedModel(classifier, scale=work.scale, target_modules=work.targets)
    layers = {
        layer.name: lowrank.fresh(
            work.rank, d_in=layer.d_in, d_out=layer.d_out, rng=generator(work.seed, "init", layer.name)
        )
        for layer in model.layers
    }
    hf.write_adapter(
        work.folder / "start",
        Adapter(layers, model.dense),
        scale=work.scale,
        base=base,
        modules_to_save=model.modules_to_save,
        label_names=LABELS,
        card="",
    )


def write_texts(work: Work) -> None:
    """Signatures and docstrings of the standard library as token ids: whole pairs, or cut to the same length."""
    tokenizer = hf.load_tokenizer(Pretrained(work.model, MODEL))
    pairs = {}
    for part, texts in stdlib_docs().items():
        encoded, _ = data.encode(texts, tokenizer, text=["signature", "docstring"], max_length=work.length)
        columns = zip(encoded["input_ids"], encoded["labels"], strict=True)
        pairs[part] = [{"input_ids": ids, "labels": label} for ids, label in columns]
    examples = pairs["train"] if work.mixed else _cut(pairs["train"], work.length)
    needed = work.clients * work.per_client
    if len(examples) < needed:
        raise SystemExit(f"{needed} examples are needed, the texts give {len(examples)}: take fewer or smaller steps.")
    order = numpy_generator(work.seed, "deal").permutation(len(examples))
    work.write_examples([examples[i] for i in order[:needed]], "train")
    work.write_examples(pairs["test"], "test")


def _cut(pairs: Sequence[Example], length: int) -> list[Example]:
    """All texts in a row, cut into examples of exactly `length` tokens; each has the label of the text it begins in."""
    first, last = pairs[0]["input_ids"][0], pairs[0]["input_ids"][-1]
    tokens = [(token, pair["labels"]) for pair in pairs for token in pair["input_ids"] if token not in (first, last)]
    inside = length - 2
    cuts = [tokens[i : i + inside] for i in range(0, len(tokens) - inside + 1, inside)]
    return [{"input_ids": [first, *(token for token, _ in cut), last], "labels": cut[0][1]} for cut in cuts]
