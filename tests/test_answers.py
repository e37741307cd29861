"""What comes out of a run is used: scored, asked, merged; and every mistake on the way is one clear message."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import anyrank
from anyrank import answers
from anyrank.cli import main
from anyrank.errors import ConfigError, RecordError
from anyrank.record import RunFolder
from test_families import Stops, recipe, write_data, write_family
from test_record import files_of_at_most

WAYS = ("run", "run/adapter", "merged")


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A folder with a finished run of a language model and what it is of; do not change it."""
    folder = tmp_path_factory.mktemp("writer")
    base, source = write_family(folder / "model", "llama"), write_data(folder / "data", "instruction")
    anyrank.run(recipe(folder, base, source, "instruction", rounds=1), folder / "run")
    answers.merge(folder / "run", folder / "merged")
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """The same with a classifier."""
    folder = tmp_path_factory.mktemp("judge")
    base, source = write_family(folder / "model", "bert"), write_data(folder / "data", "classification")
    anyrank.run(recipe(folder, base, source, "classification", rounds=1), folder / "run")
    answers.merge(folder / "run", folder / "merged")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the command line; returns exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anyrank", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        return code, *capsys.readouterr()

    return call


def table(file: Path, *rows: str) -> str:
    file.write_text("\n".join(rows) + "\n")
    return str(file)


# --- scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_evaluate_gives_the_last_score_of_the_run(judge, command, way):
    expected = RunFolder.open(judge / "run").records()[-1]
    code, out, error = command("evaluate", judge / way, "--data", judge / "data", "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert found.pop("examples") == 20
    assert found.pop("loss") > 0
    assert found == pytest.approx(expected["metrics"])
    code, out, _ = command("evaluate", judge / way, "--data", judge / "data")
    assert f"accuracy   {expected['score']:.4f}" in out


def test_other_columns_are_named_in_a_setting(judge, command, tmp_path):
    data = table(tmp_path / "new.csv", "review,rating", "the film was good,kind", "the plot was dull,unkind")
    settings = ["--set", 'text=["review"]', "--set", "label=rating"]
    code, out, _ = command("evaluate", judge / "run", "--data", data, *settings, "--json")
    assert code == 0
    again = answers.score(judge / "run", data, settings={"text": ["review"], "label": "rating"})
    assert json.loads(out)["loss"] == again.loss
    assert json.loads(out)["examples"] == again.num_examples == 2


def test_labels_may_be_names_or_their_numbers_and_need_not_all_occur(judge, tmp_path):
    texts = ["the film was good", "the plot was dull", "the scene was poor"]
    named, numbered = (
        answers.score(judge / "run", table(tmp_path / f"{i}.csv", "sentence,label", *rows))
        for i, rows in enumerate([[f"{text},unkind" for text in texts], [f"{text},1" for text in texts]])
    )
    assert named == numbered


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["text,label", "good,kind"], "there is no column 'sentence'; the columns are text, label"),
        (["sentence", "good"], "there is no column 'label'; the columns are sentence"),
        (["sentence,label", "good,kind", "bad,funny"], "row 2: unknown label 'funny'; the labels are 'kind', 'unkind'"),
        (["sentence,label", "good,0", "bad,2"], "row 2: unknown label 2; the labels are 0, 1"),
        (["sentence,label", "good,kind", "bad,"], "row 2 has no label in column 'label'"),
        (["sentence,label"], "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_data_that_does_not_fit_is_said_once(judge, command, tmp_path, rows, said):
    data = table(tmp_path / "new.csv", *rows)
    code, _, error = command("evaluate", judge / "run", "--data", data)
    assert code == 2
    assert " ".join(error.split()).count(said) == 1
    assert data in error
    assert "training" not in error


def test_data_without_rows_is_refused(judge, writer, tmp_path):
    for folder, columns in ((judge, ["sentence", "label"]), (writer, ["instruction", "response"])):
        with pytest.raises(ConfigError, match=r"empty.csv: cannot be read .* expected a header line, at least one row"):
            answers.score(folder / "run", table(tmp_path / "empty.csv", ",".join(columns)))
    with pytest.raises(ConfigError, match=r"have no response|there are none"):
        answers.score(writer / "run", table(tmp_path / "none.csv", "instruction,response", "hello,"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lable=rating", "problem.lable: unknown key (did you mean label?); accepted by classification"),
        ("name=language", "--set name: this was trained for classification"),
        ("label", "--set label: expected key=value"),
    ],
)
def test_a_setting_that_is_none_is_refused(judge, command, setting, said):
    code, _, error = command("evaluate", judge / "run", "--data", judge / "data", "--set", setting)
    assert code == 2
    assert said in " ".join(error.split())


def test_words_are_judged_by_the_names_that_the_model_knows(tmp_path):
    rows = {"train": [["the", "film", "good"], ["dull", "a", "plot"]] * 20, "new": [["good", "good"]]}
    kinds = {"the": "article", "a": "article", "film": "noun", "plot": "noun", "good": "adjective", "dull": "adjective"}
    for name, texts in rows.items():
        lines = [json.dumps({"tokens": text, "ner_tags": [kinds[word] for word in text]}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    base = write_family(tmp_path / "model", "bert")
    changes = {"problem__name": "token_classification", "problem__max_length": 16, "rounds": 1, "train__steps": 20}
    chosen = recipe(tmp_path, base, tmp_path / "train.jsonl", "classification", **changes)
    run = anyrank.run(chosen, tmp_path / "run")
    assert run.records()[-1]["metrics"]["accuracy"] > 0.9
    assert answers.score(run.path, str(tmp_path / "new.jsonl")).metrics["accuracy"] == 1.0
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"tokens": ["good"], "ner_tags": ["verb"]}) + "\n")
    with pytest.raises(ConfigError, match="row 1: unknown label 'verb'; the labels are 'adjective', 'article', 'noun'"):
        answers.score(run.path, str(odd))


def test_a_model_that_is_drawn_is_drawn_again_as_it_was(tmp_path):
    source = write_data(tmp_path / "data", "image_classification")
    chosen = recipe(tmp_path, Path("mlp"), source, "image_classification", seed=3)
    run = anyrank.run(chosen, tmp_path / "run")
    assert answers.score(run.path, str(source)).metrics == pytest.approx(run.records()[-1]["metrics"])
    with pytest.raises(ConfigError, match="none of transformers' models, which alone can be written as one"):
        answers.merge(run.path, tmp_path / "merged")


def test_dora_and_other_scales_are_scored_as_in_the_run(judge, tmp_path):
    changes = {"rounds": 1, "local__name": "dora", "lora__scale": 3.0}
    run = anyrank.run(recipe(tmp_path, judge / "model", judge / "data", "classification", **changes), tmp_path / "run")
    answers.merge(run.path, tmp_path / "merged")
    for folder in (run.path, tmp_path / "merged"):
        score = answers.score(folder, str(judge / "data"))
        assert score.metrics == pytest.approx(run.records()[-1]["metrics"]), folder


# --- writing ------------------------------------------------------------------------------------------------------

PROMPT = "the film was good"


def test_generate_answers_as_transformers_would(writer, command):
    tokenizer = transformers.AutoTokenizer.from_pretrained(writer / "merged")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)[
        "input_ids"
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(writer / "merged").eval()
    ids = tokenizer(f"### Instruction:\n{PROMPT}\n\n### Response:\n", return_tensors="pt")
    assert asked == ids["input_ids"][0].tolist()
    with torch.no_grad():
        whole = model.generate(**ids, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    for way in WAYS:
        assert answers.generate(writer / way, PROMPT, max_new_tokens=8) == expected
    code, out, error = command("generate", writer / "run", PROMPT, "--max-new-tokens", "8")
    assert (code, out, error) == (0, expected + "\n", "")
    assert command("generate", writer / "run", PROMPT, "--max-new-tokens", "0")[0] == 2


def test_an_answer_ends_where_the_model_says_and_where_its_positions_do(writer, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(writer / "merged", merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    ids = tokenizer(f"### Instruction:\n{PROMPT}\n\n### Response:\n", return_tensors="pt")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    with torch.no_grad():
        answered = model.generate(ids, max_length=96, do_sample=False)[0, ids.shape[1] :]
    assert answers.generate(merged, PROMPT, max_new_tokens=1000) == tokenizer.decode(answered, skip_special_tokens=True)
    until = int((answered != answered[0]).nonzero()[0])
    file = merged / "generation_config.json"
    ends = {"eos_token_id": [int(answered[until]), tokenizer.eos_token_id]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ends}))
    assert answers.generate(merged, PROMPT) == tokenizer.decode(answered[: until + 1])


def test_a_chat_model_is_asked_by_its_template_and_a_text_goes_on_as_it_is(tmp_path):
    base = write_family(tmp_path / "model", "qwen2")
    source = write_data(tmp_path / "data", "instruction")
    (tmp_path / "text.csv").write_text("text\n" + "the film was good\n" * 20)
    plain = {"problem__name": "language", "problem__max_length": 16}
    runs = [
        anyrank.run(recipe(tmp_path, base, source, "chat", rounds=1), tmp_path / "chat").path,
        anyrank.run(recipe(tmp_path, base, tmp_path / "text.csv", "chat", rounds=1, **plain), tmp_path / "plain").path,
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for run, prompt in zip(runs, [f"<user>{PROMPT}<|im_end|><assistant>", PROMPT], strict=True):
        answers.merge(run, tmp_path / f"merged-{run.name}")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{run.name}").eval()
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(**ids, max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answers.generate(run, PROMPT, max_new_tokens=6) == expected


def test_a_prompt_that_leaves_no_room_is_refused(writer, command):
    code, _, error = command("generate", writer / "run", "good " * 100)
    assert code == 2
    assert "tokens; expected 1 or more to 95, as the model has 96 positions" in " ".join(error.split())


def test_a_classifier_writes_nothing(judge, command):
    code, _, error = command("generate", judge / "run", "hello")
    assert code == 2
    assert "expected a causal language model, which alone writes text; this one was trained for classification" in error


# --- merging ------------------------------------------------------------------------------------------------------


def test_export_merges_a_run_or_an_adapter_into_a_model_of_its_own(judge, command, tmp_path):
    for source in ("run", "run/adapter", "run/classes/rank-1"):
        out = tmp_path / source.replace("/", "-")
        code, said, error = command("export", judge / source, "--merge", "-o", out)
        assert (code, error) == (0, "")
        assert f"Merged model: {out}" in said
        names = {file.name for file in out.iterdir()}
        assert names >= {"anyrank.json", "config.json", "model.safetensors", "tokenizer.json"}
        assert "adapter_config.json" not in names
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "kind", 1: "unkind"}


def test_a_merged_model_keeps_the_settings_of_its_base(writer):
    base, merged = (transformers.AutoConfig.from_pretrained(writer / name).to_dict() for name in ("model", "merged"))
    assert {key for key in base if base[key] != merged[key]} <= {"_name_or_path", "dtype", "architectures"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["merged", "--merge", "-o", "new"], 1, "merged is a merged model already."),
        (["run", "--merge", "-o", "data"], 1, "data is not an empty folder. Choose another one."),
        (["run", "--merge", "-o", "run"], 1, "run already holds a run."),
        (["run", "--merge", "--rank", "1", "-o", "new"], 2, "expected one of --rank R and --merge"),
        (["run", "-o", "new"], 2, "expected one of --rank R and --merge"),
        (["run", "--rank", "1", "--base", "model", "-o", "new"], 2, "--base beside --merge alone"),
    ],
)
def test_what_cannot_be_merged_is_said(judge, command, monkeypatch, arguments, code, said):
    monkeypatch.chdir(judge)
    got, _, error = command("export", *arguments)
    assert (got, said in " ".join(error.split())) == (code, True)
    assert not Path("new").exists()


# --- what is there, and what is not -------------------------------------------------------------------------------


@pytest.mark.parametrize("do", ["evaluate", "generate", "export"])
def test_a_folder_without_a_result_is_one_message(judge, command, tmp_path, do):
    further = {"evaluate": ["--data", "x"], "generate": ["hello"], "export": ["--merge", "-o", tmp_path / "new"]}[do]
    unfinished, own = tmp_path / "unfinished", tmp_path / "own"
    with pytest.raises(KeyboardInterrupt):
        anyrank.run(recipe(tmp_path, judge / "model", judge / "data", "classification"), unfinished, observer=Stops())
    shutil.copytree(judge / "run", own)
    (own / "adapter").rename(own / "clients")
    mixture = tmp_path / "mixture"
    shutil.copytree(judge / "run", mixture)
    (mixture / "adapter" / "mixture.json").write_text("{}")
    broken = tmp_path / "broken"
    shutil.copytree(judge / "run" / "adapter", broken)
    (broken / "anyrank.json").write_text("{")
    for folder, said in {
        tmp_path / "nowhere": "there is no folder",
        judge
        / "data": "data holds no anyrank.json: expected a run folder, or an adapter or a merged model that anyrank",
        unfinished: f"has no adapter yet: finish it with `anyrank run --resume {unfinished}`.",
        own: "has no global adapter: each client has its own; name one in",
        mixture: "is a mixture of adapters; load it in Python with anyrank.hf.load_mixture.",
        broken: "anyrank.json cannot be read",
    }.items():
        code, _, error = command(do, folder, *further)
        assert (code, said in " ".join(error.split())) == (1, True), error


@pytest.mark.parametrize("way", ["score", "merge", "generate"])
def test_a_base_that_is_elsewhere_is_asked_for_and_can_be_named(writer, tmp_path, way):
    run, base = tmp_path / "run", writer / "model"
    shutil.copytree(writer / "run", run)
    file = run / "adapter" / "anyrank.json"
    about = json.loads(file.read_text())
    use = {
        "score": lambda **how: answers.score(run, str(writer / "data"), **how).loss,
        "merge": lambda **how: answers.merge(run, tmp_path / "merged", **how),
        "generate": lambda **how: answers.generate(run, PROMPT, max_new_tokens=2, **how),
    }[way]
    expected = None if way == "merge" else use()
    for name in ("/nowhere/at/all", "nobody/nothing"):
        file.write_text(json.dumps(about | {"model": {**about["model"], "name": name}}))
        with pytest.raises(
            ConfigError, match=rf"its base model {name} is not to be had \(.*\)\. Say with --base where"
        ):
            use()
    assert use(base=str(base)) == expected
    file.write_text(json.dumps(about | {"model": {**about["model"], "name": None}}))
    with pytest.raises(ConfigError, match="its base model was handed over in Python; say with --base where it is"):
        answers.merge(run, tmp_path / "another")


def test_another_base_is_remarked_upon(writer, tmp_path, caplog):
    answers.generate(writer / "run", PROMPT, max_new_tokens=1)
    assert caplog.text == ""
    shutil.copytree(writer / "merged", tmp_path / "other")
    answers.generate(writer / "run", PROMPT, base=str(tmp_path / "other"), max_new_tokens=1)
    assert "the base model is not, to the last bit, the one that the adapter was trained on" in caplog.text


def test_what_was_handed_over_in_python_is_used_in_python(judge, tmp_path, command):
    shutil.copytree(judge / "run", tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "anyrank.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"problem": {"name": "own"}, "auto_class": None}))
    for arguments, said in (
        (
            ["evaluate", tmp_path / "run", "--data", "x"],
            "its problem was handed over in Python, and can be scored only",
        ),
        (["generate", tmp_path / "run", "hello"], "expected a causal language model"),
        (["export", tmp_path / "run", "--merge", "-o", tmp_path / "new"], "none of transformers' models"),
    ):
        code, _, error = command(*arguments)
        assert (code, said in " ".join(error.split())) == (2, True), error


def test_finished_tells_what_a_folder_is(judge):
    assert [answers.finished(judge / way).merged for way in WAYS] == [False, False, True]
    assert answers.finished(judge / "run").folder == judge / "run" / "adapter"
    with pytest.raises(RecordError, match="there is no folder"):
        answers.finished(judge / "nowhere")


# --- adapters that are damaged, or not whole ----------------------------------------------------------------------

WEIGHTS, CONFIG, ABOUT = "adapter_model.safetensors", "adapter_config.json", "anyrank.json"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def entries(file: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))


def first(found: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(found) if part in name)


DAMAGES = {
    "cut": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50]),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no configuration": lambda folder: (folder / CONFIG).unlink(),
    "no object": lambda folder: (folder / CONFIG).write_text("[]"),
    "a tensor less": tensors(lambda found: found.pop(first(found, "lora_B"))),
    "a layer less": tensors(lambda found: [found.pop(first(found, factor)) for factor in ("lora_A", "lora_B")]),
    "renamed": tensors(lambda found: found.update(other=found.pop(first(found, "lora_A")))),
    "not finite": tensors(lambda found: found[first(found, "lora_A")].fill_(float("nan"))),
    "another scale": entries(CONFIG, lora_alpha=1e9),
    "a pattern that is none": entries(CONFIG, alpha_pattern={"(": 3}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_is_not_the_one_that_was_written_is_not_used(writer, command, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(writer / "run", run)
    DAMAGES[damage](run / "adapter")
    said = (
        "so the adapter is not whole" if damage.startswith("no ") and "object" not in damage else "is not the file that"
    )
    for arguments in (
        ["evaluate", run, "--data", writer / "data"],
        ["generate", run / "adapter", PROMPT],
        ["export", run, "--merge", "-o", tmp_path / "new"],
        ["export", run, "--rank", "1", "-o", tmp_path / "new"],
    ):
        code, _, error = command(*arguments)
        assert (code, said in " ".join(error.split())) == (1, True), error
        assert "adapter_" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "expected an object"),
        ({"scale": "x"}, "scale: input should be a valid number"),
        ({"scale": 0.0}, "scale: input should be greater than 0"),
        ({"layers": 5}, "layers: input should be a valid list"),
        ({"layers": ["model.nope"]}, "layers: not those of the adapter beside it"),
        ({"model": {"dtype": "zzz"}}, "model.dtype: input should be"),
        ({"problem": {}}, "problem.name: field required"),
        ({"files": [1]}, "files: input should be"),
    ],
)
def test_what_lies_beside_an_adapter_is_checked(writer, command, tmp_path, changes, said):
    adapter = tmp_path / "adapter"
    shutil.copytree(writer / "run" / "adapter", adapter)
    entries(ABOUT, **changes)(adapter) if isinstance(changes, dict) else (adapter / ABOUT).write_text("[]")
    for arguments in (
        ["evaluate", adapter, "--data", writer / "data"],
        ["generate", adapter, PROMPT],
        ["export", adapter, "--merge", "-o", tmp_path / "new"],
    ):
        code, _, error = command(*arguments)
        assert (code, said in " ".join(error.split())) == (1, True), error
        assert "anyrank.json" in error


def test_a_base_of_another_width_is_refused(writer, command, tmp_path):
    config = transformers.AutoConfig.from_pretrained(writer / "model", hidden_size=16, head_dim=8)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    transformers.AutoTokenizer.from_pretrained(writer / "model").save_pretrained(tmp_path / "narrow")
    for arguments in (
        ["evaluate", writer / "run", "--data", writer / "data"],
        ["generate", writer / "run", PROMPT],
        ["export", writer / "run", "--merge", "-o", tmp_path / "new"],
    ):
        code, _, error = command(*arguments, "--base", tmp_path / "narrow")
        assert code == 2
        assert "q_proj is 32 x 32 in the adapter, and in the model there is 16 x 16. Say with --base" in error


def test_a_prompt_that_is_no_text_is_refused(writer, command):
    code, _, error = command("generate", writer / "run", "\udcff")
    assert code == 2
    assert r"prompt: expected text in UTF-8; got '\udcff'" in error


def test_a_run_without_its_rounds_is_not_exported(writer, command, tmp_path):
    shutil.copytree(writer / "run", tmp_path / "run")
    (tmp_path / "run" / "rounds.jsonl").unlink()
    code, _, error = command("export", tmp_path / "run", "--rank", "1", "-o", tmp_path / "new")
    assert code == 1
    assert "rounds.jsonl holds no round; the folder was changed" in " ".join(error.split())


@pytest.mark.parametrize("how", [["--merge"], ["--rank", "4"]])
def test_an_export_that_finds_no_room_leaves_nothing(writer, command, tmp_path, how):
    out = tmp_path / "new"
    with files_of_at_most((writer / "run" / "adapter" / WEIGHTS).stat().st_size - 1):
        code, _, error = command("export", writer / "run", *how, "-o", out)
    assert (code, f"{out}: File too large" in " ".join(error.split())) == (1, True), error
    assert not [*tmp_path.iterdir()]
    assert command("export", writer / "run", *how, "-o", out)[0] == 0
