"""The model card of an adapter: what it is, how it came about, what it reached, how to load it.

Made from the run's own records and nothing else: the same run gives the same bytes.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

__all__ = ["licence_of", "model_card", "recipe_toml"]

_TASKS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
_OF_THE_MACHINE = ("compute", "track")  # say how a run was done here, not what it was
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")


def model_card(
    info: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    *,
    rank: int,
    licence: str | None,
    method: Mapping[str, Any] | None,
    auto_class: str | None,
    num_labels: int | None = None,
    dataset: str | None = None,
    compared: Mapping[str, float] | None = None,
    experts: Sequence[str] = (),
) -> str:
    """A model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        info: the content of `run.json`.
        record: of the round that the adapter is from; None for an adapter that was never scored.
        rank: of the adapter, the largest over layers.
        licence: of the base model, as `licence_of` finds it.
        method: what `methods.describe` says of it; None where none was played.
        auto_class: the class of transformers that loads the base model; None for a model of one's own.
        num_labels: what that class is told; None for a model without a classification head.
        dataset: the name of the data on the Hugging Face hub, if it is from there.
        compared: what baselines reached by the same metric, by name.
        experts: where the adapters of a mixture were found; none for an ordinary adapter.
    """
    sections = {
        "What it is": _what(info, rank, experts),
        "Base model": f"`{info['base']}`. Licence: {licence or 'not stated by the base model'}.",
        "How to load it": _mixture(experts) if experts else _loading(info["base"], auto_class, num_labels),
        "Results": _results(info, record, compared or {}),
        "Data": _data(info, dataset),
        "Method": _method(info["method"], method),
        "Fleet": _fleet(info),
        "Recipe": _recipe(info),
        "Limitations": _limitations(info, record),
    }
    front = _front_matter(
        info, record, licence=licence, task=_TASKS.get(auto_class or ""), dataset=dataset, experts=experts
    )
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"---\n{front}\n---\n\n# {_title(info, rank, experts)}\n\n{body}\n"


def licence_of(location: str) -> str | None:
    """The licence that a base model states: in its card, or else the first line of its licence file.

    Args:
        location: a model folder, or a name on the Hugging Face hub, of which only the local cache is looked at.
    """
    card = _file(location, "README.md")
    if card and (stated := _stated(card)):
        return stated
    for name in _LICENCE_FILES:
        if file := _file(location, name):
            lines = (line.strip(" #*\t") for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
            return next(filter(None, lines), None)
    return None


def _file(location: str, name: str) -> Path | None:
    if Path(location).is_dir():
        return path if (path := Path(location) / name).is_file() else None
    try:
        found = try_to_load_from_cache(location, name)
    except ValueError:  # no name that a hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def _stated(card: Path) -> str | None:
    try:
        front = metadata_load(card) or {}
    except Exception:  # front matter that is no YAML, or no mapping: then it states nothing
        return None
    licence = front.get("license")
    if licence == "other" and "license_name" in front:
        return f"other ({front['license_name']})"
    return ", ".join(map(str, licence)) if isinstance(licence, list) else licence and str(licence)


# --- front matter -------------------------------------------------------------------------------------------------


def _front_matter(
    info: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    *,
    licence: str | None,
    task: str | None,
    dataset: str | None,
    experts: Sequence[str],
) -> str:
    metric = info["metric"]["name"]
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=dataset or _plain(_source(info)),
            dataset_name=dataset or _source(info),
            dataset_split="test",
            metric_type=metric if name == metric else _plain(name),
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in _scores(info, record).items()
    ]
    known = licence is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence)  # as the hub writes those that it knows
    own_name = None if known or licence is None else _plain(re.sub(r"^other \((.*)\)$", r"\1", licence))
    return ModelCardData(
        base_model=info["base"],
        base_model_relation="adapter",
        library_name="anyrank" if experts else "peft",
        license=licence if known else "other",
        license_name=own_name,
        pipeline_tag=task,
        tags=["lora", "federated-learning", "anyrank"],
        datasets=[dataset] if dataset else None,
        metrics=[metric] if results else None,
        model_name=f"{info['base']} with LoRA" if results else None,
        eval_results=results or None,
    ).to_yaml()


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _scores(info: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, float]:
    """What was measured on the test set, by the metric that the run is judged by first."""
    if record is None:
        return {}
    found = {info["metric"]["name"]: record["score"], **(record.get("metrics") or {})}
    return {name: value for name, value in found.items() if value is not None}


def _source(info: Mapping[str, Any]) -> str:
    return Path(info["recipe"]["data"].get("source") or "own data").name


# --- sections -----------------------------------------------------------------------------------------------------


def _title(info: Mapping[str, Any], rank: int, experts: Sequence[str]) -> str:
    what = f"A mixture of {len(experts)} LoRA adapters" if experts else f"A LoRA adapter of rank {rank}"
    return f"{what} for {info['base']}"


def _what(info: Mapping[str, Any], rank: int, experts: Sequence[str]) -> str:
    what = f"gates over {len(experts)} finished LoRA adapters" if experts else f"a LoRA adapter of rank {rank}"
    clients = len(info["fleet"])
    how = f"over {clients} client{'s' * (clients > 1)}"
    used = ", ".join(f"{name} {info['versions'][name]}" for name in ("torch", "transformers", "peft"))
    return f"The weights here are {what} for `{info['base']}`, trained {how} by anyrank {info['anyrank']} with {used}."


def _loading(base: str, auto_class: str | None, num_labels: int | None) -> str:
    if auto_class is None:
        return _fenced(
            "python",
            """from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")  # base: the model that the run was given""",
        )
    head = "" if num_labels is None else f", num_labels={num_labels}"
    folder = "" if "/" in base else "  # the folder of the base model"
    return _fenced(
        "python",
        f"""from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}"{head}){folder}
model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()""",
    )


def _mixture(experts: Sequence[str]) -> str:
    names = "\n".join(f"- `{name}`" for name in experts)
    code = """from pathlib import Path

from anyrank.hf import load_mixture

model = load_mixture(Path("path/to/this/folder"))"""
    return (
        "This folder holds the gates and the head. The experts are PEFT adapters, looked for where the run found them:"
        f"\n\n{names}\n\nPEFT has no form for such a mixture; anyrank loads it:\n\n{_fenced('python', code)}"
    )


def _results(info: Mapping[str, Any], record: Mapping[str, Any] | None, compared: Mapping[str, float]) -> str:
    scores = _scores(info, record)
    if record is None or not scores:
        return "This adapter was not scored."
    metric, better = info["metric"]["name"], "higher" if info["metric"]["higher_is_better"] else "lower"
    beside = {**compared, **{label: value for label, value in info["references"].items() if value is not None}}
    rows = [(f"**{info['method']}**", scores.pop(metric, None)), *beside.items()]
    text = f"On the {info['data']['test']} test examples, after round {record['round']}; {better} is better.\n\n"
    text += _table(("", metric), [(label, _number(value)) for label, value in rows])
    if scores:
        text += "\n\n" + _table(("further metric", "value"), [(name, _number(value)) for name, value in scores.items()])
    if by_rank := record.get("class_scores"):
        text += "\n\nOf what clients of each rank are sent:\n\n"
        text += _table(("rank", metric), [(rank, _number(value)) for rank, value in by_rank.items()])
    if own := record.get("federated"):
        text += (
            f"\n\nOn what {own['clients']} clients held out of their own data: {metric} {_number(own['score'])} "
            f"(standard deviation over clients {_number(own['std'])}, from {_number(own['min'])} to "
            f"{_number(own['max'])})."
        )
    return text


def _data(info: Mapping[str, Any], dataset: str | None) -> str:
    data, source = info["data"], info["recipe"]["data"].get("source")
    place = f"`{source}`" if source else "Given to the run from Python"
    if dataset:
        place = f"[`{dataset}`](https://huggingface.co/datasets/{dataset})"
    text = f"{place}: {data['train']} training and {data['test']} test examples; SHA-256 `{data['fingerprint']}`."
    if labels := data.get("label_names"):
        text += f"\n\nLabels: {', '.join(f'{i} = {name}' for i, name in enumerate(labels))}."
    return text


def _method(name: str, method: Mapping[str, Any] | None) -> str:
    if method is None:
        return f"`{name}`, a baseline: no averaging of adapters."
    paper = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", method["paper"])
    return f"`{name}` ({paper}). {method['text'].splitlines()[0]}"


def _fleet(info: Mapping[str, Any]) -> str:
    members = list(info["fleet"].values())
    classes = info["recipe"]["fleet"]["classes"]
    rows = []
    for kind in dict.fromkeys(member["kind"] for member in members):
        own = [member for member in members if member["kind"] == kind]
        ranks = sorted({member["rank"] for member in own})
        device = classes.get(kind, {}).get("device", "")
        examples = sum(member["num_examples"] for member in own)
        rows.append((kind, device, str(len(own)), ", ".join(map(str, ranks)), str(examples)))
    return f"Simulated devices.\n\n{_table(('device class', 'device', 'clients', 'ranks', 'examples'), rows)}"


def _recipe(info: Mapping[str, Any]) -> str:
    recipe = {key: value for key, value in info["recipe"].items() if key not in _OF_THE_MACHINE}
    how = "The run was given its model and data from Python, and this recipe for all else."
    if info["recipe"]["data"].get("source"):
        how = "`anyrank run recipe.toml` repeats the run with this file, where data and model have the same names."
    return f"{how}\n\n<details>\n<summary>recipe.toml</summary>\n\n{_fenced('toml', recipe_toml(recipe))}\n\n</details>"


def _limitations(info: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    scored = "It was not scored on any data" if record is None else "The scores are of this test set alone"
    return (
        f"{scored}; what it does on data of another kind is not known.\n"
        "What the base model gets wrong or is biased in, this adapter does not mend, and devices were simulated."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


# --- TOML ---------------------------------------------------------------------------------------------------------


def recipe_toml(recipe: Mapping[str, Any]) -> str:
    """A recipe, such as that of `run.json`, as TOML. What is null in it is left out, which means the same."""
    return "\n".join(_toml(recipe, ())) + "\n"


def _toml(table: Mapping[str, Any], name: Sequence[str]) -> Iterator[str]:
    values = {key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)}
    if name and (values or not table):
        yield ""
        yield f"[{'.'.join(map(_key, name))}]"
    for key, value in values.items():
        yield f"{_key(key)} = {_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _toml(value, (*name, key))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = (f"{_key(key)} = {_value(inner)}" for key, inner in value.items() if inner is not None)
        return f"{{{', '.join(inner)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):  # JSON writes all that TOML wants escaped, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
