"""Instruction tuning: the forms of conversations, what of them is learned, and how answers are compared."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer

import anyrank
from anyrank.adapter import Adapter
from anyrank.errors import ConfigError
from anyrank.hf import AdaptedModel
from anyrank.local import LOCALS
from anyrank.problem import Problem
from anyrank.problems import chat
from anyrank.problems.chat import TEMPLATES, Talk, as_jinja, conversation, prompt_of, segments
from anyrank.problems.instruction import instruction, rouge_l
from anyrank.problems.texts import IGNORED, check_fast, opening
from anyrank.train import Training, evaluate
from causal import CHATML, given, in_pieces, of_bytes, of_words, texts, write_causal, write_rows

# Qwen3's way: what was thought stands before the last response only.
THOUGHTFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ENDING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BACKWARDS = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}
TWO_TURNS = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "bye"}]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_model(folder: Path, **changes: Any) -> tuple[Path, Any]:
    tokenizer = of_bytes(**changes)
    return write_causal(folder, tokenizer), tokenizer


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[Path, Any]:
    """A model whose tokenizer has no chat template."""
    return write_model(tmp_path_factory.mktemp("bare") / "model")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> tuple[Path, Any]:
    """A model with a chat template; a turn ends with its end-of-text token and a line feed."""
    return write_model(
        tmp_path_factory.mktemp("chatml") / "model", begins=False, end="<|im_end|>", chat_template=CHATML
    )


def made(
    model: tuple[Path, Any], folder: Path, rows: list[dict], test: list[dict] | None = None, **settings
) -> Problem:
    """The problem of these training examples; without other test examples they are those too."""
    source = write_rows(folder / "train.jsonl", rows)
    tested = source if test is None else write_rows(folder / "other.jsonl", test)
    return instruction(given(model[0], source, test=str(tested)), **{"max_length": 200, **settings})


def learned(model: tuple[Path, Any], folder: Path, row: dict, **settings: Any) -> str:
    """An example as text, with its targets in brackets."""
    (text,) = texts(model[1], made(model, folder, [row], **settings))
    return text


def refused(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(*arguments, **settings)
    return str(caught.value)


# Forms


PLAIN = "<s>hi\n[yo</s>]"
SHAREGPT = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
FORMS = {
    "messages": ({"messages": [USER, ASSISTANT]}, PLAIN, "messages"),
    "messages with more about them": (
        {"messages": [{**USER, "id": 3}, {**ASSISTANT, "weight": 0.5}]},
        PLAIN,
        "messages",
    ),
    "content in parts": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, ASSISTANT]},
        PLAIN,
        "messages",
    ),
    "a part whose kind is not said": (
        {"messages": [{**USER, "content": [{"text": "hi"}]}, ASSISTANT]},
        PLAIN,
        "messages",
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, "<s>be brief\nhi\n[yo</s>]", "messages"),
    "two turns": (
        {"messages": TWO_TURNS},
        "<s>be brief\nhi\n[yo</s>]\nso?\n[bye</s>]",
        "messages",
    ),
    "nobody answered in the end": ({"messages": [USER, ASSISTANT, {**USER, "content": "well?"}]}, PLAIN, "messages"),
    "an opening and an empty response": (
        {"messages": [ASSISTANT, USER, {**ASSISTANT, "content": None}, USER, ASSISTANT]},
        "<s>yo</s>\nhi\n</s>\nhi\n[yo</s>]",
        "messages",
    ),
    "a tool's answer": (
        {"messages": [USER, {"role": "tool", "content": "3"}, ASSISTANT]},
        "<s>hi\n3\n[yo</s>]",
        "messages",
    ),
    "prompt and completion": ({"prompt": "Q: hi A: ", "completion": "yo"}, "<s>Q: hi A: [yo</s>]", "prompt"),
    "an empty prompt": ({"prompt": "", "completion": "yo"}, "<s>[yo</s>]", "prompt"),
    "no text but numbers": ({"prompt": 2, "completion": 4}, "<s>2[4</s>]", "prompt"),
    "prompt and completion of messages": ({"prompt": [USER], "completion": [ASSISTANT]}, PLAIN, "messages"),
    "what was answered in a prompt is none of the targets": (
        {"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]},
        "<s>be brief\nhi\nyo</s>\nso?\n[bye</s>]",
        "messages",
    ),
    "messages and a completion": ({"prompt": [USER], "completion": "yo"}, PLAIN, "messages"),
    "a prompt and messages": ({"prompt": "hi", "completion": [ASSISTANT]}, PLAIN, "messages"),
    "instruction": ({"instruction": "hi", "response": "yo"}, PLAIN, "instruction"),
    "instruction, context, response": (
        {"instruction": "hi", "context": "some", "response": "yo"},
        "<s>hi\n\nsome\n[yo</s>]",
        "instruction",
    ),
    "instruction, input, output": (
        {"instruction": "hi", "input": "some", "output": 7, "system": "be brief"},
        "<s>be brief\nhi\n\nsome\n[7</s>]",
        "instruction",
    ),
    "an empty input": ({"instruction": "hi", "input": " ", "output": "yo"}, PLAIN, "instruction"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_has_its_responses_and_their_end_for_targets(bare, kind, tmp_path):
    row, expected, form = FORMS[kind]
    problem = made(bare, tmp_path, [row], template="plain")
    assert texts(bare[1], problem) == [expected]
    assert (problem.form, problem.remarks) == (form, [])


def test_messages_as_columns_of_a_sequence():
    row = {"conversations": {"from": ["human", "gpt"], "value": ["hi", "yo"]}}
    talk = conversation(row, chat.FORMS["messages"], {}, where="")
    assert talk == Talk([USER, ASSISTANT])


def test_renamed_columns_choose_the_form(bare, tmp_path):
    row = {"question": "hi", "answer": "yo", "passage": "some", "prompt": "p", "completion": "c"}
    names = {"instruction": "question", "response": "answer", "context": "passage"}
    problem = made(bare, tmp_path, [{**row, "who": "ann"}], template="plain", columns=names)
    assert texts(bare[1], problem) == ["<s>hi\n\nsome\n[yo</s>]"]
    assert problem.columns == {"who": ["ann"], "prompt": ["p"], "completion": ["c"]}
    assert learned(bare, tmp_path, row) == "<s>p[c</s>]"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"instruction": "qestion", "response": "answer"}, "there is no column 'qestion'.*did you mean 'question'"),
        (
            {"question": "instruction"},
            "problem.columns: there is no 'question' to rename; there are: completion, context",
        ),
        ({"prompt": "question", "response": "answer"}, "prompt and response are columns of different forms"),
        ({}, "expected a column `messages` .*found question, answer. Say in `problem.columns`"),
    ],
)
def test_columns_that_are_not_there(bare, tmp_path, columns, expected):
    with pytest.raises(ConfigError, match=expected):
        made(bare, tmp_path, [{"question": "hi", "answer": "yo"}], columns=columns)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}]}, "row 2: .*no tool_calls, got"),
        ({"messages": [{"role": "user", "content": 5}, ASSISTANT]}, "row 2: expected messages with a role .*5"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]}, "content that is text"),
        (
            {"messages": [{"role": "narrator", "content": "x"}, ASSISTANT]},
            "a role .system, user, assistant, tool.*narrator",
        ),
        ({"messages": [{"content": "x"}, ASSISTANT]}, "a role .*content"),
        ({"messages": [{**USER, "content": [{"text": 5}]}, ASSISTANT]}, "row 2: expected messages with a role .*5"),
        ({"messages": [{**USER, "content": [{"text": "x", "image": "p"}]}, ASSISTANT]}, "content that is text"),
        ({"messages": [{"role": None, "content": "x"}, ASSISTANT]}, "row 2: expected messages with a role .*None"),
        ({"messages": "hi"}, "row 2: expected a list of messages, got 'hi'"),
    ],
)
def test_messages_that_are_none(bare, tmp_path, row, expected):
    with pytest.raises(ConfigError, match="training data: .*" + expected):
        made(bare, tmp_path, [{"messages": [USER, ASSISTANT]}, row], template="plain")


@pytest.mark.parametrize(
    "messages",
    [
        USER,
        {"role": ["user", "assistant"], "content": ["hi"]},
        {"role": None, "content": ["hi", "yo"]},
        {"role": ["user", "assistant"], "content": "hiyo"},
    ],
)
def test_a_mapping_that_is_no_list_of_messages(messages):
    with pytest.raises(ConfigError, match="row 3: expected a list of messages, or a list for each of their fields"):
        conversation({"messages": messages}, chat.FORMS["messages"], {}, where="row 3")


def test_messages_as_columns_without_a_role():
    odd = {"messages": {"role": [None, "assistant"], "content": ["hi", "yo"]}}
    with pytest.raises(ConfigError, match=r"row 3: expected messages with a role .*None, 'content': 'hi'"):
        conversation(odd, chat.FORMS["messages"], {}, where="row 3")


def test_an_image_is_not_left_out_of_a_message(bare, tmp_path):
    """Parquet gives all parts the same fields."""
    parts = [{"type": "image", "text": None, "image": "p.png"}, {"type": "text", "text": "what?", "image": None}]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]}] * 2
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"row [12]: expected messages with a role .*content that is text.*p\.png"):
        instruction(given(bare[0], tmp_path / "a.parquet"), template="plain", max_length=64)
    for row in rows:
        row["messages"][0]["content"] = parts[1:]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    problem = instruction(given(bare[0], tmp_path / "b.parquet"), template="plain", max_length=64)
    assert texts(bare[1], problem) == ["<s>what?\n[what?</s>]"]


def test_a_list_where_text_is_expected(bare, tmp_path):
    rows = [{"instruction": "hi", "response": ["yo", "hey"]}]
    assert "training data: row 1: expected text, got ['yo', 'hey']" in refused(bare, tmp_path, rows, template="plain")


def test_a_row_is_named_as_the_file_has_it_though_it_was_split_off(bare, tmp_path):
    rows = [{"messages": [USER, ASSISTANT]} for _ in range(9)] + [{"messages": [{"role": "x", "content": "y"}]}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    for seed in range(3):
        with pytest.raises(ConfigError, match="training data: row 10: expected messages"):
            instruction(given(bare[0], source, seed=seed), template="plain", max_length=64)


# Test parts


def test_a_test_part_of_another_form(bare, tmp_path):
    said = {"messages": [USER, ASSISTANT]}
    text = refused(bare, tmp_path, [{"instruction": "hi", "response": "yo"}], test=[said], template="plain")
    assert "its conversations have the form messages, but those of the training data have the form instruction" in text
    assert "test data: expected a column `messages`" in refused(bare, tmp_path, [said], test=[{"text": "x"}])
    renamed = {"instruction": "q", "response": "a"}
    text = refused(bare, tmp_path, [{"q": "hi", "a": "yo"}], test=[{"q": "hi", "b": "yo"}], columns=renamed)
    assert "test data: there is no column 'a'" in text


def test_a_column_that_one_part_lacks_counts_for_the_fingerprint(bare, tmp_path):
    rows = [{"instruction": "hi", "context": "some", "response": "yo"}]
    test = [{"instruction": "hi", "system": "be brief", "output": "yo"}]
    prints = [
        made(bare, tmp_path / str(number), *parts, template="plain").fingerprint
        for number, parts in enumerate(
            [
                (rows, test),
                (rows, test),
                ([{**rows[0], "context": "other"}], test),
                (rows, [{**test[0], "output": "no"}]),
            ]
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_texts_in_a_csv_file_stay_as_written(bare, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("instruction,input,output,who\n007,NA,1.50,3\n")
    problem = instruction(given(bare[0], file, test=str(file)), template="plain", max_length=64)
    assert texts(bare[1], problem) == ["<s>007\n\nNA\n[1.50</s>]"]
    assert problem.columns == {"who": [3]}


# Templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "alpaca",
            "<s>S\n\n### Instruction:\nhi\n\n### Input:\nsome\n\n### Response:\n[yo</s>]",
        ),
        (
            "chatml",
            "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi\n\nsome<|im_end|>\n<|im_start|>assistant\n[yo</s>]",
        ),
        ("plain", "<s>S\nhi\n\nsome\n[yo</s>]"),
    ],
)
def test_named_templates(bare, tmp_path, template, expected):
    row = {"system": "S", "instruction": "hi", "context": "some", "response": "yo"}
    assert learned(bare, tmp_path, row, template=template) == expected


def test_turns_of_a_named_template_end_with_the_end_of_text(bare, tmp_path):
    expected = "<s>### Instruction:\nhi\n\n### Response:\n[yo</s>]\n\n### Instruction:\nso?\n\n### Response:\n[bye</s>]"
    assert learned(bare, tmp_path, {"messages": TWO_TURNS[1:]}, template="alpaca") == expected


def test_without_any_template_it_is_said_what_to_do(bare, tmp_path):
    text = refused(bare, tmp_path, [{"messages": [USER, ASSISTANT]}])
    assert "the tokenizer of this model has no chat template; name one, such as --set problem.template=alpaca" in text


def test_every_turn_of_a_chat_template_is_learned_up_to_its_end(chatml, tmp_path):
    expected = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n[bye<|im_end|>]\n"
    )
    assert learned(chatml, tmp_path, {"messages": TWO_TURNS}) == expected
    whole = chatml[1].apply_chat_template(TWO_TURNS, tokenize=False)
    problem = made(chatml, tmp_path, [{"messages": TWO_TURNS}])
    assert problem.train[0]["input_ids"] == chatml[1](whole, add_special_tokens=False)["input_ids"]


LONG = "yes  it was\n\n  good.\n"


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("template", [None, "alpaca", "literal"])
def test_tokens_are_those_of_the_whole_text_however_they_are_cut(tmp_path, kind, template):
    tokenizer = in_pieces(kind, chat_template=None if template else ENDING)
    model = write_causal(tmp_path / "model", tokenizer), tokenizer
    asked, said = "was the film good", [LONG, "it was  "]
    if template == "literal":
        row, said = {"prompt": f"{asked}\n", "completion": LONG}, [LONG]
        whole = f"{asked}\n{LONG}</s>"
    else:
        turns = [
            {"role": role, "content": text} for each in said for role, text in (("user", asked), ("assistant", each))
        ]
        row = {"messages": turns}
        turn = f"### Instruction:\n{asked}\n\n### Response:\n"
        whole = "\n\n".join(f"{turn}{each}</s>" for each in said)
        whole = whole if template else tokenizer.apply_chat_template(turns, tokenize=False)
    problem = made(model, tmp_path, [row], template="alpaca" if template else None)
    example = problem.train[0]
    assert example["input_ids"] == tokenizer(whole, add_special_tokens=template is not None)["input_ids"]
    targets = [label for label in example["labels"] if label != IGNORED]
    # A space that a word begins with may be the prompt's last one.
    text = tokenizer.decode(targets).replace("</s> ", "</s>").lstrip()
    assert text == "".join(f"{each}</s>" for each in said)


def test_a_tokenizer_that_does_not_say_where_tokens_are():
    with pytest.raises(
        ConfigError, match=r"model\.name: the tokenizer of this model \(SimpleNamespace\) is written in Python"
    ):
        check_fast(SimpleNamespace(is_fast=False))


def test_an_instruction_has_its_context_in_a_chat_template(chatml, tmp_path):
    row = {"instruction": "hi", "context": "some", "response": "yo"}
    assert learned(chatml, tmp_path, row) == (
        "<|im_start|>user\nhi\n\nsome<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n"
    )


def test_a_named_template_beside_a_chat_template_is_said_to_be_unused(chatml, tmp_path):
    problem = made(chatml, tmp_path, [{"messages": [USER, ASSISTANT]}], template="alpaca")
    assert problem.remarks == ["problem.template = alpaca is not used: the tokenizer has a chat template of its own"]
    assert texts(chatml[1], problem)[0].startswith("<|im_start|>user\nhi")


def test_of_a_template_that_rewrites_earlier_turns_the_last_response_is_learned(tmp_path):
    model = write_model(tmp_path / "model", begins=False, end="<|im_end|>", chat_template=THOUGHTFUL)
    assert learned(model, tmp_path, {"messages": TWO_TURNS[1:]}) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nbye<|im_end|>]\n"
    )


def test_templates_that_do_not_take_a_conversation(tmp_path):
    picky = write_model(tmp_path / "picky", chat_template=NO_SYSTEM)
    assert learned(picky, tmp_path, {"messages": TWO_TURNS[1:]}).count("[") == 2
    text = refused(picky, tmp_path, [{"messages": TWO_TURNS}])
    assert "does not take a conversation (System role not supported)" in text
    assert "be brief" in text
    assert "name another one with --set problem.template=chatml" in text
    odd = write_model(tmp_path / "odd", chat_template=BACKWARDS)
    assert "does not put a response behind its prompt" in refused(odd, tmp_path, [{"messages": [USER, ASSISTANT]}])


def test_another_chat_template_or_tokenizer_changes_the_fingerprint(chatml, tmp_path):
    rows = [{"messages": TWO_TURNS}]
    others = [
        write_model(tmp_path / str(number), begins=False, end="<|im_end|>", chat_template=template)
        for number, template in enumerate([CHATML, CHATML.replace("im_start", "im_begin")])
    ]
    prints = [made(model, tmp_path, rows).fingerprint for model in (chatml, *others)]
    assert prints[0] == prints[1] != prints[2]


def test_a_chat_template_that_leaves_responses_out_is_said_to_be_at_fault(tmp_path):
    said = {"messages": [USER, ASSISTANT]}
    silent = write_model(tmp_path / "silent", chat_template="{{ 'hello' }}")
    text = refused(silent, tmp_path, [said] * 3)
    assert "the chat template of the tokenizer writes nothing of the responses of 3 of 3 training examples" in text
    assert "To do without the template, remove it from the tokenizer" in text
    assert "have no response" not in text


@pytest.mark.parametrize("template", ["alpaca", "chatml", "plain", None])
def test_a_question_is_asked_as_it_was_trained(bare, chatml, template):
    tokenizer = bare[1] if template else chatml[1]
    asked = [SYSTEM, {**USER, "context": "some"}]
    prompt, response = segments(Talk([*asked, ASSISTANT]), tokenizer, template)
    assert prompt_of(Talk(asked), tokenizer, template) == prompt
    assert response.text.startswith("yo")
    literal = Talk([USER, ASSISTANT], literal=True)
    assert (
        prompt_of(literal._replace(messages=[USER]), tokenizer, template) == segments(literal, tokenizer, template)[0]
    )


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tmp_path):
    model = write_model(tmp_path / "model", ends=True)
    assert learned(model, tmp_path, {"prompt": "hi ", "completion": "yo"}) == "<s>hi [yo</s>]"


# What cannot be used


def rows_of(*responses: str | None) -> list[dict]:
    return [{"prompt": f"{number} ", "completion": text, "who": number} for number, text in enumerate(responses)]


def test_what_has_no_response_or_is_too_long_is_counted_and_said(bare, tmp_path):
    rows = rows_of("yes", "", "n" * 20, None, "no", " \n")
    problem = made(bare, tmp_path, rows, test=rows_of("yes", "n" * 20), max_length=10)
    assert texts(bare[1], problem) == ["<s>0 [yes</s>]", "<s>4 [no</s>]"]
    assert problem.columns == {"who": [0, 4]}
    assert problem.lengths is not None
    assert problem.lengths.tolist() == [7, 6]
    assert problem.remarks == [
        "3 of 6 training examples have no response and are left out",
        "1 of 6 training examples are longer than problem.max_length = 10 tokens: 1 left out, 2 remain",
        "1 of 2 test examples are longer than problem.max_length = 10 tokens: 1 left out, 1 remain",
    ]


def test_a_long_example_may_be_cut_if_a_target_remains(bare, tmp_path):
    rows = [*rows_of("yes", "n" * 20), {"prompt": "p" * 20, "completion": "yes", "who": 9}]
    problem = made(bare, tmp_path, rows, max_length=10, too_long="cut")
    assert texts(bare[1], problem) == ["<s>0 [yes</s>]", "<s>1 [nnnnnnn]"]
    assert problem.remarks[0] == (
        "2 of 3 training examples are longer than problem.max_length = 10 tokens: 1 are cut there, 1 left out, 2 remain"
    )


@pytest.mark.parametrize(
    ("rows", "test", "expected"),
    [
        (
            rows_of("", None),
            None,
            "none of the training examples can be used: 2 of 2 training examples have no response",
        ),
        (
            rows_of("n" * 90),
            None,
            "1 of 1 training examples are longer than problem.max_length = 64 tokens: 1 left out",
        ),
        (rows_of("yes"), rows_of(""), "none of the test examples can be used: 1 of 1 test examples have no response"),
    ],
)
def test_nothing_that_can_be_used(bare, tmp_path, rows, test, expected):
    assert expected in refused(bare, tmp_path, rows, test, max_length=64)


def test_a_response_of_one_token_before_which_there_is_nothing_is_no_target(tmp_path):
    tokenizer = of_bytes(begins=False)
    tokenizer.eos_token = None
    model = write_causal(tmp_path / "model", tokenizer), tokenizer
    rows = [{"prompt": "", "completion": "y"}, {"prompt": "", "completion": "yo"}]
    problem = made(model, tmp_path, rows)
    assert problem.remarks[0] == "1 of 2 training examples have no response and are left out"
    assert texts(tokenizer, problem) == ["[yo]"]


def test_more_tokens_than_positions(bare, tmp_path):
    assert "problem.max_length: 300 tokens, but the model has 256 positions" in refused(
        bare, tmp_path, rows_of("yes"), max_length=300
    )


# Loss and answers


def bare_of(problem: Problem) -> AdaptedModel:
    """The base model without an adapter."""
    model = AdaptedModel(problem.model(), scale=1.0)
    model.load(Adapter({}, model.dense))
    return model


def score(problem: Problem, batch_size: int) -> Any:
    model = bare_of(problem)
    training = Training(
        local=LOCALS["lora"](),
        learning_rate=1.0,
        weight_decay=0.0,
        batch_size=batch_size,
        collate=problem.collate,
        objective=problem.objective,
    )
    return evaluate(model, Adapter({}, model.dense), problem.test, training=training)


def test_the_loss_is_that_of_transformers_on_the_responses(bare, tmp_path):
    rows = [
        {"messages": TWO_TURNS},
        {"messages": [USER, ASSISTANT]},
        {"messages": [SYSTEM, USER, {**ASSISTANT, "content": "o" * 30}]},
    ]
    problem = made(bare, tmp_path, rows, template="plain")
    model: Any = problem.model()
    total, count = 0.0, 0
    with torch.inference_mode():
        for i in range(3):
            example = problem.train[i]
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
            for place, label in enumerate(example["labels"]):
                if label != IGNORED:
                    total, count = total - float(logits[place - 1, label]), count + 1
        batch = problem.collate([problem.train[i] for i in range(3)])
        whole = model(**batch).loss
    assert count == len("yo") + 1 + len("bye") + 1 + len("yo") + 1 + 31
    for batch_size in (1, 2, 8):
        reached = score(problem, batch_size)
        assert reached.loss == pytest.approx(total / count, rel=1e-5)
        assert reached.loss == pytest.approx(float(whole), rel=1e-5)
        assert reached.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_rouge_l_by_hand():
    # The longest common subsequence is "the cat": precision 2 / 3, recall 2 / 4.
    assert rouge_l(["the cat sat"], ["The cat ran fast!"]) == pytest.approx(4 / 7)
    assert rouge_l(["the cat sat", "no"], ["The cat ran fast!", "no"]) == pytest.approx((4 / 7 + 1) / 2)
    assert rouge_l([""], ["some"]) == 0


def test_answers_are_compared_as_rouge_score_does_with_what_transformers_writes(tmp_path):
    words = ["the", "a", "film", "plot", "was", "good", "bad", "long", "what", "who", "why"]
    tokenizer = of_words(words)
    model = write_causal(tmp_path / "model", tokenizer), tokenizer
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(model[0])
    rows = []
    for asked in ("what was good", "who", "why was the film long"):
        ids = torch.tensor([tokenizer(asked)["input_ids"]])
        with torch.inference_mode():
            said = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        rows.append({"prompt": asked, "answer": tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)})
    expected = ["the film was good", *(f"{row['answer']} a film" for row in rows[1:])]
    test = [{"prompt": row["prompt"], "completion": text} for row, text in zip(rows, expected, strict=True)]
    problem = made(model, tmp_path, test, max_new_tokens=6)
    scorer = RougeScorer(["rougeL"])
    by_hand = [scorer.score(text, row["answer"])["rougeL"].fmeasure for text, row in zip(expected, rows, strict=True)]
    adapted = bare_of(problem)
    assert problem.at_end(adapted) == {"rougeL": pytest.approx(np.mean(by_hand))}
    assert 0.3 < np.mean(by_hand) < 1
    first = made(model, tmp_path, test, max_new_tokens=6, answers=1)
    assert first.at_end(adapted) == {"rougeL": pytest.approx(by_hand[0])}
    assert made(model, tmp_path, test, answers=0).at_end(adapted) == {}


def test_a_prompt_that_was_cut_is_not_answered(bare, tmp_path):
    late = [USER, ASSISTANT, {"role": "user", "content": "u" * 300}, ASSISTANT]
    problem = made(bare, tmp_path, [{"messages": late}], template="plain", max_length=40, too_long="cut")
    assert texts(bare[1], problem)[0].startswith("<s>hi\n[yo</s>]\nuuuu")
    assert problem.at_end(bare_of(problem)) == {}


def test_the_largest_batch_is_as_long_as_may_be_and_has_targets(bare, tmp_path):
    batch = made(bare, tmp_path, rows_of("yes", "no, never"), max_length=40).batch_of_largest(3)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 40)
    assert (batch["labels"] != IGNORED).any()


# Whole runs


def test_conversations_in_a_file_for_each_client(chatml, tmp_path):
    for client in ("ann", "bob", "cy"):
        rows = [{"messages": [USER, {**ASSISTANT, "content": f"{client} {i % 2}"}]} for i in range(8)]
        write_rows(tmp_path / "clients" / f"{client}.jsonl", rows)
    chosen = anyrank.load_recipe(
        overrides={
            "rounds": 3,
            "model.name": str(chatml[0]),
            "problem": {"name": "instruction", "max_length": 64, "answers": 2, "max_new_tokens": 4},
            "data.source": str(tmp_path / "clients"),
            "partition": {"name": "by_column", "column": "file"},
            "train": {"learning_rate": 2e-2, "steps": 8, "batch_size": 4},
            "fleet.per_round": 3,
            "evaluate.every": 1,
            "compute": {"threads": 1, "workers": 1},
        }
    )
    folder = anyrank.run(chosen, tmp_path / "run")
    first, last = folder.records()[0], folder.records()[-1]
    assert last["metrics"].keys() == {"perplexity", "accuracy", "rougeL"}
    assert last["metrics"]["perplexity"] < 0.7 * first["metrics"]["perplexity"]
    assert set(last["returned_ranks"]) == {"ann", "bob", "cy"}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("begins", [True, False])
def test_a_named_template_is_a_chat_template_too(template, begins):
    """For whoever uses a merged model without us: the same prompts, and the same conversations."""
    bare, other = of_bytes(begins=begins), of_bytes(begins=begins)
    begin = bare.decode(opening(bare)) if begins else ""
    other.chat_template = as_jinja(template, opening=begin)
    asked = [{"role": "system", "content": 'be "kind"'}, {"role": "user", "content": "who?\n{{ x }}"}]
    prompt = other.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == begin + prompt_of(Talk(asked, given=2), bare, template).text
    talk = Talk(
        [
            *asked,
            {"role": "assistant", "content": "I."},
            {"role": "user", "content": "So?"},
            {"role": "assistant", "content": "Yes."},
        ],
        given=2,
    )
    whole = other.apply_chat_template(talk.messages, tokenize=False)
    text = begin + "".join(segment.text for segment in segments(talk, bare, template))
    assert whole.startswith(text)
    assert whole[len(text) :] == TEMPLATES[template].assistant[1]
