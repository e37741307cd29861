"""Flower's grid as a post: what it refuses to send, and what comes back that is no letter."""

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from anyrank.flower.grid import GridPost, to_flower
from anyrank.flower.letter import Letter


class Odd(Grid):
    """A grid whose answers are given by number; an exception is what fetching it sets off."""

    def __init__(self, numbers: Any = (), answers: Any = None):
        self.numbers, self.answers = list(numbers), answers or {}

    def set_run(self, run): ...

    @property
    def run(self): ...

    def create_message(self, *args, **kwargs): ...

    def get_node_ids(self):
        return [1, 2, 3]

    def push_messages(self, messages):
        return self.numbers.pop(0)

    def pull_messages(self, message_ids):
        came = [self.answers.pop(number) for number in [*message_ids] if number in self.answers]
        for answer in came:
            if isinstance(answer, Exception):
                raise answer
        return came

    def send_and_receive(self, *args, **kwargs): ...


def reply(content: Any, *, to: str = "0", error: Any = None) -> SimpleNamespace:
    metadata = SimpleNamespace(reply_to_message_id=to)
    return SimpleNamespace(content=content, metadata=metadata, error=error, has_error=lambda: error is not None)


def test_a_message_that_is_refused_has_no_number(monkeypatch):
    monkeypatch.setattr("anyrank.flower.grid.Message", lambda content, **told: content)  # Flower's own wants a run
    monkeypatch.setattr("anyrank.flower.grid.to_flower", lambda letter: {"letter": letter})
    post = GridPost(Odd([[], [None], ["5"]]))
    assert post.send({node: Letter({"ask": "hello"}) for node in (1, 2, 3)}) == {"5": 3}


@pytest.mark.parametrize(
    "odd",
    [
        reply(None),
        reply(RecordDict()),
        reply(RecordDict({"letter": ConfigRecord({"packed": 3})})),
        reply(SimpleNamespace(array_records={"letter": {"packed": SimpleNamespace(data=7)}})),
        reply(SimpleNamespace(array_records={"letter": {"packed": SimpleNamespace(data=bytes(8) + b"[" * 9)}})),
        reply(None, error=SimpleNamespace(reason="gone", code=3)),
        ValueError("unexpected format for object head"),
        IndexError("of Flower's"),
    ],
)
def test_an_answer_that_cannot_be_read_is_an_error_and_the_others_are_kept(odd):
    good = Letter({"ask": "hello"}, b"abc")
    found = GridPost(Odd(answers={"0": odd, "1": reply(to_flower(good), to="1")})).collect(["0", "1", "2"])
    assert found == {"0": found["0"], "1": good}
    assert list(found["0"].values) == ["error"]


def test_a_node_answers_for_itself_alone():
    mine, good = Letter({"n": 1}), Letter({"n": 2})
    answers = {"0": reply(to_flower(mine), to="1"), "1": reply(to_flower(good), to="1")}
    assert GridPost(Odd(answers=answers)).collect(["1", "0"]) == {"0": mine, "1": good}


def test_nodes_of_our_own_are_heard_together():
    letters = {str(i): Letter({"n": i}) for i in range(3)}
    answers = {number: reply(to_flower(letter), to=number) for number, letter in letters.items()}
    post = GridPost(Odd(answers=answers), trusted=True)
    assert (post.collect(list(letters)), post.collect([])) == (letters, {})


def test_a_superlink_that_is_not_there_is_no_answer():
    with pytest.raises(httpx.ConnectError):
        GridPost(Odd(answers={"0": httpx.ConnectError("refused")})).collect(["0"])
