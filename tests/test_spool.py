"""Updates on disk: the same numbers, read when they are asked for, and gone with the round."""

import subprocess
import sys

import pytest
import torch

from anyrank import lowrank, spool
from anyrank.adapter import Adapter, LowRank
from anyrank.errors import RoundFailed
from anyrank.spool import Spool, in_memory
from federations import Setup, assert_same, low_rank, random_adapter, spec_of

SPEC = spec_of(Setup())
RANKS = {layer.name: 2 for layer in SPEC.layers}


def adapter_of(client: str, dtype: torch.dtype = torch.float32) -> Adapter:
    return random_adapter(SPEC, RANKS, client, dtype=dtype)


@pytest.fixture
def on_disk(monkeypatch):
    """Nothing fits into memory."""
    monkeypatch.setattr(spool, "IN_MEMORY", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_is_read_is_what_was_kept(on_disk, dtype):
    adapters = [adapter_of(client, dtype) for client in ("ann", "bob", "cat")]
    with Spool() as kept:
        stored = [kept.keep(adapter) for adapter in adapters]
        for found, expected in reversed(list(zip(stored, adapters, strict=True))):
            assert_same(found, expected)
            assert_same(found, expected)  # again
            assert found.ranks == expected.ranks
            assert list(found.dense) == list(expected.dense)
            assert "head" in found.dense
            assert "neck" not in found.dense


def test_odd_tensors_come_back(on_disk):
    part = low_rank(rank=4, d_in=6, d_out=5, key=("odd",))
    layers = {
        "turned": LowRank(part.B.T, part.A.T),
        "some slots": lowrank.take(part, (3, 1)),
        "none": low_rank(rank=0, d_in=6, d_out=5, key=()),
    }
    adapter = Adapter(layers, {"one number": torch.tensor(3.0), "trained": torch.ones(2, requires_grad=True)})
    with Spool() as kept:
        found = in_memory(kept.keep(adapter))
    assert_same(found, adapter.map(torch.Tensor.detach))


def test_each_reading_is_a_copy_of_its_own(on_disk):
    with Spool() as kept:
        part = kept.keep(adapter_of("ann")).layers["layer 0"]
        part.A.zero_()
        assert torch.equal(part.A, adapter_of("ann").layers["layer 0"].A)


def test_algebra_takes_parts_on_disk(on_disk):
    parts = [adapter_of(client).layers["layer 0"] for client in ("ann", "bob")]
    with Spool() as kept:
        stored = [kept.keep(adapter_of(client)).layers["layer 0"] for client in ("ann", "bob")]
        for found, expected in (
            (lowrank.stack(stored, [0.3, 0.7]), lowrank.stack(parts, [0.3, 0.7])),
            (lowrank.padded_mean(stored, [0.3, 0.7], parts[0]), lowrank.padded_mean(parts, [0.3, 0.7], parts[0])),
            (lowrank.truncate(stored[0], 1), lowrank.truncate(parts[0], 1)),
        ):
            assert_same(Adapter({"q": found}), Adapter({"q": expected}))


def test_the_limit_is_on_all_updates_of_the_round_together(monkeypatch):
    adapters = [adapter_of(client) for client in ("ann", "bob", "cat")]
    monkeypatch.setattr(spool, "IN_MEMORY", 2 * sum(t.nbytes for t in adapters[0].tensors().values()))
    with Spool() as kept:
        assert [kept.keep(adapter) is adapter for adapter in adapters] == [True, True, False]
        assert kept.used
    with Spool() as kept:
        assert kept.keep(adapters[0]) is adapters[0]
        assert not kept.used


def test_what_is_on_disk_is_gone_at_the_end_also_after_an_error(on_disk, tmp_path):
    kept = Spool(tmp_path)
    stored = kept.keep(adapter_of("ann"))
    read = in_memory(stored)
    with pytest.raises(RoundFailed), kept:
        raise RoundFailed("nobody replied")
    assert list(tmp_path.iterdir()) == []
    assert_same(read, adapter_of("ann"))
    assert stored.ranks == RANKS  # known without reading
    with pytest.raises(ValueError, match="closed file"):
        _ = stored.layers["layer 0"].A


def test_a_killed_process_leaves_no_file(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import torch
from anyrank import spool
from anyrank.adapter import Adapter
spool.IN_MEMORY = 0
with spool.Spool(Path(sys.argv[1])) as kept:
    stored = kept.keep(Adapter({}, {"head": torch.ones(1000)}))
    assert stored.dense["head"].sum() == 1000
    print("kept", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout == "kept\n", done.stderr
    assert list(tmp_path.iterdir()) == []


PEAK = """
import sys
import torch
from anyrank import spool
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Layer, ModelCost, Plan, Spec, Task, Update
from anyrank.methods import METHODS

def peak():  # of this program: the resource module also counts what was in this process before it was started
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

method, clients, spool.IN_MEMORY = METHODS[sys.argv[1]](), int(sys.argv[2]), float(sys.argv[3])
layers = tuple(Layer(f"layer {i}", 768, 768, i) for i in range(12))
spec = Spec(layers, (16,), 1.0, 0, Adapter({}), ModelCost(1, 1, 12, 0, 0, 0, 1))
state = method.init(spec)
before, inbox = peak(), []
with spool.Spool() as kept:
    for i in range(clients):
        plan = Plan(f"client {i}", state.adapter.ranks, 1)
        task = Task("train", 1, plan, method.dispatch(state, plan))
        trained = {name: LowRank(part.A + i, torch.full_like(part.B, i)) for name, part in task.start.layers.items()}
        inbox.append((task, Update(plan.client, 1, kept.keep(Adapter(trained)), 1, {"loss": 1.0})))
    after = method.aggregate(state, inbox, [1 / clients] * clients)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rbla", "flexlora"])
def test_a_thousand_updates_need_little_more_memory_than_the_limit(method):
    """12 layers of 768 x 768 at rank 16: 1,125 MiB of updates, which are read about a thousand slots at a time."""

    def added(clients: int, limit: float) -> float:
        command = [sys.executable, "-c", PEAK, method, str(clients), str(limit)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert added(1000, float("inf")) > 1125
    assert added(1000, spool.IN_MEMORY) < spool.IN_MEMORY / 2**20 + 150
