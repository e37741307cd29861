import json
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertTokenizerFast

from anyrank import data
from anyrank.data import Labelled, encode, majority, overlap, parts
from anyrank.data.load import load as load_exactly
from anyrank.data.stdlib_docs import stdlib_docs
from anyrank.errors import ConfigError

ROWS = {
    "text": ["good, great", 'a "bad" one', "NA", "fine\nline", "dull", "kind"],
    "mood": ["up", "down", "down", "up", "down", "up"],
    "critic": ["ann", "bob", "ann", "bob", "ann", "cy"],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def docs() -> Labelled:
    return load("stdlib-docs", text=("signature", "docstring"), label="label")


def load(source, *, text=("text",), label="mood", test=None, test_share=0.5, seed=0) -> Labelled:
    return load_exactly(str(source), text=text, label=label, test=test, test_share=test_share, seed=seed)


def write(file: Path, **columns) -> Path:
    table = Dataset.from_dict(columns or ROWS)
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".csv":
        table.to_pandas().to_csv(file, index=False)
    elif file.suffix == ".parquet":
        table.to_pandas().to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
    return file


def problem(source, **arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source, **arguments)
    return str(caught.value)


# The embedded set


def documented(name: str, docstring: str, indent: str = "") -> str:
    return f'{indent}def {name}:\n{indent}    """{docstring}"""\n'


def write_library(root: Path, *, packages: int = 25, functions: int = 15) -> Path:
    """Package p00 has the fewest functions, the last one the most."""
    for package in range(packages):
        names = [f"get_item{number}(self, key{number})" for number in range(functions + package)]
        body = [documented(name, f"Returns one: number {i} of {package}.") for i, name in enumerate(names)]
        folder = root / f"p{package:02}"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("".join(body))
    return root


def texts(splits: dict[str, Dataset], column: str) -> set[str]:
    return {text for part in splits.values() for text in part[column]}


def test_no_docstring_is_in_both_parts_and_none_repeats_a_pair(docs):
    assert not set(docs.train["docstring"]) & set(docs.test["docstring"])
    pairs = [(row["client"], row["signature"], row["docstring"]) for part in (docs.train, docs.test) for row in part]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_are_balanced_in_each_client(docs, part):
    rows = getattr(docs, part)
    both = Counter(zip(rows["client"], rows["label"], strict=True))
    clients = set(rows["client"])
    assert len(clients) == 24
    assert all(both[client, 0] == both[client, 1] >= 3 for client in clients)


def test_each_text_is_seen_once_with_either_label_and_swaps_stay_in_the_client(docs):
    for part in (docs.train, docs.test):
        match, mismatch = (part.filter(lambda row, label=label: row["label"] == label) for label in (1, 0))
        for column in ("signature", "docstring"):
            both = [sorted(zip(side["client"], side[column], strict=True)) for side in (match, mismatch)]
            assert both[0] == both[1]


def test_the_size_suits_a_demo(docs):
    assert 3_500 <= len(docs.train) <= 5_000
    assert 700 <= len(docs.test) <= 1_100
    assert docs.label_names == ("mismatch", "match")
    assert docs.train.features["label"] == Value("int64")


def test_only_understanding_helps_much(docs):
    labels = np.array(docs.test["label"][:])
    assert np.mean(majority(docs) == labels) == 0.5
    assert 0.7 < np.mean(overlap(docs) == labels) < 0.85


def test_a_signature_is_words_and_a_docstring_its_first_paragraph(tmp_path):
    root = write_library(tmp_path)
    source = "class A:\n" + documented(
        "readHTTPHeader_2(self, maxBytes, *parts, on_error=1, **kw)", "Reads  a\n    header.\n  \n Slowly.", "    "
    )
    file = root / "p24" / "reader.py"
    file.write_text(source)
    rows = [row for part in stdlib_docs(root).values() for row in part if "http" in row["signature"]]
    assert {row["signature"] for row in rows} == {"read http header 2 (max bytes, parts, on error, kw)"}
    assert [row["docstring"] for row in rows if row["label"] == 1] == ["Reads a header."]


@pytest.mark.parametrize(
    "file",
    ["test/x.py", "p24/tests/x.py", "p24/test.py", "site-packages/p24/x.py", "turtle.py", "tkinter/x.py", "a-b/x.py"],
)
def test_tests_and_foreign_code_are_left_out(tmp_path, file):
    path = write_library(tmp_path) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(documented(f"f{i}(a)", f"Foreign text, number {i}.") for i in range(60)))
    assert not any("Foreign" in text for text in texts(stdlib_docs(tmp_path), "docstring"))


def test_repeats_and_files_that_cannot_be_parsed_are_left_out(tmp_path):
    extra = write_library(tmp_path) / "p24"
    (extra / "bad.py").write_text("def broken(:\n")
    (extra / "null.py").write_bytes(b"x = '\0'\n")
    (extra / "copy.py").write_text(
        documented("other(a)", "returns one NUMBER 3 of 24")  # a docstring that is there
        + documented("get_item3(key3)", "The same signature again.")
        + documented("short(a)", "Two words.")
        + documented("new(a)", "A new one, kept.")
    )
    splits = stdlib_docs(tmp_path)
    assert "new (a)" in texts(splits, "signature")
    assert not {"other (a)", "short (a)"} & texts(splits, "signature")
    assert "The same signature again." not in texts(splits, "docstring")


def test_the_clients_are_those_with_most_functions(tmp_path):
    splits = stdlib_docs(write_library(tmp_path, packages=26))
    assert texts(splits, "client") == {f"p{number:02}" for number in range(2, 26)}


def test_a_file_that_python_warns_about_is_read_all_the_same(tmp_path):
    extra = write_library(tmp_path) / "p24" / "escape.py"
    extra.write_text("x = '\\d'\n" + documented("new(a)", "A new one, kept."))
    with pytest.warns((SyntaxWarning, DeprecationWarning)):
        compile(extra.read_text(), "escape.py", "exec")
    assert "new (a)" in texts(stdlib_docs(tmp_path), "signature")


@pytest.mark.parametrize("packages", [0, 23])
def test_a_python_without_sources_is_named(tmp_path, packages):
    with pytest.raises(ConfigError, match=f"expected at least 24 packages.*found {packages}.*full installation"):
        stdlib_docs(write_library(tmp_path / "lib", packages=packages))


def test_every_process_makes_the_same_data(tmp_path):
    write_library(tmp_path)
    script = (
        "import sys; from pathlib import Path; from anyrank.data.stdlib_docs import stdlib_docs\n"
        "print([part.to_list() for part in stdlib_docs(Path(sys.argv[1])).values()])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert there.strip() == str([part.to_list() for part in stdlib_docs(tmp_path).values()])


def test_one_seed_one_fingerprint_and_the_seed_does_not_touch_the_embedded_data(docs):
    again = load("stdlib-docs", text=("signature", "docstring"), label="label", seed=7)
    assert again.fingerprint == docs.fingerprint
    assert len(docs.fingerprint) == 64


# Files


def test_every_format_gives_the_same_data(tmp_path):
    loaded = [load(write(tmp_path / f"reviews{suffix}")) for suffix in (".csv", ".jsonl", ".json", ".parquet")]
    assert len({one.fingerprint for one in loaded}) == 1
    assert loaded[0].label_names == ("down", "up")
    assert sorted([*loaded[0].train["text"], *loaded[0].test["text"]]) == sorted(ROWS["text"])


def test_other_columns_and_the_label_as_it_was_are_kept(tmp_path):
    loaded = load(write(tmp_path / "a.csv"))
    row = next(row for part in (loaded.train, loaded.test) for row in part if row["text"] == "kind")
    assert row == {"text": "kind", "mood": "up", "critic": "cy", "label": 1}


@pytest.mark.parametrize("change", [{"text": "other"}, {"mood": "up"}])
def test_the_fingerprint_sees_texts_and_labels(tmp_path, change):
    column, value = next(iter(change.items()))
    changed = ROWS | {column: [ROWS[column][0], value, *ROWS[column][2:]]}
    first, second = load(write(tmp_path / "a.csv")), load(write(tmp_path / "b.csv", **changed))
    assert first.fingerprint != second.fingerprint


def test_the_split_is_a_function_of_the_seed(tmp_path):
    file = write(tmp_path / "a.csv", text=[f"text {i}" for i in range(40)], mood=[0, 1] * 20)
    parts = [load(file, seed=seed, test_share=0.25) for seed in (0, 0, 1)]
    assert parts[0].test["text"][:] == parts[1].test["text"][:] != parts[2].test["text"][:]
    assert len(parts[0].test) == 10
    assert not set(parts[0].test["text"]) & set(parts[0].train["text"])


@pytest.mark.parametrize("written", [["007", "", "12"], ["NA", "", "None"]])
def test_texts_in_a_csv_file_stay_as_written_and_missing_ones_are_empty(tmp_path, written):
    file = tmp_path / "a.csv"
    file.write_text("text,mood\n{},up\n{},down\n{},up\n".format(*written))
    assert load(file, test=str(file)).train["text"][:] == written


def test_numbers_and_nulls_in_other_formats_become_strings(tmp_path):
    file = write(tmp_path / "a.jsonl", text=[7, None, 12], mood=[True, False, True])
    assert load(file, test=str(file)).train["text"][:] == ["7", "", "12"]


@pytest.mark.parametrize(
    ("values", "names"),
    [([3, 1, 2, 1], ("1", "2", "3")), ([True, False, True, True], ("False", "True")), (list("baba"), ("a", "b"))],
)
def test_labels_are_numbered_in_sorted_order(tmp_path, values, names):
    file = write(tmp_path / "a.jsonl", text=list("wxyz"), mood=values)
    loaded = load(file, test=str(file))
    assert loaded.label_names == names
    assert [loaded.label_names[code] for code in loaded.test["label"]] == [str(value) for value in values]


@pytest.mark.parametrize("names", [["sad", "glad"], {"mood": ["sad", "glad"], "tone": ["x"]}])
def test_label_names_beside_the_files_are_used(tmp_path, names):
    write(tmp_path / "d" / "train.csv", text=["a", "b", "c"], mood=[1, 0, 1])
    write(tmp_path / "d" / "validation.parquet", text=["d"], mood=[1])
    (tmp_path / "d" / "label_names.json").write_text(json.dumps(names))
    loaded = load(tmp_path / "d")
    assert loaded.label_names == ("sad", "glad")
    assert loaded.test["label"][:] == [1]


def test_label_names_may_be_about_another_column_or_wrong(tmp_path):
    file = write(tmp_path / "a.csv")
    beside = tmp_path / "label_names.json"
    beside.write_text('{"tone": ["x"]}')
    assert load(file).label_names == ("down", "up")
    beside.write_text('["down", 2]')
    assert "expected a list of class names" in problem(file)
    beside.write_text("[")
    assert "is not JSON" in problem(file)


@pytest.mark.parametrize("unlabelled", [{"text": ["t"]}, {"text": ["t"], "mood": [-1]}])
def test_a_test_part_without_labels_gives_way_to_the_validation_part(tmp_path, caplog, unlabelled):
    write(tmp_path / "d" / "train.csv", text=["a", "b"], mood=[0, 1])
    write(tmp_path / "d" / "test.csv", **unlabelled)
    write(tmp_path / "d" / "validation.csv", text=["v"], mood=[1])
    assert load(tmp_path / "d").test["text"][:] == ["v"]
    assert "the test part has no labels in column 'mood'" in caplog.text


def test_a_folder_with_a_file_for_each_client(tmp_path):
    for client, kind, texts in (("ann", "jsonl", ["a", "b"]), ("bob", "csv", ["c"]), ("cy", "parquet", ["d"])):
        write(tmp_path / "d" / f"{client}.{kind}", text=texts, mood=[len(client) - 2] * len(texts))
    (tmp_path / "d" / "label_names.json").write_text('["down", "up"]')
    (tmp_path / "d" / "notes.txt").write_text("no data")
    found = data.parts(str(tmp_path / "d"))
    assert found.train.to_dict() == {
        "text": ["a", "b", "c", "d"],
        "mood": [1, 1, 1, 0],
        "file": ["ann", "ann", "bob", "cy"],
    }
    assert found.test is None
    assert load(tmp_path / "d").label_names == ("down", "up")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_column_may_be_empty_in_some_clients_files(tmp_path, suffix):
    for client, context in {"ann": None, "bob": "some", "cy": None}.items():
        write(tmp_path / "d" / f"{client}.{suffix}", text=["a"], context=[context])
    assert data.parts(str(tmp_path / "d")).train["context"][:] == [None, "some", None]


def test_files_of_clients_with_other_columns_are_all_named(tmp_path):
    write(tmp_path / "d" / "ann.csv", text=["a"], mood=["up"])
    write(tmp_path / "d" / "bob.csv", text=["b"], mod=["up"])
    write(tmp_path / "d" / "cy.csv", text=["c"], mood=[3])
    write(tmp_path / "d" / "dan.csv", text=["d"], mood=["up"])
    with pytest.raises(ConfigError) as caught:
        data.parts(str(tmp_path / "d"))
    text = str(caught.value)
    assert (
        "bob.csv: its columns are text (string), mod (string), but those of ann.csv are text (string), mood (str"
        in text
    )
    assert "cy.csv: its columns are text (string), mood (int64)" in text
    assert "dan.csv" not in text


def test_clients_files_have_no_column_for_the_file_yet(tmp_path):
    write(tmp_path / "d" / "ann.csv")
    (tmp_path / "d" / "ann.csv").write_text("text,file\na,x\n")
    with pytest.raises(
        ConfigError, match=r"ann\.csv: a column 'file' is added, which says whose a row is; rename its own"
    ):
        data.parts(str(tmp_path / "d"))


def test_a_variable_in_a_path(tmp_path, monkeypatch):
    write(tmp_path / "d" / "a.csv")
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    assert load("$MY_DATA/d/a.csv").fingerprint == load(tmp_path / "d" / "a.csv").fingerprint
    assert len(load("${MY_DATA}/d/a.csv", test="$MY_DATA/d/a.csv").test) == len(ROWS["text"])
    monkeypatch.delenv("MY_DATA")
    assert "data.source: $MY_DATA/d/a.csv names a variable that is not set in the environment" in problem(
        "$MY_DATA/d/a.csv"
    )
    text = problem(tmp_path / "d" / "a.csv", test="$MY_DATA/b.csv")
    assert "data.test: $MY_DATA/b.csv names a variable that is not set" in text


def test_progress_bars_come_back(tmp_path, capfd):
    load(write(tmp_path / "a.csv"))
    assert "Generating" not in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled()


# Names of the Hugging Face library


def test_a_hub_name_brings_its_class_names_and_its_labelled_part(monkeypatch):
    features = Features({"text": Value("string"), "mood": ClassLabel(names=["sad", "glad"])})
    parts = {"train": [0, 1, 1], "test": [-1, -1], "validation": [1, 0]}
    published = DatasetDict(
        {
            name: Dataset.from_dict({"text": [name] * len(labels), "mood": labels}, features=features)
            for name, labels in parts.items()
        }
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: asked.append(given) or published)
    loaded = load("someone/moods:small")
    assert asked == [("someone/moods", "small")]
    assert loaded.label_names == ("sad", "glad")
    assert (loaded.test["text"][0], loaded.test["label"][:]) == ("validation", [1, 0])


def test_an_unknown_name_offline_is_one_clear_error():
    text = problem("someone/no-such-moods")
    assert "no such file or directory" in text
    assert "Hugging Face data set 'someone/no-such-moods' could not be loaded" in text
    assert "stdlib-docs" in text


# Mistakes


def test_missing_columns_are_all_named_with_what_exists(tmp_path):
    text = problem(write(tmp_path / "a.csv"), text=("txet", "b"), label="lable")
    assert len(text.splitlines()) == 3
    assert "there is no column 'txet'; the columns are text, mood, critic; did you mean 'text'?" in text
    assert "there is no column 'lable'" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,mood\na,1\nb,\nc,0\n", "row 2 has no label in column 'mood'"),
        ("text,mood\na,1.5\nb,2.5\n", "expected only strings, integers or booleans, found float"),
        ("text,mood\na,1\nb,1\n", "expected two labels or more, found only 1"),
        ("text,mood\n", "cannot be read .*expected a header line, at least one row"),
        ("", "cannot be read .*No columns to parse"),
        ("text,mood\nhello, you,1\nbye,0\n", "cannot be read .*quote texts with commas"),
        ("text,mood\nbye,0\nhello, you,1\n", "cannot be read .*Expected 2 fields in line 3"),
    ],
)
def test_a_csv_file_that_does_not_fit(tmp_path, content, expected):
    file = tmp_path / "a.csv"
    file.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load(file)


def test_test_labels_must_be_known_and_there(tmp_path):
    file = write(tmp_path / "a.csv")
    other = write(tmp_path / "b.csv", text=["a", "b"], mood=["up", "sideways"])
    assert "test data: row 2: unknown label 'sideways'; the labels are 'down', 'up'" in problem(file, test=str(other))
    assert "test data: there is no column 'mood'" in problem(file, test=str(write(tmp_path / "c.csv", text=["a"])))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gone.csv", "no such file"),
        ("empty", "expected train.csv or train.json .*found nothing"),
        ("twice", "one file for each part, found train.csv, train.jsonl"),
        ("notes.md", "expected a name ending in .csv"),
        ("broken.jsonl", "cannot be read .*JSON object"),
        ("broken.parquet", "cannot be read .*Parquet file"),
    ],
)
def test_sources_that_are_not_there_or_not_data(tmp_path, source, expected):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "twice" / "train.csv")
    write(tmp_path / "twice" / "train.jsonl")
    for name in ("notes.md", "broken.jsonl", "broken.parquet"):
        (tmp_path / name).write_text('{"text": ')
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path / source)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text,mood\na,1\nb,c,2\n"), ("a.jsonl", '{"text": \n{"'), ("a.parquet", "no Parquet")],
)
def test_what_is_wrong_with_a_file_is_said_once(tmp_path, caplog, capfd, name, content):
    (tmp_path / name).write_text(content)
    library = logging.getLogger("datasets")
    level = library.level
    library.addHandler(caplog.handler)
    try:
        assert "cannot be read" in problem(tmp_path / name)
    finally:
        library.removeHandler(caplog.handler)
    assert library.level == level
    assert "Failed" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"text": ()}, r"problem\.text: expected one column, or two different ones"),
        ({"text": ("text", "text")}, "expected one column, or two different ones"),
        ({"text": ("text", "mood")}, r"problem\.text: expected neither the label column"),
        ({"test_share": 1.0}, r"data\.test_share: expected a number between 0 and 1.*got 1.0"),
        ({"test": "gone.csv"}, "gone.csv: there is no such file"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        load(write(tmp_path / "a.csv"), **arguments)


def test_columns_that_are_no_texts(tmp_path):
    file = write(tmp_path / "a.jsonl", text=[["a"], ["b"]], mood=[0, 1])
    assert "training data: column 'text': expected texts, found List" in problem(file)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(["train"], "training data: there are no rows"), (["dev", "test"], "no part 'train'; the parts are dev, test")],
)
def test_a_hub_data_set_without_training_examples(monkeypatch, parts, expected):
    empty = Dataset.from_dict({"text": [], "mood": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: DatasetDict.fromkeys(parts, empty))
    assert expected in problem("someone/nothing")


# Tokens


@pytest.fixture
def tokenizer(tmp_path) -> BertTokenizerFast:
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    return BertTokenizerFast(vocab=str(file))


def test_pairs_are_tokenised_in_order_and_not_padded(tokenizer):
    pairs = Dataset.from_dict({"one": ["a b", ""], "two": ["c", "b"], "label": [1, 0]})
    encoded, _ = encode(pairs, tokenizer, text=("one", "two"), max_length=8)
    assert encoded["input_ids"][:] == [[2, 5, 6, 3, 7, 3], [2, 3, 6, 3]]
    assert encoded["token_type_ids"][:] == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1]]
    assert encoded["labels"][:] == [1, 0]
    assert encoded["length"][:] == [6, 4]


def test_long_texts_are_cut(tokenizer):
    one = Dataset.from_dict({"one": ["a b c a b c"], "label": [0]})
    encoded, cut = encode(one, tokenizer, text=("one",), max_length=4)
    assert (encoded["input_ids"][:], cut) == ([[2, 5, 6, 3]], 1)
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "length"}


# References


def labelled(rows: list[tuple[str, str, int]], text=("one", "two")) -> Labelled:
    columns = dict(zip(("one", "two", "label"), (list(column) for column in zip(*rows, strict=True)), strict=True))
    part = Dataset.from_dict(columns)
    return Labelled(part, part, text, ("no", "yes"), "")


def test_overlap_counts_shared_words_whatever_their_case_and_spelling():
    rng = random.Random(0)
    words = [f"w{number}" for number in range(50)]
    rows = []
    for number in range(60):
        first, second = rng.sample(words, 2)
        rows.append((f"get {first}", f"The '{(first if number % 2 else second).upper()}_'", number % 2))
    assert overlap(labelled(rows)).tolist() == [label for *_, label in rows]
    assert overlap(labelled(rows, text=("one",))) is None
    assert overlap(labelled(rows[::2])) is None


def test_majority_takes_the_most_frequent_training_label():
    data_set = labelled([("a", "b", 1), ("a", "b", 1), ("a", "b", 0)])
    assert majority(data_set).tolist() == [1, 1, 1]
    assert majority(labelled([("a", "b", 1), ("a", "b", 0)])).tolist() == [0, 0]


# Real data


@pytest.mark.parametrize(
    ("folder", "text", "label", "sizes", "names"),
    [
        ("mrpc", ("sentence1", "sentence2"), "label", (3668, 1725), ("not_equivalent", "equivalent")),
        ("sst2", ("sentence",), "label", (67349, 872), ("negative", "positive")),
        ("meld", ("text",), "sentiment", (9989, 2610), ("neutral", "positive", "negative")),
    ],
)
def test_real_data_loads(folder, text, label, sizes, names):
    if "ANYRANK_DATA" not in os.environ:
        pytest.skip("ANYRANK_DATA does not name a folder with real data")
    loaded = load(Path(os.environ["ANYRANK_DATA"]) / folder, text=text, label=label)
    assert (len(loaded.train), len(loaded.test)) == sizes
    assert loaded.label_names == names


def test_the_package_names_what_it_offers():
    assert all(hasattr(data, name) for name in data.__all__)


def test_plain_text_has_a_row_for_each_paragraph_and_a_client_for_each_file(tmp_path):
    (tmp_path / "ann.txt").write_text("one line\nand another\n\n\nthe second paragraph\n", encoding="utf-8")
    (tmp_path / "bob.txt").write_text("ä third\n", encoding="utf-8")
    found = parts(str(tmp_path), test=None, as_text=["text"]).train
    assert list(found["text"]) == ["one line\nand another", "the second paragraph", "ä third"]
    assert list(found["file"]) == ["ann", "ann", "bob"]


def test_a_note_beside_tables_is_no_client(tmp_path):
    write(tmp_path / "ann.csv")
    (tmp_path / "notes.txt").write_text("these are ours\n")
    assert set(parts(str(tmp_path), test=None, as_text=["text"]).train["file"]) == {"ann"}
