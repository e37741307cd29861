"""One page out of run folders: what it says, what it refuses, and that it stands alone."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyrank.engine import Progress
from anyrank.errors import RecordError
from anyrank.methods.fedavg import fedavg
from anyrank.record import FORMAT, RunFolder
from anyrank.report import render, runs
from anyrank.report.charts import (
    Axis,
    Bar,
    Column,
    Level,
    Point,
    Series,
    areas,
    bars,
    columns,
    lines,
    ratio_ticks,
    ticks,
)
from anyrank.report.text import score
from federations import Setup, state_of

VOID = {"meta", "br", "img", "link", "input", "hr"}
FLEET = {
    "json": {"kind": "weak", "rank": 4, "num_examples": 40},
    "email": {"kind": "weak", "rank": 4, "num_examples": 60},
    "asyncio": {"kind": "strong", "rank": 8, "num_examples": 100},
}
INFO = {
    "anyrank": "0.1.0",
    "format": FORMAT,
    "metric": {"name": "accuracy", "higher_is_better": True},
    "recipe": {
        "seed": 7,
        "rounds": 3,
        "baseline": None,
        "method": {"name": "hlora"},
        "model": {"name": "tiny-model"},
        "data": {"source": "stdlib-docs", "test": None},
        "fleet": {"per_round": 2, "classes": {"weak": {"rank": 4}, "strong": {"rank": 8}}},
        "evaluate": {"every": 1, "target": None, "stop_at_target": False},
    },
    "command": "anyrank run",
    "started": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
    "machine": {"cores": 2},
    "commit": "abc1234",
    "data": {"fingerprint": "f00d", "train": 1200, "test": 300, "label_names": ["no", "yes"]},
    "references": {"before training": 0.496, "majority class": 0.501, "word overlap": 0.742},
    "fleet": FLEET,
    "remarks": [],
}


def entry(number, **changes):
    """Line `number` of a run that gets 10 points better, sends 1 MB up and 2 MB down, and takes 100 s a round."""
    accuracy = 0.5 + number / 10
    return {
        "round": number,
        "score": accuracy,
        "metrics": {"accuracy": accuracy},
        "loss": 0.7 - number / 10,
        "train_loss": 0.6,
        "bytes_up": 1_000_000,
        "bytes_down": 2_000_000,
        "simulated_seconds": 100.0 * number,
        "real_seconds": 4.0,
        "planned_ranks": {"json": 4, "asyncio": 8},
        "returned_ranks": {"json": 4, "asyncio": 8},
        "energy": {"1-4": 0.75, "5-8": 0.25},
        "class_scores": {"4": accuracy - 0.02, "8": accuracy},
        "federated": {"score": accuracy - 0.01, "std": 0.055, "min": 0.4, "max": 0.9, "clients": 2},
        "rejected": [],
        "target_seconds": None,
    } | changes


def entry_of_lm(number, **changes):
    """The same of a run that is scored by perplexity: 40 after the first round, 20 after the second, and so on."""
    value = 40.0 / number
    return (
        entry(
            number,
            score=value,
            metrics={"perplexity": value},
            class_scores={"4": value + 5, "8": value},
            federated={"score": value + 1, "std": 0.5, "min": value - 1, "max": value + 3, "clients": 2},
        )
        | changes
    )


PERPLEXITY = {
    "metric": {"name": "perplexity", "higher_is_better": False},
    "references": {"before training": 50.0},
    "data": {"fingerprint": "f00d", "train": 1200, "test": 300},
}


def write_lm_run(path, entries=None, **changes):
    entries = [entry_of_lm(1), entry_of_lm(2), entry_of_lm(3)] if entries is None else entries
    return write_run(path, entries, **(PERPLEXITY | changes))


def write_old_run(path):
    """A run as it was written when there was no choice of metrics."""
    run = write_run(path, format=1, references={"majority": 0.501, "overlap": None})
    info = json.loads((run / "run.json").read_text())
    del info["metric"], info["remarks"]
    (run / "run.json").write_text(json.dumps(info))
    lines = []
    for line in map(json.loads, (run / "rounds.jsonl").read_text().splitlines()):
        accuracy, own = line.pop("score"), line["federated"]
        line |= {"accuracy": accuracy, "class_accuracy": line.pop("class_scores")}
        line["federated"] = {"accuracy": own.pop("score"), **own}
        del line["metrics"]
        lines.append(json.dumps(line) + "\n")
    (run / "rounds.jsonl").write_text("".join(lines))
    return run


def write_run(path, entries=None, **changes):
    """A run folder; `changes` go into the recipe if it has the key, else into run.json."""
    info = copy.deepcopy(INFO)
    for key, value in changes.items():
        (info["recipe"] if key in info["recipe"] else info)[key] = value
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(info))
    entries = [entry(1), entry(2), entry(3)] if entries is None else entries
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in entries))
    return path


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "first")


class Reader(HTMLParser):
    """Reads a page as a browser's strictest cousin: every tag closed in order; keeps table rows, text and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.rows, self.words, self.attributes = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open or "style" in self.open:
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def row(self, name):
        return next(
            [" ".join(cell.split()) for cell in row] for row in self.rows if row and row[0].strip().startswith(name)
        )


def read(*folders):
    return Reader(render(folders))


def svgs(page):
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in found]


def chart(page, title):
    return next(svg for svg in svgs(page) if svg.get("aria-label") == title)


def texts(svg, kind):
    return [node.text for node in svg.iter("text") if kind in node.get("class").split()]


def everything(tmp_path):
    """Several runs that together make every part of the page appear."""
    first = write_run(tmp_path / "first")
    centralised = entry(1, score=0.83, energy={"1-8": 1.0}, class_scores={"8": 0.83})
    write_run(first / "compare" / "centralised", [centralised], baseline="centralised", method={"name": "zero_padding"})
    shrunk = entry(2, returned_ranks={"json": 2, "asyncio": 5})
    lost = entry(3, rejected=[{"client": "email", "stage": "late", "reason": "after 31.0 s"}])
    second = write_run(tmp_path / "second", [entry(1), shrunk, lost], method={"name": "hetlora"})
    return [first, second, write_lm_run(tmp_path / "third", remarks=["Texts are cut into windows."])]


# --- what the page says -------------------------------------------------------------------------------------------


def test_the_summary_has_the_run_in_numbers(run):
    assert read(run).row("first") == [
        "first", "hlora", "3", "80.0 %", "80.0 % round 3", "79.0 % ± 5.5", "3.0", "6.0", "0:05:00", "0:00:12",
    ]  # fmt: skip


def test_the_header_names_method_model_and_data(run):
    assert "first Method hlora Model tiny-model Data stdlib-docs (1,200 to train, 300 to test)" in read(run).text


def test_what_needs_no_training_stands_beside_the_runs(run):
    page = read(run)
    assert page.row("word overlap")[3] == "74.2 %"
    assert page.row("majority class")[3] == "50.1 %"


def test_references_of_different_data_are_told_apart(run, tmp_path):
    other = write_run(tmp_path / "second", references={"majority class": 0.6})
    page = read(run, other)
    assert page.row("majority class (first)")[3] == "50.1 %"
    assert page.row("majority class (second)")[3] == "60.0 %"
    assert page.row("word overlap")[3] == "74.2 %"


def test_the_best_round_need_not_be_the_last(tmp_path):
    run = write_run(tmp_path / "run", [entry(1), entry(2, score=0.9), entry(3, score=None)])
    assert read(run).row("run")[3:5] == ["90.0 %", "90.0 % round 2"]


def test_a_run_without_its_last_rounds_is_called_unfinished(tmp_path):
    assert "unfinished, 1 of 3 rounds" in read(write_run(tmp_path / "run", [entry(1)])).text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = read(write_run(tmp_path / "run", []))
    assert "unfinished, 0 of 3 rounds" in page.text
    assert page.row("run")[3:6] == ["–", "–", "–"]


def test_time_to_target(tmp_path):
    aim = {"every": 1, "target": 0.65, "stop_at_target": False}
    reached = write_run(tmp_path / "reached", [entry(1), entry(2, target_seconds=200.0)], evaluate=aim)
    missed = write_run(tmp_path / "missed", [entry(1)], evaluate=aim)
    page = read(reached, missed)
    assert page.row("reached")[9] == "0:03:20 65.0 %"
    assert page.row("missed")[9] == "– 65.0 % not reached"


def test_a_run_that_stopped_at_its_target_is_finished(tmp_path):
    aim = {"every": 1, "target": 0.65, "stop_at_target": True}
    text = read(write_run(tmp_path / "run", [entry(1), entry(2, target_seconds=200.0)], evaluate=aim)).text
    assert "2 of 3, stopped at the target" in text
    assert "unfinished" not in text


def test_a_round_that_was_not_measured_is_left_out_of_the_curve(tmp_path):
    entries = [entry(1), entry(2, score=None), entry(3, score=float("nan")), entry(4)]
    page = render([write_run(tmp_path / "run", entries, rounds=4)])
    tips = [title.text for title in chart(page, "Accuracy over rounds").iter("title")]
    assert [tip.split("\n")[0] for tip in tips] == ["run, round 1", "run, round 4"]


def test_a_number_that_is_not_finite_is_null_in_the_record_and_left_out_of_the_page(tmp_path):
    nan, path = float("nan"), write_run(tmp_path / "run", [])
    record = entry(1, loss=nan, train_loss=float("inf"), energy={"1-4": nan, "5-8": 1.0})
    progress = Progress(state_of(fedavg(), Setup()), {}, record=record)
    RunFolder(path, INFO).save(progress, real_seconds=1.0)
    (line,) = (path / "rounds.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["train_loss"], found["energy"]) == (None, None, {"1-4": None, "5-8": 1.0})
    assert found["score"] == record["score"]
    assert render([path])


def test_a_compared_run_of_one_round_is_a_level_with_its_name(tmp_path):
    page = render(everything(tmp_path)[:1])
    accuracy = chart(page, "Accuracy over rounds")
    assert "centralised 83.0\N{NO-BREAK SPACE}%" in texts(accuracy, "level-label")
    assert len([node for node in accuracy.iter("line") if node.get("class") == "level strong"]) == 1
    assert Reader(page).row("centralised")[1] == "zero_padding baseline: centralised"


def test_a_reference_far_below_the_curves_does_not_squeeze_them(tmp_path):
    high = [entry(number, score=0.9 + number / 100) for number in (1, 2, 3)]
    labels = texts(chart(render([write_run(tmp_path / "run", high)]), "Accuracy over rounds"), "level-label")
    assert labels == []


def test_bytes_add_up_over_the_rounds(run):
    page = render([run])
    assert texts(chart(page, "Up, cumulative bytes"), "end") == ["3.00\N{NO-BREAK SPACE}MB"]
    assert texts(chart(page, "Down, cumulative bytes"), "end") == ["6.00\N{NO-BREAK SPACE}MB"]


def test_an_evaluation_before_training_is_round_0_and_costs_nothing(tmp_path):
    before = entry(0, bytes_up=0, bytes_down=0, planned_ranks={}, returned_ranks={}, energy={}, federated=None)
    page = render([write_run(tmp_path / "run", [before, entry(1), entry(2), entry(3)])])
    assert Reader(page).row("run")[2] == "3"
    assert len(list(chart(page, "Up, cumulative bytes").iter("title"))) == 4


def test_clients_that_were_never_asked_count_where_the_method_follows_the_devices(run):
    columns = chart(render([run]), "Clients by planned rank")
    assert [title.text for title in columns.iter("title")] == ["rank 4\nweak: 2 clients", "rank 8\nstrong: 1 client"]


def test_a_method_that_plans_one_rank_for_everyone_is_shown_as_it_plans(tmp_path):
    flat = [entry(number, planned_ranks={"json": 4, "asyncio": 4}) for number in (1, 2, 3)]
    page = render([write_run(tmp_path / "run", flat)])
    columns = chart(page, "Clients by planned rank")
    assert [title.text for title in columns.iter("title")] == ["rank 4\nweak: 1 client\nstrong: 1 client"]
    assert "1 client never asked and left out" in page


def test_ranks_over_rounds_are_shown_where_clients_prune(tmp_path):
    first, second, _ = everything(tmp_path)
    assert "Mean rank over rounds" not in render([first])
    shrinking = chart(render([second]), "Mean rank over rounds")
    # json (4 -> 2) and email (never asked, 4) are weak; asyncio (8 -> 5) is strong; then round 3 gives back 4 and 8.
    assert [title.text.split("\n")[1] for title in shrinking.iter("title")] == [
        *(f"mean rank {mean}" for mean in ("4.00", "4.00", "3.00", "4.00")),
        *(f"mean rank {mean}" for mean in ("8.00", "8.00", "5.00", "8.00")),
    ]


def test_energy_by_band(run):
    energy = chart(render([run]), "Energy by rank band over rounds")
    assert sorted(texts(energy, "end")) == ["1–4: 75.0\N{NO-BREAK SPACE}%", "5–8: 25.0\N{NO-BREAK SPACE}%"]


def test_bands_are_in_the_order_of_their_ranks(tmp_path):
    energy = {"1-8": 0.5, "9-16": 0.3, "17-128": 0.2}
    run = write_run(tmp_path / "run", [entry(1, energy=energy), entry(2, energy=energy)])
    assert runs.read([run])[0].bands == ["1-8", "9-16", "17-128"]


def test_accuracy_by_rank_is_the_last_that_was_measured(tmp_path):
    run = write_run(tmp_path / "run", [entry(1), entry(2), entry(3, class_scores=None)])
    assert texts(chart(render([run]), "Accuracy by rank"), "value") == [
        "68.0\N{NO-BREAK SPACE}%", "70.0\N{NO-BREAK SPACE}%",
    ]  # fmt: skip


def test_missing_replies_are_listed_with_their_reason(tmp_path):
    page = read(*everything(tmp_path))
    assert page.rows[-1] != []
    assert ["second", "3", "email", "late", "after 31.0 s"] in page.rows
    assert "1 reply that a round had to do without: 1 late." in page.text


def test_no_missing_replies_no_table(run):
    assert "Missing replies" not in read(run).text


def test_runs_are_compared_by_the_settings_in_which_they_differ(tmp_path):
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", method={"name": "rbla", "weights": "slots"})
    page = read(first, second)
    assert page.row("method.name") == ["method.name", "hlora", "rbla"]
    assert page.row("method.weights") == ["method.weights", "–", "slots"]
    assert not any(row and row[0] == "seed" for row in page.rows)


def test_recipe_and_versions_are_kept(run):
    text = read(run).text
    assert 'seed = 7 rounds = 3 [method] name = "hlora"' in text
    assert "[fleet.classes.weak] rank = 4" in text
    assert "test = " not in text  # what is not set is no TOML
    assert "torch 2.13.0" in text


def test_every_round_is_in_a_table(run):
    assert next([cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in read(run).rows if row[0] == "2") == [
        "2", "70.0 %", "69.0 %", "0.500", "0.600", "1.0", "2.0", "0:03:20", "0:00:04",
        "2", "2", "6.0", "6.0", "75.0 %", "25.0 %",
    ]  # fmt: skip


def test_a_run_by_perplexity_in_numbers(tmp_path):
    page = read(write_lm_run(tmp_path / "run"))
    assert page.row("run")[3:6] == ["13.33", "13.33 round 3", "14.33 ± 0.50"]
    assert page.row("before training")[3] == "50.00"
    assert "Perplexity, lower is better" in page.text
    assert "Perplexity 13.33 before training 50.00" in page.text
    assert "12.33 to 16.33 over 2 clients" in page.text
    assert "ccuracy" not in page.text
    assert next(row[1:4] for row in page.rows if row[0] == "2") == ["20.00", "21.00", "0.500"]


def test_the_best_round_is_the_lowest_where_lower_is_better(tmp_path):
    run = write_lm_run(tmp_path / "run", [entry_of_lm(1), entry_of_lm(3), entry_of_lm(4, score=15.0)])
    assert read(run).row("run")[3:5] == ["15.00", "13.33 round 3"]


def test_a_target_is_a_value_of_the_metric(tmp_path):
    aim = {"every": 1, "target": 15, "stop_at_target": False}
    run = write_lm_run(tmp_path / "run", evaluate=aim)
    page = render([run])
    assert Reader(page).row("run")[9] == "– 15.00 not reached"
    assert "target 15.00" in texts(chart(page, "Perplexity over rounds"), "level-label")


def test_an_axis_fits_its_metric(tmp_path):
    steep = [entry_of_lm(1, score=900.0), entry_of_lm(2), entry_of_lm(3)]
    few, many = (render([write_lm_run(tmp_path / name, entries)]) for name, entries in (("few", None), ("many", steep)))
    assert texts(chart(few, "Perplexity over rounds"), "tick")[:4] == ["10", "20", "30", "40"]
    assert "ogarithmic" not in few
    assert texts(chart(many, "Perplexity over rounds"), "tick")[:7] == ["10", "20", "50", "100", "200", "500", "1,000"]
    assert "Lower is better, logarithmic axis." in many


@pytest.mark.parametrize(("start", "drawn"), [(50.0, ["before training 50.00"]), (500.0, [])])
def test_a_reference_far_above_the_curves_is_left_out_where_lower_is_better(tmp_path, start, drawn):
    page = render([write_lm_run(tmp_path / "run", references={"before training": start})])
    assert texts(chart(page, "Perplexity over rounds"), "level-label") == drawn


def test_bars_by_rank_reach_the_largest_score(tmp_path):
    bars = chart(render([write_lm_run(tmp_path / "run")]), "Perplexity by rank")
    assert texts(bars, "value") == ["18.33", "13.33"]
    widths = [float(node.get("width")) for node in bars.iter("rect")]
    assert widths[1] == pytest.approx(widths[0] * 13.333 / 18.333, abs=0.02)


def test_a_correlation_can_be_negative(tmp_path):
    worse = entry(1, score=-0.0214, class_scores={"4": -0.02, "8": 0.1})
    better = entry(2, score=0.3, class_scores=None)
    page = render([write_run(tmp_path / "run", [worse, better], metric=INFO["metric"] | {"name": "matthews"})])
    assert texts(chart(page, "Matthews by rank"), "value") == ["-0.020", "0.100"]
    assert "matthews -0.021" in next(iter(chart(page, "Matthews over rounds").iter("title"))).text


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("f1", 0.81234, "81.2\N{NO-BREAK SPACE}%"),
        ("rougeL", 1, "100.0\N{NO-BREAK SPACE}%"),
        ("pearson", 0.81234, "0.812"),
        ("perplexity", 12.3456, "12.35"),
        ("perplexity", 50257, "50,257"),
        ("perplexity", 1.25e30, "1.25e+30"),
        ("accuracy", None, "–"),
    ],
)
def test_shares_are_in_percent_and_everything_else_has_a_few_digits(metric, value, text):
    assert score(metric, value) == text


def test_further_metrics_of_the_last_evaluation(tmp_path):
    measured = {"accuracy": 0.7, "f1": 0.65, "matthews": None}
    run = write_run(tmp_path / "run", [entry(1), entry(2, metrics=measured), entry(3, score=None, metrics=None)])
    page = read(run)
    assert "All metrics of the last evaluation Run Accuracy F1" in page.text
    assert next(row for row in page.rows if "65.0\N{NO-BREAK SPACE}%" in row) == [
        "run", "70.0\N{NO-BREAK SPACE}%", "65.0\N{NO-BREAK SPACE}%",
    ]  # fmt: skip
    assert "Further metrics" in page.text


def test_a_single_metric_needs_no_table_of_metrics(run):
    assert "metrics" not in read(run).text


def test_runs_by_different_metrics_share_no_axis(tmp_path):
    first, second = write_run(tmp_path / "first"), write_lm_run(tmp_path / "second")
    page = render([first, second])
    for title, tip in (("Accuracy over rounds", "first"), ("Perplexity over rounds", "second")):
        assert {node.text.split(",")[0] for node in chart(page, title).iter("title")} == {tip}
    reader = Reader(page)
    assert "By accuracy: first." in reader.text
    assert "By perplexity: second." in reader.text
    assert reader.row("first")[2:5] == ["accuracy", "3", "80.0 %"]
    assert reader.row("second")[2:5] == ["perplexity lower is better", "3", "13.33"]
    assert [row[2] for row in reader.rows if row[:1] == ["before training"]] == ["accuracy", "perplexity"]


def test_a_score_that_is_not_finite_is_not_shown(tmp_path):
    spoilt = entry_of_lm(3, score=None, metrics={"perplexity": None}, class_scores={"4": None, "8": 9.0})
    spoilt["federated"] |= {"score": None, "std": None, "max": None}
    lines = [entry_of_lm(1), entry_of_lm(2), spoilt]
    page = render([write_lm_run(tmp_path / "run", lines, references={"before training": None})])
    assert Reader(page).row("run")[3:6] == ["20.00", "20.00 round 2", "21.00 ± 0.50"]
    assert "before training" not in page
    assert texts(chart(page, "Perplexity by rank"), "value") == ["9.000"]


def test_a_run_without_a_choice_of_metrics_reads_as_one_by_accuracy(tmp_path):
    new = write_run(tmp_path / "new" / "run", references={"majority class": 0.501})
    old = write_old_run(tmp_path / "old" / "run")
    assert render([old]) == render([new])


def test_old_and_new_runs_are_compared(tmp_path):
    page = render([write_old_run(tmp_path / "old"), write_run(tmp_path / "new")])
    assert {node.text.split(",")[0] for node in chart(page, "Accuracy over rounds").iter("title")} == {"old", "new"}
    assert Reader(page).row("majority class")[3] == "50.1 %"


def test_remarks_say_whose_they_are_unless_they_are_everyones(tmp_path):
    first = write_run(tmp_path / "first", remarks=["Both.", "Mine."])
    second = write_run(tmp_path / "second", remarks=["Both."])
    page = read(first, second)
    assert "Remarks Both. first: Mine." in page.text
    assert "Remarks" not in read(write_run(tmp_path / "third")).text


def test_folders_of_one_name_are_told_apart_by_where_they_are(tmp_path):
    pair = [write_run(tmp_path / seed / "run") for seed in ("seed-1", "seed-2")]
    assert [run.name for run in runs.read(pair)] == ["seed-1/run", "seed-2/run"]


def test_a_folder_named_twice_is_shown_once(run):
    assert len(runs.read([run, run / ".." / "first"])) == 1


# --- that it stands alone -----------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_each_chart_is_xml(tmp_path):
    page = render(everything(tmp_path))
    Reader(page)
    named = [svg for svg in svgs(page) if svg.get("role") == "img"]
    assert len(named) >= 9
    assert all(svg.get("aria-label") for svg in named)
    assert page.count("<figure>") == page.count("<figcaption>") == len(named)


def test_nothing_is_loaded_from_anywhere(tmp_path):
    page = render(everything(tmp_path))
    assert not re.search(r"https?:|//\w|@import|url\(", page)
    assert not [name for _, name, _ in Reader(page).attributes if name in ("src", "href", "srcset", "data")]


def test_the_same_folders_make_the_same_bytes(tmp_path, monkeypatch):
    folders = everything(tmp_path)
    page = render(folders)
    monkeypatch.chdir(tmp_path)
    assert render([folder.relative_to(tmp_path) for folder in folders]) == page
    assert str(tmp_path) not in page


def test_names_are_text_and_never_markup(tmp_path):
    evil = "<script>alert('&')</script>"
    fleet = {
        evil: {"kind": evil, "rank": 4, "num_examples": 1},
        "b": {"kind": "b\x00\x1b", "rank": 8, "num_examples": 1},
    }
    lost = [{"client": evil, "stage": evil, "reason": evil}]
    entries = [entry(n, planned_ranks={evil: 4}, returned_ranks={evil: 3}, rejected=lost) for n in (1, 2, 3)]
    name = "a&b<i>'\"\udcff"
    run = write_run(tmp_path / name, entries, fleet=fleet, command=evil, method={"name": evil, "<b>": evil})
    page = render([run, write_run(tmp_path / "plain")])
    page.encode("utf-8")
    reader = Reader(page)
    assert page.count("<script") == 1
    assert [name, "3", evil, evil, evil] in [[cell.replace("?", "\udcff") for cell in row] for row in reader.rows]
    assert svgs(page)


def test_a_report_needs_no_torch():
    code = "import sys, anyrank.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what it refuses ----------------------------------------------------------------------------------------------


def test_it_reads_the_format_that_runs_are_written_in():
    assert runs.FORMAT == FORMAT


def test_no_folder_at_all():
    with pytest.raises(RecordError, match="Name at least one"):
        render([])


def test_a_folder_that_holds_no_run(tmp_path):
    with pytest.raises(RecordError, match="holds no run"):
        render([tmp_path / "absent"])


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="holds no run"):
        render([tmp_path / "file"])


def test_a_folder_of_runs_gets_a_hint(run):
    with pytest.raises(RecordError, match="Did you mean a folder in it: first"):
        render([run.parent])


@pytest.mark.parametrize("text", ["", '{"format": 1', "\x00"])
def test_a_truncated_run_json(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(RecordError, match="cannot be read"):
        render([run])


@pytest.mark.parametrize("text", ["[]", "{}", f'{{"format": {FORMAT + 1}}}', "null"])
def test_a_foreign_format(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(RecordError, match="reads formats 1 and 2"):
        render([run])


@pytest.mark.parametrize(
    "changes", [{"recipe": {}}, {"recipe": None}, {"fleet": {"a": {}}}, {"fleet": 3}, {"metric": {}}]
)
def test_a_run_json_that_is_none(tmp_path, changes):
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(INFO | changes))
    with pytest.raises(RecordError, match="is not the record of a run"):
        render([folder])


@pytest.mark.parametrize("cut", [1, 30, -2])
def test_a_last_line_cut_short_is_ignored(run, cut):
    whole = render([run])
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(entry(4))[:cut])
    assert render([run]) == whole


def test_a_cut_through_a_letter_is_ignored(run):
    whole = render([run])
    with (run / "rounds.jsonl").open("ab") as file:
        file.write('{"round": 4, "rejected": [{"client": "é'.encode()[:-1])
    assert render([run]) == whole


@pytest.mark.parametrize("line", ["nonsense", "3", '{"round": 2}', json.dumps(entry(2, score="high"))])
def test_a_broken_line_is_named(run, line):
    lines = (run / "rounds.jsonl").read_text().splitlines()
    (run / "rounds.jsonl").write_text("\n".join([lines[0], line, lines[2], ""]))
    with pytest.raises(RecordError, match=r"rounds\.jsonl, line 2, is not the record of a round"):
        render([run])


# --- charts -------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6).map(lambda number: round(number, 3))


@given(NUMBERS, NUMBERS, st.booleans())
def test_ticks_are_even_few_and_enclose_the_data(a, b, whole):
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, whole=whole)
    steps = {round((two - one) / (found[-1] - found[0]), 6) for one, two in pairwise(found)}
    assert found[0] <= low <= high <= found[-1] + 1e-9 * abs(high)
    assert len(steps) == 1
    assert 2 <= len(found) <= 9
    assert not whole or all(tick == int(tick) for tick in found)


@given(st.floats(1e-6, 1e9), st.floats(2, 1e40))
def test_ticks_of_ratios_are_few_and_enclose_the_data(low, ratio):
    found = ratio_ticks(low, low * ratio)
    assert found[0] <= low * (1 + 1e-5)
    assert low * ratio <= found[-1] * (1 + 1e-5)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 9


def test_equal_distances_are_equal_ratios_on_a_logarithmic_axis():
    svg = ElementTree.fromstring(lines([ramp(0, 1, 10, 100)], title="t", x=Axis("x"), y=Axis("y", log=True)))
    places = [float(pair.split(",")[1]) for pair in svg.find(".//polyline").get("points").split()]
    assert places[0] - places[1] == pytest.approx(places[1] - places[2], abs=0.02)


def test_ticks_are_round_numbers():
    assert ticks(0.503, 0.836) == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85]
    assert ticks(0, 12, count=6) == [0, 2, 4, 6, 8, 10, 12]
    assert ticks(0, 2, whole=True) == [0, 1, 2]


def ramp(tone, *heights, end=""):
    points = [Point(place, height, f"{place}") for place, height in enumerate(heights)]
    return Series(points=points, tone=tone, end=end)


def test_higher_values_are_higher_up_and_later_ones_further_right():
    svg = ElementTree.fromstring(lines([ramp(0, 1, 3, 2)], title="t", x=Axis("x"), y=Axis("y")))
    places = [tuple(map(float, pair.split(","))) for pair in svg.find(".//polyline").get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2
    assert y1 < y2 < y0


def test_a_step_holds_its_value_until_the_next():
    svg = ElementTree.fromstring(lines([ramp(0, 1, 3)], title="t", x=Axis("x"), y=Axis("y"), step=True))
    start, corner, stop = [pair.split(",") for pair in svg.find(".//polyline").get("points").split()]
    assert corner == [stop[0], start[1]]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_labels_at_the_end_never_overlap_and_keep_their_order(heights):
    series = [ramp(tone, 0.5, height, end=f"{height:.6f}") for tone, height in enumerate(heights)]
    svg = ElementTree.fromstring(lines(series, title="t", x=Axis("x"), y=Axis("y")))
    labels = [(float(node.get("y")), float(node.text)) for node in svg.iter("text") if node.get("class") == "end"]
    places = [place for place, _ in labels]
    assert all(below - above >= 13.9 for above, below in pairwise(places))
    assert [value for _, value in labels] == sorted((value for _, value in labels), reverse=True)


def test_labels_stay_inside_the_chart_however_many_bands_there_are():
    bands = [ramp(0, 1 / 50, 1 / 50, end=f"{band}") for band in range(50)]
    svg = ElementTree.fromstring(areas(bands, title="t", x=Axis("round")))
    places = [float(node.get("y")) for node in svg.iter("text") if node.get("class") == "end"]
    assert len(places) > 8
    assert 0 < min(places) < max(places) < 280


def test_levels_alone_make_a_chart():
    svg = ElementTree.fromstring(lines([], title="t", x=Axis("x"), y=Axis("y"), levels=[Level("half", 0.5)]))
    assert texts(svg, "level-label") == ["half"]


def test_colours_that_come_again_are_drawn_differently():
    kinds = {node.get("class") for node in ElementTree.fromstring(
        lines([ramp(tone, 1, 2) for tone in range(12)], title="t", x=Axis("x"), y=Axis("y"))
    ).iter("g") if node.get("opacity")}  # fmt: skip
    assert len(kinds) == 12


def test_stacked_shares_fill_the_height():
    bands = [ramp(0, 0.2, 0.4), ramp(0, 0.8, 0.6)]
    svg = ElementTree.fromstring(areas(bands, title="t", x=Axis("round")))
    lower, upper = [node.get("points").split() for node in svg.iter("polygon")]
    assert lower[:2] == upper[:1:-1]  # the top of one is the ground of the next
    assert {float(pair.split(",")[1]) for pair in upper[:2]} == {14.0}


def test_a_single_measurement_is_a_band_not_a_point():
    svg = ElementTree.fromstring(areas([ramp(0, 0.3), ramp(0, 0.7)], title="t", x=Axis("round")))
    assert all(len(set(node.get("points").split())) == 4 for node in svg.iter("polygon"))


def test_column_heights_are_in_proportion():
    stacks = [
        Column(label="4", parts=[2, 0], strengths=[1, 1], tip=""),
        Column(label="8", parts=[1, 3], strengths=[1, 1], tip=""),
    ]
    svg = ElementTree.fromstring(columns(stacks, title="t", x=Axis("rank"), y=Axis("", low=0)))
    heights = [float(node.get("height")) for node in svg.iter("rect") if node.get("class") == "bar"]
    assert heights == pytest.approx([heights[1] * 2, heights[1], heights[1] * 3], abs=0.02)
    assert texts(svg, "value") == ["2", "4"]


def test_bars_of_a_group_share_one_label():
    rows = [Bar(group="rank 4", value=value, text="", tone=0, tip="") for value in (0.25, 0.5)]
    svg = ElementTree.fromstring(bars(rows, title="t"))
    short, long = [float(node.get("width")) for node in svg.iter("rect")]
    assert long == pytest.approx(2 * short, abs=0.02)
    assert texts(svg, "name") == ["rank 4"]
