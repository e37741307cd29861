"""Methods that train, send or share one factor at a time: FFA-LoRA, RoLoRA, FedSA-LoRA, ADF-LoRA, TAD-LoRA."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank.adapter import Adapter, LowRank
from anyrank.client import Assignment, work
from anyrank.federation import Layer, Method, Spec, State, Task
from anyrank.job import load_recipe, prepare
from anyrank.memory import Memory
from anyrank.methods import METHODS
from anyrank.seeding import generator
from anyrank.topology import TOPOLOGIES, Asked, Topology, metropolis, reduce
from anyrank.transport.in_process import InProcess
from anyrank.wire import bytes_down, bytes_up, completed
from federations import (
    COST,
    Setup,
    assert_close,
    assert_factors_close,
    assert_same,
    device,
    devices_of,
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
from tiny import recipe_toml, write_model, write_reviews

few = settings(max_examples=10)


@dataclass
class Exchange:
    """A round in which clients answer at once: `client` makes of a task the adapter that it returns."""

    number: int
    client: Callable[[Task], Adapter]
    seed: int = 0

    def ask(
        self, tasks: Sequence[Task], *, neighbours: Mapping[str, Sequence[str]] | None = None, late: bool = False
    ) -> Asked:
        inbox = [(task, completed(task, reply(task, self.client(task)))) for task in tasks]
        return Asked(inbox, [1 / len(inbox)] * len(inbox), 0.0)

    def carry(self, down: int, up: int) -> None:
        pass

    def held(self, client: str) -> int:
        return 0


def idle(task: Task) -> Adapter:
    return task.start


def moved(task: Task) -> Adapter:
    """Training that moves what the plan trains, and nothing else, by random numbers."""
    layers = {}
    for name, part in task.start.layers.items():
        step = low_rank(
            rank=part.rank,
            d_in=part.A.shape[1],
            d_out=part.B.shape[0],
            key=("step", task.round, task.plan.client, name),
            dtype=part.A.dtype,
        )
        A, B = (0.1 * (factor in task.plan.train) for factor in "AB")
        layers[name] = LowRank(part.A + A * step.A, part.B + B * step.B)
    return Adapter(layers, task.start.dense)


def in_star(method: Method, setup: Setup, state: State, client: Callable[[Task], Adapter]) -> State:
    played = TOPOLOGIES["star"]().play(method, state, {}, devices_of(setup), Exchange(state.round + 1, client))
    return played.state


def among_peers(
    topology: Topology, method: Method, setup: Setup, state: State, client: Callable[[Task], Adapter], rounds: int
) -> list[Mapping[str, State]]:
    """The peers' states after each round, the first ones in front; peers start with random adapters of their own."""
    devices = devices_of(setup)
    peers: Mapping[str, State] = {
        member.client: state.with_adapter(
            random_adapter(state.spec, state.adapter.ranks, member.client, dtype=torch.float64)
        )
        for member in devices
    }
    seen = [peers]
    for _ in range(rounds):
        state, peers, _ = topology.play(method, state, peers, devices, Exchange(state.round + 1, client))
        seen.append(peers)
    return seen


def mean_of(peers: Mapping[str, State]) -> Adapter:
    flat = [peer.adapter.tensors() for peer in peers.values()]
    return Adapter.from_tensors({name: torch.stack([f[name] for f in flat]).mean(0) for name in flat[0]})


def spread(peers: Mapping[str, State], factor: str) -> float:
    """How far the peers' factors are from their mean."""
    mean = mean_of(peers).tensors()
    return sum(
        float((tensor - mean[name]).square().sum())
        for peer in peers.values()
        for name, tensor in peer.adapter.tensors().items()
        if name.startswith(f"{factor}/")
    )


# --- worked by hand -----------------------------------------------------------------------------------------------
#
# One 2x3 layer. Client 0 has rank 1 and a quarter of the data, client 1 has rank 2 and three quarters. Both return other
# values of both factors; those of a factor that does not travel must not be seen.

SERVER = one_layer([[1, 0, 0], [0, 1, 0]], [[2, 0], [0, 2]])
SMALL = one_layer([[0, 0, 4]], [[8], [0]])
LARGE = one_layer([[0, 4, 0], [8, 0, 0]], [[0, 4], [4, 8]])
MEAN_A, MEAN_B = [[0, 3, 1], [6, 0, 0]], [[2, 3], [3, 6]]
GOLDEN = {
    ("ffa_lora", 1): ([[1, 0, 0], [0, 1, 0]], MEAN_B),
    ("ffa_lora", 2): ([[1, 0, 0], [0, 1, 0]], MEAN_B),
    ("rolora", 1): ([[1, 0, 0], [0, 1, 0]], MEAN_B),
    ("rolora", 2): (MEAN_A, [[2, 0], [0, 2]]),
    ("rolora", 3): ([[1, 0, 0], [0, 1, 0]], MEAN_B),
    # The second row of A has one owner, whose 8 is not diluted.
    ("fedsa_lora", 1): ([[0, 3, 1], [8, 0, 0]], [[2, 0], [0, 2]]),
    ("fedsa_lora", 2): ([[0, 3, 1], [8, 0, 0]], [[2, 0], [0, 2]]),
}


def tiny(levels=(1, 2), *, d_in=3, d_out=2) -> Spec:
    return Spec((Layer("q", d_in, d_out, 0),), levels, scale=1.0, seed=0, start=Adapter({}), cost=COST)


def played_by_hand(method: Method, state: State, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    devices = [device(f"client {i}", adapter.layers["q"].rank) for i, adapter in enumerate(adapters)]
    tasks = [
        Task("train", state.round + 1, plan, method.dispatch(state, plan)) for plan in method.assign(state, devices)
    ]
    inbox = [(task, completed(task, reply(task, adapter))) for task, adapter in zip(tasks, adapters, strict=True)]
    return reduce(method, state, inbox, weights).adapter


@pytest.mark.parametrize(("name", "round"), GOLDEN)
@pytest.mark.parametrize("weights", [[0.25, 0.75], [0.1, 0.3]], ids=["all arrived", "some arrived"])
def test_two_clients_by_hand(name, round, weights):
    state = State(tiny(), SERVER, round=round - 1)
    found = played_by_hand(METHODS[name](), state, [SMALL, LARGE], weights)
    assert_factors_close(found, one_layer(*GOLDEN[name, round]), 1e-6)


@pytest.mark.parametrize("name", ["adf_lora", "tad_lora"])
@pytest.mark.parametrize("round", [1, 6])
def test_two_peers_by_hand_mix_both_factors_at_the_smallest_rank(name, round):
    method = METHODS[name]()
    state = replace(method.init(tiny()), round=round - 1)
    assert state.adapter.ranks == {"q": 1}
    other = one_layer([[0, 4, 0]], [[0], [4]])
    found = played_by_hand(method, state, [SMALL, other], [0.25, 0.75])
    assert_factors_close(found, one_layer([[0, 3, 1]], [[2], [3]]), 1e-6)


# --- the mean of the products -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "round"), [("ffa_lora", 1), ("ffa_lora", 2), ("rolora", 1), ("rolora", 2)])
@few
@given(setup=setups())
def test_one_factor_at_mixed_ranks_gives_the_dense_mean_of_the_products(name, round, setup):
    method = METHODS[name]()
    state = replace(state_of(method, setup, torch.float64), round=round - 1)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for layer, product in products(after.adapter).items():
        mean = sum(w * products(u.adapter)[layer] for (_, u), w in zip(inbox, weights_of(setup), strict=True))
        before = state.adapter.layers[layer]
        uncovered = before.B[:, max(setup.ranks) :] @ before.A[max(setup.ranks) :]  # slots that nobody holds stay
        assert_close(product, mean + uncovered, 1e-6)


@pytest.mark.parametrize("name", ["fedavg", "adf_lora"])
def test_with_both_factors_free_the_mean_is_another(name):
    setup = Setup(ranks=(2, 2), sizes=(1, 1))
    method = METHODS[name]()
    state = state_of(method, setup)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, [0.5, 0.5])
    for layer, product in products(after.adapter).items():
        mean = torch.stack([products(update.adapter)[layer] for _, update in inbox]).mean(dim=0)
        assert float((product - mean).norm()) > 0.1 * float(mean.norm())


@pytest.mark.parametrize(("name", "share"), [("ffa_lora", 0.5), ("rolora", 0.5), ("fedsa_lora", 1.0)])
@pytest.mark.parametrize("round", [1, 2])
def test_what_is_left_of_a_slot_that_one_of_two_equal_clients_holds(name, share, round):
    state = State(tiny(), SERVER, round=round - 1)
    first = one_layer([[1, 0, 0]], [[2], [0]])
    found = played_by_hand(METHODS[name](), state, [first, SERVER], [0.5, 0.5])
    assert_close(products(found)["q"], torch.tensor([[2.0, 0, 0], [0, 2 * share, 0]]), 1e-6)


@few
@given(setup=setups())
def test_fedsa_averages_each_row_of_A_over_its_owners_and_leaves_B(setup):
    method = METHODS["fedsa_lora"]()
    state = state_of(method, setup, torch.float64)
    inbox = inbox_of(method, setup, state)
    after = method.aggregate(state, inbox, weights_of(setup))
    for layer, part in after.adapter.layers.items():
        assert torch.equal(part.B, state.adapter.layers[layer].B)
        for j, row in enumerate(part.A):
            owners = [
                (w, update.adapter.layers[layer].A[j])
                for (_, update), w in zip(inbox, weights_of(setup), strict=True)
                if update.adapter.layers[layer].rank > j
            ]
            total = sum(w for w, _ in owners)
            mean = sum(w / total * A for w, A in owners) if owners else state.adapter.layers[layer].A[j]
            assert_close(row, mean, 1e-12)


# --- the frozen factor --------------------------------------------------------------------------------------------


def all_equal(setup: Setup, method: Method, state: State, factor: str, reference: Adapter) -> bool:
    """The server and everyone it sends to hold the first slots of the reference's factor, bit by bit."""
    held = [state.adapter, *(task.start for task in tasks_of(method, setup, state))]
    pairs = [
        (getattr(part, factor), getattr(reference.layers[name], factor))
        for adapter in held
        for name, part in adapter.layers.items()
    ]
    cut = [(own, ref[: own.shape[0]] if factor == "A" else ref[:, : own.shape[1]]) for own, ref in pairs]
    return all(torch.equal(own, ref) for own, ref in cut)


@few
@given(setup=setups())
def test_ffa_A_is_that_of_the_seed_on_everyone_in_every_round(setup):
    method = METHODS["ffa_lora"]()
    first = state = method.init(spec_of(setup))
    for _ in range(3):
        state = in_star(method, setup, state, moved)
        assert all_equal(setup, method, state, "A", first.adapter)
    assert all(float(part.B.norm()) > 0 for part in state.adapter.layers.values())
    assert_same(method.init(spec_of(setup)).adapter, first.adapter)  # anyone can draw it


@few
@given(setup=setups())
def test_rolora_the_factor_at_rest_is_the_same_on_everyone(setup):
    method = METHODS["rolora"]()
    state = method.init(spec_of(setup))
    for trained in "BABA":
        (frozen,) = {"A", "B"} - {trained}
        after = in_star(method, setup, state, moved)
        assert all_equal(setup, method, after, frozen, state.adapter)
        assert not all_equal(setup, method, after, trained, state.adapter)
        state = after


@pytest.mark.parametrize("name", ["adf_lora", "tad_lora", "fedsa_lora"])
@few
@given(setup=setups())
def test_an_idle_round_changes_nothing(name, setup):
    method = METHODS[name]()
    state = state_of(method, setup)
    assert_factors_close(reduce(method, state, echo_of(method, setup, state), weights_of(setup)).adapter, state.adapter)


# --- the schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "trained"),
    [
        ("ffa_lora", {}, "BBBBBBBBBBBB"),
        ("rolora", {}, "BABABABABABA"),
        ("adf_lora", {}, "BBBBBAAAAABB"),
        ("tad_lora", {}, "BBBBBAAAAABB"),
        ("adf_lora", {"period": 3}, "BBBAAABBBAAA"),
        ("tad_lora", {"period": 1}, "BABABABABABA"),
    ],
)
def test_which_factor_is_trained_in_which_round(name, arguments, trained):
    method, setup = METHODS[name](**arguments), Setup()
    state = method.init(spec_of(setup))
    found = []
    for _ in trained:
        (factor,) = {task.plan.train for task in tasks_of(method, setup, state)}
        found.append(factor)
        state = in_star(method, setup, state, idle)
    assert "".join(found) == trained


def test_fedsa_trains_both_factors_in_every_round():
    method, setup = METHODS["fedsa_lora"](), Setup()
    state = method.init(spec_of(setup))
    assert {task.plan.train for task in tasks_of(method, setup, state)} == {"AB"}


def test_adf_and_tad_are_one_rule():
    setup = Setup()
    found = []
    for name in ("adf_lora", "tad_lora"):
        method = METHODS[name](period=2)
        state = method.init(spec_of(setup))
        for _ in range(5):
            state = in_star(method, setup, state, moved)
        found.append(state.adapter)
    assert_same(*found)


# --- bytes --------------------------------------------------------------------------------------------------------

M, N, RANKS = 96, 64, (4, 8)
TABLE = [  # numbers for each rank, down and up
    ("ffa_lora", 1, M, M),
    ("ffa_lora", 2, M, M),
    ("rolora", 1, M + N, M),
    ("rolora", 2, M + N, N),
    ("fedsa_lora", 1, N, N),
    ("fedsa_lora", 2, N, N),
    ("adf_lora", 1, M + N, M + N),
    ("tad_lora", 6, M + N, M + N),
]


@pytest.mark.parametrize(("name", "round", "down", "up"), TABLE)
def test_bytes_are_those_of_the_factors_that_travel(name, round, down, up):
    method = METHODS[name]()
    spec = tiny(RANKS, d_in=N, d_out=M)
    state = replace(method.init(spec), round=round - 1)
    ranks = RANKS if method.claims.mixed_ranks else (min(RANKS),) * 2
    plans = method.assign(state, [device(f"client {rank}", rank) for rank in RANKS])
    for plan, rank in zip(plans, ranks, strict=True):
        task = Task("train", round, plan, method.dispatch(state, plan))
        for found, numbers in ((bytes_down(task), down), (bytes_up(task, reply(task, idle(task))), up)):
            header = found - 4 * rank * numbers
            assert 0 < header < 300  # less than a slot would be


# --- without a server ---------------------------------------------------------------------------------------------

PEERS = Setup(ranks=(2,) * 5, sizes=(1, 2, 3, 4, 5))
SERVERLESS = [TOPOLOGIES["ring"](), TOPOLOGIES["gossip"](probability=0.4)]


@pytest.mark.parametrize("topology", SERVERLESS, ids=lambda topology: topology.name)
def test_mixing_keeps_the_mean_of_both_factors_and_ends_in_it(topology):
    method = METHODS["adf_lora"](period=2)
    state = state_of(method, PEERS, torch.float64)
    seen = among_peers(topology, method, PEERS, state, idle, rounds=30)
    mean = mean_of(seen[0])
    for peers in seen:
        assert_factors_close(mean_of(peers), mean, 1e-9)
    for factor in "AB":
        assert spread(seen[0], factor) > 1
        assert all(spread(after, factor) <= spread(before, factor) + 1e-9 for before, after in pairwise(seen))
    for peer in seen[-1].values():
        assert_factors_close(peer.adapter, mean, 1e-4)


@pytest.mark.parametrize("topology", SERVERLESS, ids=lambda topology: topology.name)
def test_the_mean_of_the_peers_moves_by_the_mean_of_what_they_learned(topology):
    method = METHODS["adf_lora"](period=2)
    state = state_of(method, PEERS, torch.float64)
    seen = among_peers(topology, method, PEERS, state, moved, rounds=6)
    for round, (before, after) in enumerate(pairwise(seen), start=1):
        plans = {name: method.assign(before[name], [device(name, 2)])[0] for name in before}
        learned = {
            name: replace(peer, adapter=moved(Task("train", round, plans[name], peer.adapter)))
            for name, peer in before.items()
        }
        assert_factors_close(mean_of(after), mean_of(learned), 1e-9)


def test_one_round_of_a_ring_is_the_naive_sum_over_neighbours():
    method = METHODS["adf_lora"]()
    state = state_of(method, PEERS, torch.float64)
    before, after = among_peers(TOPOLOGIES["ring"](), method, PEERS, state, moved, rounds=1)
    names = list(before)
    for i, name in enumerate(names):
        near = [names[i - 1], name, names[(i + 1) % len(names)]]
        plans = [plan_for(state.spec, other, 2) for other in near]
        tasks = [
            Task("train", 1, replace(plan, train="B"), before[other].adapter)
            for plan, other in zip(plans, near, strict=True)
        ]
        flat = [moved(task).tensors() for task in tasks]
        for key, tensor in after[name].adapter.tensors().items():
            assert_close(tensor, sum(f[key] for f in flat) / 3, 1e-9)


def test_the_factor_at_rest_is_mixed_too_and_rolora_leaves_it_alone():
    spreads = {}
    for name, arguments in (("adf_lora", {"period": 1}), ("rolora", {})):
        method = METHODS[name](**arguments)
        state = state_of(method, PEERS, torch.float64)
        seen = among_peers(TOPOLOGIES["ring"](), method, PEERS, state, moved, rounds=1)
        spreads[name] = [spread(peers, "A") for peers in seen]  # B is trained in the first round
    assert spreads["adf_lora"][1] < 0.5 * spreads["adf_lora"][0]
    assert spreads["rolora"][1] == spreads["rolora"][0]


@few
@given(st.integers(2, 9), st.integers(0, 100))
def test_what_mixing_leaves_is_bounded_by_the_graph(count, seed):
    """The contraction that the best period depends on: spread after <= rho * spread before, for every factor."""
    setup = Setup(shapes=((4, 3),), ranks=(1,) * count, sizes=(1,) * count, seed=seed)
    method = METHODS["tad_lora"]()
    following = np.roll(np.eye(count, dtype=bool), 1, axis=1)
    weights = metropolis((following | following.T) & ~np.eye(count, dtype=bool))
    rho = float(np.linalg.norm(weights - 1 / count, 2) ** 2)
    before, after = among_peers(
        TOPOLOGIES["ring"](), method, setup, state_of(method, setup, torch.float64), idle, rounds=1
    )
    for factor in "AB":
        assert spread(after, factor) <= rho * spread(before, factor) + 1e-9


# --- fedsa: a B for each client -----------------------------------------------------------------------------------


@dataclass
class Clients:
    """Clients that enter what they kept, train, and keep; `sent` and `trained` hold what passed in the last round."""

    method: Method
    kept: dict[str, Adapter]
    trained: dict[str, Adapter]

    def __call__(self, task: Task) -> Adapter:
        client = task.plan.client
        start = self.method.enter(task.start, self.kept.get(client))
        self.trained[client] = moved(replace(task, start=start))
        self.kept[client] = self.method.keep(self.trained[client])
        return self.trained[client]


def test_B_stays_at_home_and_comes_back():
    method, setup = METHODS["fedsa_lora"](), Setup(ranks=(1, 2, 2))
    first = state = method.init(spec_of(setup))
    clients = Clients(method, {}, {})
    before: dict[str, Adapter] = {}
    for _ in range(3):
        for task in tasks_of(method, setup, state):
            start = method.enter(task.start, clients.kept.get(task.plan.client))
            for name, part in start.layers.items():
                assert torch.equal(part.A, task.start.layers[name].A)  # the server's
                assert (task.start.layers[name].B == 0).all()
                own = before.get(task.plan.client, task.start)
                assert torch.equal(part.B, own.layers[name].B)
            assert_same(Adapter({}, start.dense), Adapter({}, task.start.dense))
        state = in_star(method, setup, state, clients)
        before = dict(clients.trained)
        assert all((part.B == 0).all() for part in state.adapter.layers.values())
        assert all(float(p.B.norm()) > 0 for adapter in before.values() for p in adapter.layers.values())
    assert not torch.equal(state.adapter.layers["layer 0"].A, first.adapter.layers["layer 0"].A)


def test_a_client_that_comes_late_starts_with_the_shared_A_and_a_zero_B():
    method, setup = METHODS["fedsa_lora"](), Setup(ranks=(1, 2, 2))
    state = method.init(spec_of(setup))
    clients = Clients(method, {}, {})
    *early, late = devices_of(setup)
    for _ in range(2):
        state = TOPOLOGIES["star"]().play(method, state, {}, early, Exchange(state.round + 1, clients)).state
    (plan,) = method.assign(state, [late])
    start = method.enter(method.dispatch(state, plan), clients.kept.get(late.client))
    assert_same(start, state.adapter)
    assert all((part.B == 0).all() for part in start.layers.values())


@few
@given(setup=setups(least=2))
def test_no_part_of_any_B_is_in_what_the_server_gets(setup):
    method = METHODS["fedsa_lora"]()
    state = method.init(spec_of(setup))
    found = []
    for sign in (1.0, -1.0):  # clients that differ in B alone cannot be told apart

        def client(task: Task, sign: float = sign) -> Adapter:
            layers = {n: LowRank(p.A, sign * p.B) for n, p in moved(task).layers.items()}
            return Adapter(layers, task.start.dense)

        found.append(in_star(method, setup, state, client).adapter)
    assert_same(*found)


@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1), (2, 2)])
def test_a_kept_B_of_another_rank_gives_its_first_columns(before, now):
    method = METHODS["fedsa_lora"]()
    kept = method.keep(Adapter({"q": low_rank(rank=before, d_in=5, d_out=4, key=("kept",))}))
    fresh = LowRank(low_rank(rank=now, d_in=5, d_out=4, key=("start",)).A, torch.zeros(4, now))
    start = Adapter({"q": fresh, "v": fresh}, {"head": torch.ones(2)})
    found = method.enter(start, kept)
    both = min(before, now)
    assert torch.equal(found.layers["q"].A, fresh.A)
    assert torch.equal(found.layers["q"].B[:, :both], kept.layers["q"].B[:, :both])
    assert (found.layers["q"].B[:, both:] == 0).all()
    assert_same(Adapter({"v": found.layers["v"]}), Adapter({"v": fresh}))  # a layer that it never trained
    assert torch.equal(found.dense["head"], start.dense["head"])
    assert_same(method.enter(start, None), start)


# --- what can be learned ------------------------------------------------------------------------------------------


def after_descent(name: str) -> tuple[LowRank, torch.Tensor, torch.Tensor]:
    """Clients of rank 2 fit one linear map of rank 1, one gradient step a round; the adapter, all inputs, all outputs."""
    method, setup = METHODS[name](), Setup(shapes=((5, 6),), ranks=(2, 2, 2), sizes=(1, 1, 1))
    wanted = torch.nn.functional.normalize(low_rank(rank=1, d_in=6, d_out=5, key=("wanted",)).product, dim=(0, 1))
    inputs = {f"client {i}": torch.randn(20, 6, generator=generator("inputs", i)) for i in range(3)}

    def step(task: Task) -> Adapter:
        part, x = task.start.layers["layer 0"], inputs[task.plan.client]
        missed = x @ (part.product - wanted).T / len(x)
        A, B = (float(factor in task.plan.train) for factor in "AB")
        after = LowRank(part.A - A * part.B.T @ missed.T @ x, part.B - B * missed.T @ x @ part.A.T)
        return Adapter({"layer 0": after}, task.start.dense)

    state = method.init(spec_of(setup))
    for _ in range(25):
        state = in_star(method, setup, state, step)
    x = torch.cat(list(inputs.values()))
    return state.adapter.layers["layer 0"], x, x @ wanted.T


def test_over_a_frozen_A_the_best_B_is_found_and_no_better():
    part, x, y = after_descent("ffa_lora")
    best = torch.linalg.lstsq(x @ part.A.T, y).solution.T
    assert_close(part.B, best, 1e-2)
    assert float((x @ part.product.T - y).norm()) > 0.5 * float(y.norm())


def test_taking_turns_reaches_what_a_frozen_A_cannot():
    part, x, y = after_descent("rolora")
    assert float((x @ part.product.T - y).norm()) < 1e-2 * float(y.norm())


# --- real clients -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_factor")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv", rows=96)))
    return file


def job_of(recipe, name):
    return prepare(load_recipe(recipe, {"method.name": name}))


@pytest.mark.parametrize(("name", "round"), [("ffa_lora", 1), ("rolora", 1), ("rolora", 2), ("adf_lora", 6)])
def test_local_training_leaves_the_frozen_factor_alone(recipe, name, round):
    job = job_of(recipe, name)
    state = job.method.init(job.spec)
    state = state.with_layers(  # as in the middle of a run, where A has a gradient
        {
            n: LowRank(p.A, low_rank(rank=p.rank, d_in=1, d_out=p.B.shape[0], key=(n,)).B)
            for n, p in state.adapter.layers.items()
        }
    )
    state = replace(state, round=round - 1)
    plan = replace(job.method.assign(state, list(job.cohort.fleet.values()))[0], steps=2)
    task = Task("train", round, plan, job.method.dispatch(state, plan))
    asked = Assignment(task, {"train": job.problem.train})
    update, kept = work(job.model, job.method, asked, training=job.training, seed=0)
    assert kept is None
    for layer, part in update.adapter.layers.items():
        for factor in "AB":
            same = torch.equal(getattr(part, factor), getattr(task.start.layers[layer], factor))
            assert same == (factor not in plan.train)


def test_a_clients_own_B_is_trained_on_and_scored(recipe, tmp_path):
    job = job_of(recipe, "fedsa_lora")
    method, clients = (
        job.method,
        InProcess(
            job.model,
            job.method,
            job.training,
            job.problem.train,
            job.cohort.shards,
            job.problem.test,
            held_out=0.25,
            seed=0,
            memory=Memory(tmp_path),
        ),
    )
    state = method.init(job.spec)
    (plan,) = method.assign(state, list(job.cohort.fleet.values())[:1])

    def run(kind, round):
        (update,) = clients.run([Task(kind, round, plan, method.dispatch(state, plan))])
        return update

    naive = run("test", 0).metrics["loss"]
    first = run("train", 1)
    assert run("test", 1).metrics["loss"] < naive  # the same adapter was sent: what differs is its own B
    assert run("train", 2).metrics["loss"] < first.metrics["loss"]
