"""Products that become part of the base model, and two rules that correct a mean without them.

Folds: how the state keeps them and who pays for them; FLoRA, Fed-RAC-LoRA and FedEx-LoRA. Corrections of a mean:
LoRA-FAIR and FLoRIST.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.engine import begin, rounds
from anyrank.errors import ConfigError
from anyrank.federation import Layer, Spec, State, make_task
from anyrank.job import load_recipe
from anyrank.methods import METHODS
from anyrank.seeding import generator
from anyrank.topology import TOPOLOGIES, check_topology, reduce
from anyrank.wire import bytes_down, bytes_up, completed, nbytes
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

FRESH = ("flora", "rac_lora")
FOLDING = (*FRESH, "fedex_lora")
few = settings(max_examples=15)

# --- worked by hand -----------------------------------------------------------------------------------------------
#
# One 3x4 layer. Client 0 has rank 1 and a quarter of the data, client 1 has rank 2 and three quarters. The mean of
# their products has rows [2.5 0 6 0] and [0 4.5 0 0], of lengths 6.5 and 4.5.

SPEC = Spec((Layer("q", 4, 3, 0),), (1, 2), scale=1.0, seed=0, start=Adapter({}), cost=COST)
FIRST = one_layer([[1, 0, 0, 0]], [[10], [0], [0]])
BOTH = one_layer([[0, 1, 0, 0], [0, 0, 2, 0]], [[0, 4], [6, 0], [0, 0]])
MEANS = one_layer([[0.25, 0.75, 0, 0], [0, 0, 1.5, 0]], [[2.5, 3], [4.5, 0], [0, 0]])  # of the factors
weights_by_hand = pytest.mark.parametrize(
    "weights", [(0.25, 0.75), (0.1, 0.3)]
)  # in the second somebody did not answer


def play(method, adapters=(FIRST, BOTH), weights=(0.25, 0.75), state=None):
    """One round in which client k, asked at the rank of `adapters[k]`, returns it."""
    state, inbox = state or method.init(SPEC), []
    for i, adapter in enumerate(adapters):
        (plan,) = method.assign(state, [device(f"client {i}", adapter.layers["q"].rank)])
        task = make_task(method, state, plan)
        inbox.append((task, completed(task, reply(task, adapter))))
    return reduce(method, state, inbox, weights)


@weights_by_hand
def test_flora_stacks_with_the_weight_on_one_side(weights):
    after = play(METHODS["flora"](), weights=weights)
    (fold,) = after.folds
    stack = one_layer([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]], [[2.5, 0, 3], [0, 4.5, 0], [0, 0, 0]])
    assert_factors_close(fold.adapter, stack, 1e-6)
    assert_products_close(after.whole, stack, 1e-6)


@weights_by_hand
def test_rac_lora_folds_the_mean_of_b_over_the_sketch(weights):
    method = METHODS["rac_lora"]()
    sketch = one_layer([[1, 2, 0, 0], [0, 1, 0, 1]], [[0, 0], [0, 0], [0, 0]])
    first = one_layer([[9, 9, 9, 9]], [[4], [0], [0]])  # what a client did to A does not arrive
    both = one_layer([[9, 9, 9, 9], [9, 9, 9, 9]], [[0, 2], [4, 0], [0, 0]])
    after = play(method, (first, both), weights, State(SPEC, sketch))
    wanted = one_layer([[1, 2, 0, 0], [0, 1, 0, 1]], [[1, 1.5], [3, 0], [0, 0]])
    assert_factors_close(after.folds[0].adapter, wanted, 1e-6)


@weights_by_hand
def test_fedex_lora_folds_what_the_means_miss(weights):
    after = play(METHODS["fedex_lora"](), weights=weights)
    assert_factors_close(after.adapter, MEANS, 1e-6)
    # 1/4 of client 0 minus the mean, times client 0 minus client 1.
    residual = one_layer([[1, -1, 0, 0], [0, 0, -2, 0]], [[1.875, -0.75], [-1.125, 0], [0, 0]])
    assert_factors_close(after.folds[0].adapter, residual, 1e-6)
    assert_close(products(after.whole)["q"], torch.tensor([[2.5, 0, 6, 0], [0, 4.5, 0, 0], [0, 0, 0, 0]]), 1e-6)


@weights_by_hand
def test_lora_fair_corrects_b_by_ridge_regression(weights):
    # A A^T is diag(5/8, 9/4). D A^T - B A A^T is [-15/16 9/4; 9/16 0; 0 0], to be divided by 1 and 21/8.
    after = play(METHODS["lora_fair"](lam=0.375), weights=weights)
    corrected = [[2.5 - 15 / 16, 3 + 6 / 7], [4.5 + 9 / 16, 0], [0, 0]]
    assert_factors_close(after.adapter, one_layer([[0.25, 0.75, 0, 0], [0, 0, 1.5, 0]], corrected), 1e-6)
    assert after.folds == ()


@weights_by_hand
def test_florist_keeps_the_directions_that_hold_the_energy(weights):
    # Of the energy 6.5^2 + 4.5^2 the first direction holds 0.676.
    both = play(METHODS["florist"](tau=0.7), weights=weights).adapter
    assert_factors_close(
        both, one_layer([[2.5 / 6.5, 0, 6 / 6.5, 0], [0, 1, 0, 0]], [[6.5, 0], [0, 4.5], [0, 0]]), 1e-6
    )
    one = play(METHODS["florist"](tau=0.65), weights=weights).adapter.layers["q"]
    assert_close(one.A[0], torch.tensor([2.5 / 6.5, 0, 6 / 6.5, 0]), 1e-6)
    assert_close(one.B, torch.tensor([[6.5, 0], [0, 0], [0, 0]]), 1e-6)
    assert_close(one.A @ one.A.T, torch.eye(2), 1e-6)  # the second slot can learn


# --- the state and its folds --------------------------------------------------------------------------------------

WIDE = replace(SPEC, layers=(Layer("q", 9, 7, 0), Layer("v", 30, 20, 1)))


def folded(ranks, dtype=torch.float64):
    """A state of random factors, and after it one with a fold of each of these ranks; what was folded."""
    states = [State(WIDE, random_adapter(WIDE, {"q": 2, "v": 2}, dtype=dtype))]
    parts = [random_adapter(WIDE, {"q": rank, "v": rank}, i, dtype=dtype) for i, rank in enumerate(ranks)]
    for part in parts:
        states.append(states[-1].with_fold(part.layers))
    return states, parts


@few
@given(st.lists(st.integers(1, 5), max_size=6))
def test_folds_are_numbered_from_one_and_no_product_is_lost(ranks):
    states, parts = folded(ranks)
    for newest, state in enumerate(states):
        assert [fold.number for fold in state.folds] == list(range(newest - len(state.folds) + 1, newest + 1))
        assert_same(state.adapter, states[0].adapter)
        wanted = lowrank.together([state.adapter, *parts[:newest]])
        assert_products_close(state.whole, wanted, 1e-9)
        assert state.whole.dense is state.adapter.dense


def test_folds_become_one_when_they_have_more_slots_than_a_layer_has_dimensions():
    states, parts = folded([3, 4, 1], torch.float32)  # the smaller side of q is 7
    assert [len(state.folds) for state in states[:3]] == [0, 1, 2]
    slots = sum(fold.adapter.layers["q"].rank for fold in states[3].folds)
    assert slots == 7 if len(states[3].folds) == 1 else slots <= 8
    assert states[3].folds[-1].number == 3
    assert_products_close(states[3].whole, lowrank.together([states[2].whole, parts[2]]))


def test_a_client_is_charged_for_the_folds_that_it_lacks():
    method = METHODS["flora"]()
    states, parts = folded([2, 1, 3, 6])
    plan = replace(plan_for(WIDE, "client 0", 2), down="")

    def down(state, held):
        return bytes_down(make_task(method, state, plan, held=held))

    head = nbytes(Adapter({}, states[0].adapter.dense))
    assert [down(states[0], 0), down(states[2], 2), down(states[4], 4)] == [head] * 3  # nothing is new
    assert down(states[2], 1) - head == nbytes(Adapter(parts[1].layers))
    assert down(states[2], 0) - head == nbytes(Adapter(parts[0].layers)) + nbytes(Adapter(parts[1].layers))
    # By now the first folds are compressed: whoever lacks one of them gets the compressed one.
    assert down(states[4], 0) == down(states[4], 1) == down(states[4], 2) > head + 8 * 6 * (20 + 30)
    assert down(states[4], 3) > head


def test_a_client_that_sat_out_gets_what_it_missed():
    method = METHODS["flora"]()
    run = toy.federation(method, per_round=2, rounds=6)
    found = list(rounds(run, begin(run, method.init(toy.SPEC), toy.FLEET)))
    held, asked = {}, [task for task in run.transport.asked if task.kind == "train"]
    for task in asked:
        assert task.held == held.get(task.plan.client, 0)
        held[task.plan.client] = task.round - 1
    assert any(task.held < task.round - 2 for task in asked)  # somebody did sit out
    by_round = [sum(bytes_down(task) for task in asked if task.round == after.state.round) for after in found]
    assert by_round == [after.record["bytes_down"] for after in found]


# --- exact means --------------------------------------------------------------------------------------------------


def dense_mean(inbox, weights, layer):
    total = sum(weights)
    pairs = zip(inbox, weights, strict=True)
    return sum(weight / total * products(update.adapter)[layer] for (_, update), weight in pairs)


@pytest.mark.parametrize("name", FOLDING)
@few
@given(setup=setups())
def test_the_whole_is_the_mean_of_the_clients_models_round_after_round(name, setup):
    method = METHODS[name]()
    state = state_of(method, setup, torch.float64)
    for round in range(3):
        inbox = inbox_of(method, setup, state, round)
        after = method.aggregate(state, inbox, weights_of(setup))
        for layer, product in products(after.whole).items():
            wanted = dense_mean(inbox, weights_of(setup), layer)
            if name == "fedex_lora":  # keeps the slots that nobody was sent
                wanted += lowrank.tail(state.adapter.layers[layer], max(setup.ranks)).product
            if state.folds:
                wanted += lowrank.together([fold.adapter for fold in state.folds]).layers[layer].product
            assert_close(product, wanted, 1e-9)
        state = after


@pytest.mark.parametrize("tau", [1.0, 0.97, 0.8, 0.3])
@few
@given(setup=setups())
def test_florist_is_the_dense_mean_cut_where_the_energy_is_reached(tau, setup):
    method = METHODS["florist"](tau=tau)
    state = state_of(method, setup, torch.float64)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for layer, part in after.adapter.layers.items():
        U, S, Vt = torch.linalg.svd(dense_mean(inbox, weights_of(setup), layer), full_matrices=False)
        held = S.square().cumsum(0) / S.square().sum()
        rank = min(setup.server_rank, int((held < tau - 1e-12).sum()) + 1)
        assert_close(part.product, U[:, :rank] * S[:rank] @ Vt[:rank], 1e-6)
        assert (part.B[:, rank:].norm(dim=0) < 1e-9).all()
        assert_close(part.A.norm(dim=1), torch.ones(part.rank), 1e-9)
        room = min(part.A.shape)
        assert_close(part.A[:room] @ part.A[:room].T, torch.eye(room), 1e-9)


def test_florist_claims_to_be_exact_where_nothing_is_cut():
    assert METHODS["florist"](tau=1.0).claims.exact
    assert not METHODS["florist"]().claims.exact


def test_florist_with_all_of_the_energy_is_flexlora():
    setup, after = Setup(spare=1), {}
    for method in (METHODS["florist"](tau=1.0), METHODS["flexlora"]()):
        state = state_of(method, setup)
        after[method.claims.paper] = method.aggregate(state, inbox_of(method, setup, state), weights_of(setup)).adapter
    assert_products_close(*after.values())


@pytest.mark.parametrize("make", [METHODS["flora"], lambda: METHODS["florist"](tau=0.8)], ids=["flora", "florist"])
@few
@given(setup=setups())
def test_how_a_client_splits_its_product_is_irrelevant(make, setup):
    method = make()
    state = state_of(method, setup, torch.float64)
    inbox = inbox_of(method, setup, state)

    def split(part):
        Q = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=generator("split")))[0].double()
        Q = Q * torch.linspace(0.5, 2.0, part.rank).double()
        return LowRank(torch.linalg.inv(Q) @ part.A, part.B @ Q)

    other = [
        (task, reply(task, Adapter({n: split(p) for n, p in update.adapter.layers.items()}, update.adapter.dense)))
        for task, update in inbox
    ]
    found, wanted = (method.aggregate(state, box, weights_of(setup)).whole for box in (other, inbox))
    assert_products_close(found, wanted, 1e-7)


# --- fresh adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_adapter_is_fresh_and_known_without_the_clients(name, dtype):
    method, setup = METHODS[name](), Setup(spare=1)
    state = state_of(method, setup, dtype)
    after, other = (
        method.aggregate(state, inbox_of(method, setup, state, who), weights_of(setup)) for who in ("one", "other")
    )
    again = method.aggregate(after, inbox_of(method, setup, after), weights_of(setup))
    for layer, part in after.adapter.layers.items():
        before = state.adapter.layers[layer]
        assert part.rank == before.rank
        assert part.A.dtype == part.B.dtype == dtype
        assert (part.B == 0).all()
        assert (part.A.abs().amax(dim=1) > 0).all()
        assert part.A.abs().max() <= part.A.shape[1] ** -0.5 + 1e-2  # as LoRA draws it
        assert torch.equal(part.A, other.adapter.layers[layer].A)
        assert not torch.equal(part.A, again.adapter.layers[layer].A)  # another one in every round
    seeded = state_of(method, replace(setup, seed=1), dtype)
    seeded = method.aggregate(seeded, inbox_of(method, setup, seeded), weights_of(setup))
    assert not torch.equal(seeded.adapter.layers["layer 0"].A, after.adapter.layers["layer 0"].A)


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_given_adapter_is_the_first_fold(name, rank):
    given = low_rank(rank=3, d_in=6, d_out=4, key=("given",))
    spec = Spec((Layer("q", 6, 4, 0), Layer("v", 3, 4, 0)), (1, rank), 1.0, 0, Adapter({"q": given}), COST)
    method = METHODS[name]()
    state = method.init(spec)
    assert [fold.number for fold in state.folds] == [1]
    assert_close(state.whole.layers["q"].product, given.product)
    assert state.adapter.ranks == {"q": rank, "v": rank}
    assert all((part.B == 0).all() for part in state.adapter.layers.values())
    tasks = [make_task(method, state, *method.assign(state, [device("client", 1)]), held=held) for held in (0, 1)]
    assert bytes_down(tasks[0]) - bytes_down(tasks[1]) == nbytes(Adapter({"q": given}))
    assert_close(tasks[0].applied.layers["q"].product, given.product)


@pytest.mark.parametrize("name", FRESH)
@few
@given(setup=setups())
def test_a_round_in_which_nobody_learns_changes_nothing_at_mixed_ranks(name, setup):
    method = METHODS[name]()
    state = method.init(spec_of(setup))
    state = method.aggregate(state, inbox_of(method, setup, state), weights_of(setup))
    after = method.aggregate(state, echo_of(method, setup, state), weights_of(setup))
    assert_products_close(after.whole, state.whole)
    assert method.claims.keeps_no_op


@pytest.mark.parametrize("name", FRESH)
def test_the_rank_of_what_is_learned_grows_with_the_rounds(name):
    method, setup = METHODS[name](), Setup(shapes=((12, 14),), ranks=(2,), sizes=(1,))
    state = method.init(spec_of(setup))
    for round in range(1, 5):
        state = method.aggregate(state, inbox_of(method, setup, state, round), [1.0])
        assert int(torch.linalg.matrix_rank(products(state.whole)["layer 0"], rtol=1e-6)) == 2 * round


def test_what_travels_with_fresh_adapters():
    setup = Setup(ranks=(1, 2), sizes=(1, 2))
    for name, train in (("flora", "AB"), ("rac_lora", "B")):
        method = METHODS[name]()
        for task in tasks_of(method, setup, method.init(spec_of(setup))):
            assert (task.plan.down, task.plan.up, task.plan.train) == ("", train, train)
            assert bytes_down(task) == nbytes(Adapter({}, task.start.dense))
            assert bytes_up(task, reply(task, task.start)) == nbytes(task.start, train)


# --- fedex_lora ---------------------------------------------------------------------------------------------------


def test_the_residual_of_three_clients_has_half_the_rank_of_the_obvious_stack():
    method, setup = METHODS["fedex_lora"](), Setup(shapes=((11, 13),), ranks=(2, 2, 2), sizes=(1, 2, 3))
    state = state_of(method, setup, torch.float64)
    after = method.aggregate(state, inbox_of(method, setup, state), weights_of(setup))
    assert len(after.folds) == len(state.folds) + 1
    part = after.folds[-1].adapter.layers["layer 0"]
    assert part.rank == 4 == (3 - 1) * 2 == (3 + 1) * 2 // 2
    assert int(torch.linalg.matrix_rank(part.product)) == 4  # no smaller one would do


def test_one_client_leaves_no_residual():
    method, setup = METHODS["fedex_lora"](), Setup(ranks=(2,), sizes=(1,))
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, [1.0])
    assert after.folds == state.folds
    assert_same(Adapter(after.adapter.layers), Adapter(inbox[0][1].adapter.layers))


@few
@given(setups(equal_ranks=True))
def test_fedex_lora_keeps_a_round_that_changes_nothing_at_one_rank(setup):
    method = METHODS["fedex_lora"]()
    state = state_of(method, setup)
    after = method.aggregate(state, echo_of(method, setup, state), weights_of(setup))
    assert_products_close(after.whole, state.whole)
    assert_factors_close(after.adapter, state.adapter)


def test_fedex_lora_shrinks_what_only_some_can_hold():
    # Of a slot at weight w the mean is w, w^2 of it in the factors: w - w^2 + w^3 - ... is left in the end.
    method = METHODS["fedex_lora"]()
    slots = one_layer([[1, 0, 0, 0], [0, 1, 0, 0]], [[1, 0], [0, 1], [0, 0]])
    state, left = State(SPEC, slots), []
    for _ in range(3):
        start = state.adapter.layers["q"]
        state = play(method, [Adapter({"q": lowrank.truncate(start, 1)}), state.adapter], (0.5, 0.5), state)
        left.append(products(state.whole)["q"].diagonal().tolist())
    assert_close(torch.tensor(left), torch.tensor([[1, 0.5, 0], [1, 0.375, 0], [1, 0.34375, 0]]))
    assert not method.claims.keeps_no_op


# --- lora_fair ----------------------------------------------------------------------------------------------------


def dense_parts(setup, state, inbox, layer):
    """The mean factors in the slots that somebody holds, and the mean product, all of them dense."""
    rank, weights = max(setup.ranks), weights_of(setup)
    parts = [lowrank.pad(update.adapter.layers[layer], rank) for _, update in inbox]
    A, B = (sum(w * getattr(p, f) for p, w in zip(parts, weights, strict=True)) for f in "AB")
    return A, B, dense_mean(inbox, weights, layer)


def corrected(method, setup):
    """For each layer the mean A and B, the mean product, and B after the round."""
    state = state_of(method, setup, torch.float64)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for layer, part in after.adapter.layers.items():
        A, B, D = dense_parts(setup, state, inbox, layer)
        assert_close(part.A[: A.shape[0]], A, 1e-12)
        yield A, B, D, part.B[:, : A.shape[0]]


@few
@given(setups(), st.sampled_from([1e-3, 0.01, 1.0]))
def test_the_ridge_correction_is_where_its_objective_is_stationary(setup, lam):
    for A, B, D, found in corrected(METHODS["lora_fair"](lam=lam), setup):
        change = (found - B).requires_grad_()
        objective = (D - (B + change) @ A).square().sum() + lam * change.square().sum()
        (gradient,) = torch.autograd.grad(objective, change)
        assert float(gradient.norm()) < 1e-7 * max(1.0, float(D.norm()))
        assert float((D - found @ A).norm()) <= float((D - B @ A).norm()) + 1e-9


def test_a_heavy_ridge_is_the_mean_and_a_light_one_least_squares():
    setup = Setup(ranks=(1, 2, 2))
    for _, B, _, found in corrected(METHODS["lora_fair"](lam=1e6), setup):
        assert_close(found, B)
    for A, B, D, found in corrected(METHODS["lora_fair"](lam=1e-9), setup):
        assert_close(found @ A, D @ torch.linalg.pinv(A) @ A, 1e-6)
        assert float((found @ A - B @ A).norm()) > 0.1


def unlike(A, B, D, change):
    """The paper's dissimilarity, dense."""
    return 1 - torch.cosine_similarity(D.flatten(), ((B + change) @ A).flatten(), dim=0)


@few
@given(setups(), st.sampled_from([0.01, 0.3]))
def test_sgd_descends_the_cosine_by_its_dense_gradient_and_shrinks_by_lam(setup, lam):
    rate = 0.3
    method = METHODS["lora_fair"](solver="sgd", lam=lam, steps=3, learning_rate=rate)
    for A, B, D, found in corrected(method, setup):
        change = torch.zeros_like(B)
        for _ in range(3):
            live = change.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(unlike(A, B, D, live), live)
            moved = change - rate * gradient
            size = float(moved.norm())
            change = moved * (1 - rate * lam / size) if size > rate * lam else torch.zeros_like(B)
        assert_close(found, B + change, 1e-7)


def test_sgd_ends_where_the_papers_objective_is_stationary():
    setup = Setup(shapes=((7, 9), (8, 6)), ranks=(1, 1, 1))
    for A, B, D, found in corrected(METHODS["lora_fair"](solver="sgd", steps=800, learning_rate=0.3), setup):
        change = (found - B).requires_grad_()
        objective = unlike(A, B, D, change) + 0.01 * change.norm()
        (gradient,) = torch.autograd.grad(objective, change)
        assert float(gradient.norm()) < 1e-3
        assert objective.item() < unlike(A, B, D, torch.zeros_like(B)).item() - 0.01


def test_sgd_leaves_the_mean_where_the_angle_is_worth_less_than_lam():
    for _, B, _, found in corrected(METHODS["lora_fair"](solver="sgd", lam=100.0), Setup(ranks=(1, 2, 2))):
        assert_close(found, B, 1e-12)


@pytest.mark.parametrize("solver", ["ridge", "sgd"])
def test_lora_fair_does_nothing_where_the_means_miss_nothing(solver):
    method, setup = METHODS["lora_fair"](solver=solver), Setup(ranks=(2, 2), sizes=(1, 2))
    state = state_of(method, setup, torch.float64)
    echo = method.aggregate(state, echo_of(method, setup, state), weights_of(setup))
    assert_factors_close(echo.adapter, state.adapter, 1e-9)
    silent = [
        (task, reply(task, update.adapter.map(torch.zeros_like))) for task, update in inbox_of(method, setup, state)
    ]
    for part in method.aggregate(state, silent, weights_of(setup)).adapter.layers.values():
        assert (part.A == 0).all()
        assert (part.B == 0).all()


# --- what a recipe may say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *[("florist", "tau", tau) for tau in (0, 1.1)],
        *[("lora_fair", "lam", lam) for lam in (0, -1)],
        ("lora_fair", "solver", "adam"),
        ("lora_fair", "steps", 0),
        ("lora_fair", "learning_rate", 0),
    ],
)
def test_hyperparameters_are_checked_with_the_recipe(name, key, value):
    with pytest.raises(ConfigError, match=rf"method\.{key}"):
        load_recipe(overrides={"method": {"name": name, key: value}})


@pytest.mark.parametrize("name", FOLDING)
def test_folds_need_one_server(name):
    claims = METHODS[name]().claims
    assert claims.folds
    for topology in set(TOPOLOGIES) - {"star"}:
        with pytest.raises(ConfigError, match="numbered by one server"):
            check_topology(name, claims, topology)
    check_topology(name, claims, "star")
