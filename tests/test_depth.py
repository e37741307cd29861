"""Methods in which clients train different layers or spread their ranks: legend, hier_fedlora, fed_hello, hra_lora."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.device import memory_bytes, reply_seconds
from anyrank.federation import Device, Layer, ModelCost, Plan, Profile, Spec, State, Task, Times, make_task
from anyrank.methods import METHODS
from anyrank.methods.fed_hello import clustered, odds_of, widest
from anyrank.methods.hier_fedlora import chosen, divergence, grouped
from anyrank.methods.hra_lora import dealt
from anyrank.methods.legend import balanced, rank_list
from anyrank.seeding import numpy_generator
from anyrank.topology import Asked, hierarchy, reduce
from anyrank.wire import bytes_down, bytes_up, completed, nbytes
from federations import assert_close, assert_same, low_rank, products, random_adapter, reply

ROOMY = Profile(forward_flops=1.0, backward_flops=1.0, memory_bytes=1e15, up_bps=1e6, down_bps=1e6)
COST = ModelCost(
    forward_flops=1,
    block_backward_flops=1,
    num_blocks=12,
    base_bytes=0,
    block_activation_bytes=1000,
    working_bytes=0,
    tokens_per_step=1,
)


def spec_of(
    blocks: int = 4, levels: tuple[int, ...] = (2, 4, 6), *, each: int = 1, seed: int = 0, cost: ModelCost = COST
) -> Spec:
    """A model whose every block has `each` adapted layers, none square."""
    layers = tuple(Layer(f"{block}.{i}", 3, 2 + i, block) for block in range(blocks) for i in range(each))
    cost = replace(cost, num_blocks=blocks)
    return Spec(layers, levels, 1.0, seed, Adapter({}, {"head": torch.ones(2, 3)}), cost)


def device_of(
    client: str, rank: int = 4, *, times: Times | None = None, memory: float = 1e15, labels=(), size=1
) -> Device:
    profile = replace(ROOMY, memory_bytes=memory)
    return Device(client, "any", profile, rank, size, steps=2, labels=labels, times=times)


def in_use(method, spec: Spec) -> State:
    """A state in the middle of a run, with random factors."""
    state = method.init(spec)
    return state.with_adapter(random_adapter(spec, state.adapter.ranks, "server"))


def depths_of(plans: Sequence[Plan], spec: Spec) -> dict[str, int]:
    """How many blocks each client trains; they must be the last ones, with all their layers."""
    blocks = {layer.name: layer.block for layer in spec.layers}
    found = {}
    for plan in plans:
        trained = sorted({blocks[name] for name in plan.ranks})
        assert trained == list(spec.blocks[len(spec.blocks) - len(trained) :])
        assert set(plan.ranks) == {name for name, block in blocks.items() if block in trained}
        found[plan.client] = len(trained)
    return found


def answered(task: Task, adapter: Adapter, **observed: float):
    """A reply with what was observed of each layer."""
    update = reply(task, adapter)
    metrics = {**update.metrics, **{f"fisher {name}": value for name, value in observed.items()}}
    return task, replace(update, metrics=metrics)


# --- legend: ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "largest", "step", "blocks", "expected"),
    [
        ("arithmetic", 28, 1, 12, [17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28]),
        ("arithmetic", 8, 3, 4, [1, 2, 5, 8]),  # 8 - 9 is clipped
        ("halving", 96, 1, 6, [3, 6, 12, 24, 48, 96]),
        ("halving", 4, 1, 5, [1, 1, 1, 2, 4]),
        ("uniform", 32, 1, 3, [32, 32, 32]),
    ],
)
def test_the_rank_list_by_hand(shape, largest, step, blocks, expected):
    found = rank_list(spec_of(blocks, (1, largest), each=2), shape, step)
    assert list(found.values()) == [rank for rank in expected for _ in range(2)]
    assert METHODS["legend"](shape=shape, step=step).init(spec_of(blocks, (1, largest))).adapter.ranks == {
        f"{i}.0": rank for i, rank in enumerate(expected)
    }


@given(
    shape=st.sampled_from(["arithmetic", "halving", "uniform"]),
    largest=st.integers(1, 40),
    step=st.integers(0, 5),
    blocks=st.integers(1, 12),
)
def test_ranks_never_fall_towards_the_output_and_end_at_the_fleets_largest(shape, largest, step, blocks):
    found = list(rank_list(spec_of(blocks, (1, largest)), shape, step).values())
    assert found == sorted(found)
    assert found[0] >= 1
    assert found[-1] == largest


def test_without_factors_every_rank_is_0():
    assert set(rank_list(spec_of(3, (0,)), "arithmetic", 1).values()) == {0}


def test_the_rank_list_counts_blocks_that_hold_a_layer():
    layers = (Layer("a", 3, 2, 1), Layer("b", 3, 2, 4), Layer("c", 3, 2, 5))
    spec = replace(spec_of(7, (1, 6)), layers=layers)
    assert rank_list(spec, "arithmetic", 2) == {"a": 2, "b": 4, "c": 6}


def test_a_given_adapter_is_cut_to_the_best_of_each_layers_rank():
    given_part = low_rank(rank=5, d_in=3, d_out=2, key=("given",))
    spec = replace(spec_of(2, (4,)), start=Adapter({"0.0": given_part}))
    state = METHODS["legend"](step=3).init(spec)
    assert state.adapter.ranks == {"0.0": 1, "1.0": 4}
    best = lowrank.svd(given_part, 1, torch.Generator())
    assert_close(state.adapter.layers["0.0"].product, best.product)


@pytest.mark.parametrize(("depth", "ranks"), [(12, 270), (9, 216), (6, 153)])
def test_a_client_of_depth_k_trains_the_last_k_ranks(depth, ranks):
    spec = spec_of(12, (28,))
    method = METHODS["legend"]()
    state = method.init(spec)
    memory = memory_at(spec, state.adapter.ranks, depth)
    (plan,) = method.assign(state, [device_of("a", memory=memory)])
    assert depths_of([plan], spec) == {"a": depth}
    assert sum(plan.ranks.values()) == ranks


def memory_at(spec: Spec, ranks: Mapping[str, int], depth: int) -> float:
    """What the last `depth` blocks need, by the device model."""
    blocks = spec.blocks[len(spec.blocks) - depth :]
    plan = Plan("any", {layer.name: ranks[layer.name] for layer in spec.layers if layer.block in blocks}, steps=1)
    return float(memory_bytes(plan, model=spec.cost, layers=spec.layers, dense_parameters=6))


# --- legend: depths -----------------------------------------------------------------------------------------------

# BERT-base on three Jetson boards: seconds a step for the forward pass, and for the backward pass of a block.
BOARDS = {"tx2": (1.32, 0.058), "nx": (0.73, 0.030), "agx": (0.42, 0.028)}
UP = 1 / 1.5e6  # seconds a byte
SHAPES = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]


def jetsons(*counts: int) -> list[Device]:
    devices = []
    for (kind, (f, mu)), count in zip(BOARDS.items(), counts, strict=True):
        times = Times(forward=f, backward=mu, up=UP)
        devices += [Device(f"{kind} {i}", kind, ROOMY, 28, 1, steps=20, times=times) for i in range(count)]
    return devices


def bert() -> Spec:
    layers = tuple(Layer(f"{b}.{i}", *shape, b) for b in range(12) for i, shape in enumerate(SHAPES))
    return Spec(layers, (28,), 1.0, 0, Adapter({}), replace(COST, num_blocks=12))


@pytest.mark.parametrize(
    ("eps", "seconds", "depths"),
    [(1.0, 50, (12, 12, 12)), (10 / 50, 43, (8, 12, 12)), (5 / 50, 35, (4, 12, 12))],
)
def test_twenty_boards_by_the_published_timings(eps, seconds, depths):
    """20 local steps; the wait that is tolerated is all, 10 s and 5 s of the 50 s at full depth."""
    spec, devices = bert(), jetsons(7, 7, 6)
    state = State(spec, Adapter({name: part_of(rank) for name, rank in rank_list(spec, "arithmetic", 1).items()}))
    plans = METHODS["legend"](eps=eps).assign(state, devices)
    found = depths_of(plans, spec)
    assert {name.split()[0]: depth for name, depth in found.items()} == dict(zip(BOARDS, depths, strict=True))
    assert len({(name.split()[0], depth) for name, depth in found.items()}) == 3  # boards of a kind get one depth
    slowest = max(reply_seconds(plan, device, spec) for plan, device in zip(plans, devices, strict=True))
    assert slowest == pytest.approx(seconds, abs=0.7)


def part_of(rank: int) -> LowRank:
    return LowRank(torch.zeros(rank, 1), torch.zeros(1, rank))  # only its rank is looked at


TABLES = st.lists(
    st.lists(st.floats(0, 10), min_size=1, max_size=6).map(lambda steps: list(np.cumsum([1.0, *steps]))),
    min_size=1,
    max_size=6,
)


def taken(seconds, depths) -> np.ndarray:
    return np.array([row[depth] for row, depth in zip(seconds, depths, strict=True)])


@given(seconds=TABLES, least=st.integers(1, 2), eps=st.floats(0, 1))
def test_depths_stay_within_limits_cover_all_and_leave_no_time_unused(seconds, least, eps):
    seconds = [row for row in seconds if len(row) > least] or [[1.0, 2.0, 3.0]]
    depths = balanced(seconds, least, eps)
    assert all(least <= depth < len(row) for depth, row in zip(depths, seconds, strict=True))
    assert max(depths) == max(map(len, seconds)) - 1
    longest = taken(seconds, depths).max()
    assert longest <= taken(seconds, [len(row) - 1 for row in seconds]).max()
    others = [row[depth + 1] for row, depth in zip(seconds, depths, strict=True) if depth + 1 < len(row)]
    # Whoever was made the deepest to cover a block may take longer than the others had time for.
    before = max((time for _, time in sorted(zip(depths, taken(seconds, depths), strict=True))[:-1]), default=longest)
    assert all(second > before for second in others)


@given(seconds=TABLES)
def test_who_tolerates_any_wait_is_as_deep_as_memory_allows(seconds):
    assert balanced(seconds, 1, 1.0) == [len(row) - 1 for row in seconds]


@given(seconds=TABLES, first=st.floats(0, 1), second=st.floats(0, 1))
def test_less_patience_never_makes_a_round_longer(seconds, first, second):
    seconds.append([0.0] * max(map(len, seconds)))  # covers all blocks in no time
    hasty, patient = (taken(seconds, balanced(seconds, 1, eps)).max() for eps in sorted((first, second)))
    assert hasty <= patient


def test_the_slowest_is_shortened_until_the_wait_is_short_enough():
    # Mean waits at depths 3, 2, 1 of the slow one: 3, 2 and 1 s, of 10 s at the deepest.
    slow, fast = [0.0, 6.0, 8.0, 10.0], [0.0, 2.0, 3.0, 4.0]
    assert [balanced([slow, fast], 1, eps)[0] for eps in (0.3, 0.25, 0.2, 0.15, 0.1)] == [3, 2, 2, 1, 1]
    assert balanced([slow, fast], 2, 0.0)[0] == 2  # the least depth


def test_time_that_is_left_is_used():
    # The first of two equally slow clients gives up a block. As the other cannot, nothing is gained, and it gets it back.
    assert balanced([[0.0, 4.0, 8.0], [0.0, 8.0], [0.0, 1.0, 2.0]], 1, 0.0) == [2, 1, 2]


def test_a_block_that_nobody_trains_any_more_goes_to_the_fastest_that_can():
    slow, slower, small = [0.0, 5.0, 9.0], [0.0, 5.0, 10.0], [0.0, 1.0]
    assert balanced([slower, slow, small], 1, 0.0) == [1, 2, 1]


def test_blocks_that_no_memory_holds_are_left_and_keep_their_value():
    method, spec = METHODS["legend"](), spec_of(4)
    state = in_use(method, spec)
    memory = memory_at(spec, state.adapter.ranks, 2)
    devices = [device_of(name, memory=memory) for name in "ab"]
    plans = method.assign(state, devices)
    assert depths_of(plans, spec) == {"a": 2, "b": 2}
    inbox = [answered(t, random_adapter(spec, t.plan.ranks, t.plan.client)) for t in tasks(method, state, devices)]
    after = reduce(method, state, inbox, [0.5, 0.5])
    for name in ("0.0", "1.0"):
        assert torch.equal(after.adapter.layers[name].A, state.adapter.layers[name].A)


@pytest.mark.parametrize("name", ["legend", "hier_fedlora"])
def test_memory_is_respected_to_the_byte(name):
    method, spec = METHODS[name](), spec_of(4)
    state = method.init(spec)
    for depth in (1, 2, 3, 4):
        needed = memory_at(spec, state.adapter.ranks, depth)
        for memory, expected in ((needed, depth), (needed - 1, depth - 1)):
            plans = method.assign(state, [device_of("a", memory=memory)])
            assert depths_of(plans, spec) == ({"a": expected} if expected else {})


def test_who_cannot_hold_the_least_depth_sits_out():
    method, spec = METHODS["legend"](k_min=3), spec_of(4)
    state = method.init(spec)
    devices = [device_of(f"{k}", memory=memory_at(spec, state.adapter.ranks, k)) for k in (1, 2, 3, 4)]
    assert depths_of(method.assign(state, devices), spec) == {"3": 3, "4": 4}
    assert method.assign(state, devices[:2]) == []
    shallow = METHODS["legend"](k_min=9)  # more than there are blocks: all of them
    assert depths_of(shallow.assign(state, devices), spec) == {"4": 4}


@given(f=st.floats(0, 10), mu=st.floats(0, 1), up=st.floats(0, 1e-3), blocks=st.integers(1, 5))
def test_a_deeper_client_is_never_predicted_faster(f, mu, up, blocks):
    spec = spec_of(blocks, each=2)
    device = device_of("a", times=Times(f, mu, up))
    ranks = rank_list(spec, "arithmetic", 1)
    names = [layer.name for layer in reversed(spec.layers)]
    plans = [Plan("a", {name: ranks[name] for name in names[:count]}, steps=3) for count in range(len(names) + 1)]
    seconds = [reply_seconds(plan, device, spec) for plan in plans]
    assert seconds == sorted(seconds)


def test_seconds_to_the_reply_by_hand():
    # Two steps of 1.5 s and two blocks of 0.25 s; 2 ranks of 3 + 2, 1 rank of 3 + 2, and a head of 6 numbers, 4 bytes each.
    spec = spec_of(3)
    plan = Plan("a", {"1.0": 1, "2.0": 2}, steps=2)
    found = reply_seconds(plan, device_of("a", times=Times(1.5, 0.25, 0.01)), spec)
    assert found == pytest.approx(2 * (1.5 + 2 * 0.25) + 0.01 * 4 * (15 + 6))
    # Nothing measured yet: a second each for the forward pass and a block, and a megabyte a second.
    assert reply_seconds(plan, device_of("a"), spec) == pytest.approx(2 * (1 + 2) + 1e-6 * 84)


def test_depths_follow_the_measured_times():
    method, spec = METHODS["legend"](), spec_of(4)
    state = method.init(spec)
    quick, slow = Times(1.0, 0.2, 0.0), Times(2.0, 1.0, 0.0)

    def depths(a, b):
        return depths_of(method.assign(state, [device_of("a", times=a), device_of("b", times=b)]), spec)

    assert depths(quick, quick) == {"a": 4, "b": 4}
    assert depths(slow, quick) == {"a": 1, "b": 4}
    assert depths(quick, slow) == {"a": 4, "b": 1}
    assert depths(None, None) == {"a": 4, "b": 4}


# --- what travels, and the average --------------------------------------------------------------------------------


def tasks(method, state, devices) -> list[Task]:
    return [make_task(method, state, plan) for plan in method.assign(state, devices)]


def uneven(name: str) -> tuple:
    """A method, a state and two devices of which the first trains less than the whole model, the second all of it."""
    method, spec = METHODS[name](), spec_of(4, (2, 6))
    if name == "hier_fedlora":
        method = METHODS[name](groups=2)
    state = in_use(method, spec)
    memory = memory_at(spec, state.adapter.ranks, 2) if name != "fed_hello" else 1e15
    return method, state, [device_of("weak", 2, memory=memory), device_of("strong", 6, size=3)]


DEPTHS = ["legend", "hier_fedlora", "fed_hello"]


@pytest.mark.parametrize("name", DEPTHS)
def test_untrained_layers_travel_frozen_and_the_client_applies_the_whole_adapter(name):
    method, state, devices = uneven(name)
    weak, strong = tasks(method, state, devices)
    assert len(weak.plan.ranks) == 2
    assert len(strong.plan.ranks) == 4
    assert strong.frozen.layers == {}
    assert set(weak.frozen.layers) == set(state.adapter.layers) - set(weak.start.layers)
    for task in (weak, strong):
        whole = products(lowrank.together([task.start, task.applied]))
        for layer, product in products(state.adapter).items():
            assert torch.equal(whole[layer], product)
    assert bytes_down(weak) == nbytes(weak.start) + nbytes(weak.frozen)
    _, update = answered(weak, weak.start)
    assert bytes_up(weak, update) == nbytes(weak.start) < bytes_up(strong, answered(strong, strong.start)[1])


def test_frozen_layers_can_be_left_out():
    method = METHODS["legend"](send_frozen=False)
    _, state, devices = uneven("legend")
    weak, _ = tasks(method, state, devices)
    assert weak.applied.layers == {}
    assert bytes_down(weak) == nbytes(weak.start)


def by_hand(name: str, sizes: Sequence[float], expected_low: float, expected_high: float, **arguments):
    """The weak client returns ones, the strong one threes; weights are their sizes."""
    _, state, devices = uneven(name)
    method = METHODS[name](**arguments)
    weak, strong = tasks(method, state, devices)
    inbox = [
        answered(weak, weak.start.map(torch.ones_like)),
        answered(strong, strong.start.map(lambda tensor: 3 * torch.ones_like(tensor))),
    ]
    after = reduce(method, state, inbox, sizes)
    for layer, part in after.adapter.layers.items():
        expected = expected_high if layer in weak.plan.ranks else expected_low
        for factor in (part.A, part.B):
            assert_close(factor, torch.full_like(factor, expected), 1e-6)
    assert_close(after.adapter.dense["head"], torch.full((2, 3), (sizes[0] + 3 * sizes[1]) / sum(sizes)))
    assert {layer: part.rank for layer, part in after.adapter.layers.items()} == state.adapter.ranks


@pytest.mark.parametrize("name", DEPTHS)
def test_a_layer_is_the_mean_over_those_that_trained_it(name):
    by_hand(name, [0.25, 0.75], expected_low=3.0, expected_high=2.5)


def test_legend_can_count_heads():
    by_hand("legend", [0.25, 0.75], expected_low=3.0, expected_high=2.0, weights="uniform")


@pytest.mark.parametrize("name", DEPTHS)
def test_a_layer_without_a_holder_keeps_its_bits(name):
    method, state, devices = uneven(name)
    weak, _ = tasks(method, state, devices)
    after = reduce(method, state, [answered(weak, weak.start.map(torch.ones_like))], [1.0])
    kept = {layer: part for layer, part in after.adapter.layers.items() if layer not in weak.plan.ranks}
    assert len(kept) == 2
    for layer, part in kept.items():
        assert_same(Adapter({layer: part}), Adapter({layer: state.adapter.layers[layer]}))


@given(seed=st.integers(0, 2**20), sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_the_mean_over_holders_equals_the_naive_one(seed, sizes):
    method, spec = METHODS["legend"](step=1), spec_of(3, (1, 4), seed=seed)
    state = in_use(method, spec)
    memories = [memory_at(spec, state.adapter.ranks, 1 + (seed + i) % 3) for i in range(len(sizes))]
    devices = [device_of(f"{i}", memory=memory) for i, memory in enumerate(memories)]
    inbox = [answered(t, random_adapter(spec, t.plan.ranks, t.plan.client)) for t in tasks(method, state, devices)]
    after = reduce(method, state, inbox, [size / sum(sizes) for size in sizes])
    for layer, previous in state.adapter.layers.items():
        held = [
            (u.adapter.layers[layer], n) for (_, u), n in zip(inbox, sizes, strict=True) if layer in u.adapter.layers
        ]
        for factor in ("A", "B"):
            total = sum(n for _, n in held)
            naive = sum(n / total * getattr(p, factor) for p, n in held) if held else getattr(previous, factor)
            assert_close(getattr(after.adapter.layers[layer], factor), naive, 1e-6)


# --- hier_fedlora -------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    counts = np.array([[1, 1], [4, 0], [0, 0]])
    expected = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), math.log(1 / 0.75), 0.0]
    assert divergence(counts, np.array([6, 2])) == pytest.approx(expected)
    assert divergence(np.zeros((2, 0)), np.zeros(0)) == pytest.approx([0, 0])  # nobody tells


@given(counts=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=8))
def test_divergence_is_zero_for_the_mix_itself_and_never_below(counts):
    table = np.array(counts)
    assert (divergence(table, table.sum(axis=0)) >= -1e-12).all()
    assert divergence(table.sum(axis=0, keepdims=True), table.sum(axis=0)) == pytest.approx([0])


def pooled(counts: np.ndarray, members: Sequence[Sequence[int]]) -> float:
    return sum(
        float(divergence(counts[list(group)].sum(axis=0, keepdims=True), counts.sum(axis=0))[0]) for group in members
    )


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_are_nearer_to_the_global_mix_than_random_ones(groups):
    # Twelve clients with one label each, three clients for each of four labels.
    counts = np.kron(np.eye(4), np.ones((3, 1))) * np.arange(10, 22)[:, None]
    found = grouped(counts, [1.0] * 12, groups, 0.1)
    assert sorted(i for group in found for i in group) == list(range(12))
    assert {len(group) for group in found} == {12 // groups}
    rng = numpy_generator("random groups")
    random = [pooled(counts, np.split(rng.permutation(12), groups)) for _ in range(200)]
    assert pooled(counts, found) < np.quantile(random, 0.1)
    assert pooled(counts, found) < 0.6 * np.mean(random)


def test_with_equal_labels_groups_are_formed_by_speed():
    counts = np.tile([5, 5], (6, 1))
    seconds = [1.0, 9.0, 9.1, 1.1, 9.2, 1.2]
    assert sorted(map(sorted, grouped(counts, seconds, 2, 0.1))) == [[0, 3, 5], [1, 2, 4]]


def test_there_are_no_more_groups_than_clients():
    assert grouped(np.ones((2, 2)), [1.0, 1.0], 5, 0.1) == [[0], [1]]
    assert grouped(np.zeros((0, 0)), [], 5, 0.1) == []


def test_frequency_and_depth_share_one_budget():
    seconds = [0.0, 1.0, 2.0, 3.0]
    # Near the mix: as deep as possible, then as often as the time allows.
    assert chosen(seconds, 0.0, 3.0, 4) == (1, 3)
    assert chosen(seconds, 0.0, 6.0, 4) == (2, 3)
    assert chosen(seconds, 0.0, 100.0, 4) == (4, 3)
    # Far from it: as often as possible, then as deep as the time allows.
    assert chosen(seconds, 50.0, 3.0, 4) == (3, 1)
    assert chosen(seconds, 50.0, 8.0, 4) == (4, 2)


@given(
    seconds=st.lists(st.floats(0.01, 5), min_size=1, max_size=5).map(lambda s: list(np.cumsum([0.5, *s]))),
    away=st.floats(0, 5),
    slack=st.floats(1, 5),
    f_max=st.integers(1, 4),
)
def test_a_group_keeps_the_deadline(seconds, away, slack, f_max):
    limit = slack * seconds[-1]
    f, k = chosen(seconds, away, limit, f_max)
    assert 1 <= f <= f_max
    assert 1 <= k < len(seconds)
    assert f * seconds[k] <= limit


def test_plans_name_groups_with_one_depth_and_one_frequency_each():
    method, spec = METHODS["hier_fedlora"](groups=2), spec_of(4, (2, 6))
    labels = [(9, 0), (0, 9), (8, 0), (0, 8)]
    devices = [device_of(f"{i}", labels=counts, size=sum(counts)) for i, counts in enumerate(labels)]
    plans = method.assign(method.init(spec), devices)
    assert [plan.client for plan in plans] == ["0", "1", "2", "3"]
    depths = depths_of(plans, spec)
    found = {plan.group: (plan.repeats, depths[plan.client]) for plan in plans}
    assert [plan.group for plan in plans] == ["group 1", "group 2", "group 2", "group 1"]  # each has both labels
    assert found == {"group 1": (2, 4), "group 2": (2, 4)}
    assert {rank for plan in plans for rank in plan.ranks.values()} == {2}


def test_the_slowest_group_sets_the_deadline_and_a_fast_one_aggregates_more_often():
    method = METHODS["hier_fedlora"](groups=2, deadline=1.0, speed=100.0)  # by speed
    spec = spec_of(4, (2, 6))
    quick, slow = Times(1.0, 0.5, 0.0), Times(3.0, 1.5, 0.0)
    devices = [device_of(f"{i}", times=slow if i % 2 else quick, labels=(5, 5), size=10) for i in range(4)]
    plans = {plan.client: plan for plan in method.assign(method.init(spec), devices)}
    assert plans["0"].group == plans["2"].group != plans["1"].group == plans["3"].group
    assert [plans[client].repeats for client in "0123"] == [3, 1, 3, 1]  # 3 s a step against 9 s
    assert set(depths_of(list(plans.values()), spec).values()) == {4}


def test_a_group_is_as_slow_as_its_slowest_member():
    method, spec = METHODS["hier_fedlora"](groups=2, deadline=1.0, speed=0.0), spec_of(4, (2, 6))
    quick, slow = Times(1.0, 0.5, 0.0), Times(3.0, 1.5, 0.0)
    devices = [device_of(f"{i}", times=slow if i == 0 else quick, labels=(5, 5), size=10) for i in range(4)]
    plans = method.assign(method.init(spec), devices)
    assert [(plan.group, plan.repeats) for plan in plans] == [("group 1", 1), ("group 2", 3)] * 2


def test_a_group_is_as_deep_as_its_smallest_memory():
    method, spec = METHODS["hier_fedlora"](groups=1), spec_of(4, (2, 6))
    state = method.init(spec)
    small = memory_at(spec, state.adapter.ranks, 3)
    devices = [device_of("a", memory=small, labels=(1, 1)), device_of("b", labels=(1, 1)), device_of("c", memory=1.0)]
    assert depths_of(method.assign(state, devices), spec) == {"a": 3, "b": 3}


class Adding:
    """A round in which every client adds one to what it was sent, and that remembers who was asked how often."""

    number, seed = 1, 0

    def __init__(self, devices: Sequence[Device]):
        self.sizes, self.asked = {device.client: device.num_examples for device in devices}, Counter()

    def ask(self, tasks, *, neighbours=None, late=False):
        self.asked.update(task.plan.client for task in tasks)
        inbox = [answered(task, task.start.map(lambda tensor: tensor + 1)) for task in tasks]
        total = sum(self.sizes[task.plan.client] for task in tasks)
        return Asked(inbox, [self.sizes[task.plan.client] / total for task in tasks], 1.0)

    def carry(self, down, up):
        pass

    def held(self, client):
        return 0


def test_a_round_of_the_hierarchy_follows_the_plans():
    method = METHODS["hier_fedlora"](groups=2, deadline=1.0, speed=100.0)
    spec = spec_of(4, (2, 6))
    state = in_use(method, spec)
    shallow = memory_at(spec, state.adapter.ranks, 2)
    quick, slow = Times(1.0, 0.5, 0.0), Times(3.0, 1.5, 0.0)
    devices = [
        device_of(f"{i}", times=slow if i % 2 else quick, memory=1e15 if i % 2 else shallow, labels=(5, 5), size=10)
        for i in range(4)
    ]
    plans = {plan.client: plan for plan in method.assign(state, devices)}
    round = Adding(devices)
    played = hierarchy(edges=7, repeats=9).play(method, state, {}, devices, round)
    assert round.asked == {client: plan.repeats for client, plan in plans.items()}
    assert plans["0"].repeats == 4
    # The lower blocks moved by one, in the group that trains them once; the upper ones by the mean of 4 times and once.
    for layer, part in played.state.adapter.layers.items():
        moved = 2.5 if layer in plans["0"].ranks else 1.0
        assert_close(part.A, state.adapter.layers[layer].A + moved, 1e-5)


# --- fed_hello ----------------------------------------------------------------------------------------------------


def test_odds_of_a_bottleneck_of_twelve_blocks_are_the_published_ones():
    assert odds_of("bottleneck", 12) == [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3]  # of 27


def test_odds_of_the_other_patterns():
    assert odds_of("triangle", 8) == [3, 3, 3, 3, 2, 2, 1, 1]
    assert odds_of("inverted_triangle", 8) == [1, 1, 2, 2, 3, 3, 3, 3]
    assert odds_of("uniform", 8) == [1] * 8


@pytest.mark.parametrize(
    ("pattern", "six", "nine"),
    [
        ("triangle", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("inverted_triangle", [6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("bottleneck", [0, 1, 2, 9, 10, 11], [0, 1, 2, 3, 4, 8, 9, 10, 11]),
        ("uniform", [1, 3, 5, 7, 9, 11], [0, 2, 3, 4, 6, 7, 8, 10, 11]),
    ],
)
def test_patterns_by_hand(pattern, six, nine):
    assert widest(pattern, 12, 6) == six
    assert widest(pattern, 12, 9) == nine
    assert widest(pattern, 12, 12) == list(range(12))


def blocks_of(plan: Plan, spec: Spec) -> list[int]:
    return sorted({layer.block for layer in spec.layers if layer.name in plan.ranks})


@pytest.mark.parametrize("strategy", ["fim", "gd", "rgd"])
def test_three_classes_train_six_nine_and_twelve_of_twelve_blocks_at_one_rank(strategy):
    method, spec = METHODS["fed_hello"](strategy=strategy), spec_of(12, (2, 4, 6), each=2)
    plans = method.assign(method.init(spec), [device_of(f"{rank}", rank) for rank in (2, 4, 6)])
    assert [len(blocks_of(plan, spec)) for plan in plans] == [6, 9, 12]
    assert [len(plan.ranks) for plan in plans] == [12, 18, 24]
    assert {rank for plan in plans for rank in plan.ranks.values()} == {2}


@given(blocks=st.integers(1, 9), levels=st.sets(st.integers(1, 9), min_size=1, max_size=4), least=st.floats(0.01, 1))
def test_a_higher_class_never_trains_fewer_blocks_and_the_highest_trains_all(blocks, levels, least):
    spec = spec_of(blocks, tuple(sorted(levels)))
    method = METHODS["fed_hello"](least=least)
    plans = method.assign(method.init(spec), [device_of(f"{rank}", rank) for rank in spec.levels])
    counts = [len(blocks_of(plan, spec)) for plan in plans]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == blocks


def test_draws_follow_the_odds_and_change_with_round_and_client():
    method, spec = METHODS["fed_hello"](strategy="rgd"), spec_of(12, (2, 4))
    drawn, state = Counter(), method.init(spec)
    sets = set()
    for round in range(60):
        state = replace(state, round=round)
        for plan in method.assign(state, [device_of(f"{i}", 2) for i in range(5)]):
            chosen_blocks = blocks_of(plan, spec)
            assert len(chosen_blocks) == 6
            drawn.update(chosen_blocks)
            sets.add(tuple(chosen_blocks))
    odds = dict(enumerate(odds_of("bottleneck", 12)))
    mean = {o: np.mean([drawn[b] for b in odds if odds[b] == o]) for o in (1, 2, 3)}
    assert mean[1] < 0.75 * mean[2] < 0.75 * mean[3]
    assert len(sets) > 100
    again = method.assign(state, [device_of("0", 2)])
    assert again == method.assign(state, [device_of("0", 2)])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 10, 11, 100, 101], [1, 1, 2, 2, 3, 3]),
        ([101, 1, 10, 2, 100, 11], [3, 1, 2, 1, 3, 2]),
        ([0, 0, 0, 50, 51, 100], [1, 1, 1, 2, 2, 3]),
        ([5, 5, 5], [3, 3, 3]),
        ([7, 1], [3, 2]),
        ([7], [3]),
    ],
)
def test_clusters_by_hand(scores, expected):
    assert clustered(list(map(float, scores))) == expected


@given(st.lists(st.integers(0, 30), min_size=3, max_size=7))
def test_clusters_are_those_of_least_squared_error(scores):
    def error(groups) -> float:
        parts = [[s for s, g in zip(scores, groups, strict=True) if g == label] for label in (1, 2, 3)]
        return sum(np.var(part) * len(part) for part in parts if part)

    found = clustered(list(map(float, scores)))
    best = min(error([(code // 3**i) % 3 + 1 for i in range(len(scores))]) for code in range(3 ** len(scores)))
    assert error(found) == pytest.approx(best, abs=1e-9)
    order = sorted(zip(scores, found, strict=True))
    assert all(low <= high for (_, low), (_, high) in pairwise(order))


def test_observations_are_the_squared_gradients_of_each_layer():
    for name in ("fed_hello", "hra_lora"):
        part = LowRank(torch.ones(1, 3), torch.ones(2, 1)).map(lambda tensor: tensor.requires_grad_())
        silent = LowRank(torch.ones(1, 3), torch.ones(2, 1, requires_grad=True))
        (part.A.sum() * 2 + part.B.sum() * 3 + silent.B.sum()).backward()
        found = METHODS[name]().observe(Adapter({"q": part, "v": silent}))
        assert found == {"fisher q": 3 * 4 + 2 * 9, "fisher v": 2}


def test_scores_are_means_over_holders_and_count_from_the_end_of_the_warm_up():
    method, spec = METHODS["fed_hello"](warmup=2, refresh=3), spec_of(3, (1, 2), each=2)
    state = method.init(spec)
    whole = dict.fromkeys(state.adapter.ranks, 1)
    high = {name: rank for name, rank in whole.items() if name.startswith("2")}
    odds = []
    for round in range(6):
        state = replace(state, round=round)
        inbox = []
        for client, ranks, factor in (("a", whole, 1.0), ("b", high, 5.0)):
            task = make_task(method, state, Plan(client, ranks, steps=2))
            scores = {name: factor * 2 * 10 ** int(name[0]) * (round + 1) for name in ranks}
            inbox.append(answered(task, task.start, **scores))
        state = reduce(method, state, inbox, [0.25, 0.75])
        odds.append(state.notes.get("odds"))
    # Two steps at rank 1: block 0 has 1 for each of its layers, block 2 has (0.25 + 0.75 * 5) * 100; times the round.
    expected = {name: 6 * 10 ** int(name[0]) * (4 if name[0] == "2" else 1) for name in whole}
    assert state.notes["fisher"] == pytest.approx(expected)
    assert odds[0] is None
    assert odds[1:] == [[1, 2, 3]] * 5


def test_odds_are_kept_between_refreshes_and_scores_where_nobody_trained():
    method, spec = METHODS["fed_hello"](warmup=1, refresh=2), spec_of(3, (1, 2))
    state = method.init(spec)
    found = []
    for round, scores in enumerate([{"0.0": 9.0, "1.0": 5.0, "2.0": 1.0}, {"0.0": 1.0, "2.0": 9.0}, {"1.0": 5.0}]):
        state = replace(state, round=round)
        task = make_task(method, state, Plan("a", dict.fromkeys(scores, 1), steps=1))
        state = reduce(method, state, [answered(task, task.start, **scores)], [1.0])
        found.append(state.notes["odds"])
    assert found == [[3, 2, 1], [3, 2, 1], [1, 2, 3]]
    assert state.notes["fisher"] == {"0.0": 1.0, "1.0": 5.0, "2.0": 9.0}


def test_only_scores_need_a_server():
    assert METHODS["fed_hello"]().claims.topologies == ("star",)
    for strategy in ("gd", "rgd"):
        method = METHODS["fed_hello"](strategy=strategy)
        assert len(method.claims.topologies) == 4
        assert method.observe is None


# --- hra_lora -----------------------------------------------------------------------------------------------------


def test_ranks_in_proportion_by_hand():
    scores = {"a": 1.0, "b": 2.0, "c": 5.0}
    assert dealt(16, scores, low=1, high=20) == {"a": 2, "b": 4, "c": 10}
    assert dealt(16, scores, low=3, high=20) == {"a": 3, "b": 4, "c": 9}
    assert dealt(16, scores, low=1, high=8) == {"a": 3, "b": 5, "c": 8}
    assert dealt(16, {"a": 0.0, "b": 0.0, "c": 1.0}, low=1, high=8) == {"a": 4, "b": 4, "c": 8}


def test_the_published_setting_is_within_its_bounds():
    # Twelve layers, mean ranks 12, 18, 24; least 10, most 48.
    scores = {f"{i}": 1.5**i for i in range(12)}
    for budget in (144, 216, 288):
        found = dealt(budget, scores, low=10, high=48)
        assert sum(found.values()) == budget
        assert min(found.values()) >= 10
        assert max(found.values()) <= 48
        assert list(found.values()) == sorted(found.values())


@given(
    scores=st.lists(st.floats(0, 1e6), min_size=1, max_size=6),
    low=st.integers(1, 4),
    extra=st.integers(0, 20),
    mean=st.integers(0, 10),
)
def test_budgets_are_spent_exactly_and_a_larger_one_never_takes_a_rank_away(scores, low, extra, mean):
    named = {f"{i}": score for i, score in enumerate(scores)}
    high = low + extra
    smaller, larger = (dealt(min(low + m, high) * len(named), named, low=low, high=high) for m in (mean, mean + 1))
    for found, m in ((smaller, mean), (larger, mean + 1)):
        assert sum(found.values()) == min(low + m, high) * len(named)
        assert all(low <= rank <= high for rank in found.values())
    assert all(smaller[name] <= larger[name] for name in named)


@given(scores=st.lists(st.floats(0, 100), min_size=1, max_size=5), low=st.integers(1, 3), budget=st.integers(1, 40))
def test_each_rank_goes_to_the_largest_score_for_its_rank(scores, low, budget):
    named = {f"{i}": score for i, score in enumerate(scores)}
    ranks = dict.fromkeys(named, low)
    while sum(ranks.values()) < min(budget, 9 * len(named)):
        open_to = [name for name, rank in ranks.items() if rank < 9]
        ranks[min(open_to, key=lambda name: (-named[name] / (ranks[name] + 0.5), ranks[name]))] += 1
    assert dealt(budget, named, low=low, high=9) == ranks


def test_equal_scores_give_equal_ranks():
    assert set(dealt(15, dict.fromkeys("abc", 2.0), low=1, high=9).values()) == {5}
    assert set(dealt(15, dict.fromkeys("abc", 0.0), low=1, high=9).values()) == {5}


def scored(method, spec: Spec, scores: Mapping[str, float], *, round: int) -> State:
    return replace(in_use(method, spec).with_notes(fisher=dict(scores)), round=round)


def test_clients_share_their_budget_among_the_layers_that_matter():
    method, spec = METHODS["hra_lora"](warmup=1), spec_of(4, (2, 4))
    scores = {"0.0": 1.0, "1.0": 1.0, "2.0": 2.0, "3.0": 4.0}
    state = scored(method, spec, scores, round=1)
    plans = method.assign(state, [device_of("a", 2), device_of("b", 4)])
    assert state.adapter.ranks == dict.fromkeys(scores, 8)
    assert [sum(plan.ranks.values()) for plan in plans] == [8, 16]
    assert plans[1].ranks == {"0.0": 2, "1.0": 2, "2.0": 4, "3.0": 8}
    for plan in plans:
        assert method.dispatch(state, plan).ranks == plan.ranks


@pytest.mark.parametrize(("warmup", "expected"), [(0, ["B", "A", "B", "A"]), (2, ["AB", "AB", "B", "A"])])
def test_factors_take_turns_after_the_warm_up(warmup, expected):
    method, spec = METHODS["hra_lora"](warmup=warmup), spec_of(2, (2, 4))
    state = method.init(spec)
    found = [method.assign(replace(state, round=round), [device_of("a", 4)])[0] for round in range(4)]
    assert [plan.train for plan in found] == [plan.up for plan in found] == expected
    assert {plan.down for plan in found} == {"AB"}


def test_the_resting_factor_is_not_sent_up_and_counts_as_it_was_sent():
    method, spec = METHODS["hra_lora"](warmup=0), spec_of(2, (2, 4))
    (task,) = tasks(method, in_use(method, spec), [device_of("a", 4)])
    update = completed(task, reply(task, task.start.map(lambda tensor: tensor + 1)))
    assert bytes_up(task, update) == nbytes(update.adapter, "B") < nbytes(update.adapter)
    for layer, part in update.adapter.layers.items():
        assert torch.equal(part.A, task.start.layers[layer].A)
        assert torch.equal(part.B, task.start.layers[layer].B + 1)


def test_scores_are_taken_after_the_warm_up_and_then_every_so_often():
    method, spec = METHODS["hra_lora"](warmup=2, refresh=2), spec_of(2, (2, 4))
    state, found = method.init(spec), []
    for round in range(5):
        state = replace(state, round=round)
        (task,) = tasks(method, state, [device_of("a", 4)])
        # Two steps; what was observed is in proportion to the slots, and so says the same of both layers.
        seen = {name: 2.0 * (round + 1) * rank for name, rank in task.plan.ranks.items()}
        state = reduce(method, state, [answered(task, random_adapter(spec, task.plan.ranks, round), **seen)], [1.0])
        found.append(state.notes.get("fisher", {}).get("1.0"))
    assert found == [None, 2.0, 2.0, 4.0, 4.0]
    assert state.notes["fisher"]["0.0"] == state.notes["fisher"]["1.0"]


def test_two_clients_by_hand():
    # Both products have norm 10, so they weigh the same, whatever the examples say.
    spec = Spec((Layer("q", 3, 2, 0),), (1, 2), 1.0, 0, Adapter({}), COST)
    method = METHODS["hra_lora"](most=1.0)
    state = method.init(spec)
    small = Adapter({"q": LowRank(torch.tensor([[1.0, 0, 0]]), torch.tensor([[10.0], [0]]))})
    large = Adapter({"q": LowRank(torch.tensor([[0.0, 1, 0], [0, 0, 2]]), torch.tensor([[0.0, 4], [6, 0]]))})
    inbox = []
    for client, adapter in (("a", small), ("b", large)):
        task = make_task(method, state, Plan(client, adapter.ranks, steps=1))
        inbox.append((task, reply(task, adapter)))
    after = reduce(method, state, inbox, [0.25, 0.75]).adapter.layers["q"]
    # The mean product is [5 0 4; 0 3 0]: its rows are orthogonal, of lengths sqrt 41 and 3.
    length = math.sqrt(41)
    assert_close(after.A, torch.tensor([[5 / length, 0, 4 / length], [0, 1, 0]]), 1e-6)
    assert_close(after.B, torch.tensor([[length, 0], [0, 3]]), 1e-6)


@given(seed=st.integers(0, 2**20))
def test_the_aggregate_is_the_dense_svd_of_the_norm_weighted_mean(seed):
    method, spec = METHODS["hra_lora"](warmup=0, most=1.5), spec_of(3, (1, 2), seed=seed)
    state = scored(method, spec, {"0.0": 1.0, "1.0": 2.0, "2.0": 3.0}, round=1)
    devices = [device_of("a", 1), device_of("b", 2), device_of("c", 2)]
    inbox = [answered(t, random_adapter(spec, t.plan.ranks, t.plan.client)) for t in tasks(method, state, devices)]
    after = reduce(method, state, inbox, [0.2, 0.3, 0.5])
    for layer, part in after.adapter.layers.items():
        dense = [products(update.adapter)[layer] for _, update in inbox]
        norms = [float(product.norm()) for product in dense]
        U, S, Vt = torch.linalg.svd(sum(n * product for n, product in zip(norms, dense, strict=True)) / sum(norms))
        assert part.rank == 3
        assert_close(part.product, U @ torch.diag(S) @ Vt[: len(S)], 1e-5)


def test_equal_weights_while_there_is_no_product():
    method, spec = METHODS["hra_lora"](), spec_of(2, (2, 4))
    state = method.init(spec)
    inbox = [answered(task, task.start) for task in tasks(method, state, [device_of("a", 2), device_of("b", 4)])]
    for part in reduce(method, state, inbox, [0.5, 0.5]).adapter.layers.values():
        assert (part.B == 0).all()
        assert (part.A.norm(dim=1) > 0.9).all()
