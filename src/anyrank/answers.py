"""Using what came out of a run: score it on data, have it answer a prompt, write it as one model.

What is used is a run folder, one of its PEFT directories, or a merged model; beside its weights lies `anyrank.json`.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from anyrank import config, hf
from anyrank.adapter import MAGNITUDE, Adapter
from anyrank.compute import devices
from anyrank.errors import ConfigError, RecordError
from anyrank.hf import AdaptedModel
from anyrank.job import content_hash
from anyrank.local import LOCALS
from anyrank.pretrained import Pretrained, resolve
from anyrank.problem import Problem
from anyrank.problems import PROBLEMS, Given
from anyrank.problems.chat import Talk, as_jinja, prompt_of
from anyrank.problems.language import CAUSAL
from anyrank.problems.texts import opening, tokens_of
from anyrank.record import RunFolder
from anyrank.results import ABOUT, read_about
from anyrank.seeding import seed_of
from anyrank.train import Score, Training, evaluate

__all__ = ["Finished", "finished", "generate", "merge", "score"]

logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """What came out of a run.

    Attributes:
        folder: where it is.
        about: the content of `anyrank.json`.
        merged: it is a whole model, not an adapter.
    """

    folder: Path
    about: dict[str, Any]
    merged: bool


def finished(folder: Path) -> Finished:
    """Look at what came out of a run.

    Args:
        folder: of a run that has ended, of an adapter, or of a merged model.

    Raises:
        RecordError: there is no such thing, or not the one that was written.
    """
    is_run = (folder / "run.json").exists()
    place = folder / "adapter" if is_run else folder
    if not (place / ABOUT).exists():
        raise RecordError(_why_not(folder, is_run))
    about = read_about(place)
    if (place / "mixture.json").exists():
        raise RecordError(f"{place} is a mixture of adapters; load it in Python with anyrank.hf.load_mixture.")
    return Finished(place, about, about["files"] is None)


def _why_not(folder: Path, is_run: bool) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}."
    if not is_run:
        return f"{folder} holds no {ABOUT}: expected a run folder, or an adapter or a merged model that anyrank wrote."
    if (folder / "clients").is_dir():
        return f"{folder} has no global adapter: each client has its own; name one in {folder / 'clients'}."
    return f"{folder} has no adapter yet: finish it with `anyrank run --resume {folder}`."


def score(
    folder: Path, source: str, *, base: str | None = None, settings: Sequence[str] | Mapping[str, Any] = ()
) -> Score:
    """Score what came out of a run on data.

    Args:
        folder: of a run, an adapter, or a merged model.
        source: where the data is, as `data.source` of a recipe: its test part, or all of it if it has none.
        base: where the base model is, if its name does not lead to it.
        settings: of the problem's table, where the data's columns have other names than in training: values by key, or
            `key=value` strings.

    Raises:
        RecordError: there is nothing in the folder that could be scored.
        ConfigError: model or data cannot be had, or do not fit.
    """
    what = finished(folder)
    problem = _problem(what, base, source, settings)
    model, adapter = _model(what, problem)
    model.to(devices()[0])
    training = Training(
        local=LOCALS["lora"](),
        learning_rate=1.0,
        weight_decay=0.0,
        batch_size=16,
        collate=problem.collate,
        objective=problem.objective,
    )
    reached = evaluate(model, adapter, problem.test, training=training)
    return replace(reached, metrics={**reached.metrics, **problem.at_end(model)})


def _problem(what: Finished, base: str | None, source: str, settings: Sequence[str] | Mapping[str, Any]) -> Problem:
    name, table = what.about["problem"]["name"], what.about["model"]
    if name == config.OWN:
        raise ConfigError(f"{what.folder}: its problem was handed over in Python, and can be scored only there.")
    changes = settings if isinstance(settings, Mapping) else config.parse_overrides(settings)
    if "name" in changes:
        raise ConfigError(f"--set name: this was trained for {name}, and is scored by that; leave it out.")
    checked = config.chosen("problem", what.about["problem"] | changes, PROBLEMS)
    given = Given(
        base=_base(what, base),
        loading=hf.Loading(getattr(torch, table["dtype"])),
        source=source,
        test=None,
        test_share=0.5,
        seed=what.about["seed"],
        label_names=what.about["label_names"] or None,
        only="test",
    )
    try:
        return PROBLEMS[name](given, **{key: value for key, value in checked.items() if key != "name"})
    except ConfigError as error:  # for a problem, the same examples are for training and for testing
        one = [each.replace("training data", "test data") for each in error.problems]
        raise ConfigError([each.replace("test data", f"data {source}") for each in dict.fromkeys(one)]) from error


def _base(what: Finished, base: str | None) -> Pretrained:
    if what.merged:
        return Pretrained(str(what.folder), what.folder.name)
    name = base or what.about["model"]["name"]
    if name is None:
        raise ConfigError(f"{what.folder}: its base model was handed over in Python; say with --base where it is.")
    try:
        found = resolve(name)
        if what.about["auto_class"]:
            hf.load_config(found)
    except ConfigError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0].removeprefix("model.name: ").rstrip(".")
        raise ConfigError(
            f"{what.folder}: its base model {name} is not to be had ({reason}). Say with --base where it is."
        ) from error
    return found


def _model(what: Finished, problem: Problem) -> tuple[AdaptedModel, Adapter]:
    """The model, and the adapter to put into it."""
    about, bare = what.about, _bare(what, problem.model)
    if what.merged:
        model = AdaptedModel(bare, scale=about["scale"], target_modules=about["layers"])
        return model, Adapter({}, model.dense)
    adapter = _fitting(what, bare)
    model = AdaptedModel(
        bare,
        scale=about["scale"],
        target_modules=about["layers"],
        modules_to_save=about["modules_to_save"],
        weights="dora" if any(name.endswith(MAGNITUDE) for name in adapter.dense) else "lora",
    )
    return model, adapter


def _fitting(what: Finished, bare: nn.Module) -> Adapter:
    """The adapter, which has a place in this model."""
    adapter = hf.read_adapter(what.folder, scale=what.about["scale"])
    if sorted(adapter.layers) != sorted(what.about["layers"]):
        raise RecordError(
            f"{what.folder / ABOUT}: layers: not those of the adapter beside it. Bring it back as it was."
        )
    if odd := hf.unlike(adapter, bare):
        raise ConfigError(
            f"{what.folder}: the base model is not the one that the adapter is for: {odd[0]}. Say with --base where that is."
        )
    return adapter


def _bare(what: Finished, load: Callable[[], nn.Module]) -> nn.Module:
    """The model without the adapter, what is drawn in it drawn as in the run."""
    about = what.about
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(about["seed"], "head"))
        model = load()
    same = what.merged or about["model"]["quantize"] or content_hash(model) == about["base_hash"]
    if not same:  # other versions of transformers can keep the same model in other tensors, so that this is no error
        logger.warning(
            "%s: the base model is not, to the last bit, the one that the adapter was trained on; name that with --base "
            "if this is another",
            what.folder,
        )
    return model


def generate(folder: Path, prompt: str, *, base: str | None = None, max_new_tokens: int = 128) -> str:
    """What a causal language model answers to one prompt, greedily.

    Args:
        folder: of a run, an adapter, or a merged model.
        prompt: an instruction, or the beginning of a text, as it was trained.
        base: where the base model is, if its name does not lead to it.
        max_new_tokens: at most.

    Raises:
        RecordError: there is nothing in the folder that could answer.
        ConfigError: the model cannot be had, or is none that writes; or the prompt is no text, empty, or too long for it.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"prompt: expected text in UTF-8; got {prompt!r}. Say it in a terminal with UTF-8.") from None
    what = finished(folder)
    if what.about["auto_class"] != CAUSAL:
        raise ConfigError(
            f"{folder}: expected a causal language model, which alone writes text; this one was trained for "
            f"{what.about['problem']['name']}."
        )
    found = _base(what, base)
    tokenizer = hf.load_tokenizer(found)
    asked = Talk([{"role": "user", "content": prompt}], literal=what.about["form"] in (None, "prompt"))
    text = prompt_of(asked, tokenizer, what.about["problem"].get("template"))
    (ids,) = tokens_of(tokenizer, [text.text])
    ids = ids if text.templated else [*opening(tokenizer), *ids]  # a chat template writes its own
    model = _whole(what, found).to(devices()[0])
    (answer,) = hf.generate(model, tokenizer, [ids], max_new_tokens=max_new_tokens)
    return answer


def merge(folder: Path, out: Path, *, base: str | None = None) -> None:
    """Write base and adapter as one model that transformers loads, with its tokenizer or image processor.

    Args:
        folder: of a run or an adapter.
        out: a folder that does not exist or is empty.
        base: where the base model is, if its name does not lead to it.

    Raises:
        RecordError: `out` is occupied, or there is no adapter.
        ConfigError: the base model cannot be had, or is none of transformers.
    """
    what, out = finished(folder), out.resolve()
    RunFolder.check_free(out)
    if what.merged:
        raise RecordError(f"{folder} is a merged model already.")
    if what.about["auto_class"] is None:
        raise ConfigError(f"{folder}: its base is none of transformers' models, which alone can be written as one.")
    found = _base(what, base)
    about = json.dumps(what.about | {"files": None}, indent=2, sort_keys=True) + "\n"
    processor, template = hf.load_processor(found, what.about["auto_class"]), what.about["problem"].get("template")
    if template and what.about["form"] != "prompt" and not processor.chat_template:
        begin = processor.decode(opening(processor)) if opening(processor) else ""
        processor.chat_template = as_jinja(template, opening=begin)
    hf.write_whole(out, _whole(what, found), processor, {ABOUT: about})


def _whole(what: Finished, base: Pretrained) -> Any:
    """Base and adapter as one model of transformers."""
    about = what.about
    loading = hf.Loading(getattr(torch, about["model"]["dtype"]))
    model = _bare(what, lambda: hf.load_model(base, about["auto_class"], loading, **about["arguments"]))
    if what.merged:
        return model
    _fitting(what, model)
    return hf.merged(model, what.folder)
