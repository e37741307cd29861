"""How methods that average products cut the mean to the server's rank: from a sketch, and from no more slots than needed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import lowrank
from anyrank.methods import METHODS
from federations import (
    Setup,
    assert_products_close,
    inbox_of,
    products,
    setups,
    state_of,
    weights_of,
)

sketched = pytest.mark.parametrize("name", ["flexlora", "hlora"])
WIDE = Setup(shapes=((40, 30), (20, 50)), ranks=(2, 4, 4), sizes=(1, 2, 3))


def aggregated(name, setup, **arguments):
    """The state after a round, and the dense mean of each layer."""
    method = METHODS[name](**arguments)
    state = state_of(method, setup)
    inbox, weights = inbox_of(method, setup, state), weights_of(setup)
    returned = [products(update.adapter) for _, update in inbox]
    means = {layer: sum(w * each[layer] for w, each in zip(weights, returned, strict=True)) for layer in returned[0]}
    return method.aggregate(state, inbox, weights), means


@sketched
@given(setup=setups())
def test_a_sketch_with_a_row_for_every_direction_gives_the_exact_aggregate(name, setup):
    assert_products_close(
        aggregated(name, setup, oversample=6)[0].adapter, aggregated(name, setup)[0].adapter, tolerance=1e-4
    )


@sketched
@given(oversample=st.integers(1, 3))
def test_the_error_of_a_sketch_is_noted(name, oversample):
    state, means = aggregated(name, WIDE, oversample=oversample)
    found = products(state.adapter)
    errors = [float((found[layer] - mean).norm() / mean.norm()) for layer, mean in means.items()]
    best = [float(S[4:].norm() / S.norm()) for S in map(torch.linalg.svdvals, means.values())]
    assert state.notes == {"truncation_error": pytest.approx(max(errors), abs=1e-5)}
    assert max(best) <= state.notes["truncation_error"] < 1
    assert json.loads(json.dumps(state.notes)) == state.notes


@sketched
def test_without_a_sketch_nothing_is_noted(name):
    assert aggregated(name, WIDE)[0].notes == {}


@pytest.mark.parametrize("frozen", [True, False])
def test_what_clients_were_sent_this_round_adds_no_slots_to_the_sum(frozen, monkeypatch):
    exact, ranks = lowrank.svd, []
    monkeypatch.setattr(lowrank, "svd", lambda part, *rest: ranks.append(part.rank) or exact(part, *rest))
    aggregated("anyrank", WIDE, frozen=frozen)
    assert ranks == [4 + 2 + 4 + 4] * 2
