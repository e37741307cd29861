"""Methods about who owns a slot: averages over the owners, random slots, prefixes that are trained on purpose."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.errors import ConfigError
from anyrank.federation import Layer, Plan, Spec, State, make_task
from anyrank.job import load_recipe, prepare
from anyrank.methods import METHODS
from anyrank.seeding import generator
from anyrank.topology import TOPOLOGIES, Asked, check_topology, reduce
from anyrank.train import train
from anyrank.wire import bytes_down, bytes_up, nbytes
from federations import (
    COST,
    Setup,
    assert_close,
    assert_factors_close,
    assert_products_close,
    assert_same,
    device,
    devices_of,
    echo_of,
    inbox_of,
    low_rank,
    one_layer,
    products,
    reply,
    setups,
    state_of,
    tasks_of,
    weights_of,
)
from tiny import recipe_toml, write_model, write_reviews

PRODUCTS = ("raflora", "rb_lora")
FACTORS = ("fedilora", "prelort")
RANDOM = ("fslora", "fed_plora")
HERE = (*PRODUCTS, *FACTORS, *RANDOM)
few = settings(max_examples=10)

# --- worked by hand -----------------------------------------------------------------------------------------------
#
# One 2x3 layer. Client 0 has one slot and a quarter of the data, client 1 has two slots and three quarters.

SPEC = Spec((Layer("q", 3, 2, 0),), (1, 2), scale=1.0, seed=0, start=Adapter({}), cost=COST)
SERVER = one_layer([[1, 0, 0], [0, 1, 0]], [[1, 0], [0, 1]])


def play(name, adapters, weights=(0.25, 0.75), slots=None):
    """One round from `SERVER` in which client k, asked for its slots or else the first ones, returns `adapters[k]`."""
    method, state, inbox = METHODS[name](), State(SPEC, SERVER), []
    for i, adapter in enumerate(adapters):
        plan = Plan(f"client {i}", adapter.ranks, steps=1, slots=slots[i] if slots else None)
        task = make_task(method, state, plan)
        inbox.append((task, reply(task, adapter)))
    return reduce(method, state, inbox, weights).adapter


FIRST = one_layer([[1, 0, 0]], [[10], [0]])
BOTH = one_layer([[0, 1, 0], [0, 0, 2]], [[0, 3], [6, 0]])
BY_OWNERS = {
    # The sum is 2.5 at (0, 0), 4.5 at (1, 1), and the undiluted 6 at (0, 2): its rows are of lengths 6.5 and 4.5.
    **dict.fromkeys(PRODUCTS, one_layer([[2.5 / 6.5, 0, 6 / 6.5], [0, 1, 0]], [[6.5, 0], [0, 4.5]])),
    **dict.fromkeys(FACTORS, one_layer([[0.25, 0.75, 0], [0, 0, 2]], [[2.5, 3], [4.5, 0]])),
}


@pytest.mark.parametrize("name", BY_OWNERS)
@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.1, 0.3)])  # in the second round somebody did not answer
def test_two_clients_with_prefixes_by_hand(name, weights):
    assert_factors_close(play(name, [FIRST, BOTH], weights), BY_OWNERS[name], 1e-6)


SECOND = one_layer([[0, 1, 4]], [[0], [5]])
MOVED = one_layer([[3, 0, 0], [0, 1, 0]], [[1, 0], [0, 3]])
BY_SLOTS = {
    "fslora": one_layer([[2.5, 0, 0], [0, 1, 1]], [[1, 0], [0, 3.5]]),  # slot 0 moves by 3/4 of client 1's change
    "fed_plora": one_layer([[3, 0, 0], [0, 1, 1]], [[1, 0], [0, 3.5]]),  # slot 0 is client 1's
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.1, 0.3)])
def test_two_clients_with_slots_of_their_own_by_hand(name, weights):
    assert_factors_close(play(name, [SECOND, MOVED], weights, slots=[(1,), (0, 1)]), BY_SLOTS[name], 1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_a_slot_that_nobody_was_asked_for_keeps_its_bits(name):
    after = play(name, [SECOND, SECOND], slots=[(1,), (1,)]).layers["q"]
    assert torch.equal(after.A[0], SERVER.layers["q"].A[0])
    assert torch.equal(after.B[:, 0], SERVER.layers["q"].B[:, 0])
    assert_close(after.A[1], SECOND.layers["q"].A[0])


@pytest.mark.parametrize("name", [*PRODUCTS, *FACTORS])
def test_of_two_like_clients_the_one_that_holds_a_slot_alone_is_not_diluted(name):
    one = Adapter({"q": lowrank.truncate(SERVER.layers["q"], 1)})
    after = play(name, [one, SERVER], (0.5, 0.5))
    assert_close(products(after)["q"], torch.tensor([[1.0, 0, 0], [0, 1, 0]]), 1e-6)


# --- products over the owners -------------------------------------------------------------------------------------


def partitioned(state, inbox, weights, layer):
    """The sum as raFLoRA writes it: partitions between the levels of the fleet, each over those that own it whole."""
    part, total = state.adapter.layers[layer], 0.0
    low = 0
    for high in state.spec.levels:
        segment = slice(low, high)
        owners = [(u.adapter.layers[layer], w) for (t, u), w in zip(inbox, weights, strict=True) if t.plan.rank >= high]
        if owners:
            mass = sum(weight for _, weight in owners)
            total += sum(weight / mass * p.B[:, segment].double() @ p.A[segment].double() for p, weight in owners)
        else:
            total += part.B[:, segment].double() @ part.A[segment].double()
        low = high
    return total


@few
@given(setups())
def test_raflora_is_the_best_approximation_of_the_papers_sum(setup):
    method = METHODS["raflora"]()
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for layer, part in after.adapter.layers.items():
        wanted = partitioned(state, inbox, weights_of(setup), layer)
        S = torch.linalg.svdvals(wanted)
        for rank in {*setup.ranks, setup.server_rank}:
            sent = lowrank.truncate(part, rank).map(torch.Tensor.double).product
            assert_close((sent - wanted).norm(), S[rank:].norm())


@few
@given(setups())
def test_raflora_and_rb_lora_are_one_rule(setup):
    after = []
    for name in PRODUCTS:
        method = METHODS[name]()
        state = state_of(method, setup)
        after.append(method.aggregate(state, inbox_of(method, setup, state), weights_of(setup)).adapter)
    assert_same(after[0], after[1])


@few
@given(setups(equal_ranks=True))
def test_raflora_is_flexlora_at_equal_ranks(setup):
    setup = replace(setup, spare=0)
    after = []
    for name in ("raflora", "flexlora"):
        method = METHODS[name]()
        state = state_of(method, setup)
        after.append(method.aggregate(state, inbox_of(method, setup, state), weights_of(setup)).adapter)
    assert_products_close(after[0], after[1])


@few
@given(setups())
def test_rounds_of_weak_clients_leave_raflora_what_only_strong_ones_hold(setup):
    method = METHODS["raflora"]()
    state = first = state_of(method, replace(setup, spare=2))
    for _ in range(3):
        echo = echo_of(method, replace(setup, spare=2), state)
        weak = [(task, update) for task, update in echo if task.plan.rank == min(setup.ranks)]
        state = replace(reduce(method, state, weak, [1.0] * len(weak)), round=state.round + 1)
        assert_products_close(state.adapter, first.adapter)


def test_how_a_client_splits_its_product_matters_to_raflora():
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    part = BOTH.layers["q"]
    turned = Adapter({"q": LowRank(turn @ part.A, part.B @ turn.T)})
    assert_products_close(turned, BOTH)
    found, expected = (products(play("raflora", [FIRST, other]))["q"] for other in (turned, BOTH))
    assert float((found - expected).norm()) > 1


# --- the rule of RBLA under other names ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORS)
@few
@given(setup=setups())
def test_the_server_step_is_that_of_rbla(name, setup):
    rbla, method = METHODS["rbla"](), METHODS[name]()
    state = state_of(rbla, setup)
    inbox = inbox_of(rbla, setup, state)
    found, expected = (each.aggregate(state, inbox, weights_of(setup)).adapter for each in (method, rbla))
    assert_same(found, expected)
    ours, theirs = (each.claims._replace(paper="") for each in (method, rbla))
    assert ours == theirs


# --- nested prefixes ----------------------------------------------------------------------------------------------


def live_of(rank, *, layers=("q", "v")):
    parts = {name: low_rank(rank=rank, d_in=5, d_out=3, key=(name,), dtype=torch.float64) for name in layers}
    return Adapter(parts, {"head": torch.ones(2)}).map(lambda tensor: tensor.requires_grad_())


def drawn(rank, levels=(), *, times=200):
    """How often each prefix was used."""
    form, live, rng = METHODS["prelort"](levels=levels).local.form, live_of(rank), generator("draws")
    found = [form(live, rng) for _ in range(times)]
    assert all(len(set(adapter.ranks.values())) == 1 for adapter in found)  # all layers at one prefix
    ranks = [adapter.layers["q"].rank for adapter in found]
    return {level: ranks.count(level) for level in sorted(set(ranks))}


@pytest.mark.parametrize(
    ("rank", "levels", "prefixes"),
    [
        (1, (), [1]),
        (6, (), [1, 2, 4, 6]),
        (8, (), [1, 2, 4, 8]),
        (16, (4, 8, 16), [4, 8, 16]),
        (8, (4, 8, 16), [4, 8]),
        (6, (8, 4, 4), [4, 6]),
        (2, (4, 8), [2]),
    ],
)
def test_each_level_up_to_the_rank_is_drawn_about_as_often(rank, levels, prefixes):
    found = drawn(rank, levels)
    assert list(found) == prefixes
    assert all(abs(count - 200 / len(prefixes)) < 30 for count in found.values())


def test_a_step_uses_the_first_slots_and_the_others_get_a_gradient_of_zero():
    form, live = METHODS["prelort"](levels=[2]).local.form, live_of(6)
    rng = generator("step")
    level = 6
    while level == 6:
        formed = form(live, rng)
        level = formed.layers["q"].rank
    assert formed.dense is live.dense
    for name, part in formed.layers.items():
        expected = live.layers[name].B[:, :2] @ live.layers[name].A[:2]
        assert_close(part.product.detach(), expected.detach(), 1e-12)
    sum(part.product.sum() for part in formed.layers.values()).backward()
    for part in live.layers.values():
        assert (part.A.grad[:2].abs().sum(dim=1) > 0).all()
        assert (part.A.grad[2:] == 0).all()
        assert (part.B.grad[:, :2].abs().sum(dim=0) > 0).all()
        assert (part.B.grad[:, 2:] == 0).all()


def test_nested_training_makes_every_prefix_a_good_approximation():
    U, _, Vt = torch.linalg.svd(low_rank(rank=6, d_in=8, d_out=6, key=("target",)).product, full_matrices=False)
    target = U[:, :4] * torch.tensor([4.0, 3.0, 2.0, 1.0]) @ Vt[:4]
    nested = METHODS["prelort"]().local
    errors = {}
    for name, form in (("nested", nested.form), ("plain", lambda live, rng: live)):
        start = lowrank.fresh(4, d_in=8, d_out=6, rng=generator("fresh"))
        live = Adapter({"q": start.map(lambda tensor: tensor.requires_grad_())})
        optimizer, rng = nested.optimizer(live, 0.02, 0.0), generator("levels")
        for _ in range(600):
            optimizer.zero_grad()
            (form(live, rng).layers["q"].product - target).square().sum().backward()
            optimizer.step()
        found = live.layers["q"].map(torch.Tensor.detach)
        errors[name] = [float((lowrank.truncate(found, c).product - target).norm()) for c in (1, 2, 4)]
    best = [(9 + 4 + 1) ** 0.5, (4 + 1) ** 0.5, 0.0]
    for error, least in zip(errors["nested"], best, strict=True):
        assert error < least + 0.05
    assert errors["plain"][0] > best[0] + 0.5
    assert errors["plain"][1] > best[1] + 0.5


def test_levels_are_checked_with_the_recipe():
    for levels in ([0], [2.5], "4"):
        with pytest.raises(ConfigError, match=r"method\.levels"):
            load_recipe(overrides={"method": {"name": "prelort", "levels": levels}})


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("slots")
    file = folder / "recipe.toml"
    model, reviews = write_model(folder / "model"), write_reviews(folder / "reviews.csv")
    file.write_text(recipe_toml(model, reviews, method="prelort"))
    return prepare(load_recipe(file))


def trained(job, *, steps=6, order="order"):
    state = job.method.init(job.spec)
    strong = max(job.cohort.fleet.values(), key=lambda device: device.rank)
    (plan,) = job.method.assign(state, [strong])
    task = make_task(job.method, state, replace(plan, steps=steps))
    rng = generator(order)
    adapter, metrics = train(
        job.model, task, task.start, job.problem.train, training=job.training, method=job.method, rng=rng
    )
    return task.start, adapter, metrics


def test_a_client_trains_its_prefixes_in_the_model(job):
    start, adapter, metrics = trained(job)
    assert adapter.ranks == start.ranks
    assert set(adapter.ranks.values()) == {4}
    assert metrics["loss"] > 0
    for name, part in adapter.layers.items():
        assert (part.B.abs().sum(dim=0) > 0).all()
        assert not torch.equal(part.A, start.layers[name].A)
    assert_same(trained(job)[1], adapter)
    assert not torch.equal(trained(job, order="another")[1].layers[name].B, part.B)


# --- random slots -------------------------------------------------------------------------------------------------


def at_round(method, setup, number):
    return replace(state_of(method, setup), round=number)


@pytest.mark.parametrize("name", RANDOM)
@few
@given(setup=setups())
def test_a_client_is_sent_its_slots_of_the_server(name, setup):
    method = METHODS[name]()
    state = state_of(method, setup)
    for task, member in zip(tasks_of(method, setup, state), devices_of(setup), strict=True):
        assert len(task.plan.slots) == member.rank
        assert task.plan.scale == (setup.server_rank / member.rank if name == "fslora" else 1)
        for layer, part in task.start.layers.items():
            assert torch.equal(part.A, state.adapter.layers[layer].A[list(task.plan.slots)])
            assert torch.equal(part.B, state.adapter.layers[layer].B[:, list(task.plan.slots)])


@pytest.mark.parametrize("name", RANDOM)
def test_slots_change_with_the_round_and_every_slot_is_trained_in_a_weak_fleet(name):
    setup = Setup(ranks=(1, 1, 1), sizes=(1, 1, 1), spare=5)
    method = METHODS[name]()
    state = state_of(method, setup)
    for number in range(12):
        state = reduce(method, replace(state, round=number), inbox_of(method, setup, state), weights_of(setup))
    for layer, part in state.adapter.layers.items():
        before = state_of(method, setup).adapter.layers[layer]
        assert ((part.A - before.A).norm(dim=1) > 0).all()
        assert ((part.B - before.B).norm(dim=0) > 0).all()


def naive(name, state, inbox, weights, layer):
    part = state.adapter.layers[layer]
    A, B = part.A.double().clone(), part.B.double().clone()
    for slot in range(part.rank):
        moved_A, moved_B, mass = 0.0, 0.0, 0.0
        for (task, update), weight in zip(inbox, weights, strict=True):
            if slot in task.plan.slots:
                at = task.plan.slots.index(slot)
                returned = update.adapter.layers[layer].map(torch.Tensor.double)
                moved_A = moved_A + weight * (returned.A[at] - A[slot])
                moved_B = moved_B + weight * (returned.B[:, at] - B[:, slot])
                mass += weight
        if mass:
            share = sum(weights) if name == "fslora" else mass
            A[slot] += moved_A / share
            B[:, slot] += moved_B / share
    return LowRank(A, B)


@pytest.mark.parametrize("name", RANDOM)
@few
@given(setup=setups(), number=st.integers(0, 5))
def test_random_slots_are_averaged_as_the_loop_says(name, setup, number):
    method = METHODS[name]()
    state = at_round(method, setup, number)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    trained = {slot for task, _ in inbox for slot in task.plan.slots}
    for layer, part in after.adapter.layers.items():
        expected, before = naive(name, state, inbox, weights_of(setup), layer), state.adapter.layers[layer]
        assert_close(part.A, expected.A)
        assert_close(part.B, expected.B)
        for slot in set(range(part.rank)) - trained:
            assert torch.equal(part.A[slot], before.A[slot])
            assert torch.equal(part.B[:, slot], before.B[:, slot])


@few
@given(setups())
def test_an_unchanged_fslora_client_counts_and_a_silent_one_does_not(setup):
    method = METHODS["fslora"]()
    state = state_of(method, setup)
    (task, update), *others = inbox_of(method, setup, state)
    alone = method.aggregate(state, [(task, update)], [0.3])
    idle = [(t, reply(t, t.start)) for t, _ in others]
    among = method.aggregate(state, [(task, update), *idle], [1.0] * (1 + len(others)))
    for layer, part in state.adapter.layers.items():
        step = alone.adapter.layers[layer].A - part.A
        assert_close(among.adapter.layers[layer].A - part.A, step / (1 + len(others)))


def test_the_mean_sketch_is_the_global_product():
    setup = Setup(shapes=((5, 4),), ranks=(2,), sizes=(1,), spare=4)
    method = METHODS["fslora"]()
    state = state_of(method, setup, torch.float64)
    (product,) = products(state.adapter).values()

    def bias(draws):
        total = torch.zeros_like(product)
        for number in range(draws):
            (task,) = tasks_of(method, setup, replace(state, round=number))
            total += task.plan.scale * task.start.layers["layer 0"].product
        return float((total / draws - product).norm() / product.norm())

    assert bias(1) > 0.5
    assert bias(1000) < 0.1


@few
@given(setups(), st.integers(0, 5))
def test_every_fed_plora_client_starts_at_the_global_model(setup, number):
    method = METHODS["fed_plora"]()
    state = at_round(method, setup, number)
    for task in tasks_of(method, setup, state):
        assert_products_close(lowrank.together([task.start, task.applied]), Adapter(state.adapter.layers))
        layers = [task.start.num_parameters, task.frozen.num_parameters]
        assert sum(layers) == state.adapter.num_parameters  # each slot is sent once, whole
        assert bool(task.frozen.layers) == (task.plan.rank < setup.server_rank)


def test_fed_plora_sends_all_slots_down_and_its_own_up():
    setup = Setup(shapes=((4, 3),), ranks=(1, 2), sizes=(1, 1), spare=1)
    plora, sketch = METHODS["fed_plora"](), METHODS["fslora"]()
    for method in (plora, sketch):
        for task, update in inbox_of(method, setup, state_of(method, setup)):
            numbers = [len(task.plan.slots) * (4 + 3) + 6, (3 - len(task.plan.slots)) * (4 + 3)]  # the head has six
            assert task.start.num_parameters == update.adapter.num_parameters == numbers[0]
            assert task.frozen.num_parameters == (numbers[1] if method is plora else 0)
            down = nbytes(task.start) + (nbytes(task.frozen) if method is plora else 0)
            assert bytes_down(task) == down
            assert bytes_up(task, update) == nbytes(update.adapter)


# --- topologies ---------------------------------------------------------------------------------------------------


class Echo:
    """A round in which everyone returns what they received."""

    number, seed = 1, 0

    def ask(self, tasks, *, neighbours=None, late=False):
        return Asked([(task, reply(task, task.start)) for task in tasks], [1 / len(tasks)] * len(tasks), 1.0)

    def carry(self, down, up):
        pass

    def held(self, client):
        return 0


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_round_that_changes_nothing_changes_nothing_in_each_topology_that_is_claimed(name, topology):
    method = METHODS[name]()
    if topology not in method.claims.topologies:
        with pytest.raises(ConfigError, match=f"{name} does not work .*{method.claims.needs}"):
            check_topology(name, method.claims, topology)
        return
    setup = Setup(ranks=(1, 2, 3, 1), sizes=(1, 1, 1, 1), spare=1)
    state, chosen = state_of(method, setup), TOPOLOGIES[topology]()
    peers = {member.client: state for member in devices_of(setup)} if chosen.peers else {}
    played = chosen.play(method, state, peers, devices_of(setup), Echo())
    for after in (played.state, *played.peers.values()):
        assert after.round == 1
        assert_products_close(after.adapter, state.adapter)


def test_an_edge_answers_for_the_random_slots_of_its_clients():
    method, member = METHODS["fslora"](), device("client 0", 1)
    state = state_of(method, Setup(ranks=(1,), sizes=(1,), spare=3))

    class Doubled(Echo):
        def ask(self, tasks, *, neighbours=None, late=False):
            return Asked([(task, reply(task, task.start.map(lambda t: 2 * t))) for task in tasks], [1.0], 1.0)

    after = TOPOLOGIES["hierarchy"](edges=1, repeats=2).play(method, state, {}, [member], Doubled()).state
    ((slot,),) = [plan.slots for plan in method.assign(state, [member])]
    for layer, part in after.adapter.layers.items():
        factor = torch.ones(part.rank)
        factor[slot] = 4
        assert_close(part.A, factor[:, None] * state.adapter.layers[layer].A)
        assert_close(part.B, factor * state.adapter.layers[layer].B)
