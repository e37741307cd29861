"""What every method must do, and what each claims to do, on any shapes, ranks and weights.

A new method is tested by its line in `METHODS` and its `claims` alone.
"""

import re
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from anyrank import lowrank
from anyrank.adapter import CHANGE, Adapter, LowRank
from anyrank.engine import begin, rounds
from anyrank.federation import Inbox, Method, State, Task, make_task
from anyrank.methods import METHODS, proximal, server_optimizer
from anyrank.seeding import generator
from anyrank.topology import reduce
from anyrank.wire import decode, encode
from federations import (
    Setup,
    assert_close,
    assert_factors_close,
    assert_products_close,
    assert_same,
    copied,
    devices_of,
    echo_of,
    inbox_of,
    products,
    reply,
    setups,
    state_of,
    tasks_of,
    weights_of,
)

# Two names of one piece of code are shown to be that; the rest need not be tested twice.
SAME = {"hlora": "flexlora", "rb_lora": "raflora", "fedilora": "rbla", "tad_lora": "adf_lora"}
# Arguments with which a method neither drops energy, nor holds slots that its clients cannot, nor is slow.
MADE = {"florist": {"tau": 1.0}, "hra_lora": {"least": 1.0, "most": 1.0}, "galore": {"scale": 1.0}}
BARE = {name: make(**MADE.get(name, {})) for name, make in METHODS.items() if name not in SAME}
SERVER = {
    f"server_optimizer({name})": server_optimizer(BARE[name], learning_rate=0.7, momentum=0.5)
    for name in ("zero_padding", "hetlora", "rbla", "flexlora", "raflora", "anyrank", "local_only")
}
PROXIMAL = {f"proximal({name})": proximal(BARE[name], 0.1) for name in ("hetlora", "flexlora", "prelort")}
ALL = BARE | SERVER  # proximal acts on the clients' loss alone, as the first test shows
few = settings(max_examples=4)


def over(methods, claimed=lambda claims: True):
    chosen = {name: method for name, method in methods.items() if claimed(method.claims)}
    return pytest.mark.parametrize("method", chosen.values(), ids=chosen.keys())


@pytest.mark.parametrize(("name", "other"), SAME.items())
def test_two_names_of_one_rule_are_one_piece_of_code(name, other):
    one, two = METHODS[name](), METHODS[other]()
    for seam, function in one._asdict().items():
        if seam not in ("claims", "local"):
            same = getattr(two, seam)
            assert (function and function.__code__) == (same and same.__code__), seam
    assert one.claims._replace(paper="") == two.claims._replace(paper="")


def played(method: Method, setup: Setup, state: State, inbox: Inbox | None = None) -> State:
    return reduce(method, state, inbox_of(method, setup, state) if inbox is None else inbox, weights_of(setup))


def known_to(method: Method, setup: Setup, state: State) -> dict[str, Adapter]:
    """All that a round leaves for the next: what each client is sent, and what the server keeps."""
    sent = {task.plan.client: task.start for task in tasks_of(method, setup, state)}
    return {"global": state.whole, **sent}


def applied(task: Task) -> Adapter:
    """All that a client computes with: what it trains, what is frozen beside it, and what has been folded."""
    start = {name: LowRank(part.A, part.B * task.plan.scale) for name, part in task.start.layers.items()}
    return Adapter(lowrank.together([Adapter(start), task.applied]).layers, task.start.dense)


def assert_alike(method: Method, setup: Setup, found: State, expected: State, tolerance=1e-5) -> None:
    """Equal in the space that the method works in; a factored product is unique up to a basis only."""
    a, b = known_to(method, setup, found), known_to(method, setup, expected)
    for who in a:
        if method.claims.space == "factor" and not method.claims.folds:
            assert_factors_close(a[who], b[who], tolerance)
        elif who == "global":
            assert_products_close(a[who], b[who], tolerance)
        assert_close(a[who].dense["head"], b[who].dense["head"], tolerance)


@over(BARE)
def test_wrappers_change_what_they_are_about_and_nothing_else(method):
    assert proximal(method, 0.1)._replace(penalty=method.penalty) == method
    stepped = server_optimizer(method, learning_rate=0.7, momentum=0.5)
    assert stepped._replace(step=method.step, claims=method.claims) == method


# --- planning and sending -----------------------------------------------------------------------------------------


@over(BARE)
@few
@given(setup=setups())
def test_every_device_is_planned_once_and_sent_exactly_what_was_planned(method, setup):
    state = state_of(method, setup)
    devices = devices_of(setup)
    tasks = tasks_of(method, setup, state)
    assert [task.plan.client for task in tasks] == [member.client for member in devices]
    for task, member in zip(tasks, devices, strict=True):
        assert task.plan.steps == member.steps
        assert task.start.ranks == task.plan.ranks
        if task.plan.ranks and not method.claims.mixed_depths:
            assert fmean(task.plan.ranks.values()) <= member.rank
        for name, part in task.start.layers.items():
            assert part.A.shape[1:] == state.adapter.layers[name].A.shape[1:]
            assert part.B.shape[:1] == state.adapter.layers[name].B.shape[:1]
        assert task.plan.slots is None or len(task.plan.slots) == len(set(task.plan.slots)) == task.plan.rank
        assert task.plan.up
    if state.adapter.layers and not method.claims.mixed_depths:
        ranks = {fmean(task.plan.ranks.values()) for task in tasks}
        assert ranks == set(setup.ranks) if method.claims.mixed_ranks else len(ranks) == 1


@over(BARE)
@few
@given(setup=setups())
def test_at_the_start_nothing_is_changed_yet_and_everything_can_learn(method, setup):
    state = method.init(state_of(method, setup).spec)
    assert state.round == 0
    for part in state.adapter.layers.values():
        assert (part.B == 0).all()
        assert (part.A.norm(dim=1) > 0).all()


# --- the reducer: what holds for every method ---------------------------------------------------------------------


@over(ALL)
@few
@given(setup=setups())
def test_inputs_are_not_touched(method, setup):
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    state = played(method, setup, state, inbox)  # so that the server optimizer has something to remember
    seen = [state.adapter, *state.extra.values()]
    seen += [adapter for task, update in inbox for adapter in (task.start, update.adapter)]
    before = [copied(adapter) for adapter in seen]
    played(method, setup, state, inbox)
    for adapter, copy in zip(seen, before, strict=True):
        assert_same(adapter, copy)


@over(ALL)
@few
@given(setup=setups(least=2), order=st.randoms(use_true_random=False))
def test_the_order_of_the_inbox_is_irrelevant(method, setup, order):
    state = state_of(method, setup)
    pairs = list(zip(inbox_of(method, setup, state), weights_of(setup), strict=True))
    found = reduce(method, state, *map(list, zip(*pairs, strict=True)))
    order.shuffle(pairs)
    assert_alike(method, setup, reduce(method, state, *map(list, zip(*pairs, strict=True))), found)


@over(ALL, lambda claims: not claims.change)
@few
@given(setup=setups(), factor=st.floats(1e-3, 1e3))
def test_scaling_all_weights_is_irrelevant(method, setup, factor):
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    found = reduce(method, state, inbox, [factor * weight for weight in weights_of(setup)])
    assert_alike(method, setup, found, played(method, setup, state, inbox))


@over(ALL)
@few
@given(setup=setups())
def test_shapes_and_names_stay_fixed_over_rounds(method, setup):
    state = first = state_of(method, setup)
    for round in range(3):
        inbox = inbox_of(method, setup, state, round)
        present = [i for i in range(len(inbox)) if i % 3 != round % 3] or [0]
        weights = weights_of(setup)
        state = reduce(method, state, [inbox[i] for i in present], [weights[i] for i in present])
        found = {name: tensor.shape for name, tensor in state.adapter.tensors().items()}
        assert found == {name: tensor.shape for name, tensor in first.adapter.tensors().items()}
        assert [task.start.ranks for task in tasks_of(method, setup, state)] == [
            task.plan.ranks for task in tasks_of(method, setup, first)
        ]


@over(ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_is_kept(method, dtype):
    setup = Setup(spare=1)
    state = state_of(method, setup, dtype)
    for round in range(2):
        state = played(method, setup, state, inbox_of(method, setup, state, round))
    for adapter in known_to(method, setup, state).values():
        assert {tensor.dtype for tensor in adapter.tensors().values()} == {dtype}


@over(ALL)
@few
@given(setup=setups())
def test_everything_can_still_learn(method, setup):
    # One client returns what it would after no training at all: B is zero.
    state = state_of(method, setup)
    task, update = (inbox := list(inbox_of(method, setup, state)))[0]
    idle = {name: LowRank(part.A, torch.zeros_like(part.B)) for name, part in update.adapter.layers.items()}
    inbox[0] = (task, reply(task, Adapter(idle, update.adapter.dense)))
    after = played(method, setup, state, inbox)
    for adapter in known_to(method, setup, after).values():
        for part in adapter.layers.values():
            assert not ((part.A == 0).all(dim=1) & (part.B == 0).all(dim=0)).any()


@over(ALL)
@few
@given(setup=setups(), silent=st.sampled_from(["one", "all"]))
def test_all_is_finite_when_updates_are_zero(method, setup, silent):
    state = state_of(method, setup)
    inbox = list(inbox_of(method, setup, state))
    for i, (task, update) in enumerate(inbox):
        if silent == "all" or i == 0:
            inbox[i] = (task, reply(task, update.adapter.map(torch.zeros_like)))
    for adapter in known_to(method, setup, played(method, setup, state, inbox)).values():
        assert all(torch.isfinite(tensor).all() for tensor in adapter.tensors().values())


@over(ALL)
@few
@given(setup=setups())
def test_layers_that_nobody_returned_stay_as_they_are(method, setup):
    state = state_of(method, setup)
    lost = state.spec.layers[0].name
    inbox = [
        (task, reply(task, Adapter({n: p for n, p in u.adapter.layers.items() if n != lost}, u.adapter.dense)))
        for task, u in inbox_of(method, setup, state)
    ]
    found, expected = (after.adapter.layers[lost] for after in (played(method, setup, state, inbox), state))
    assert_close(found.product, expected.product)
    if method.claims.space == "factor":
        assert_close(found.A, expected.A)
        assert_close(found.B, expected.B)


@over(ALL)
@few
@given(setup=setups())
def test_states_and_messages_survive_the_wire(method, setup):
    state = state_of(method, setup)
    state = played(method, setup, state)
    adapters = {**state.extra, **known_to(method, setup, state)}
    packed = encode(adapters, {"round": 1})
    back, header = decode(packed)
    assert header == {"round": 1}
    assert set(back) == set(adapters)
    for name, adapter in adapters.items():
        assert_same(back[name], adapter)
    assert encode(back, header) == packed


@over(ALL)
@few
@given(setup=setups())
def test_the_same_round_gives_the_same_bits(method, setup):
    state = state_of(method, setup)
    assert_same(played(method, setup, state).adapter, played(method, setup, state).adapter)


# --- fixed points -------------------------------------------------------------------------------------------------


def at_full_rank(setup: Setup) -> Setup:
    return Setup(setup.shapes, setup.ranks, setup.sizes, 0, setup.seed)


@over(BARE, lambda claims: not claims.personal)
@few
@given(setup=setups(equal_ranks=True))
def test_equal_updates_at_full_rank_are_the_result(method, setup):
    setup = at_full_rank(setup)
    state = state_of(method, setup)
    inbox = list(inbox_of(method, setup, state))
    inbox = [(task, reply(task, inbox[0][1].adapter)) for task, _ in inbox]
    after = played(method, setup, state, inbox)
    returned = inbox[0][1].adapter
    result = lowrank.together([returned, *(fold.adapter for fold in state.folds)])
    for task in tasks_of(method, setup, after):
        for name, product in products(result).items():
            assert_close(products(applied(task))[name], product)
        assert_close(task.start.dense["head"], returned.dense["head"])
    again = played(method, setup, after, [(task, reply(task, task.start)) for task in tasks_of(method, setup, after)])
    assert_products_close(again.whole, after.whole)


@over(ALL)
@few
@given(setup=setups(equal_ranks=True))
def test_a_round_that_changes_nothing_at_full_rank_changes_nothing(method, setup):
    setup = at_full_rank(setup)
    state = state_of(method, setup)
    assert_products_close(played(method, setup, state, echo_of(method, setup, state)).whole, state.whole)


@over(BARE, lambda claims: not claims.personal)
@few
@given(setup=setups())
def test_one_client_at_full_rank_gets_back_what_it_returned(method, setup):
    setup = Setup(setup.shapes, setup.ranks[:1], setup.sizes[:1], 0, setup.seed)
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    (task,) = tasks_of(method, setup, played(method, setup, state, inbox))
    result = lowrank.together([inbox[0][1].adapter, *(fold.adapter for fold in state.folds)])
    for name, product in products(result).items():
        assert_close(products(applied(task))[name], product)


# --- claims -------------------------------------------------------------------------------------------------------


@over(ALL, lambda claims: claims.keeps_uncovered)
@few
@given(setup=setups())
def test_claimed_slots_that_nobody_holds_keep_their_bits(method, setup):
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = played(method, setup, state, inbox)
    for name, part in after.adapter.layers.items():
        held = [task.plan.slots or range(task.plan.ranks[name]) for task, _ in inbox if name in task.plan.ranks]
        others = [slot for slot in range(part.rank) if not any(slot in slots for slots in held)]
        assert torch.equal(part.A[others], state.adapter.layers[name].A[others])
        assert torch.equal(part.B[:, others], state.adapter.layers[name].B[:, others])


@over(BARE, lambda claims: not (claims.keeps_uncovered or claims.folds))
def test_not_claimed_slots_that_nobody_holds_lose_their_value(method):
    setup = Setup(ranks=(1, 2), sizes=(1, 1), spare=1)
    state = state_of(method, setup)
    after = played(method, setup, state)
    for name, part in after.adapter.layers.items():
        assert float((part.B[:, 2:] - state.adapter.layers[name].B[:, 2:]).norm()) > 0.1


@over(BARE, lambda claims: claims.exact)
@few
@given(setup=setups())
def test_claimed_the_aggregate_is_the_mean_of_the_products(method, setup):
    # A server rank that holds the sum of all ranks: nothing is truncated.
    setup = Setup(setup.shapes, setup.ranks, setup.sizes, sum(setup.ranks), setup.seed)
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for name, product in products(after.whole).items():
        dense = [w * products(u.adapter)[name] for (_, u), w in zip(inbox, weights_of(setup), strict=True)]
        own = lowrank.tail(state.adapter.layers[name], max(setup.ranks)) if method.claims.keeps_uncovered else None
        dense += [own.product.double()] if own else []
        dense += [products(fold.adapter)[name] for fold in state.folds]
        assert_close(product, torch.stack(dense).sum(dim=0))


@over(BARE, lambda claims: not (claims.exact or claims.personal or claims.mixed_depths))
def test_not_claimed_the_aggregate_is_another(method):
    setup = Setup(ranks=(1, 2), sizes=(1, 1), spare=3)
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, [0.5, 0.5])
    for name, product in products(after.whole).items():
        mean = torch.stack([products(update.adapter)[name] for _, update in inbox]).mean(dim=0)
        assert float((product - mean).norm()) > 0.1 * float(mean.norm())


@over(ALL, lambda claims: claims.keeps_no_op)
@few
@given(setup=setups())
def test_claimed_a_round_that_changes_nothing_changes_nothing_at_mixed_ranks(method, setup):
    state = state_of(method, setup)
    after = played(method, setup, state, echo_of(method, setup, state))
    if method.claims.personal:  # its head on the server is the engine's mean, which nobody uses
        after = after.with_adapter(state.adapter)
    assert_alike(method, setup, after, state)


@over(BARE, lambda claims: not claims.keeps_no_op)
def test_not_claimed_a_round_that_changes_nothing_shrinks_the_product(method):
    setup = Setup(ranks=(1, 3), sizes=(1, 1))
    state = state_of(method, setup)
    # Orthogonal slots, as products whose slots cancel each other could also grow.
    state = state.with_layers({n: lowrank.svd(p, 3, generator(n)) for n, p in state.adapter.layers.items()})
    sizes = [total_size(state)]
    gone = not method.claims.folds  # what has been folded is out of reach, and stays
    for _ in range(4):
        state = played(method, setup, state, echo_of(method, setup, state))
        sizes.append(total_size(state))
    assert all(after < before for before, after in pairwise(sizes))
    assert sizes[1] < 0.995 * sizes[0]
    # In the end only what the weakest client can hold is left.
    first = state.prefix(dict.fromkeys(state.adapter.ranks, 1))
    assert not gone or sizes[-1] == pytest.approx(total_size(state.with_adapter(first)), rel=0.02)


def total_size(state: State) -> float:
    return sum(float(lowrank.norm(part)) for part in state.whole.layers.values())


@over(BARE, lambda claims: not claims.prunes)
@few
@given(setup=setups())
def test_not_claimed_clients_send_what_they_trained(method, setup):
    state = state_of(method, setup)
    for task, update in inbox_of(method, setup, state):
        assert_same(method.leave(update.adapter, task.start), update.adapter)


@over(BARE, lambda claims: claims.prunes)
@few
@given(setup=setups())
def test_claimed_pruned_updates_fit_and_their_client_can_go_on_smaller(method, setup):
    state = state_of(method, setup)
    inbox, smaller = [], []
    for task in tasks_of(method, setup, state):
        left = method.leave(task.start.map(lambda tensor: 0.5 * tensor), task.start)
        inbox.append((task, reply(task, left)))
        smaller.append(max(left.ranks.values()))
        assert all(1 <= rank <= task.plan.ranks[name] for name, rank in left.ranks.items())
    after = played(method, setup, state, inbox)
    pruned = Setup(setup.shapes, tuple(smaller), setup.sizes, setup.server_rank - max(smaller), setup.seed)
    assert [max(task.start.ranks.values()) for task in tasks_of(method, pruned, after)] == smaller


@over({name: method for name, method in BARE.items() if name != "galore"})  # which has no factors
def test_claimed_a_personal_method_has_no_global_adapter(method):
    setup = Setup()
    state = state_of(method, setup)
    found, before = products(played(method, setup, state).whole), products(state.whole)
    moved = any(float((found[name] - before[name]).norm()) > 1e-6 for name in found)
    assert moved != method.claims.personal


@over(BARE, lambda claims: claims.mixed_depths)
@few
@given(setup=setups())
def test_claimed_what_is_not_trained_is_applied(method, setup):
    state = state_of(method, setup)
    for task in tasks_of(method, setup, state):
        for name, whole in products(state.whole).items():
            assert_close(products(applied(task)).get(name, torch.zeros_like(whole)), whole)


# --- convergence --------------------------------------------------------------------------------------------------


@over(BARE | SERVER | PROXIMAL)
def test_linear_clients_learn(method):
    run = toy.federation(method, rounds=8)
    after = list(rounds(run, begin(run, method.init(toy.SPEC), toy.FLEET)))
    assert after[-1].record["loss"] < 0.35 * toy.whole_loss(method.init(toy.SPEC).adapter)


# --- bytes --------------------------------------------------------------------------------------------------------


def numbers(adapter: Adapter, factors: str = "AB") -> int:
    return sum(getattr(part, factor).numel() for part in adapter.layers.values() for factor in factors)


def formula(claim: str, **values: int) -> int:
    """`(m + n) r_k` as a number."""
    return eval(re.sub(r"(?<=[\w)]) (?=[(\w])", " * ", claim), {"__builtins__": {}}, values)


@over(BARE, lambda claims: re.fullmatch(r"[mnrkKR_()+\-1 ]+", claims.down + claims.up) and not claims.mixed_depths)
def test_claimed_numbers_travel(method):
    # In the second round, for a client that was there in the first. Bytes are those of the same tensors, in test_wire.
    setup = Setup(shapes=((5, 7),), ranks=(1, 2, 4), sizes=(1, 1, 1))
    state = played(method, setup, state_of(method, setup))
    held = state.folds[-1].number - 1 if state.folds else 0
    for plan in method.assign(state, devices_of(setup)):
        task = make_task(method, state, plan, held=held)
        r = state.adapter.layers["layer 0"].rank
        known = {"m": 5, "n": 7, "r": r, "r_k": plan.rank, "R": sum(setup.ranks), "K": len(setup.ranks)}
        change = sum(t.numel() for name, t in task.start.dense.items() if name.endswith(CHANGE))
        news = sum(numbers(fold.adapter) for fold in task.folds if fold.number > held)
        assert numbers(task.start, plan.down) + numbers(task.frozen) + news + change == formula(
            method.claims.down, **known
        )
        assert numbers(task.start, plan.up) + change == formula(method.claims.up, **known)
