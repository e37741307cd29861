"""What the terminal shows of a run, whatever it is scored by."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from anyrank.display import LiveObserver, number, summary
from anyrank.record import RunFolder

INFO = {
    "recipe": {"baseline": None, "fleet": {"classes": {"weak": {"device": "phone"}}}},
    "rounds": 1,
    "method": "flora",
    "metric": {"name": "perplexity", "higher_is_better": False},
    "references": {"before training": 61.371, "unigrams": None},
    "versions": {},
    "data": {},
    "fleet": {"ann": {"kind": "weak", "rank": 4, "num_examples": 10}},
    "modules_to_save": [],
}
RECORD = {
    "round": 1,
    "score": 12.3456,
    "metrics": {"perplexity": 12.3456, "token_accuracy": 0.51234},
    "class_scores": {"4": 13.5},
    "federated": {"score": 12.5, "std": 0.25, "min": 12.0, "max": 13.0, "clients": 1},
    "train_loss": 2.5,
    "bytes_down": 1,
    "bytes_up": 1,
    "simulated_seconds": 1.0,
    "real_seconds": 1.0,
    "examples": 10,
    "planned_ranks": {"ann": 4},
    "returned_ranks": {"ann": 4},
    "rejected": [],
    "late_replies": {},
    "target_seconds": None,
}


def write(path: Path, **changes: object) -> RunFolder:
    folder = RunFolder.create(path, INFO)
    (path / "rounds.jsonl").write_text(json.dumps(RECORD | changes) + "\n")
    return folder


def shown(folder: RunFolder) -> list[list[str]]:
    """The words of each line of the closing tables."""
    console = Console(file=StringIO(), width=160, markup=False)
    console.print(*summary(folder))
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_the_tables_name_the_metric_and_say_all_that_was_measured(tmp_path):
    folder = write(tmp_path / "run")
    write(tmp_path / "run" / "compare" / "centralised", score=11.0)
    lines = shown(folder)
    for line in (
        "on the test set perplexity",
        "flora 12.35",
        "centralised baseline 11.00",
        "before training 61.37",
        "unigrams not finite",
        "on 1 clients' own data 12.50 ± 0.2500",
        "token_accuracy 0.5123",
        "device class device clients trained at rank perplexity at that rank",
        "weak phone 1 4 4: 13.50",
    ):
        assert line.split() in lines


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": None, "metrics": None}, "not evaluated"),
        ({"score": None, "metrics": {"perplexity": None}}, "not finite"),
    ],
)
def test_a_score_that_is_missing_says_why(tmp_path, changes, said):
    folder = write(tmp_path / "run", class_scores=None, federated=None, **changes)
    assert ["flora", *said.split()] in shown(folder)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8299, "0.8299"), (1.0, "1.0000"), (-0.02, "-0.0200"), (12.314, "12.31"), (50257, "50257.00"), (2e9, "2e+09")],
)
def test_digits_that_count(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("score", "text"), [(12.314, "perplexity   12.31  train loss"), (None, "perplexity          train loss")]
)
def test_the_line_of_a_round_names_the_metric(score, text):
    observer = LiveObserver(Console(file=StringIO(), width=160))
    observer._metric = "perplexity"
    observer.finished_round(RECORD | {"score": score})
    assert text in observer.console.file.getvalue()
