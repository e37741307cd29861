"""Every method in every topology: it learns, or says why it does not work there."""

from dataclasses import replace
from itertools import islice

import pytest

from anyrank.engine import begin, rounds
from anyrank.errors import ConfigError
from anyrank.methods import METHODS
from anyrank.topology import TOPOLOGIES, check_topology
from federations import assert_same
from toy import FLEET, SPEC, federation, whole_loss

PAIRS = [(name, topology) for name in METHODS for topology in TOPOLOGIES]
WORKING = [(name, topology) for name, topology in PAIRS if topology in METHODS[name]().claims.topologies]


@pytest.mark.parametrize(("name", "topology"), [pair for pair in WORKING if pair[1] != "star"])
def test_a_claimed_pair_learns(name, topology):
    method = METHODS[name]()
    run = federation(method, TOPOLOGIES[topology]())
    found = list(rounds(run, begin(run, method.init(SPEC), FLEET)))
    assert found[-1].record["loss"] < 0.85 * whole_loss(method.init(SPEC).adapter)
    assert all(after.record["bytes_up"] > 0 and after.record["bytes_down"] > 0 for after in found)
    assert [after.state.round for after in found] == list(range(1, 5))


@pytest.mark.parametrize(("name", "topology"), sorted(set(PAIRS) - set(WORKING)))
def test_another_pair_is_refused_with_reason_and_way_out(name, topology):
    claims = METHODS[name]().claims
    assert claims.needs
    with pytest.raises(ConfigError) as caught:
        check_topology(name, claims, topology)
    assert claims.needs in str(caught.value)
    assert all(other in str(caught.value) for other in claims.topologies)


@pytest.mark.parametrize(("name", "topology"), [pair for pair in WORKING if pair[1] in ("star", "ring")])
def test_going_on_in_the_middle_is_the_uninterrupted_run(name, topology):
    method = METHODS[name]()
    start = begin(federation(method, TOPOLOGIES[topology]()), method.init(SPEC), FLEET)
    run = federation(method, TOPOLOGIES[topology](), rounds=3, per_round=3)
    whole = list(rounds(run, start))
    again = federation(method, TOPOLOGIES[topology](), rounds=3, per_round=3)
    second = next(islice(rounds(again, start), 1, None))
    rest = list(rounds(again, replace(second, record={})))
    assert_same(rest[-1].state.whole, whole[-1].state.whole)
    assert rest[-1].fleet == whole[-1].fleet
    for client, peer in whole[-1].peers.items():
        assert_same(rest[-1].peers[client].whole, peer.whole)
