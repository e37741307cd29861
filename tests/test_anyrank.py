"""Our own method: numbers by hand, its dense formula, and what is a fixed point of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Layer, Spec, make_task
from anyrank.methods import METHODS
from anyrank.seeding import generator
from anyrank.topology import reduce
from anyrank.wire import bytes_down, nbytes
from federations import (
    COST,
    assert_close,
    assert_products_close,
    device,
    inbox_of,
    one_layer,
    products,
    reply,
    setups,
    state_of,
    tasks_of,
    weights_of,
)

METHOD = METHODS["anyrank"]()
BARE = METHODS["anyrank"](frozen=False)
ASKED = METHODS["anyrank"](weights="asked")
weighings = pytest.mark.parametrize("method", [METHOD, ASKED], ids=["owners", "asked"])


@pytest.mark.parametrize(("method", "second"), [(METHOD, 0.0), (ASKED, 0.5)], ids=["owners", "asked"])
def test_two_clients_by_hand(method, second):
    # D = diag(4, 2). A rank-1 client is sent the 4 and makes it 6; a rank-2 client makes the 2 a 0. Weights 1/4 and 3/4.
    # The second slot moves by 3/4 of the way, or, as nobody else holds it, all of it.
    spec = Spec((Layer("q", 3, 2, 0),), (1, 2), 1.0, 0, Adapter({}), COST)
    state = method.init(spec).with_adapter(one_layer([[1, 0, 0], [0, 1, 0]], [[4, 0], [0, 2]]))
    tasks = [make_task(method, state, plan) for plan in method.assign(state, [device("a", 1), device("b", 2)])]
    assert_products_close(tasks[0].start, one_layer([[1, 0, 0]], [[4], [0]]))
    assert_products_close(tasks[0].frozen, one_layer([[0, 1, 0]], [[0], [2]]))
    assert not tasks[1].frozen.layers
    inbox = [
        (tasks[0], reply(tasks[0], one_layer([[1, 0, 0]], [[6], [0]]))),
        (tasks[1], reply(tasks[1], one_layer([[1, 0, 0], [0, 1, 0]], [[4, 0], [0, 0]]))),
    ]
    after = reduce(method, state, inbox, [0.25, 0.75])
    assert_close(products(after.adapter)["q"], torch.tensor([[4.5, 0, 0], [0, second, 0]]))
    # If only the first replies, the other has changed nothing.
    after = reduce(method, state, inbox[:1], [0.25])
    assert_close(products(after.adapter)["q"], torch.tensor([[4.5, 0, 0], [0, 2, 0]]))


@weighings
@given(setup=setups())
def test_it_is_its_dense_formula(method, setup):
    setup = replace(setup, spare=6)  # nothing is truncated beyond what the SVD of the dense sum truncates
    state, weights = state_of(method, setup), [0.9 * w for w in weights_of(setup)]  # somebody did not reply
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights)
    for name, D in products(state.adapter).items():
        for (task, update), w in zip(inbox, weights, strict=True):
            U, S = update.adapter.layers[name], task.start.layers[name]
            for j in range(U.rank):
                owned = sum(
                    v for (_, other), v in zip(inbox, weights, strict=True) if other.adapter.layers[name].rank > j
                )
                share = w * sum(weights) / owned if method is METHOD else w
                D = D + share * (torch.outer(U.B[:, j], U.A[j]) - torch.outer(S.B[:, j], S.A[j]))
        U, S, Vt = torch.linalg.svd(D, full_matrices=False)
        rank = state.adapter.layers[name].rank
        assert_close(products(after.adapter)[name], U[:, :rank] * S[:rank] @ Vt[:rank])


@given(setups())
def test_every_client_starts_from_the_global_model(setup):
    state = state_of(METHOD, setup)
    for task in tasks_of(METHOD, setup, state):
        for name, whole in products(state.adapter).items():
            frozen = products(task.frozen).get(name, torch.zeros_like(whole))
            assert_close(products(task.start)[name] + frozen, whole)
        assert bytes_down(task) >= nbytes(task.start) + nbytes(task.frozen) * bool(task.frozen.layers)
    for task in tasks_of(BARE, setup, state):
        assert not task.frozen.layers


def correlated(seed: int) -> torch.Tensor:
    rng = generator("inputs", seed)
    return torch.randn(200, 6, generator=rng) @ torch.randn(6, 6, generator=rng)


def moved_from_optimum(method) -> float:
    """Three clients of rank 1 and one of rank 3 train from the optimum of all; how far the server moves, relatively."""
    rng = generator("optimum")
    optimum = torch.randn(5, 3, generator=rng) @ torch.randn(3, 6, generator=rng)
    spec = Spec((Layer("q", 6, 5, 0),), (1, 3), 1.0, 0, Adapter({}), COST)
    U, S, Vt = torch.linalg.svd(optimum, full_matrices=False)
    state = method.init(spec).with_adapter(Adapter({"q": LowRank(Vt[:3], U[:, :3] * S[:3])}))
    inbox = []
    for i, plan in enumerate(method.assign(state, [device(str(i), rank) for i, rank in enumerate((1, 1, 1, 3))])):
        task, x = make_task(method, state, plan), correlated(i)
        live = task.start.layers["q"].map(lambda tensor: tensor.clone().requires_grad_())
        rest = task.frozen.layers["q"].product if "q" in task.frozen.layers else torch.zeros(5, 6)
        optimizer = torch.optim.SGD([live.A, live.B], lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            (x @ (live.product + rest - optimum).T).square().mean().backward()
            optimizer.step()
        inbox.append((task, reply(task, Adapter({"q": live.map(torch.Tensor.detach)}))))
    after = reduce(method, state, inbox, [0.25] * 4)
    return float((products(after.adapter)["q"] - optimum).norm() / optimum.norm())


def test_an_optimum_stays_with_the_frozen_part_and_drifts_without():
    assert moved_from_optimum(METHOD) < 1e-5
    assert moved_from_optimum(ASKED) < 1e-5
    assert moved_from_optimum(BARE) > 1e-3


@given(setup=setups())
def test_how_clients_split_their_product_is_irrelevant_to_weights_of_all_asked(setup):
    method = ASKED
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    turned = []
    for task, update in inbox:
        layers = {}
        for name, part in update.adapter.layers.items():
            Q = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=generator("turn", name))).Q
            layers[name] = LowRank(Q.T @ part.A, part.B @ Q)
        turned.append((task, reply(task, Adapter(layers, update.adapter.dense))))
    found, expected = (method.aggregate(state, some, weights_of(setup)) for some in (turned, inbox))
    assert_products_close(found.adapter, expected.adapter)
