"""What is learned from plain text, labelled texts, words and choices: examples, losses, metrics, and short runs."""

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from scipy import stats
from sklearn import metrics as sklearn
from torch.nn import functional as F
from transformers import BertTokenizerFast, GPT2Tokenizer

import anyrank
from anyrank.adapter import Adapter
from anyrank.errors import ConfigError
from anyrank.hf import AdaptedModel
from anyrank.job import prepare
from anyrank.local import LOCALS
from anyrank.problem import Answers, Problem
from anyrank.problems.choice import multiple_choice
from anyrank.problems.classification import classification, regression
from anyrank.problems.language import language
from anyrank.problems.texts import IGNORED, opening
from anyrank.problems.words import token_classification
from anyrank.train import Score, Training, evaluate
from causal import given, of_bytes, texts, write_causal, write_rows
from tiny import VOCABULARY, write_model


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> tuple[Path, Any]:
    """A causal language model with a token for each byte."""
    tokenizer = of_bytes()
    return write_causal(tmp_path_factory.mktemp("causal") / "model", tokenizer), tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("bert") / "model")


def score(problem: Problem, batch_size: int, **changes: Any) -> Score:
    """The base model's, with a head as it is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AdaptedModel(problem.model(), scale=1.0, **changes)
    training = Training(
        local=LOCALS["lora"](),
        learning_rate=1.0,
        weight_decay=0.0,
        batch_size=batch_size,
        collate=problem.collate,
        objective=problem.objective,
    )
    return evaluate(model, Adapter({}, model.dense), problem.test, training=training)


def run(folder: Path, problem: dict, model: Path, source: Path, **changes: Any) -> Any:
    """The records of a run of a second or two."""
    usual = {
        "rounds": 2,
        "model.name": str(model),
        "problem": problem,
        "data.source": str(source),
        "partition": {"name": "iid", "clients": 3},
        "train": {"learning_rate": 1e-2, "epochs": 4, "batch_size": 8},
        "fleet.per_round": 3,
        "evaluate.every": 1,
        "compute": {"threads": 1, "workers": 1},
    }
    chosen = anyrank.load_recipe(overrides={**usual, **changes})
    return anyrank.run(chosen, folder / "run").records()


# Plain text


def plain(
    model: tuple[Path, Any], folder: Path, rows: list[dict], test: list[dict] | None = None, **settings
) -> Problem:
    """Without other test examples these are the training examples."""
    source = write_rows(folder / "train.jsonl", rows)
    tested = source if test is None else write_rows(folder / "other.jsonl", test)
    return language(given(model[0], source, test=str(tested)), **{"max_length": 8, **settings})


def test_a_text_ends_with_its_end_and_is_cut_into_examples(causal, tmp_path):
    rows = [
        {"text": "abc", "who": "x"},
        {"text": "", "who": "y"},
        {"text": "0123456789abcd", "who": "z"},
        {"text": None},
    ]
    problem = plain(causal, tmp_path, rows)
    # A text of 16 tokens, with its beginning and its end, is two examples of 8.
    assert texts(causal[1], problem) == ["[<s>abc</s>]", "[<s>0123456]", "[789abcd</s>]"]
    assert problem.columns == {"who": ["x", "z", "z"]}
    assert problem.lengths is not None
    assert problem.lengths.tolist() == [5, 8, 8]
    left_out, cut = (
        "2 of 4 {} texts are empty and left out",
        "1 of 4 {} texts are longer than problem.max_length tokens",
    )
    assert problem.remarks == [
        text.format(part) for part in ("training", "test") for text in (left_out, cut + " and become 2 examples")
    ]


def test_a_last_piece_of_one_token_has_nothing_before_it_to_be_predicted_from(causal, tmp_path):
    problem = plain(causal, tmp_path, [{"text": "0123456"}])
    assert texts(causal[1], problem) == ["[<s>0123456]"]
    assert (problem.remarks, problem.columns) == ([], {"row": [0]})


def test_texts_of_a_tokenizer_that_puts_its_own_end_have_one_end(tmp_path):
    tokenizer = of_bytes(ends=True)
    problem = plain((write_causal(tmp_path / "model", tokenizer), tokenizer), tmp_path, [{"text": "abc"}])
    assert texts(tokenizer, problem) == ["[<s>abc</s>]"]


def test_what_a_tokenizer_puts_before_a_text(bert):
    assert opening(of_bytes()) == [1]
    assert opening(of_bytes(begins=False)) == opening(of_bytes(begins=False, ends=True)) == []
    assert opening(BertTokenizerFast.from_pretrained(bert)) == [2]


def test_perplexity_is_that_of_transformers_own_loss_in_batches_of_any_size(causal, tmp_path):
    problem = plain(
        causal, tmp_path, [{"text": text} for text in ("ab", "the film", "a", "was quite long", "0")], max_length=20
    )
    model: Any = problem.model()
    batch = problem.collate([problem.train[i] for i in range(5)])
    with torch.inference_mode():
        expected = float(model(**batch).loss)
        guesses = model(input_ids=batch["input_ids"]).logits.argmax(-1)[:, :-1]
    wanted = batch["labels"][:, 1:]
    # In a text of n letters n + 1 tokens are predicted: these and the end.
    assert (wanted != IGNORED).sum() == sum(n + 1 for n in (2, 8, 1, 14, 1))
    accuracy = (guesses == wanted).sum() / (wanted != IGNORED).sum()
    for size in (1, 2, 16):
        reached = score(problem, size)
        assert reached.loss == pytest.approx(expected, rel=1e-5)
        assert reached.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        assert reached.metrics["accuracy"] == pytest.approx(float(accuracy))


@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_head_that_is_itself_trained_answers_alike(causal, tmp_path, changes):
    problem = plain(causal, tmp_path, [{"text": text} for text in ("ab", "the film", "a")])
    expected, reached = score(problem, 2), score(problem, 2, **changes)
    assert reached.loss == pytest.approx(expected.loss, rel=1e-5)
    assert reached.metrics["accuracy"] == expected.metrics["accuracy"]


def test_texts_of_one_source_are_split_before_they_are_cut(causal, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": f"{number}" * 20} for number in range(10)])
    problem = language(given(causal[0], source, test_share=0.3), max_length=8)
    seen = [{str(example["input_ids"][1:2]) for example in part} for part in (problem.train, problem.test)]  # pyright: ignore
    assert (len(problem.train), len(problem.test)) == (7 * 3, 3 * 3)
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("rows", "test", "expected"),
    [
        ([{"txt": "a"}], None, "training data: there is no column 'text'; the columns are txt; did you mean 'txt'"),
        ([{"text": "a"}], [{"x": "a"}], "test data: there is no column 'text'"),
        ([{"text": ["a"]}], None, "training data: column 'text': expected texts, found List"),
        ([{"text": ""}], None, "expected training and test texts of two tokens or more.*has 0 and 0 of them"),
        ([{"text": "a"}], [{"text": None}, {"text": ""}], "has 1 and 0 of them"),
    ],
)
def test_texts_that_are_none(causal, tmp_path, rows, test, expected):
    with pytest.raises(ConfigError, match=expected):
        plain(causal, tmp_path, rows, test)


def test_numbers_are_texts_too(causal, tmp_path):
    assert texts(causal[1], plain(causal, tmp_path, [{"text": 12}, {"text": 3}])) == ["[<s>12</s>]", "[<s>3</s>]"]


def test_more_tokens_than_positions(causal, tmp_path):
    with pytest.raises(ConfigError, match=r"problem\.max_length: 257 tokens, but the model has 256 positions"):
        plain(causal, tmp_path, [{"text": "a"}], max_length=257)
    assert plain(causal, tmp_path, [{"text": "a"}], max_length=256).batch_of_largest(2)["input_ids"].shape == (2, 256)


def test_a_language_model_learns_in_a_run(causal, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": f"the film {i % 3} was good"} for i in range(40)])
    first, *_, last = (each["metrics"]["perplexity"] for each in run(tmp_path, {"name": "language"}, causal[0], source))
    assert last < 0.6 * first


# Labelled texts


def labelled(
    bert: Path, folder: Path, rows: list[dict], test: list[dict] | None = None, make=classification, **settings
):
    source = write_rows(folder / "train.jsonl", rows)
    tested = source if test is None else write_rows(folder / "other.jsonl", test)
    return make(given(bert, source, test=str(tested)), **{"text": ["text"], "max_length": 16, **settings})


def answers(predictions: list[float], labels: list[float], loss: float = 0.0) -> Answers:
    return Answers(np.array(predictions), np.array(labels), loss)


def metrics_of(problem: Problem, given: Answers) -> dict[str, float]:
    return {metric.name: metric.of(given) for metric in problem.objective.metrics}


KINDS = [
    {"text": f"the film was {word}", "label": label}
    for word, label in (("good", "kind"), ("bad", "mean"), ("long", "meh"))
]


def test_metrics_of_two_classes_are_those_of_the_second_one(bert, tmp_path):
    problem = labelled(bert, tmp_path, KINDS[:2])
    # One of two is found, and two of three are right ones: F1 is 2 * 1/2 * 2/3 / (1/2 + 2/3).
    found = answers([1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0])
    reached = metrics_of(problem, found)
    assert reached["f1"] == pytest.approx(4 / 7) == pytest.approx(sklearn.f1_score(found.labels, found.predictions))
    assert reached["accuracy"] == pytest.approx(4 / 7)
    # (2 * 2 - 1 * 2) / sqrt(3 * 4 * 3 * 4)
    assert reached["matthews"] == pytest.approx(1 / 6)
    constant = metrics_of(problem, answers([0, 0, 0], [1, 0, 0]))
    assert constant == {"accuracy": pytest.approx(2 / 3), "f1": 0.0, "matthews": 0.0}


def test_of_three_classes_f1_is_the_mean_also_where_one_does_not_occur(bert, tmp_path):
    problem = labelled(bert, tmp_path, KINDS)
    three, two = answers([0, 1, 2, 2], [0, 1, 1, 2]), answers([0, 0, 1, 1], [0, 1, 1, 1])
    assert metrics_of(problem, three)["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert metrics_of(problem, two)["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    matthews = sklearn.matthews_corrcoef(three.labels, three.predictions)
    assert metrics_of(problem, three)["matthews"] == pytest.approx(matthews)


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 0.75), ("f1", 6 / 7), ("matthews", 0.0)])
def test_a_run_is_judged_by_the_chosen_metric_and_so_are_references(bert, tmp_path, metric, expected):
    rows = [KINDS[0], *[KINDS[1]] * 3]
    problem = labelled(bert, tmp_path, rows, metric=metric)
    assert problem.objective.metric.name == metric
    assert {each.name for each in problem.objective.metrics} == {"accuracy", "f1", "matthews"}
    assert problem.references == {"majority class": pytest.approx(expected)}


def test_a_pair_has_word_overlap_for_a_reference(bert, tmp_path):
    pairs = [{"a": f"the {x}", "b": f"a {y}", "label": int(x == y)} for x in ("film", "plot") for y in ("film", "plot")]
    problem = labelled(bert, tmp_path, pairs * 5, text=["a", "b"], metric="f1")
    assert problem.references == {"word overlap": 1.0, "majority class": 0.0}


def test_examples_with_one_label_can_be_scored(bert, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"a": "the film", "b": "a plot", "label": "mean"}] * 3)
    known = given(bert, source, label_names=("kind", "mean"), only="test")
    problem = classification(known, text=["a", "b"], max_length=16)
    assert [problem.test[i]["labels"] for i in range(3)] == [1, 1, 1]
    assert set(score(problem, 2).metrics) == {"accuracy", "f1", "matthews"}


@pytest.mark.parametrize(
    ("names", "written", "expected"),
    [
        (("1", "2", "3"), [1, 2], [0, 1]),
        (("1", "2", "3"), [3, 3], [2, 2]),
        (("1", "2", "3"), [0, 1], "unknown label 0; the labels are 1, 2, 3"),
        (("1", "2", "3"), [0, 2], "unknown label 0; the labels are 1, 2, 3"),
        (("-1", "1"), [-1, 1], [0, 1]),
        (("kind", "mean"), [1, 0], [1, 0]),
        (("False", "True"), [1, 0], [1, 0]),
        (("False", "True"), [True, False], [1, 0]),
    ],
)
def test_numbers_in_data_to_be_scored_are_class_names_where_these_are_numbers(bert, tmp_path, names, written, expected):
    source = write_rows(tmp_path / "a.jsonl", [{"text": "good", "label": label} for label in written])
    known = given(bert, source, label_names=names, only="test")
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            classification(known, text=["text"], max_length=16)
        return
    problem = classification(known, text=["text"], max_length=16)
    assert [problem.train[i]["labels"] for i in range(2)] == expected


def coded(bert: Path, file: Path, own: list[str], known: list[str]) -> Problem:
    """Two texts of the first class of a file that names its classes, to be scored by what knows some from before."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=own)})
    Dataset.from_dict({"text": ["good"] * 2, "label": [0, 0]}, features=features).to_parquet(file)
    return classification(given(bert, file, label_names=known, only="test"), text=["text"], max_length=16)


@pytest.mark.parametrize(
    ("own", "known", "expected"),
    [
        (["2", "1"], ["1", "2"], 1),
        (["mean", "kind"], ["kind", "mean"], 1),
        (["mean"], ["kind", "mean"], 1),
        (["unkind", "friendly"], ["kind", "mean"], 0),  # other words for the same, it may be
    ],
)
def test_data_to_be_scored_may_have_class_names_in_an_order_of_its_own(bert, tmp_path, own, known, expected):
    assert coded(bert, tmp_path / "a.parquet", own, known).test[0]["labels"] == expected


def test_data_to_be_scored_may_name_classes_that_nothing_was_trained_for(bert, tmp_path):
    with pytest.raises(ConfigError, match="column 'label': unknown class 'meh'; the classes are 'kind', 'mean'"):
        coded(bert, tmp_path / "a.parquet", ["meh", "kind"], ["kind", "mean"])
    assert coded(bert, tmp_path / "b.parquet", ["kind", "meh"], ["mean", "kind"]).test[0]["labels"] == 1


def test_a_class_for_nearly_each_example_is_said(bert, tmp_path):
    rows = [{"text": "good", "label": f"{number % 6}"} for number in range(10)]
    remark = "6 classes in 10 training examples: are these labels classes, and not numbers or names?"
    assert labelled(bert, tmp_path, rows).remarks == [remark]
    assert labelled(bert, tmp_path / "twice", rows * 2).remarks == []


def test_another_tokenizer_changes_the_fingerprint_and_the_same_one_does_not(bert, tmp_path):
    """Each problem that has texts; the same words are other tokens once two of the vocabulary are exchanged."""
    changed = write_model(tmp_path / "model")
    swapped = [{"good": "bad", "bad": "good"}.get(word, word) for word in VOCABULARY]
    (changed / "vocab.txt").write_text("\n".join(swapped) + "\n")
    BertTokenizerFast(vocab=str(changed / "vocab.txt")).save_pretrained(changed)

    def prints(model: Path) -> list[str]:
        made = [labelled(model, tmp_path / "a", KINDS), tagged(model, tmp_path / "b", [NAMED])]
        made += [
            labelled(model, tmp_path / "c", [{"text": "good", "label": 0.5}], make=regression),
            chosen(model, tmp_path / "d", [ASKED]),
            plain((model, None), tmp_path / "e", [{"text": "the film was good"}]),
        ]
        return [problem.fingerprint for problem in made]

    first, again, other = prints(bert), prints(bert), prints(changed)
    assert first == again
    assert not {*first} & {*other}


def test_the_loss_is_the_mean_over_examples(bert, tmp_path):
    problem = labelled(bert, tmp_path, KINDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = problem.model()
    batch = problem.collate([problem.train[i] for i in range(3)])
    with torch.inference_mode():
        expected = float(model(**batch).loss)
    assert (
        score(problem, 1).loss == pytest.approx(expected, rel=1e-5) == pytest.approx(score(problem, 8).loss, rel=1e-5)
    )


def test_labels_that_only_one_client_has_are_said(bert, tmp_path):
    words = {"ann": ("kind", "mean"), "bob": ("pos", "neg"), "cy": ("kind", "mean")}
    for name, labels in words.items():
        rows = [{"text": "the film was good", "label": labels[i % 2]} for i in range(8)]
        write_rows(tmp_path / "clients" / f"{name}.jsonl", rows)
    problem = classification(given(bert, tmp_path / "clients", test_share=0.2), text=["text"], max_length=16)
    assert problem.label_names == ("kind", "mean", "neg", "pos")
    assert problem.remarks == [
        "1 of 3 files have labels that are in no other one: bob (neg, pos); if they are other words for the same, rename them"
    ]
    assert set(problem.columns["file"]) == set(words)


def test_a_label_that_one_client_alone_has_is_nothing_to_be_said(bert, tmp_path):
    for name, labels in {"ann": "ab", "bob": "ac"}.items():
        rows = [{"text": "the film", "label": labels[i % 2]} for i in range(8)]
        write_rows(tmp_path / "clients" / f"{name}.jsonl", rows)
    problem = classification(given(bert, tmp_path / "clients", test_share=0.2), text=["text"], max_length=16)
    assert (problem.label_names, problem.remarks) == (("a", "b", "c"), [])


# Numbers


def test_correlations_and_the_root_of_the_loss(bert, tmp_path):
    rows = [{"text": "good", "label": 1.5}, {"text": "bad", "label": 0}]
    problem = labelled(bert, tmp_path, rows, make=regression)
    assert problem.objective.metric.name == "pearson"
    assert problem.label_names == ()
    found = answers([1.0, 2.0, 4.0, 3.0], [1.0, 3.0, 20.0, 4.0], loss=9.0)
    reached = metrics_of(problem, found)
    assert reached["pearson"] == pytest.approx(stats.pearsonr(found.labels, found.predictions)[0])
    # Ranks are 1 2 4 3 and 1 2 4 3.
    assert (reached["spearman"], reached["rmse"]) == (pytest.approx(1.0), 3.0)
    # sum (x - 2)(y - 2) / sqrt(2 * 2) of 1 2 3 and 1 3 2
    assert metrics_of(problem, answers([1, 2, 3], [1, 3, 2]))["pearson"] == pytest.approx(0.5)
    for constant in (answers([2, 2, 2], [1, 2, 3]), answers([1, 2, 3], [2, 2, 2]), answers([1], [2])):
        assert metrics_of(problem, constant) == {"pearson": 0.0, "spearman": 0.0, "rmse": 0.0}


def test_a_number_that_float32_cannot_hold(bert, tmp_path):
    rows = [{"text": "good", "label": 1.5}, {"text": "bad", "label": -1e300}]
    with pytest.raises(
        ConfigError, match=r"row 2, column 'label': expected a number of at most 3.4e\+38.*found -1e\+300"
    ):
        labelled(bert, tmp_path, rows, make=regression)


def test_a_number_is_learned_by_the_mean_square(bert, tmp_path):
    rows = [{"text": "good", "label": 1.5}, {"text": "bad", "label": -0.25}, {"text": "long", "label": 7}]
    problem = labelled(bert, tmp_path, rows, make=regression)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = problem.model()
    batch = problem.collate([problem.train[i] for i in range(3)])
    with torch.inference_mode():
        output = model(**batch)
        expected = float(F.mse_loss(output.logits[:, 0], torch.tensor([1.5, -0.25, 7.0])))
    assert float(output.loss) == pytest.approx(expected)
    assert score(problem, 1).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", ["three", True, None])
def test_labels_that_are_no_numbers(bert, tmp_path, value):
    rows = [{"text": "good", "label": 1.5}]
    with pytest.raises(ConfigError, match=r"test data: row 1.*(expected a finite number, found|has no label)"):
        labelled(bert, tmp_path, rows, [{"text": "bad", "label": value}, {"text": "bad", "label": 1}], make=regression)


def test_regression_learns_a_simple_rule(bert, tmp_path):
    worth = {"good": 1.0, "great": 2.0, "fine": 0.5, "bad": -1.0, "poor": -2.0, "dull": -0.5}
    rows = [{"text": f"the film was {word}", "label": value} for word, value in worth.items()] * 10
    records = run(
        tmp_path,
        {"name": "regression", "text": ["text"], "max_length": 16},
        bert,
        write_rows(tmp_path / "a.jsonl", rows),
    )
    assert records[-1]["metrics"]["pearson"] > 0.7
    assert records[-1]["metrics"].keys() == {"pearson", "spearman", "rmse"}


# Words


def tagged(model: Path, folder: Path, rows: list[dict], test: list[dict] | None = None, **settings: Any) -> Problem:
    source = write_rows(folder / "train.jsonl", rows)
    tested = source if test is None else write_rows(folder / "other.jsonl", test)
    return token_classification(
        given(model, source, test=str(tested)), **{"label": "tags", "max_length": 16, **settings}
    )


NAMED = {"tokens": ["the", "film", "was", "good"], "tags": ["O", "THING", "O", "HOW"]}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A model whose tokenizer knows `actors` as two pieces."""
    folder = write_model(tmp_path_factory.mktemp("pieces") / "model")
    file = folder / "vocab.txt"
    file.write_text("\n".join([*VOCABULARY[:-1], "##s"]) + "\n")
    BertTokenizerFast(vocab=str(file)).save_pretrained(folder)
    return folder


def test_a_word_of_several_tokens_has_its_label_at_the_first(pieces, tmp_path):
    row = {"tokens": ["the", "actors", "actors", "was"], "tags": ["O", "WHO", "WHO", "O"]}
    problem = tagged(pieces, tmp_path, [row])
    assert problem.label_names == ("O", "WHO")
    ids = [VOCABULARY.index(word) for word in ("[CLS]", "the", "actor", "[UNK]", "actor", "[UNK]", "was", "[SEP]")]
    ids[3] = ids[5] = len(VOCABULARY) - 1  # ##s
    assert problem.train[0]["input_ids"] == ids
    assert problem.train[0]["labels"] == [IGNORED, 0, 1, IGNORED, 1, IGNORED, 0, IGNORED]


@pytest.mark.parametrize(
    ("tags", "names"),
    [
        (["b", "a", "b", "c"], ("a", "b", "c")),
        ([3, 1, 3, 7], ("1", "3", "7")),
        ([True, False, True, True], ("False", "True")),
    ],
)
def test_tags_are_strings_or_numbers(bert, tmp_path, tags, names):
    problem = tagged(bert, tmp_path, [{"tokens": NAMED["tokens"], "tags": tags}])
    assert problem.label_names == names
    assert [names[label] for label in problem.train[0]["labels"][1:-1]] == [str(tag) for tag in tags]


def test_tags_with_names_of_their_own(bert, tmp_path):
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "HOW", "WHO"]))})
    part = Dataset.from_dict({"tokens": [NAMED["tokens"]], "tags": [[0, 0, 0, 1]]}, features=features)
    (tmp_path / "d").mkdir()
    for name in ("train", "test"):
        part.to_parquet(tmp_path / "d" / f"{name}.parquet")
    problem = token_classification(given(bert, tmp_path / "d"), label="tags", max_length=16)
    assert problem.label_names == ("O", "HOW", "WHO")
    assert problem.train[0]["labels"] == [IGNORED, 0, 0, 0, 1, IGNORED]
    (tmp_path / "d" / "label_names.json").write_text('{"tags": ["o", "how", "who"]}')
    named = token_classification(given(bert, tmp_path / "d"), label="tags", max_length=16)
    assert named.label_names == ("o", "how", "who")
    assert named.fingerprint != problem.fingerprint


def test_known_names_keep_their_numbers(bert, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"tokens": ["good"], "tags": ["HOW"]}])
    known = given(bert, source, label_names=("O", "THING", "HOW"), only="test")
    assert token_classification(known, label="tags", max_length=16).test[0]["labels"] == [IGNORED, 2, IGNORED]


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (
            {"tokens": ["film"], "tags": ["WHERE"]},
            "test data: row 1: unknown label 'WHERE'; the labels are 'HOW', 'O', 'THING'",
        ),
        (
            {"tokens": ["film"], "tags": ["O", "O"]},
            "test data: row 1: expected a list of words in column 'tokens' and as many",
        ),
        ({"tokens": ["film", "was"], "tags": ["O", None]}, "row 1: expected a list of words.*none of them missing"),
        ({"tokens": [], "tags": []}, "row 1: expected a list of words"),
        ({"tokens": "film", "tags": ["O"]}, "row 1: expected a list of words"),
        ({"tokens": ["film"]}, "test data: there is no column 'tags'"),
    ],
)
def test_words_and_tags_that_do_not_fit(bert, tmp_path, test, expected):
    with pytest.raises(ConfigError, match=expected):
        tagged(bert, tmp_path, [NAMED], [test])


def test_a_column_called_label_beside_the_tags_is_none_of_them(bert, tmp_path):
    assert tagged(bert, tmp_path, [{**NAMED, "label": "x", "who": "ann"}]).columns == {"who": ["ann"]}


def test_many_words_are_cut_and_said(bert, tmp_path):
    long = {"tokens": ["film"] * 40, "tags": ["THING"] * 40}
    problem = tagged(bert, tmp_path, [NAMED, long], max_length=8)
    assert problem.train[1]["labels"] == [IGNORED, *[2] * 6, IGNORED]
    assert (
        problem.remarks[0] == "1 of 2 training examples are longer than problem.max_length = 8 tokens and are cut there"
    )
    with pytest.raises(ConfigError, match=r"problem\.max_length: 2 tokens leave no word of"):
        tagged(bert, tmp_path, [NAMED], max_length=2)


def test_words_within_a_text_have_the_space_that_gpt2_tells_them_by(tmp_path):
    letters = {token: i for i, token in enumerate(["<|endoftext|>", *"Ġabc"])}
    tokenizer = GPT2Tokenizer(vocab=letters, merges=[])
    model = write_causal(tmp_path / "model", tokenizer)
    row = {"tokens": ["ab", "c", "a"], "tags": ["X", "Y", "X"]}
    source = write_rows(tmp_path / "a.jsonl", [row])
    problem = token_classification(given(model, source, test=str(source)), label="tags", max_length=16)
    assert tokenizer.convert_ids_to_tokens(problem.train[0]["input_ids"]) == ["a", "b", "Ġ", "c", "Ġ", "a"]
    assert problem.train[0]["labels"] == [0, IGNORED, 1, IGNORED, 0, IGNORED]


def test_the_loss_and_metrics_of_words(bert, tmp_path):
    short = {"tokens": ["good"], "tags": ["HOW"]}
    problem = tagged(bert, tmp_path, [NAMED, short])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = problem.model()
    batch = problem.collate([problem.train[i] for i in range(2)])
    with torch.inference_mode():
        output = model(**batch)
    wanted = batch["labels"] != IGNORED
    labels, guesses = batch["labels"][wanted].numpy(), output.logits.argmax(-1)[wanted].numpy()
    for size in (1, 8):
        reached = score(problem, size)
        assert reached.loss == pytest.approx(float(output.loss), rel=1e-5)
        assert reached.metrics["accuracy"] == pytest.approx(np.mean(labels == guesses))
        expected = sklearn.f1_score(labels, guesses, average="macro", zero_division=0.0)  # pyright: ignore
        assert reached.metrics["f1"] == pytest.approx(expected)


def test_words_are_learned_in_a_run(bert, tmp_path):
    rows = [
        {"tokens": ["the", thing, "was", how], "tags": ["O", "THING", "O", "HOW"]}
        for thing in ("film", "plot", "actor")
        for how in ("good", "bad")
    ]
    problem = {"name": "token_classification", "label": "tags", "max_length": 16}
    records = run(tmp_path, problem, bert, write_rows(tmp_path / "a.jsonl", rows * 8))
    assert records[-1]["metrics"]["f1"] > 0.9


# Choices


def chosen(model: Path, folder: Path, rows: list[dict], test: list[dict] | None = None, **settings: Any) -> Problem:
    source = write_rows(folder / "train.jsonl", rows)
    tested = source if test is None else write_rows(folder / "other.jsonl", test)
    return multiple_choice(given(model, source, test=str(tested)), **{"max_length": 16, **settings})


ASKED = {"question": "the film was", "choices": ["good", "very bad", "a plot"], "label": 2, "who": "ann"}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        (ASKED, {}),
        ({**ASKED, "label": "C"}, {}),
        ({**ASKED, "label": "2"}, {}),
        (
            {"q": "the film was", "a": "good", "b": "very bad", "c": "a plot", "answer": 2, "who": "ann"},
            {"question": "q", "choices": ["a", "b", "c"], "label": "answer"},
        ),
    ],
)
def test_each_choice_is_a_pair_with_its_question(bert, tmp_path, row, settings):
    problem = chosen(bert, tmp_path, [row], **settings)
    batch = problem.collate([problem.train[0]] * 2)
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    expected = tokenizer(["the film was"] * 3, ASKED["choices"], padding=True, return_tensors="pt")
    for name, tensor in expected.items():
        assert torch.equal(batch[name], torch.stack([tensor, tensor])), name
    assert batch["labels"].tolist() == [2, 2]
    assert (problem.columns, problem.references) == ({"who": ["ann"]}, {"chance": pytest.approx(1 / 3)})
    assert problem.batch_of_largest(2)["input_ids"].shape == (2, 3, 16)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {**ASKED, "label": 3},
            "training data: row 2, column 'label': expected a whole number from 0 to 2 or a letter.*got 3",
        ),
        ({**ASKED, "label": "good"}, "row 2, column 'label'.*got 'good'"),
        ({**ASKED, "label": None}, "row 2, column 'label'.*got None"),
        ({**ASKED, "choices": ["good", "bad"]}, "row 2: expected 3 choices, as in the first row, got 2"),
        ({**ASKED, "choices": ["good"]}, "row 2: expected a list of two texts or more"),
        ({**ASKED, "choices": None}, "row 2: expected a list of two texts or more"),
    ],
)
def test_choices_that_do_not_fit(bert, tmp_path, row, expected):
    with pytest.raises(ConfigError, match=expected):
        chosen(bert, tmp_path, [ASKED, row])


def test_choices_need_their_columns_and_a_model_that_can_choose(bert, causal, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no column 'choises'.*did you mean 'choices'"):
        chosen(bert, tmp_path, [ASKED], choices=["choises"])
    with pytest.raises(ConfigError, match=r"model\.name: .*could not be loaded"):
        chosen(causal[0], tmp_path, [ASKED], max_length=64).model()


def test_long_choices_are_cut_and_said(bert, tmp_path):
    problem = chosen(bert, tmp_path, [ASKED, {**ASKED, "choices": ["good", "bad " * 30, "long"]}])
    assert (
        problem.remarks[0]
        == "1 of 2 training examples are longer than problem.max_length = 16 tokens and are cut there"
    )


def test_choosing_is_learned_in_a_run_in_which_clients_train_one_after_another(bert, tmp_path):
    kind, unkind = ("good", "great", "fine"), ("bad", "poor", "dull")
    rows = [
        {"question": "the film was", "choices": [one, other] if number % 2 else [other, one], "label": 1 - number % 2}
        for one in kind
        for other in unkind
        for number in range(8)
    ]
    source, problem = write_rows(tmp_path / "a.jsonl", rows), {"name": "multiple_choice", "max_length": 16}
    assert run(tmp_path, problem, bert, source, **{"lora.dropout": 0.1})[-1]["metrics"]["accuracy"] > 0.9
    recipe = {
        "model.name": str(bert),
        "problem": problem,
        "data.source": str(source),
        "partition": {"name": "iid", "clients": 8},
    }
    remarks = prepare(anyrank.load_recipe(overrides=recipe)).remarks
    assert any("clients do not share passes, they train one after another: what enters" in text for text in remarks)
