"""Instruction tuning: a causal language model learns to answer. Only responses are targets."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from datasets import Dataset

from anyrank import data, hf
from anyrank.errors import ConfigError
from anyrank.problem import Problem
from anyrank.problems.chat import FORMS, INSTEAD, TEMPLATES, Form, Segment, conversation, format_of, segments
from anyrank.problems.given import Given, by_length, without
from anyrank.problems.language import CAUSAL, LANGUAGE
from anyrank.problems.texts import (
    IGNORED,
    check_fast,
    check_length,
    largest_batch,
    opening,
    padding,
    tokens_and_ends,
    tokens_of,
)

__all__ = ["instruction", "rouge_l"]

Template = Literal["alpaca", "chatml", "plain"]
ROW = "row of its part"
"""A column that we add: split-off examples are still called by the row in which they came."""


def instruction(
    given: Given,
    *,
    template: Template | None = None,
    columns: dict[str, str] = {},  # noqa: B006 - never changed
    max_length: Annotated[int, Ge(2)] = 512,
    too_long: Literal["drop", "cut"] = "drop",
    answers: Annotated[int, Ge(0)] = 16,
    max_new_tokens: Annotated[int, Ge(1)] = 64,
) -> Problem:
    """Conversations, in one of three forms, which is told by the columns that there are.

    A list of `messages` with `role` and `content` (or of `conversations` with `from` and `value`); `prompt` and `completion`,
    as they are; or `instruction`, `context` (or `input`) and `response` (or `output`).

    Args:
        given: model and data.
        template: how conversations become text where the tokenizer has no chat template: `alpaca`, `chatml` or `plain`.
        columns: other names of these columns in the data, such as `{instruction = "question", response = "answer"}`.
        max_length: tokens of an example.
        too_long: leave out examples of more tokens, or cut off what they have too much.
        answers: how many test prompts are answered at the end of a run, to be compared with what was expected by ROUGE-L.
        max_new_tokens: of such an answer.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    names = [name for form in FORMS.values() for name in form.columns(columns)]
    found = given.parts(names)
    form_name = _form_name(found, columns)
    form = FORMS[form_name]
    train, test = given.split(_numbered(found))
    tokenizer = given.tokenizer()
    check_fast(tokenizer)
    check_length(max_length, tokenizer, given.config())
    encode = partial(_encoded, form=form, columns=columns, tokenizer=tokenizer, template=template)
    kept, tested = (
        encode(part, max_length=max_length, cut=too_long == "cut", where=where)
        for part, where in ((train, "training data"), (test, "training data" if found.test is None else "test data"))
    )
    for part, of in ((kept, "training"), (tested, "test")):
        if not len(part.examples):
            why = "; ".join(part.remarks(of, max_length)) or "there are none"
            instead = f" To do without the template, {INSTEAD}" if part.unsaid else ""
            raise ConfigError(f"problem: none of the {of} examples can be used: {why}.{instead}")
    collate, lengths = padding(tokenizer), np.asarray(kept.examples["length"][:])
    table = without(train.select(kept.rows), ROW, *form.columns(columns))
    content = [[name for name in form.columns(columns) if name in part.column_names] for part in (train, test)]
    said = data.fingerprint([train], content[0], [data.fingerprint([test], content[1])])
    remarks = [*kept.remarks("training", max_length), *tested.remarks("test", max_length)]
    if template and tokenizer.chat_template and not kept.literal:
        remarks.append(f"problem.template = {template} is not used: the tokenizer has a chat template of its own")
    return Problem(
        model=given.load(CAUSAL),
        train=kept.examples,
        test=by_length(tested.examples),
        objective=LANGUAGE,
        collate=collate,
        columns=table or {"row": kept.rows},
        lengths=lengths,
        largest=largest_batch(kept.examples[int(lengths.argmax())], max_length, collate),
        fingerprint=data.with_tokens(said, (kept.examples, tested.examples)),
        task_type="CAUSAL_LM",
        auto_class=CAUSAL,
        form="messages" if form_name == "prompt" and not kept.literal else form_name,
        at_end=partial(_rouge, tokenizer, tested.asked[:answers], max_new_tokens),
        remarks=remarks,
    )


def _numbered(found: data.Parts) -> data.Parts:
    return data.Parts(*(part and part.add_column(ROW, list(range(1, len(part) + 1))) for part in found))  # pyright: ignore


def _form_name(found: data.Parts, columns: Mapping[str, str]) -> str:
    """The form of all conversations, by its name in `FORMS`."""
    form_name = format_of(found.train, columns, where="training data")
    if found.test is not None and (other := format_of(found.test, columns, where="test data")) != form_name:
        raise ConfigError(
            f"test data: by its columns ({', '.join(found.test.column_names)}) its conversations have the form {other}, but "
            f"those of the training data have the form {form_name}; bring them to one."
        )
    return form_name


class _Encoded(NamedTuple):
    """Conversations as tokens.

    Attributes:
        examples: those that can be used.
        rows: of the data, of each of them.
        asked: what comes before the last response, and this response; of examples that are not cut.
        of: how many rows there were.
        empty: rows without a response.
        unsaid: rows with a response of which the tokenizer's chat template writes nothing.
        long: rows that are longer than they may be.
        cut: how many of these were cut, and not left out.
        literal: there are conversations that are not put into a template.
    """

    examples: Dataset
    rows: list[int]
    asked: list[tuple[Segment, str]]
    of: int
    empty: int
    unsaid: int
    long: int
    cut: int
    literal: bool

    def remarks(self, part: str, max_length: int) -> list[str]:
        """What became of rows that did not become an example as they are."""
        remarks, lost = [], self.long - self.cut
        if self.empty:
            remarks.append(f"{self.empty} of {self.of} {part} examples have no response and are left out")
        if self.unsaid:
            remarks.append(
                f"the chat template of the tokenizer writes nothing of the responses of {self.unsaid} of {self.of} {part} "
                "examples, which are left out"
            )
        if self.long:
            done = [f"{self.cut} are cut there"] if self.cut else []
            done += [f"{lost} left out, {len(self.rows)} remain"] if lost else []
            remarks.append(
                f"{self.long} of {self.of} {part} examples are longer than problem.max_length = {max_length} tokens: "
                f"{', '.join(done)}"
            )
        return remarks


def _encoded(
    part: Dataset,
    *,
    form: Form,
    columns: Mapping[str, str],
    tokenizer: Any,
    template: Template | None,
    max_length: int,
    cut: bool,
    where: str,
) -> _Encoded:
    talks = [conversation(each, form, columns, where=f"{where}: row {each[ROW]}") for each in part.to_list()]
    spoken = [segments(talk, tokenizer, template) if talk else [] for talk in talks]
    tokens = tokens_and_ends(tokenizer, ["".join(segment.text for segment in each) for each in spoken])
    begin = opening(tokenizer)
    ids, labels, rows, asked, empty, unsaid, long, cut_there = [], [], [], [], 0, 0, 0, 0
    for row, (talk, each, (text, ends)) in enumerate(zip(talks, spoken, tokens, strict=True)):
        own = _labels(each, text, ends, tokenizer.eos_token_id)
        if each and not each[0].templated:  # a chat template writes its own
            text, own = [*begin, *text], [*[IGNORED] * len(begin), *own]
        if talk is None or not _has_targets(own):
            by_tokenizer = talk is not None and each[0].templated
            unsaid, empty = unsaid + by_tokenizer, empty + (not by_tokenizer)
            continue
        if len(text) > max_length:
            long += 1
            if not cut or not _has_targets(own[:max_length]):
                continue
            cut_there += 1
        else:
            prompt = Segment("".join(segment.text for segment in each[:-1]), False, each[0].templated)
            asked.append((prompt, talk.messages[-1]["content"]))
        ids.append(text[:max_length])
        labels.append(own[:max_length])
        rows.append(row)
    lengths = [len(text) for text in ids]
    table = {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "labels": labels, "length": lengths}
    literal = any(talk is not None and talk.literal for talk in talks)
    return _Encoded(Dataset.from_dict(table), rows, asked, len(part), empty, unsaid, long, cut_there, literal)


def _labels(spoken: Sequence[Segment], ids: Sequence[int], ends: Sequence[int], end_of_text: int | None) -> list[int]:
    """What is to be learned of the tokens of a conversation.

    Args:
        spoken: the conversation.
        ids: its tokens.
        ends: where in its text each of them ends.
        end_of_text: the token after which there is nothing more to be said.
    """
    labels, at = [IGNORED] * len(ids), 0
    for segment in spoken:
        first, at = bisect_right(ends, at), at + len(segment.text)
        own = ids[first : bisect_right(ends, at)] if segment.target else []
        if end_of_text in own:  # templates go on behind it, with a line feed say
            own = own[: len(own) - own[::-1].index(end_of_text)]
        labels[first : first + len(own)] = own
    return labels


def _has_targets(labels: Sequence[int]) -> bool:
    """Whether there is one that can be predicted from something before it."""
    return any(label != IGNORED for label in labels[1:])


def _rouge(tokenizer: Any, asked: Sequence[tuple[Segment, str]], max_new_tokens: int, model: Any) -> dict[str, float]:
    """ROUGE-L of greedy answers to test prompts."""
    begin, texts = opening(tokenizer), tokens_of(tokenizer, [prompt.text for prompt, _ in asked])
    prompts = [ids if prompt.templated else [*begin, *ids] for (prompt, _), ids in zip(asked, texts, strict=True)]
    if not any(prompts):
        return {}
    pairs = [(ids, expected) for ids, (_, expected) in zip(prompts, asked, strict=True) if ids]
    answered = hf.generate(model.model, tokenizer, [ids for ids, _ in pairs], max_new_tokens=max_new_tokens)
    return {"rougeL": rouge_l(answered, [expected for _, expected in pairs])}


def rouge_l(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The mean F1 of the longest common subsequences of words (Lin. ROUGE. 2004)."""
    from rouge_score.rouge_scorer import RougeScorer  # it takes a second to load

    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(target, answer)["rougeL"].fmeasure for answer, target in zip(answers, expected, strict=True)]
    return float(np.mean(scores))


assert set(TEMPLATES) == set(Template.__args__)  # pyright: ignore[reportAttributeAccessIssue]
