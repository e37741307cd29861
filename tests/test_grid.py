"""Flower's grid as a post: what it refuses to send, and what comes back that is no letter."""

import threading
import time
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


def test_an_answer_that_is_still_being_brought_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr("anyrank.flower.grid._BRISK", 0.05)
    letters = {str(i): Letter({"n": i}) for i in range(3)}
    brought = threading.Event()

    class Slow(Odd):
        def pull_messages(self, message_ids):
            came = super().pull_messages(message_ids)
            if came and "1" in message_ids:
                brought.wait(60)
            return came

    post = GridPost(Slow(answers={number: reply(to_flower(letter), to=number) for number, letter in letters.items()}))
    assert post.collect(["0", "1", "2"]) == {number: letters[number] for number in ("0", "2")}
    assert post.collect(["1"]) == {}
    brought.set()
    until = time.monotonic() + 30
    while not (found := post.collect(["1"])) and time.monotonic() < until:
        time.sleep(0.01)
    assert found == {"1": letters["1"]}
    assert post.collect(["1"]) == {}
