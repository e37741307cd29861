"""How many processes there are and who shares a pass: from sizes alone."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import compute
from anyrank.compute import _expected_longest, cohort_of, settled
from anyrank.config import ComputeTable
from anyrank.device import transformer_cost

TABLE = ComputeTable(threads=4, memory_gb=8.0)


def cost_of(*, batch_size: int, tokens: int, hidden: int = 384):
    return transformer_cost(
        matrix_parameters_per_block=12 * hidden**2,
        matrix_parameters_outside_blocks=0,
        num_blocks=6,
        hidden=hidden,
        heads=12,
        intermediate=4 * hidden,
        batch_size=batch_size,
        tokens=tokens,
        base_bytes=0,
    )


def settle(table: ComputeTable = TABLE, *, batch_size=4, lengths=(32,), clients=100, apart=False, hidden=384):
    cost = cost_of(batch_size=batch_size, tokens=max(lengths), hidden=hidden)
    return settled(
        table, cost=cost, dtype="float32", lengths=lengths, batch_size=batch_size, clients=clients, apart=apart
    )


def test_the_longest_of_some_examples_on_average():
    assert _expected_longest([7])(3) == 7
    assert _expected_longest([1, 3])(1) == 2
    assert _expected_longest([1, 3])(2) == pytest.approx(2.5)  # 1 with chance 1/4
    assert _expected_longest([2, 2, 2, 6])(2) == pytest.approx(2 * 9 / 16 + 6 * 7 / 16)


def test_small_batches_share_passes_and_large_ones_do_not():
    assert 2 < settle().cohort < 10
    assert settle(batch_size=64, lengths=(128,)).cohort == 1
    assert settle(hidden=4096).cohort == 1  # the calls take no time beside the arithmetic


def test_mixed_lengths_share_less():
    cost = cost_of(batch_size=4, tokens=128)
    alike, mixed = (
        cohort_of(32, cost=cost, speed=8e10, lengths=lengths, batch_size=4) for lengths in ([32], [8] * 15 + [128])
    )
    assert mixed < alike


@given(
    most=st.integers(1, 40),
    batch_size=st.integers(1, 32),
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=20),
)
def test_a_cohort_is_never_more_than_there_is_room_for(most, batch_size, lengths):
    cost = cost_of(batch_size=batch_size, tokens=max(lengths))
    assert 1 <= cohort_of(most, cost=cost, speed=8e10, lengths=lengths, batch_size=batch_size) <= most


def test_what_the_recipe_says_stands():
    asked = ComputeTable(threads=3, workers=2, cohort=5, memory_gb=1.0, prefix_cache_gb=0.5)
    assert settle(asked) == asked
    assert settle(asked, apart=True).cohort == 1


def test_memory_bounds_processes_and_passes():
    assert settle().workers == 4
    assert settle(clients=2).workers == 2
    of_a_client = cost_of(batch_size=4, tokens=32)
    needed = (of_a_client.working_bytes + 6 * of_a_client.block_activation_bytes) / 1e9
    tight = settle(ComputeTable(threads=4, memory_gb=2.5 * needed))
    assert (tight.workers, tight.cohort) == (2, 1)


def test_settling_what_is_settled_changes_nothing():
    once = settle(ComputeTable())
    assert once.threads == torch.get_num_threads()
    assert settle(once) == once


def test_only_linux_forks(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert settle().workers == 1


@pytest.mark.parametrize("used_before", [False, True])
def test_gpus_have_a_worker_each_and_are_asked_by_another_process(monkeypatch, used_before):
    asked_by = []

    def properties(device):
        asked_by.append(os.getpid())
        return SimpleNamespace(total_memory=16 * 10**9)

    monkeypatch.setattr(compute, "devices", lambda: [torch.device("cuda", 0), torch.device("cuda", 1)])
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used_before)
    plan = settle(ComputeTable())
    assert (plan.workers, plan.memory_gb) == (2, 8.0)
    # After the first use of CUDA this process can fork nobody who uses it, and may as well ask by itself.
    assert asked_by == [os.getpid()] * used_before
