"""Each method against its equations: numbers worked by hand, and naive dense formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Layer, Spec, State, Task
from anyrank.methods import METHODS, describe, proximal, server_optimizer
from anyrank.seeding import generator
from anyrank.topology import reduce
from federations import (
    COST,
    Setup,
    assert_close,
    assert_factors_close,
    assert_products_close,
    assert_same,
    device,
    echo_of,
    inbox_of,
    low_rank,
    one_layer,
    plan_for,
    products,
    random_adapter,
    reply,
    setups,
    spec_of,
    state_of,
    tasks_of,
    weights_of,
)

# --- worked by hand -----------------------------------------------------------------------------------------------
#
# One 2x3 layer. Client 0 has rank 1 and a quarter of the data, client 1 has rank 2 and three quarters. Both products
# have norm 10, so HetLoRA weighs them equally: the four rules cannot be mistaken for each other.

SMALL = one_layer([[1, 0, 0]], [[10], [0]])
LARGE = one_layer([[0, 1, 0], [0, 0, 2]], [[0, 4], [6, 0]])  # products [0 0 8; 0 6 0]
GOLDEN = {
    "fedavg": one_layer([[0.25, 0.75, 0]], [[2.5], [4.5]]),
    "zero_padding": one_layer([[0.25, 0.75, 0], [0, 0, 1.5]], [[2.5, 3], [4.5, 0]]),
    "hetlora": one_layer([[0.5, 0.5, 0], [0, 0, 1]], [[5, 2], [3, 0]]),
    "rbla": one_layer([[0.25, 0.75, 0], [0, 0, 2]], [[2.5, 4], [4.5, 0]]),
    # The mean product is [2.5 0 6; 0 4.5 0]: its rows are orthogonal, of lengths 6.5 and 4.5.
    "flexlora": one_layer([[2.5 / 6.5, 0, 6 / 6.5], [0, 1, 0]], [[6.5, 0], [0, 4.5]]),
    "hlora": one_layer([[2.5 / 6.5, 0, 6 / 6.5], [0, 1, 0]], [[6.5, 0], [0, 4.5]]),
}


def tiny(levels=(1, 2), *, d_in=3, d_out=2, dense=None) -> Spec:
    return Spec((Layer("q", d_in, d_out, 0),), levels, scale=1.0, seed=0, start=Adapter({}, dense or {}), cost=COST)


def play(method, state, adapters, weights):
    """One round in which client k, planned at the rank of `adapters[k]`, returns it."""
    inbox = []
    for i, adapter in enumerate(adapters):
        plan = plan_for(state.spec, f"client {i}", adapter.layers["q"].rank)
        task = Task("train", state.round + 1, plan, state.prefix(plan.ranks))
        inbox.append((task, reply(task, adapter)))
    return reduce(method, state, inbox, weights)


@pytest.mark.parametrize("name", GOLDEN)
def test_two_clients_by_hand(name):
    method = METHODS[name]()
    large = LARGE if name != "fedavg" else one_layer([[0, 1, 0]], [[0], [6]])
    after = play(method, method.init(tiny()), [SMALL, large], [0.25, 0.75])
    assert_factors_close(after.adapter, GOLDEN[name], 1e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_are_divided_by_what_arrived(name):
    # A third client of weight 0.6 was asked and did not answer.
    method = METHODS[name]()
    large = LARGE if name != "fedavg" else one_layer([[0, 1, 0]], [[0], [6]])
    after = play(method, method.init(tiny()), [SMALL, large], [0.1, 0.3])
    assert_factors_close(after.adapter, GOLDEN[name], 1e-6)


def test_flexlora_sends_each_client_the_first_directions():
    method = METHODS["flexlora"]()
    after = play(method, method.init(tiny()), [SMALL, LARGE], [0.25, 0.75])
    sent = method.dispatch(after, plan_for(after.spec, "client 0", 1))
    assert_factors_close(sent, one_layer([[2.5 / 6.5, 0, 6 / 6.5]], [[6.5], [0]]), 1e-6)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("zero_padding", 0.25),
        ("rbla", 1.0),
        ("hetlora", (math.sqrt(2) / (1 + math.sqrt(2))) ** 2),  # 0.343: norms 1 and sqrt 2
        ("flexlora", 0.5),
        ("hlora", 0.5),
    ],
)
def test_what_is_left_of_a_slot_that_one_of_two_equal_clients_holds(name, share):
    method = METHODS[name]()
    both = one_layer([[1, 0, 0], [0, 1, 0]], [[1, 0], [0, 1]])  # two orthonormal slots of size 1
    first = Adapter({"q": lowrank.truncate(both.layers["q"], 1)})
    after = play(method, method.init(tiny()), [first, both], [0.5, 0.5])
    assert_close(products(after.adapter)["q"], torch.tensor([[1.0, 0, 0], [0, share, 0]]), 1e-6)


# --- fedavg and the start -----------------------------------------------------------------------------------------


def test_fedavg_trains_everyone_at_the_smallest_rank_of_the_fleet():
    method = METHODS["fedavg"]()
    state = method.init(tiny((2, 4, 8)))
    plans = method.assign(state, [device("a", 8), device("b", 4)])
    assert state.adapter.ranks == {"q": 2}
    assert [plan.ranks for plan in plans] == [{"q": 2}, {"q": 2}]


OWN_RANK = [n for n, make in METHODS.items() if make().claims.mixed_ranks and n not in ("hra_lora", "galore")]


@pytest.mark.parametrize("name", OWN_RANK)
def test_the_others_train_everyone_at_their_own_rank(name):
    method = METHODS[name]()
    state = method.init(tiny((2, 4, 8)))
    plans = method.assign(state, [device("a", 8), device("b", 4)])
    assert state.adapter.ranks == {"q": 8}
    assert [plan.ranks for plan in plans] == [{"q": 8}, {"q": 4}]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_given_adapter_is_where_a_run_starts(rank):
    given = low_rank(rank=3, d_in=6, d_out=4, key=("given",))
    spec = Spec((Layer("q", 6, 4, 0), Layer("v", 3, 4, 0)), (1, rank), 1.0, 0, Adapter({"q": given}), COST)
    state = METHODS["rbla"]().init(spec)
    best = lowrank.svd(given, min(rank, 3), generator("any"))
    assert state.adapter.ranks == {"q": rank, "v": rank}
    assert_close(state.adapter.layers["q"].product, best.product)
    assert (state.adapter.layers["v"].B == 0).all()


# --- hetlora ------------------------------------------------------------------------------------------------------


def hetlora_round(gamma, rank, *, shrink=0.5, rank_min=1):
    """A client whose whole adapter shrinks or grows during training; returns the rank that it sends."""
    method = METHODS["hetlora"](gamma=gamma, rank_min=rank_min)
    start = Adapter({"q": LowRank(torch.ones(rank, 3), torch.ones(2, rank))}, {"head": torch.ones(2)})
    left = method.leave(start.map(lambda tensor: tensor * shrink), start)
    assert torch.equal(left.dense["head"], torch.full((2,), shrink))
    return left.layers["q"].rank


@pytest.mark.parametrize(
    ("gamma", "rank", "kept"),
    [
        *[(0.99, 4, 3), (0.99, 5, 4), (0.99, 8, 7), (0.99, 16, 15), (0.99, 50, 49), (0.99, 100, 99)],
        *[(0.85, 4, 3), (0.85, 8, 6), (0.85, 16, 13), (0.85, 50, 42)],
        *[(0.58, 50, 29), (0.29, 100, 29)],  # in floating point both products are just below 29
        *[(0.99, 1, 1), (0.5, 2, 1), (0.01, 4, 1)],
    ],
)
def test_pruning_keeps_the_floor_of_gamma_times_the_rank(gamma, rank, kept):
    assert hetlora_round(gamma, rank) == kept


@given(st.floats(0.01, 1), st.integers(1, 40), st.integers(1, 8), st.floats(0.1, 2))
def test_rank_never_grows_and_is_never_pruned_below_the_least(gamma, rank, rank_min, shrink):
    found = hetlora_round(gamma, rank, shrink=shrink, rank_min=rank_min)
    assert min(rank, rank_min) <= found <= rank


def test_a_tail_that_did_not_shrink_is_kept():
    assert hetlora_round(0.85, 8, shrink=1.0) == 8
    assert hetlora_round(0.85, 8, shrink=1.5) == 8


@given(setups())
def test_gamma_one_never_prunes_and_has_no_penalty(setup):
    method = METHODS["hetlora"](gamma=1.0, lam=5.0)
    for task in tasks_of(method, setup, state_of(method, setup)):
        halved = task.start.map(lambda tensor: tensor * 0.5)
        assert_same(method.leave(halved, task.start), halved)
        assert method.penalty(halved, task.start) == 0


@given(setups())
def test_the_first_round_never_prunes(setup):
    method = METHODS["hetlora"](gamma=0.5)
    state = method.init(spec_of(setup))
    for task, update in inbox_of(method, setup, state):
        assert_same(method.leave(update.adapter, task.start), update.adapter)


def test_the_tail_is_summed_over_layers_and_all_layers_are_pruned_together():
    method = METHODS["hetlora"](gamma=0.5)
    start = Adapter({name: LowRank(torch.ones(4, 3), torch.ones(2, 4)) for name in ("q", "v")})
    # The tail of q grows from 4.9 to 6.1, that of v shrinks from 4.9 to 2.4: together they shrink.
    now = Adapter(
        {name: LowRank(torch.ones(4, 3), torch.ones(2, 4) * size) for name, size in (("q", 1.25), ("v", 0.5))}
    )
    assert method.leave(now, start).ranks == {"q": 2, "v": 2}
    assert_close(method.leave(now, start).layers["q"].A, now.layers["q"].A[:2])
    # And the other way round for more growth than loss.
    now = Adapter(
        {name: LowRank(torch.ones(4, 3), torch.ones(2, 4) * size) for name, size in (("q", 1.75), ("v", 0.5))}
    )
    assert method.leave(now, start).ranks == {"q": 4, "v": 4}


def test_the_penalty_is_the_product_of_the_tails_norms():
    method = METHODS["hetlora"](gamma=0.85, lam=0.1)
    adapter = Adapter({name: low_rank(rank=8, d_in=5, d_out=3, key=(name,)) for name in ("q", "v")})
    expected = sum(0.1 * part.A[6:].norm() * part.B[:, 6:].norm() for part in adapter.layers.values())
    assert_close(method.penalty(adapter, adapter), expected)


@pytest.mark.parametrize("rank", [1, 2, 4])  # rank 1 has an empty tail
def test_the_penalty_has_a_finite_gradient_where_the_tail_is_zero(rank):
    method = METHODS["hetlora"](gamma=0.85)
    for live in (one_layer([[1.0] * 3] * rank, [[0.0] * rank] * 2), one_layer([[0.0] * 3] * rank, [[0.0] * rank] * 2)):
        part = live.layers["q"].map(lambda tensor: tensor.requires_grad_())
        method.penalty(Adapter({"q": part}), live).backward()
        for factor in (part.A, part.B):
            assert factor.grad is None or torch.isfinite(factor.grad).all()


@given(setups())
def test_hetlora_weights_are_the_dense_frobenius_norms_per_layer(setup):
    method = METHODS["hetlora"]()
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for layer, previous in state.adapter.layers.items():
        returned = [update.adapter.layers[layer] for _, update in inbox]
        nu = [float(part.product.norm()) for part in returned]
        expected = lowrank.padded_mean(returned, nu, previous)
        assert_close(after.adapter.layers[layer].A, expected.A)
        assert_close(after.adapter.layers[layer].B, expected.B)


def test_doubling_a_clients_b_doubles_its_weight():
    method = METHODS["hetlora"]()
    double = one_layer([[1, 0, 0]], [[20], [0]])
    after = play(method, method.init(tiny()), [double, LARGE], [0.25, 0.75])
    assert_close(after.adapter.layers["q"].A[0], torch.tensor([2 / 3, 1 / 3, 0]), 1e-6)


def test_hetlora_weighs_equally_while_there_is_no_product():
    method = METHODS["hetlora"]()
    idle = [one_layer([[1, 0, 0]], [[0], [0]]), one_layer([[0, 1, 0]], [[0], [0]])]
    after = play(method, method.init(tiny()), idle, [0.25, 0.75])
    assert_close(after.adapter.layers["q"].A[0], torch.tensor([0.5, 0.5, 0]), 1e-6)
    assert float(after.adapter.layers["q"].A[1].norm()) > 0  # held by nobody, kept


# --- product rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flexlora", "hlora"])
@given(setup=setups())
def test_product_rules_are_the_truncated_dense_mean_for_every_prefix(name, setup):
    method = METHODS[name]()
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for layer in state.adapter.layers:
        mean = sum(
            weight * products(update.adapter)[layer]
            for (_, update), weight in zip(inbox, weights_of(setup), strict=True)
        )
        U, S, Vt = torch.linalg.svd(mean, full_matrices=False)
        for rank in {*setup.ranks, setup.server_rank}:
            sent = products(method.dispatch(after, plan_for(state.spec, "client 0", rank)))[layer]
            assert_close((sent - mean).norm(), S[rank:].norm())
            gap = float(S[rank - 1] - S[rank]) if rank < len(S) else math.inf
            if gap > 1e-2 * float(S[0]):  # otherwise the best approximation is not unique
                assert_close(sent, U[:, :rank] * S[:rank] @ Vt[:rank], 1e-4)


@pytest.mark.parametrize("name", ["flexlora", "hlora"])
@given(setup=setups())
def test_product_rules_do_not_see_how_a_client_splits_its_product(name, setup):
    method = METHODS[name]()
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)

    def split(part):
        Q = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=generator("split")))[0]
        return LowRank(3 * Q @ part.A, part.B @ Q.T / 3)

    other = [
        (task, reply(task, Adapter({n: split(p) for n, p in update.adapter.layers.items()}, update.adapter.dense)))
        for task, update in inbox
    ]
    found, expected = (method.aggregate(state, box, weights_of(setup)) for box in (other, inbox))
    for layer in state.adapter.layers:
        found_S, S = (lowrank.singular_values(after.adapter.layers[layer]) for after in (found, expected))
        size = min(len(found_S), len(S))
        assert_close(found_S[:size], S[:size])
    if setup.server_rank >= 6:  # nothing is truncated
        assert_products_close(found.adapter, expected.adapter)


def test_flexlora_and_hlora_are_one_rule():
    setup = Setup()
    after = []
    for name in ("flexlora", "hlora"):
        method = METHODS[name]()
        state = state_of(method, setup)
        after.append(method.aggregate(state, inbox_of(method, setup, state), weights_of(setup)).adapter)
    assert_same(after[0], after[1])


# --- relations ----------------------------------------------------------------------------------------------------


@given(setups(equal_ranks=True))
def test_rbla_and_zero_padding_are_fedavg_at_equal_ranks(setup):
    setup = Setup(setup.shapes, setup.ranks, setup.sizes, 0, setup.seed)
    found = {}
    for name in ("fedavg", "rbla", "zero_padding"):
        method = METHODS[name]()
        state = state_of(method, setup)
        found[name] = method.aggregate(state, inbox_of(method, setup, state), weights_of(setup)).adapter
    assert_factors_close(found["rbla"], found["fedavg"])
    assert_factors_close(found["zero_padding"], found["fedavg"])


# --- local only ---------------------------------------------------------------------------------------------------


def test_local_only_keeps_clients_apart():
    setup = Setup(ranks=(1, 2, 2), spare=1)
    method = METHODS["local_only"]()
    state = method.init(spec_of(setup))
    first = [task.start for task in tasks_of(method, setup, state)]
    inbox = inbox_of(method, setup, state)
    state = reduce(method, state, inbox[:2], [0.5, 0.5])  # the third was not asked
    second = [task.start for task in tasks_of(method, setup, state)]
    for (_, update), start in zip(inbox[:2], second[:2], strict=True):
        assert_same(start, update.adapter)
    # Neither layers nor head of the others have reached it.
    assert_same(second[2], first[2])
    third = reduce(method, state, inbox_of(method, setup, state, "again")[1:], [0.5, 0.5])
    assert_same(tasks_of(method, setup, third)[0].start, inbox[0][1].adapter)


# --- proximal -----------------------------------------------------------------------------------------------------


def test_proximal_adds_half_mu_times_the_squared_distance_of_all_tensors():
    method = proximal(METHODS["fedavg"](), 0.5)
    setup = Setup()
    spec = spec_of(setup)
    start, now = (random_adapter(spec, {"layer 0": 2, "layer 1": 2}, who) for who in ("start", "now"))
    squares = sum(((now.tensors()[name] - tensor) ** 2).sum() for name, tensor in start.tensors().items())
    assert_close(method.penalty(now, start), 0.25 * squares)
    assert method.penalty(start, start) == 0
    assert METHODS["fedavg"]().penalty is None


def test_proximal_pulls_with_mu_times_the_distance():
    method = proximal(METHODS["fedavg"](), 0.5)
    start = Adapter({"q": low_rank(rank=2, d_in=3, d_out=2, key=("start",))}, {"head": torch.ones(2)})
    now = start.map(lambda tensor: (tensor + 1).requires_grad_())
    method.penalty(now, start).backward()
    for tensor in now.tensors().values():
        assert_close(tensor.grad, torch.full_like(tensor, 0.5))


def test_proximal_keeps_the_methods_own_penalty_and_everything_else():
    bare = METHODS["hetlora"](gamma=0.5, lam=0.1)
    method = proximal(bare, 2.0)
    start, now = (Adapter({"q": low_rank(rank=4, d_in=3, d_out=2, key=(who,))}) for who in ("start", "now"))
    distance = sum(((now.tensors()[name] - tensor) ** 2).sum() for name, tensor in start.tensors().items())
    assert float(bare.penalty(now, start)) > 0
    assert_close(method.penalty(now, start), bare.penalty(now, start) + distance)
    assert method._replace(penalty=bare.penalty) == bare


# --- server optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_server_learning_rate_of_one_without_momentum_is_the_bare_method(name):
    setup = Setup(ranks=(1, 2, 4), spare=1)
    bare = METHODS[name]()
    method = server_optimizer(bare, learning_rate=1.0, momentum=0.0)
    plain = state = state_of(bare, setup)
    for round in range(3):
        plain = reduce(bare, plain, inbox_of(bare, setup, plain, round), weights_of(setup))
        state = reduce(method, state, inbox_of(method, setup, state, round), weights_of(setup))
        assert_products_close(state.adapter, plain.adapter)
        assert_close(state.adapter.dense["head"], plain.adapter.dense["head"])
        if bare.claims.space == "factor":
            assert_factors_close(state.adapter, plain.adapter, 1e-6)
    assert method.claims == bare.claims


def best_of_rank(product, rank):
    U, S, Vt = torch.linalg.svd(product, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank]


@pytest.mark.parametrize("name", [n for n in OWN_RANK if not METHODS[n]().claims.folds])
@pytest.mark.parametrize(("learning_rate", "momentum"), [(1.0, 0.9), (0.5, 0.0), (0.3, 0.6)])
def test_heavy_ball_over_three_rounds_is_the_naive_recursion(name, learning_rate, momentum):
    setup = Setup(shapes=((5, 4), (4, 6)), ranks=(1, 2, 2), sizes=(1, 2, 3))
    bare = METHODS[name]()
    method = server_optimizer(bare, learning_rate=learning_rate, momentum=momentum)
    state = state_of(bare, setup, torch.float64)
    by_product = bare.claims.space == "product"

    def view(adapter):
        return {**(products(adapter) if by_product else adapter.tensors()), "head": adapter.dense["head"]}

    x = previous = view(state.adapter)
    for round in range(3):
        inbox = inbox_of(method, setup, state, round)
        aggregated = view(reduce(bare, state, inbox, weights_of(setup)).adapter)
        moved = {n: x[n] + learning_rate * (aggregated[n] - x[n]) + momentum * (x[n] - previous[n]) for n in x}
        if by_product:
            moved = {n: t if n == "head" else best_of_rank(t, setup.server_rank) for n, t in moved.items()}
        x, previous = moved, x
        state = reduce(method, state, inbox, weights_of(setup))
        for key, tensor in view(state.adapter).items():
            assert_close(tensor, x[key], 1e-9)


def test_momentum_keeps_rolling_where_nobody_pulls_and_says_so():
    setup = Setup(ranks=(1, 2), sizes=(1, 1))
    method = server_optimizer(METHODS["rbla"](), learning_rate=1.0, momentum=0.5)
    first = state_of(method, setup)
    second = reduce(method, first, inbox_of(method, setup, first), [0.5, 0.5])
    third = reduce(method, second, echo_of(method, setup, second), [0.5, 0.5])
    for name, tensor in third.adapter.tensors().items():
        one, two = first.adapter.tensors()[name], second.adapter.tensors()[name]
        assert_close(tensor, two + 0.5 * (two - one))
    assert not method.claims.keeps_no_op
    assert not method.claims.keeps_uncovered
    assert server_optimizer(METHODS["rbla"](), learning_rate=0.5, momentum=0.0).claims == METHODS["rbla"]().claims


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_describes_itself(name):
    found = describe(name)
    assert found["name"] == name == METHODS[name].__name__ == METHODS[name].__module__.rpartition(".")[2]
    assert found["paper"]
    assert found["cost"]
    assert found["text"]
    assert found["space"] in {"factor", "product"}


def test_hyperparameters_are_the_arguments_of_the_function():
    assert describe("hetlora")["arguments"] == {"gamma": 0.99, "lam": 0.01, "rank_min": 1}
    assert describe("fedavg")["arguments"] == {}


def test_a_state_without_replies_for_a_layer_yields_nothing_for_it():
    spec = tiny()
    state = State(spec, Adapter({"q": low_rank(rank=2, d_in=3, d_out=2, key=("q",))}))
    assert list(state.holders([], [])) == []
