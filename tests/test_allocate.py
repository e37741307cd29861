"""Rank policies, orderings, device classes, and the plans that methods share."""

from collections import Counter
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank.adapter import Adapter, LowRank
from anyrank.allocate import (
    RANK_POLICIES,
    Candidate,
    affordable,
    at_depth,
    at_own_rank,
    at_random_slots,
    at_rank,
    auto,
    data_size,
    deal_classes,
    due,
    fisher,
    fisher_scores,
    listed,
    ordered,
    per_class,
    power_law,
    ratios,
    seconds_by_depth,
)
from anyrank.device import memory_bytes, reply_seconds
from anyrank.errors import ConfigError
from anyrank.federation import Device, Layer, ModelCost, Plan, Profile, Spec, State, Task, Update
from anyrank.seeding import numpy_generator
from federations import COST

TRIO = [
    Candidate("ann", "phone", 30, 2),
    Candidate("bob", "laptop", 10, 8),
    Candidate("cat", "phone", 20, 2),
]
PROFILE = Profile(1.0, 1.0, 1.0, 1.0, 1.0)
SPEC = Spec((Layer("q", 3, 7, 0), Layer("v", 3, 5, 1)), (2, 8), 2.0, 0, Adapter({}), COST)

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def rng(seed=0):
    return numpy_generator(seed, "ranks")


def crowd(sizes):
    return [Candidate(f"c{number:03}", "any", size, None) for number, size in enumerate(sizes)]


def problems_of(policy, clients=TRIO, **settings):
    with pytest.raises(ConfigError) as caught:
        policy(clients, rng(), **settings)
    return caught.value.problems


def test_per_class():
    assert per_class(TRIO, rng()) == {"ann": 2, "bob": 8, "cat": 2}


def test_per_class_names_each_class_without_a_rank_once():
    clients = [Candidate(name, kind, 1, None) for name, kind in (("a", "tv"), ("b", "car"), ("c", "tv"))]
    found = problems_of(per_class, clients)
    assert [problem.split(":")[0] for problem in found] == ["device class 'car'", "device class 'tv'"]


def test_per_class_refuses_a_rank_below_one():
    assert problems_of(per_class, [Candidate("ann", "phone", 1, 0)]) == (
        "device class 'phone': rank is 0; expected at least 1",
    )


def test_list_goes_by_position():
    assert listed(TRIO, rng(), values=[4, 1, 9]) == {"ann": 4, "bob": 1, "cat": 9}


def test_list_reports_length_and_values_together():
    found = problems_of(listed, values=[0, -2])
    assert len(found) == 3
    assert "position 2: rank is -2" in found[1]
    assert "2 values for 3 clients" in found[2]


def test_data_size_by_hand():
    # bob is covered by 1 of 3, cat by 2, ann by all: floor(8/3), floor(16/3), 8.
    assert data_size(TRIO, rng()) == {"ann": 8, "bob": 2, "cat": 5}
    assert data_size(TRIO, rng(), largest=1) == {"ann": 1, "bob": 1, "cat": 1}
    assert problems_of(data_size, largest=0)


@given(sizes=SIZES, largest=st.integers(1, 64))
def test_data_size_follows_the_data(sizes, largest):
    ranks = data_size(crowd(sizes), rng(), largest=largest)
    by_size = sorted((c.num_examples, ranks[c.client]) for c in crowd(sizes))
    assert [rank for _, rank in by_size] == sorted(ranks.values())
    assert max(ranks.values()) == largest
    assert min(ranks.values()) >= 1


def test_ratios_by_hand():
    # A share that is too small still leaves rank 1; the shares start again after the last client.
    assert ratios(TRIO, rng(), values=[0.01, 0.5], of=9) == {"ann": 1, "bob": 4, "cat": 1}


def test_ratios_do_not_lose_a_rank_to_rounding():
    assert ratios(TRIO[:1], rng(), values=[0.29], of=100) == {"ann": 29}


def test_ratios_report_everything_wrong():
    assert len(problems_of(ratios, values=[0.0, 1.5], of=0)) == 3
    assert problems_of(ratios, values=[], of=4) == ("ranks.values: expected at least one share, got none",)


@given(smallest=st.integers(1, 20), width=st.integers(0, 40), alpha=st.floats(-5, 5), seed=st.integers(0, 9))
def test_power_law_stays_in_its_range(smallest, width, alpha, seed):
    largest = smallest + width
    ranks = power_law(crowd([1] * 20), rng(seed), smallest=smallest, largest=largest, alpha=alpha)
    assert all(smallest <= rank <= largest for rank in ranks.values())


def test_power_law_has_the_right_frequencies():
    counts = Counter(power_law(crowd([1] * 20_000), rng(), smallest=1, largest=2, alpha=0.1).values())
    # P(1) = 1 / (1 + 2^-0.9).
    assert counts[1] / 20_000 == pytest.approx(0.651, abs=0.01)


def test_power_law_is_skewed_to_small_ranks():
    ranks = sorted(power_law(crowd([1] * 1000), rng()).values())
    assert ranks[500] < (5 + 50) / 2 < max(ranks)


def test_power_law_survives_extreme_exponents():
    assert set(power_law(TRIO, rng(), alpha=1e4).values()) == {50}
    assert set(power_law(TRIO, rng(), alpha=-1e4).values()) == {5}


def test_power_law_reports_everything_wrong():
    assert len(problems_of(power_law, smallest=9, largest=3, alpha=float("nan"))) == 2
    assert problems_of(power_law, smallest=0)


def test_same_seed_same_ranks():
    clients = crowd([1] * 50)
    assert power_law(clients, rng(1)) == power_law(clients, rng(1))
    assert power_law(clients, rng(1)) != power_law(clients, rng(2))


def test_every_policys_settings_are_annotated_and_keyword_only():
    for policy in RANK_POLICIES.values():
        clients, generator, *settings = signature(policy).parameters.values()
        assert (clients.name, generator.name) == ("clients", "rng")
        for setting in settings:
            assert setting.kind is Parameter.KEYWORD_ONLY
            assert setting.annotation is not Parameter.empty


# The third block has the narrowest layer; adapters of rank r keep 4 r bytes for each of 3 layers, and train 14 r
# numbers in each of the two lower blocks and 10 r in the last.
NARROW = (Layer("q", 6, 8, 0), Layer("k", 8, 6, 1), Layer("v", 5, 5, 2))
COSTLY = ModelCost(
    forward_flops=10,
    block_backward_flops=2,
    num_blocks=3,
    base_bytes=1000,
    block_activation_bytes=100,
    working_bytes=50,
    tokens_per_step=1,
)
DEEP = Spec(NARROW, (1,), 2.0, 0, Adapter({}, {"head": torch.zeros(5)}), COSTLY)
AFFORD = {"largest": 64, "memory_share": 1.0, "seconds": None}


def of_memory(size):
    return Device("ann", "phone", replace(PROFILE, memory_bytes=float(size)), 0, 30, 5)


def needs(rank, depth, device=None, spec=DEEP):
    """Bytes, and seconds of a round."""
    device = device or of_memory(1)
    plan = at_depth(spec, device, {layer.name: rank for layer in spec.layers}, depth)
    dense = sum(tensor.numel() for tensor in spec.start.dense.values())
    memory = memory_bytes(plan, model=spec.cost, layers=spec.layers, dense_parameters=dense)
    return memory, reply_seconds(plan, device, spec)


def test_what_a_device_affords_by_hand():
    def at_rank(rank):
        return 1000 + 50 + 3 * 100 + 4 * 3 * rank + 16 * (5 + 38 * rank)

    assert [needs(rank, 3)[0] for rank in (1, 4)] == [at_rank(1), at_rank(4)]
    assert affordable(DEEP, of_memory(1e9), **AFFORD) == (4, 3)  # 8 would be above a side of 5
    assert affordable(DEEP, of_memory(1e9), **{**AFFORD, "largest": 3}) == (2, 3)
    assert affordable(DEEP, of_memory(at_rank(4)), **AFFORD) == (4, 3)
    assert affordable(DEEP, of_memory(at_rank(4) - 1), **AFFORD) == (2, 3)
    assert affordable(DEEP, of_memory(2 * at_rank(2)), **{**AFFORD, "memory_share": 0.5}) == (2, 3)
    assert affordable(DEEP, of_memory(at_rank(1) - 1), **AFFORD) == (1, 2)
    assert affordable(DEEP, of_memory(1000), **AFFORD) == (1, 0)
    # 5 steps of 10 + 3 x 2 seconds, and a second for each byte of 38 numbers a rank and the head.
    seconds = 5 * 16.0 + 4 * (5 + 2 * 38)
    assert affordable(DEEP, of_memory(1e9), **{**AFFORD, "seconds": seconds}) == (2, 3)
    assert affordable(DEEP, of_memory(1e9), **{**AFFORD, "seconds": seconds - 1}) == (1, 3)
    assert affordable(DEEP, of_memory(1e9), **{**AFFORD, "seconds": 1.0}) == (1, 0)


@given(
    memory=st.integers(900, 6000),
    share=st.floats(0.1, 1),
    seconds=st.none() | st.floats(60, 1500),
    largest=st.integers(1, 9),
)
def test_what_a_device_affords_fits_and_no_more_would(memory, share, seconds, largest):
    device = of_memory(memory)

    def fits(rank, depth):
        needed, taken = needs(rank, depth, device)
        return needed <= share * memory and (seconds is None or taken <= seconds)

    rank, depth = affordable(DEEP, device, largest=largest, memory_share=share, seconds=seconds)
    assert rank in (1, 2, 4)
    assert rank <= largest
    assert 0 <= depth <= 3
    if depth:
        assert fits(rank, depth)
    if depth == 3:
        assert 2 * rank > min(largest, 5) or not fits(2 * rank, 3)
    else:
        assert rank == 1
        assert not fits(1, depth + 1)


def test_auto_gives_each_client_the_rank_that_its_device_affords():
    devices = [of_memory(size) for size in (1e9, needs(2, 3)[0], 1000)]
    clients = [
        Candidate(f"c{i}", "phone", 30, None, partial(affordable, DEEP, device)) for i, device in enumerate(devices)
    ]
    assert auto(clients, rng(), memory_share=1.0) == {"c0": 4, "c1": 2, "c2": 1}
    assert auto(clients, rng(), largest=2) == {"c0": 2, "c1": 1, "c2": 1}  # 0.8 of the memory unless told otherwise
    assert set(auto(clients, rng(), seconds=1.0).values()) == {1}


def test_auto_reports_everything_wrong():
    assert len(problems_of(auto, largest=0, memory_share=1.5, seconds=0.0)) == 3
    assert len(problems_of(auto, memory_share=0.0, seconds=float("nan"))) == 2
    assert "which the candidates do not say" in problems_of(auto)[0]


def test_ordered_by_hand():
    ranks, sizes = {"ann": 8, "bob": 1, "cat": 4}, {"ann": 10, "bob": 10, "cat": 5}
    assert ordered(ranks, sizes, order="as_drawn") == ranks
    assert ordered(ranks, sizes, order="with_data") == {"ann": 4, "bob": 8, "cat": 1}
    assert ordered(ranks, sizes, order="against_data") == {"ann": 1, "bob": 4, "cat": 8}


@given(
    clients=st.dictionaries(st.text("abc", min_size=1), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1),
    order=st.sampled_from(["as_drawn", "with_data", "against_data"]),
)
def test_ordered_keeps_the_multiset_and_sorts(clients, order):
    ranks, sizes = ({client: pair[part] for client, pair in clients.items()} for part in (0, 1))
    found = ordered(ranks, sizes, order=order)
    assert list(found) == list(ranks)
    assert Counter(found.values()) == Counter(ranks.values())
    sign = {"as_drawn": 0, "with_data": 1, "against_data": -1}[order]
    for one in found:
        for other in found:
            assert sign == 0 or sign * (sizes[one] - sizes[other]) <= 0 or found[one] >= found[other]


def test_deal_classes_counts_by_largest_remainder():
    # Of 8: 3.6, 2.8 and 1.6 are owed; the two left over go to 2.8 and to the earlier of the equal remainders.
    dealt = deal_classes([f"c{n}" for n in range(8)], {"tx2": 0.45, "nx": 0.35, "agx": 0.2}, rng())
    assert Counter(dealt.values()) == {"tx2": 4, "nx": 3, "agx": 1}


@given(
    count=st.integers(0, 30),
    shares=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 100), min_size=1),
    factor=st.sampled_from([0.25, 2.0, 8.0]),
)
def test_deal_classes_is_proportional_at_any_scale(count, shares, factor):
    clients = [f"c{n}" for n in range(count)]
    dealt = deal_classes(clients, shares, rng())
    assert list(dealt) == clients
    assert dealt == deal_classes(clients, {kind: share * factor for kind, share in shares.items()}, rng())
    counts, total = Counter(dealt.values()), sum(shares.values())
    assert all(abs(counts[kind] - count * share / total) < 1 + 1e-9 for kind, share in shares.items())


def test_deal_classes_shuffles_by_the_generator():
    clients = [f"c{n}" for n in range(30)]
    shares = {"phone": 1.0, "laptop": 1.0}
    assert deal_classes(clients, shares, rng(1)) == deal_classes(clients, shares, rng(1))
    assert deal_classes(clients, shares, rng(1)) != deal_classes(clients, shares, rng(2))


def test_deal_classes_refuses_what_it_cannot_share_out():
    with pytest.raises(ConfigError) as caught:
        deal_classes(["ann"], {"phone": 0.0, "laptop": 1.0, "tv": -1.0, "car": float("nan")}, rng())
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="at least one"):
        deal_classes(["ann"], {}, rng())


def test_plans_hold_every_layer_at_the_devices_rank():
    devices = [Device("ann", "phone", PROFILE, 2, 30, 5), Device("bob", "laptop", PROFILE, 8, 10, 7)]
    assert at_rank(SPEC, devices[0], 3) == Plan("ann", {"q": 3, "v": 3}, 5)
    assert at_own_rank(State(SPEC, Adapter({})), devices) == [
        Plan("ann", {"q": 2, "v": 2}, 5),
        Plan("bob", {"q": 8, "v": 8}, 7),
    ]


def test_random_slots_are_some_of_the_servers_and_a_matter_of_seed_round_and_client():
    devices = [Device("ann", "phone", PROFILE, 2, 30, 5), Device("bob", "laptop", PROFILE, 8, 10, 7)]
    counts, state, seeded = Counter(), State(SPEC, Adapter({})), State(replace(SPEC, seed=1), Adapter({}))
    others = 0
    for number in range(200):
        ann, bob = at_random_slots(replace(state, round=number), devices)
        assert bob == replace(at_own_rank(state, devices)[1], slots=tuple(range(8)))
        assert ann.slots is not None
        assert list(ann.slots) == sorted(set(ann.slots))
        assert len(ann.slots) == 2
        assert at_random_slots(replace(state, round=number), devices[:1]) == [ann]  # whoever else takes part
        counts.update(ann.slots)
        others += at_random_slots(replace(seeded, round=number), devices)[0] != ann
    assert others > 150
    assert set(counts) == set(range(8))
    assert all(30 <= count <= 70 for count in counts.values())  # 50 each on average
    twins = [replace(devices[0], client=name) for name in ("ann", "eve", "sue", "una")]
    assert len({plan.slots for plan in at_random_slots(state, twins)}) > 1


def test_a_depth_counts_blocks_with_adapted_layers_from_the_output():
    layers = (Layer("a", 3, 7, 1), Layer("b", 3, 5, 4), Layer("c", 3, 7, 4), Layer("d", 3, 5, 5))
    ann, spec = Device("ann", "phone", PROFILE, 2, 30, 5), replace(SPEC, layers=layers)
    ranks = {"a": 1, "b": 2, "c": 3, "d": 4}
    for depth, names in enumerate(["", "d", "bcd", "abcd"]):
        assert at_depth(spec, ann, ranks, depth) == Plan("ann", {name: ranks[name] for name in names}, 5)


def test_seconds_by_depth_go_as_far_as_memory():
    # Adapters of rank 2: 4 bytes times one token times 2 columns are kept; 16 bytes for each of 20 and 16 parameters.
    ann = Device("ann", "phone", replace(PROFILE, memory_bytes=1e9), 2, 30, 5)
    ranks = {"q": 2, "v": 2}
    needed = [2 * 4 + 16 * 16, 2 * 2 * 4 + 16 * (20 + 16)]
    seconds = seconds_by_depth(SPEC, ann, ranks)
    assert seconds == [5.0, 5.0 + 4 * 16, 5.0 + 4 * 36]  # a step takes a second at any depth, a byte as well
    for memory, depths in ((needed[1], 3), (needed[1] - 1, 2), (needed[0], 2), (needed[0] - 1, 1), (0, 1)):
        small = replace(ann, profile=replace(PROFILE, memory_bytes=float(memory)))
        assert seconds_by_depth(SPEC, small, ranks) == seconds[:depths]


def test_scores_are_sums_of_squares_by_step_and_slot_over_those_that_trained_the_layer():
    q = LowRank(torch.ones(2, 3), torch.ones(7, 2)).map(lambda tensor: tensor.requires_grad_())
    (q.A.sum() * 2 + q.B.sum() * 3).backward()
    observed = fisher(Adapter({"q": q}))
    assert observed == {"fisher q": 6 * 4 + 14 * 9}
    inbox = []
    for client, ranks, metrics in (
        ("ann", {"q": 2}, observed),
        ("bob", {"q": 1, "v": 4}, {"fisher q": 9.0, "fisher v": 8.0}),
        ("cat", {"q": 1}, {}),
    ):
        task = Task("train", 1, Plan(client, ranks, steps=3), Adapter({}))
        inbox.append((task, Update(client, 1, Adapter({}), 1, {"loss": 1.0, **metrics})))
    expected = {"q": (0.25 * 150 / 6 + 0.5 * 9 / 3) / 0.75, "v": 8 / 12}
    assert fisher_scores(inbox, [0.25, 0.5, 0.25]) == pytest.approx(expected)
    assert fisher_scores(inbox[2:], [1.0]) == {}


def test_scores_count_after_the_warm_up_and_then_every_so_often():
    assert [round for round in range(1, 10) if due(round, 3, 2)] == [3, 5, 7, 9]
    assert [round for round in range(1, 10) if due(round, 0, 4)] == [1, 5, 9]
