"""Seconds and bytes of a plan, against numbers worked by hand, measured, or read off published tables."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyrank.device import (
    PROFILES,
    ModelCost,
    compute_seconds,
    memory_bytes,
    too_small,
    trained_blocks,
    transformer_cost,
    undisturbed,
)
from anyrank.federation import Device, Layer, Plan, Profile

# BERT-base on SST-2, (trained blocks, seconds per batch): LEGEND's prototype, and LoRA on all layers.
TABLE = {
    "jetson-tx2": [(1, 1.38), (12, 2.02)],
    "jetson-nx": [(2, 0.79), (12, 1.09)],
    "jetson-agx": [(6, 0.59), (12, 0.76)],
}

SMALL = ModelCost(
    forward_flops=1000,
    block_backward_flops=60,
    num_blocks=4,
    base_bytes=10_000,
    block_activation_bytes=500,
    working_bytes=300,
    tokens_per_step=5,
)
LAYERS = tuple(Layer(f"{block}.{name}", 3, 7, block) for block in range(4) for name in ("query", "value"))
SLOW = Profile(forward_flops=500.0, backward_flops=30.0, memory_bytes=20_000.0, up_bps=1.0, down_bps=1.0)


def bert_base():
    return transformer_cost(
        matrix_parameters_per_block=7_077_888,
        matrix_parameters_outside_blocks=591_360,
        num_blocks=12,
        hidden=768,
        heads=12,
        intermediate=3072,
        batch_size=32,
        tokens=64,
        base_bytes=437_935_112,
    )


def device(profile=SLOW, client="ann"):
    return Device(client, "slow", profile, rank=8, num_examples=10, steps=3)


def from_block(lowest, *, layers=LAYERS, rank=2, steps=3):
    return Plan("ann", {layer.name: rank for layer in layers if layer.block >= lowest}, steps)


def seconds(plan, profile=SLOW):
    return compute_seconds(plan, undisturbed(profile, SMALL), model=SMALL, layers=LAYERS)


def memory(plan, model=SMALL, layers=LAYERS):
    return memory_bytes(plan, model=model, layers=layers, dense_parameters=11)


def test_transformer_cost_by_hand():
    cost = transformer_cost(
        matrix_parameters_per_block=100,
        matrix_parameters_outside_blocks=12,
        num_blocks=3,
        hidden=4,
        heads=2,
        intermediate=16,
        batch_size=2,
        tokens=5,
        base_bytes=2000,
    )
    # 10 tokens a step. A block: 2 * 100 * 10 for matrices, 4 * 5 * 5 * 4 * 2 examples for attention.
    assert cost.forward_flops == 3 * (2000 + 800) + 2 * 12 * 10
    assert cost.block_backward_flops == 2000 + 2 * 800
    # Per token: query, key, value, two norms; attention's weights (2 heads x 5 > hidden); the feed-forward.
    assert cost.block_activation_bytes == 4 * 10 * (5 * 4 + 10 + 16)
    assert cost.working_bytes == 4 * 10 * (2 * 16 + 4 + 3)
    assert (cost.num_blocks, cost.base_bytes, cost.tokens_per_step) == (3, 2000, 10)


@pytest.mark.parametrize("board", TABLE)
@pytest.mark.parametrize("measurement", [0, 1])
def test_boards_reproduce_the_published_seconds(board, measurement):
    blocks, published = TABLE[board][measurement]
    layers = [Layer(f"{block}.query", 768, 768, block) for block in range(12)]
    plan = from_block(12 - blocks, layers=layers, steps=1)
    found = compute_seconds(plan, undisturbed(PROFILES[board], bert_base()), model=bert_base(), layers=layers)
    assert found == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("board", TABLE)
def test_boards_agree_with_a_least_squares_fit(board):
    mu, f = np.polyfit(*zip(*TABLE[board], strict=True), deg=1)
    cost, profile = bert_base(), PROFILES[board]
    assert cost.forward_flops / profile.forward_flops == pytest.approx(f, abs=0.005)
    assert cost.block_backward_flops / profile.backward_flops == pytest.approx(mu, abs=0.0005)


def test_boards_are_ordered_and_every_profile_is_usable():
    assert [PROFILES[board].memory_bytes for board in TABLE] == [4e9, 6e9, 8e9]
    speeds = [PROFILES[board].forward_flops for board in TABLE]
    assert speeds == sorted(speeds)
    for profile in PROFILES.values():
        assert min(vars(profile).values()) > 0


def test_depth_counts_from_the_lowest_planned_block_to_the_models_last():
    assert trained_blocks(from_block(0), LAYERS, num_blocks=4) == 4
    assert trained_blocks(from_block(3), LAYERS, num_blocks=4) == 1
    assert trained_blocks(Plan("ann", {}, 3), LAYERS, num_blocks=4) == 0
    # The gradient passes the upper blocks even where they hold no adapter.
    assert trained_blocks(Plan("ann", {"1.query": 2}, 3), LAYERS[:4], num_blocks=4) == 3


def test_compute_seconds_by_hand():
    # 3 steps of (1000 / 500 forward + 2 blocks of 60 / 30).
    assert seconds(from_block(2)) == 3 * (2.0 + 2 * 2.0)


def test_rank_does_not_change_the_time():
    assert seconds(from_block(1, rank=1)) == seconds(from_block(1, rank=64))


def test_memory_by_hand():
    # One block: two layers of rank 2, at 5 tokens a step.
    images = 4 * 5 * (2 + 2)
    trained = 11 + 2 * 2 * (3 + 7)
    assert memory(from_block(3)) == 10_000 + 300 + 500 + images + 16 * trained


def test_too_small_names_the_device_and_the_numbers():
    roomy = replace(SLOW, memory_bytes=1e9)
    plans = [from_block(0, rank=9), replace(from_block(0, rank=9), client="bob")]
    needed = memory(plans[0], layers=LAYERS)
    assert needed > SLOW.memory_bytes
    found = too_small(plans, [device(roomy, "bob"), device()], model=SMALL, layers=LAYERS, dense_parameters=11)
    assert len(found) == 1
    for part in (
        "'ann'",
        "1 x slow",
        "rank 9",
        "8 layers",
        f"{needed / 1e6:,.1f} MB",
        f"{SLOW.memory_bytes / 1e6:,.1f} MB",
        "smaller batch",
    ):
        assert part in found[0]
    assert found[0].endswith("larger device; it holds rank 1 in the last 4 of 4 blocks")


@pytest.mark.parametrize(("blocks", "said"), [(3, "; it holds rank 1 in the last 3 of 4 blocks"), (0, "larger device")])
def test_what_is_too_small_for_all_layers_is_told_how_deep_it_can_train(blocks, said):
    room = memory(from_block(4 - blocks, rank=1)) if blocks else memory(from_block(3, rank=1)) - 1
    tight = replace(SLOW, memory_bytes=float(room))
    (found,) = too_small([from_block(0)], [device(tight)], model=SMALL, layers=LAYERS, dense_parameters=11)
    assert found.endswith(said)


def test_what_just_fits_is_not_named():
    plan = from_block(0)
    exact = replace(SLOW, memory_bytes=float(memory(plan)))
    assert too_small([plan], [device(exact)], model=SMALL, layers=LAYERS, dense_parameters=11) == []


@given(shallow=st.integers(0, 4), deep=st.integers(0, 4), name=st.sampled_from(sorted(PROFILES)))
def test_a_deeper_plan_is_never_faster_nor_smaller(shallow, deep, name):
    deep, shallow = sorted((deep, shallow))
    assert seconds(from_block(deep), PROFILES[name]) >= seconds(from_block(shallow), PROFILES[name])
    assert memory(from_block(deep)) >= memory(from_block(shallow))


@given(low=st.integers(1, 64), high=st.integers(1, 64), lowest=st.integers(0, 3))
def test_a_higher_rank_never_needs_less_memory(low, high, lowest):
    low, high = sorted((low, high))
    assert memory(from_block(lowest, rank=high)) >= memory(from_block(lowest, rank=low))
