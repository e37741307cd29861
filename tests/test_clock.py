"""When replies arrive, who is late, who never comes, and how long a round takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyrank.clock import Arrival, Change, Clock, Workload, round_seconds
from anyrank.errors import ConfigError
from anyrank.federation import Profile

PROFILE = Profile(forward_flops=1.0, backward_flops=1.0, memory_bytes=1.0, up_bps=10.0, down_bps=100.0)

OUTCOMES = st.sampled_from(["in time", "late", "dropped"])
ARRIVALS = st.lists(st.builds(Arrival, st.just("ann"), st.floats(0, 100), OUTCOMES), max_size=6)


def workload(client="ann", compute_seconds=4.0):
    return Workload(client, "phone", compute_seconds, bytes_down=200, bytes_up=30, profile=PROFILE)


def many(count=400):
    return [workload(f"client-{number}") for number in range(count)]


def outcomes(clock, round=1):
    return [arrival.outcome for arrival in clock.arrivals(many(), round)]


def test_a_trip_is_download_compute_and_upload():
    # 200 bytes at 100 a second, 4 s, 30 bytes at 10 a second.
    assert Clock(seed=0).arrivals([workload()], 1) == [Arrival("ann", 9.0, "in time")]


def test_a_straggler_computes_slower_but_its_network_does_not():
    slow = Clock(straggler=1.0, slowdown=3.0, seed=0)
    assert slow.arrivals([workload()], 1) == [Arrival("ann", 2.0 + 12.0 + 3.0, "in time", 3.0)]


def test_a_class_of_devices_can_change_in_the_course_of_a_run():
    clock = Clock(changes=[Change(3, "phone", 2.0), Change(5, "phone", 0.5), Change(3, "laptop", 9.0)], seed=0)
    found = [clock.arrivals([workload()], round)[0] for round in (2, 3, 4, 5, 6)]
    assert [arrival.seconds for arrival in found] == [9.0, 13.0, 13.0, 7.0, 7.0]
    assert [arrival.slowdown for arrival in found] == [1.0, 2.0, 2.0, 0.5, 0.5]


@pytest.mark.parametrize(("deadline", "outcome"), [(8.9, "late"), (9.0, "in time"), (None, "in time")])
def test_the_deadline_itself_is_in_time(deadline, outcome):
    assert Clock(deadline=deadline, seed=0).arrivals([workload()], 1)[0].outcome == outcome


def test_probabilities_are_frequencies():
    clock = Clock(deadline=10.0, dropout=0.25, straggler=0.5, seed=3)
    found = outcomes(clock)
    assert found.count("dropped") == pytest.approx(100, abs=30)
    assert found.count("late") == pytest.approx(150, abs=35)


def test_draws_depend_on_seed_round_and_client_only():
    clock = Clock(dropout=0.5, seed=3)
    assert outcomes(clock) == outcomes(clock)
    assert outcomes(clock) != outcomes(clock, round=2)
    assert outcomes(clock) != outcomes(Clock(dropout=0.5, seed=4))
    assert clock.arrivals(many()[::-1], 1) == clock.arrivals(many(), 1)[::-1]


def test_dropout_does_not_change_who_is_slow():
    calm, rough = (Clock(dropout=dropout, straggler=0.5, seed=3).arrivals(many(), 1) for dropout in (0.0, 0.5))
    assert [arrival.seconds for arrival in calm] == [arrival.seconds for arrival in rough]


def test_more_dropout_only_adds_clients():
    few, more = (outcomes(Clock(dropout=dropout, seed=3)) for dropout in (0.2, 0.4))
    assert all(b == "dropped" for a, b in zip(few, more, strict=True) if a == "dropped")


@pytest.mark.parametrize(
    ("outcome", "deadline", "seconds"),
    [
        ("in time", None, 8.0),
        ("in time", 20.0, 8.0),
        ("dropped", None, 5.0),
        ("dropped", 20.0, 20.0),
        ("late", 7.0, 7.0),
    ],
)
def test_round_seconds(outcome, deadline, seconds):
    assert round_seconds([Arrival("ann", 5.0, "in time"), Arrival("bob", 8.0, outcome)], deadline) == seconds


def test_a_round_without_replies():
    gone = [Arrival("ann", 5.0, "dropped")]
    assert round_seconds(gone, None) == 0.0
    assert round_seconds(gone, 20.0) == 20.0


@given(arrivals=ARRIVALS, deadline=st.floats(1, 100))
def test_nobody_missing_means_no_waiting_for_the_deadline(arrivals, deadline):
    found = round_seconds(arrivals, deadline)
    replies = [arrival.seconds for arrival in arrivals if arrival.outcome == "in time"]
    assert found == (max(replies, default=0.0) if len(replies) == len(arrivals) else deadline)


@given(deadline=st.floats(1, 50), dropout=st.floats(0, 0.9), straggler=st.floats(0, 1), round=st.integers(1, 99))
def test_no_round_outlasts_its_deadline(deadline, dropout, straggler, round):
    clock = Clock(deadline=deadline, dropout=dropout, straggler=straggler, seed=1)
    arrivals = clock.arrivals(many(5), round)
    assert round_seconds(arrivals, deadline) <= deadline
    assert all(arrival.seconds > deadline for arrival in arrivals if arrival.outcome == "late")


def test_bad_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Clock(deadline=0.0, dropout=1.0, straggler=float("nan"), slowdown=0.5, seed=0)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "deadline",
        "dropout",
        "straggler",
        "slowdown",
    ]
