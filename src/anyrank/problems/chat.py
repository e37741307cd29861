"""Conversations: the forms in which people keep them, and how they become text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from anyrank import data
from anyrank.errors import ConfigError

__all__ = [
    "FORMS",
    "INSTEAD",
    "TEMPLATES",
    "Form",
    "Segment",
    "Talk",
    "as_jinja",
    "conversation",
    "format_of",
    "prompt_of",
    "segments",
]

Message = Mapping[str, str]


class Form(NamedTuple):
    """A form in which conversations are kept.

    Attributes:
        needed: columns that there must be; in each entry any of its names.
        optional: columns that there may be, likewise.
    """

    needed: Sequence[Sequence[str]]
    optional: Sequence[Sequence[str]] = ()

    def columns(self, renamed: Mapping[str, str]) -> list[str]:
        """All columns that it may use, as they are called in the data."""
        names = [name for entry in (*self.needed, *self.optional) for name in entry]
        return [renamed.get(name, name) for name in names]


FORMS: Mapping[str, Form] = {
    "messages": Form([["messages", "conversations"]]),
    "prompt": Form([["prompt"], ["completion"]]),
    "instruction": Form([["instruction"], ["response", "output"]], [["context", "input"], ["system"]]),
}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_KNOWN = ("system", "user", "assistant", "tool")
INSTEAD = (
    "remove it from the tokenizer (`tokenizer.chat_template = None`, saved into the model's folder) and name another one "
    "with --set problem.template=chatml."
)
"""What to do about a tokenizer whose chat template does not fit."""


class Talk(NamedTuple):
    """A conversation.

    Attributes:
        messages: with `role` and `content`, an instruction maybe with `context`; the last one is the assistant's.
        given: how many of them are the prompt, of which nothing is to be learned.
        literal: they are not put into a template.
    """

    messages: Sequence[Message]
    given: int = 1
    literal: bool = False

    @property
    def responses(self) -> list[int]:
        """Which messages are to be learned: the assistant's that say anything."""
        spoken = enumerate(self.messages)
        return [i for i, each in spoken if i >= self.given and each["role"] == "assistant" and each["content"].strip()]


class Segment(NamedTuple):
    """A part of a conversation's text.

    Attributes:
        text: as the model sees it.
        target: the model is to say it.
        templated: by the tokenizer's own chat template, which writes special tokens too.
    """

    text: str
    target: bool
    templated: bool = False


class _Template(NamedTuple):
    """How messages become text where the tokenizer has no chat template: what stands before and after each."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    context: str = "\n\n"


TEMPLATES: Mapping[str, _Template] = {
    "alpaca": _Template(
        ("", "\n\n"), ("### Instruction:\n", "\n\n"), ("### Response:\n", "\n\n"), context="\n\n### Input:\n"
    ),
    "chatml": _Template(
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ),
    "plain": _Template(("", "\n"), ("", "\n"), ("", "\n")),
}
"""Prompt templates by name. `alpaca` is that of Stanford Alpaca and FedIT, without its opening sentence."""


def as_jinja(template: str, *, opening: str = "") -> str:
    """A named template as the chat template of a tokenizer, for a model that goes on without us.

    Args:
        template: a name in `TEMPLATES`.
        opening: what the tokenizer puts before every text; a chat template has to write it.
    """
    chosen = TEMPLATES[template]

    def turn(role: str, *said: str) -> str:
        before, after = getattr(chosen, role)
        return "{{ " + " + ".join([json.dumps(before), *said, json.dumps(after)]) + " }}"

    system, user = turn("system", "message['content']"), turn("user", "message['content']")
    assistant = turn("assistant", "message['content']", "eos_token")
    return (
        "{{ " + json.dumps(opening) + " }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}" + system + "{% elif message['role'] == 'assistant' %}" + assistant + "{% else %}"
        + user + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + json.dumps(chosen.assistant[0]) + " }}{% endif %}"
    )  # fmt: skip


def format_of(part: Dataset, renamed: Mapping[str, str], *, where: str) -> str:
    """The name in `FORMS` of the form of these conversations, told by their columns.

    Args:
        part: the data.
        renamed: other names of columns in the data; only a form that has them all is considered.
        where: what the data is, for messages.

    Raises:
        ConfigError: it is none, or a renamed column is not there.
    """
    known = {name for form in FORMS.values() for name in form.columns({})}
    able = {kind: form for kind, form in FORMS.items() if renamed.keys() <= {*form.columns({})}}
    problems = [
        f"problem.columns: there is no {name!r} to rename; there are: {', '.join(sorted(known))}."
        for name in renamed
        if name not in known
    ]
    if not problems and not able:
        problems.append(
            f"problem.columns: {' and '.join(renamed)} are columns of different forms; rename those of one."
        )
    problems += data.absent_columns(part, list(renamed.values()), where=where)
    if problems:
        raise ConfigError(problems)
    for kind, form in able.items():
        if all(any(renamed.get(name, name) in part.column_names for name in entry) for entry in form.needed):
            return kind
    raise ConfigError(
        f"{where}: expected a column `messages` (or `conversations`), or `prompt` and `completion`, or `instruction` and "
        f"`response` (or `output`); found {', '.join(part.column_names)}. Say in `problem.columns` which is which, such as "
        '`columns = {instruction = "question", response = "answer"}`.'
    )


def conversation(row: Mapping[str, Any], form: Form, renamed: Mapping[str, str], *, where: str) -> Talk | None:
    """A row as a conversation up to its last response; None if it has no response.

    Args:
        row: of the data.
        form: what it is.
        renamed: other names of columns in the data.
        where: which row it is, for messages.

    Raises:
        ConfigError: it does not have the form.
    """

    def value(*names: str) -> Any:
        found = (row.get(renamed.get(name, name)) for name in names)
        return next((each for each in found if each not in (None, "")), "")

    if form is FORMS["messages"]:
        return _ending_in_response(Talk(_messages(value("messages", "conversations") or [], where)))
    if form is FORMS["prompt"]:
        spoken = {"user": value("prompt"), "assistant": value("completion")}
        if not any(isinstance(each, list | Mapping) for each in spoken.values()):
            talk = [{"role": role, "content": _text(said, where)} for role, said in spoken.items()]
            return _ending_in_response(Talk(talk, literal=True))
        prompt, completion = (
            _messages(said if isinstance(said, list | Mapping) else [{"role": role, "content": said}], where)
            for role, said in spoken.items()
        )
        return _ending_in_response(Talk([*prompt, *completion], given=len(prompt)))
    asked = {"role": "user", "content": _text(value("instruction"), where)}
    if (context := _text(value("context", "input"), where)).strip():
        asked["context"] = context
    talk = [asked, {"role": "assistant", "content": _text(value("response", "output"), where)}]
    if (system := _text(value("system"), where)).strip():
        talk = [{"role": "system", "content": system}, *talk]
    return _ending_in_response(Talk(talk))


def _text(found: Any, where: str) -> str:
    if isinstance(found, list | Mapping | bytes):
        raise ConfigError(f"{where}: expected text, got {found!r:.200}")
    return str(found)


def _messages(found: Any, where: str) -> list[Message]:
    if isinstance(found, Mapping):  # how the library `datasets` has sequences of mappings
        columns = [*found.values()]
        if not all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns):
            raise ConfigError(
                f"{where}: expected a list of messages, or a list for each of their fields, all of one length; got "
                f"{found!r:.200}"
            )
        found = [dict(zip(found, each, strict=True)) for each in zip(*columns, strict=True)]
    if not isinstance(found, list):
        raise ConfigError(f"{where}: expected a list of messages, got {found!r:.200}")
    messages = list[Message]()
    for each in found:
        about = each if isinstance(each, Mapping) else {}
        role, content = (_first(about, *names) for names in (("role", "from"), ("content", "value")))
        if isinstance(content, list) and all(map(_is_text, content)):
            content = "".join(part["text"] for part in content)
        role = _ROLES.get(role, role) if isinstance(role, str) else None
        if role not in _KNOWN or not isinstance(content, str | None) or about.get("tool_calls"):
            raise ConfigError(
                f"{where}: expected messages with a role ({', '.join(_KNOWN)}) and content that is text, and no tool_calls, "
                f"got {each!r:.200}. Leave out or rewrite such conversations."
            )
        messages.append({"role": role, "content": content or ""})
    return messages


def _is_text(part: Any) -> bool:
    """Whether a part of a message is text, and not an image say, to which Parquet gives an empty text."""
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        return False
    said = {name for name, value in part.items() if value is not None}
    return part["type"] == "text" if "type" in said else said == {"text"}


def _first(found: Mapping[str, Any], *names: str) -> Any:
    """The value of the first name that has one."""
    return next((found[name] for name in names if found.get(name) is not None), None)


def _ending_in_response(talk: Talk) -> Talk | None:
    """Without what comes after the last response."""
    return talk._replace(messages=talk.messages[: talk.responses[-1] + 1]) if talk.responses else None


def segments(talk: Talk, tokenizer: Any, template: str | None) -> list[Segment]:
    """A conversation as text: by the tokenizer's chat template where it has one, or else by the named one.

    Args:
        talk: a conversation.
        tokenizer: the base model's.
        template: a name in `TEMPLATES`.

    Raises:
        ConfigError: neither is there.
    """
    end = tokenizer.eos_token or ""
    if talk.literal:
        prompt, completion = (message["content"] for message in talk.messages)
        return [Segment(prompt, False), Segment(completion.removesuffix(end) + end, True)]
    if tokenizer.chat_template:
        return _by_tokenizer(talk, tokenizer)
    if template is None:
        raise ConfigError(
            "problem.template: conversations need a template, and the tokenizer of this model has no chat template; "
            f"name one, such as --set problem.template=alpaca; there are: {', '.join(TEMPLATES)}."
        )
    chosen, parts, responses = TEMPLATES[template], list[Segment](), talk.responses
    for i, message in enumerate(talk.messages):
        role = message["role"] if message["role"] in ("system", "assistant") else "user"
        before, after = getattr(chosen, role)
        if role == "assistant":
            said = Segment(message["content"].removesuffix(end) + end, i in responses)
            parts += [Segment(before, False), said, Segment(after, False)]
        else:
            parts.append(Segment(before + _content(message, chosen.context) + after, False))
    return _joined(parts[:-1])  # nothing comes after the last response


def prompt_of(talk: Talk, tokenizer: Any, template: str | None) -> Segment:
    """A question, before which there is no response, as the text to be answered, as `segments` would have it.

    Raises:
        ConfigError: there is neither a chat template nor a named one.
    """
    if talk.literal:
        return Segment(talk.messages[-1]["content"], False)
    if tokenizer.chat_template:
        return Segment(_applied(tokenizer, talk.messages, add_generation_prompt=True), False, templated=True)
    first, *_ = segments(Talk([*talk.messages, {"role": "assistant", "content": "."}]), tokenizer, template)
    return first


def _by_tokenizer(talk: Talk, tokenizer: Any) -> list[Segment]:
    """Each response is what the template adds to the prompt for it.

    Where a template rewrites earlier turns, as some do with thoughts, only the last response is a target.
    """
    parts, done, places = list[Segment](), "", talk.responses
    prompts = {i: _applied(tokenizer, talk.messages[:i], add_generation_prompt=True) for i in places}
    answered = {i: _applied(tokenizer, talk.messages[: i + 1]) for i in places}
    whole = answered[places[-1]]
    steady = [i for i in places if whole.startswith(prompts[i]) and whole.startswith(answered[i])]
    if not steady or steady[-1] != places[-1]:
        raise ConfigError(
            "problem.template: the chat template of this tokenizer does not put a response behind its prompt, so that what is "
            f"to be learned cannot be told. To do without it, {INSTEAD}"
        )
    for i in steady:
        parts += [
            Segment(prompts[i][len(done) :], False, templated=True),
            Segment(answered[i][len(prompts[i]) :], True, templated=True),
        ]
        done = answered[i]
    return parts


def _content(message: Message, between: str) -> str:
    """An instruction with its context, if it has any."""
    return message["content"] + (between + message["context"] if "context" in message else "")


def _applied(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    plain = [{"role": each["role"], "content": _content(each, "\n\n")} for each in messages]
    try:
        return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # jinja's, of which a template can raise any
        raise ConfigError(
            f"problem.template: the tokenizer's chat template does not take a conversation ({error}): {plain!r:.200}. Change "
            f"such conversations; or, to do without the template, {INSTEAD}"
        ) from error


def _joined(parts: Sequence[Segment]) -> list[Segment]:
    """Neighbours that are both prompts as one."""
    joined = list[Segment]()
    for part in parts:
        if joined and not part.target and not joined[-1].target:
            joined[-1] = Segment(joined[-1].text + part.text, False)
        else:
            joined.append(part)
    return joined
