"""Tasks and updates as messages: nothing is lost, nothing travels twice, and broken ones say so."""

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank.adapter import Adapter
from anyrank.engine import begin, rounds
from anyrank.errors import RecordError
from anyrank.federation import Failure, Fold, Method, Spec, Task, Update
from anyrank.flower.letter import Letter
from anyrank.messages import _LARGEST_HEADER, _deflated, pack_task, pack_update, unpack_task, unpack_update
from anyrank.methods import METHODS
from anyrank.topology import TOPOLOGIES
from anyrank.wire import bytes_down, bytes_up, nbytes, pack
from federations import assert_close, assert_same, plan_for, random_adapter
from test_matrix import WORKING
from toy import FLEET, SPEC, Clients, federation

PLAN = plan_for(SPEC, "ann", 2)
START = random_adapter(SPEC, PLAN.ranks, "start")
TASK = Task("train", 3, PLAN, START)
UPDATE = Update("ann", 3, random_adapter(SPEC, PLAN.ranks, "trained"), 12, {"loss": 0.5, "examples": 8.0})
FEDAVG = METHODS["fedavg"]()


@dataclass
class ByMessage:
    """Linear clients to whom tasks come as bytes, and whose updates leave as bytes; each keeps its folds."""

    method: Method
    spec: Spec
    inner: Clients
    held: dict[str, dict[int, Fold]] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    expected_down: int = 0
    expected_up: int = 0

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        for task in tasks:
            client = task.plan.client
            packed = pack_task(task, self.spec)
            received = unpack_task(packed, self.spec, self.method, self.held.get(client, {}))
            if task.kind == "train":  # as the engine keeps count of who holds what
                self.held[client] = {fold.number: fold for fold in received.folds}
            (update,) = self.inner.run([received])
            assert isinstance(update, Update)
            back, lost = pack_update(received, update)
            assert not lost
            self.down, self.expected_down = self.down + len(packed), self.expected_down + bytes_down(task)
            self.up, self.expected_up = self.up + len(back), self.expected_up + bytes_up(task, update)
            yield unpack_update(back, task)


@pytest.mark.parametrize(("name", "topology"), WORKING)
def test_a_run_by_messages_is_the_run(name, topology):
    """Also of methods whose factors stay where they are, whose products are folded, whose clients keep a part."""
    method = METHODS[name]()
    plain = federation(method, TOPOLOGIES[topology]())
    carried = replace(plain, transport=ByMessage(method, SPEC, Clients(method)))
    whole = list(rounds(plain, begin(plain, method.init(SPEC), FLEET)))
    found = list(rounds(carried, begin(carried, method.init(SPEC), FLEET)))
    for one, other in zip(whole, found, strict=True):
        same = {"bytes_down", "bytes_up", "steps", "planned_ranks", "planned_blocks", "returned_ranks", "rejected"}
        assert {key: one.record[key] for key in same} == {key: other.record[key] for key in same}
    for layer, part in whole[-1].state.whole.layers.items():
        assert_close(found[-1].state.whole.layers[layer].product, part.product)
    transport = carried.transport
    assert isinstance(transport, ByMessage)
    exchanges = len(transport.inner.asked)
    assert transport.down <= transport.expected_down + 1000 * exchanges
    assert transport.up <= transport.expected_up + 1000 * exchanges


def test_a_large_task_is_hardly_larger_than_its_tensors():
    layers = tuple(
        replace(SPEC.layers[0], name=f"model.layers.{i}.self_attn.q_proj", d_in=256, d_out=256) for i in range(64)
    )
    spec = replace(SPEC, layers=layers)
    plan = plan_for(spec, "ann", 16)
    task = Task("train", 1, plan, random_adapter(spec, plan.ranks, "start"))
    update = Update("ann", 1, task.start, 10, {"loss": 1.0} | {f"fisher {layer.name}": 1.0 for layer in layers})
    numbers = 4 * task.start.num_parameters
    assert len(pack_task(task, spec)) < 1.02 * numbers
    assert len(pack_update(task, update)[0]) < 1.02 * numbers
    assert len(pack_task(task, spec, compression="fp16")) < 0.51 * numbers
    assert len(pack_update(task, update, compression="int8")[0]) < 0.28 * numbers


def test_the_header_of_an_update_may_be_far_larger_than_that_of_a_model_of_80_blocks():
    names = [f"base_model.model.model.layers.{i}.self_attn.{part}_proj" for i in range(80) for part in "qkvoabc"]
    spec = replace(SPEC, layers=tuple(replace(SPEC.layers[0], name=name, d_in=2, d_out=2) for name in names))
    plan = plan_for(spec, "ann", 1)
    start = random_adapter(spec, plan.ranks, "start")
    packed = pack({"adapter": start.tensors()}, {"metrics": {f"fisher {name}": 0.123456789012345 for name in names}})
    assert 8 * int.from_bytes(packed[:8], "little") < _LARGEST_HEADER["update"]


def test_names_and_shapes_of_small_tensors_take_hardly_any_room():
    names = [f"encoder.layer.{i}.attention.self.{part}" for i in range(12) for part in ("query", "key", "value")]
    spec = replace(SPEC, layers=tuple(replace(SPEC.layers[0], name=name, d_in=64, d_out=64) for name in names))
    plan = plan_for(spec, "ann", 1)
    task = Task("train", 1, plan, random_adapter(spec, plan.ranks, "start"))
    numbers = 4 * task.start.num_parameters
    assert len(pack_task(task, spec)) < numbers + 2000
    assert len(pack_update(task, Update("ann", 1, task.start, 10, {"loss": 1.0}))[0]) < numbers + 2000


def test_a_header_that_would_fill_the_memory_is_not_inflated():
    head = zlib.compress(b"x" * 5_000_000)
    with pytest.raises(RecordError, match="too large, or not whole"):
        unpack_update(len(head).to_bytes(8, "little") + head, TASK)


@given(st.sampled_from(["fp16", "int8"]), st.integers(0, 10))
def test_what_compression_loses_of_a_change_is_added_to_the_next(compression, seed):
    """Over many rounds the sum of what arrives is the sum of what was to arrive, but for the last loss."""
    lost, arrived, meant = {}, 0.0, 0.0
    for round in range(6):
        task = replace(TASK, round=round, start=random_adapter(SPEC, PLAN.ranks, "start", seed, round))
        update = replace(UPDATE, round=round, adapter=random_adapter(SPEC, PLAN.ranks, "trained", seed, round))
        packed, lost = pack_update(task, update, compression=compression, lost=lost)
        back = unpack_update(packed, task)
        start, sent, came = (adapter.tensors() for adapter in (task.start, update.adapter, back.adapter))
        name = "B/" + SPEC.layers[0].name
        meant, arrived = meant + sent[name] - start[name], arrived + came[name] - start[name]
        assert (came[name] - sent[name]).abs().max() < (0.1 if compression == "int8" else 1e-2)
    assert_close(arrived + lost[name], meant, 1e-4)


def test_a_start_that_was_rounded_on_its_way_changes_nothing_that_was_not_trained():
    """A client that returns what it received returns, to the server, what the server sent."""
    received = unpack_task(pack_task(TASK, SPEC, compression="fp16"), SPEC, FEDAVG, {})
    assert any(
        not torch.equal(a, b) for a, b in zip(received.start.tensors().values(), START.tensors().values(), strict=True)
    )
    packed, _ = pack_update(received, replace(UPDATE, adapter=received.start), compression="int8")
    assert_same(unpack_update(packed, TASK).adapter, START)


def test_clients_that_prune_may_compress():
    smaller = random_adapter(SPEC, dict.fromkeys(PLAN.ranks, 1), "pruned")
    packed, _ = pack_update(
        TASK, replace(UPDATE, adapter=smaller), compression="int8", lost={"A/block.0.q": torch.ones(2, 6)}
    )
    back = unpack_update(packed, TASK).adapter
    assert back.ranks == smaller.ranks
    for name, tensor in back.tensors().items():
        assert_close(tensor, smaller.tensors()[name], 0.05)


def test_diverged_numbers_arrive_as_they_are():
    """So that they are rejected for what they are."""
    broken = UPDATE.adapter.map(lambda tensor: tensor / 0)
    packed, lost = pack_update(TASK, replace(UPDATE, adapter=broken), compression="int8")
    assert not lost
    assert not any(t.isfinite().any() for t in unpack_update(packed, TASK).adapter.tensors().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_numbers_travel_as_they_are(dtype):
    start = START.map(lambda tensor: tensor.to(dtype))
    received = unpack_task(pack_task(replace(TASK, start=start), SPEC), SPEC, FEDAVG, {})
    assert_same(received.start, start)


@given(st.data())
def test_broken_messages_say_so_and_nothing_else(data):
    """Cut, changed, or of the wrong kind: a `RecordError`, or something that is checked further on."""
    packed = bytearray(data.draw(st.sampled_from([pack_task(TASK, SPEC), pack_update(TASK, UPDATE)[0]])))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    packed = bytes(packed[: data.draw(st.integers(0, len(packed)))])
    for read in (lambda: unpack_update(packed, TASK), lambda: unpack_task(packed, SPEC, FEDAVG, {})):
        with contextlib.suppress(RecordError):
            read()


def of_anything(groups: Mapping[str, Mapping[str, torch.Tensor]], **changes: object) -> bytes:
    return _deflated(pack(groups, {"round": 3, "num_examples": 12, "metrics": {"loss": 0.5}} | changes))


INF, DEEP = float("inf"), json.loads("[" * 400 + "]" * 400)
ODD = [INF, -INF, float("nan"), 1.5, -1, True, None, "3", [3], {"3": 3}, DEEP]


@pytest.mark.parametrize("name", ["round", "num_examples"])
@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:10])
def test_counts_of_an_update_are_whole_numbers(name, value):
    with pytest.raises(RecordError, match="not an update of ours"):
        unpack_update(of_anything({"adapter": START.tensors()}, **{name: value}), TASK)


@pytest.mark.parametrize("metrics", [None, [1], 3, {"loss": None}, {"loss": "1"}, {"loss": True}, {"loss": 10**400}])
def test_metrics_are_numbers(metrics):
    with pytest.raises(RecordError, match="not an update of ours"):
        unpack_update(of_anything({}, metrics=metrics), TASK)


def test_metrics_that_are_not_finite_are_for_the_check_of_updates():
    assert unpack_update(of_anything({}, metrics={"loss": INF}), TASK).metrics == {"loss": INF}


@pytest.mark.parametrize("group", ["adapter", "change"])
@pytest.mark.parametrize("shape", [(), (2,), (2, 1), (1000, 6), (2, 1, 6)])
@pytest.mark.parametrize("up", ["AB", "A", "B"])
def test_tensors_of_any_shape_are_recognised_or_left_to_the_check_of_updates(group, shape, up):
    """Also those beside which a factor that did not travel is completed."""
    task = replace(TASK, plan=replace(PLAN, up=up))
    for kind in ("A", "B", "dense"):
        name = "dense/head" if kind == "dense" else f"{kind}/{SPEC.layers[0].name}"
        with contextlib.suppress(RecordError):
            back = unpack_update(of_anything({group: {**START.tensors(), name: torch.ones(shape)}}), task).adapter
            assert group == "adapter"
            assert back.tensors()[name].shape == shape


@pytest.mark.parametrize(
    ("name", "shape", "scale"),
    [
        ("A/block.0.q", (2, 1), (1, 6)),
        ("A/block.0.q", (2, 6), (1, 6)),
        ("dense/head", (1000, 1), (1, 1000)),
        ("dense/none", (1000, 1), (1, 1000)),
        ("B/none", (1000, 1), (1000, 1)),
    ],
)
def test_scales_do_not_make_much_of_little(name, shape, scale):
    change = {name: torch.ones(shape, dtype=torch.int8), f"scale of {name}": torch.ones(scale)}
    with pytest.raises(RecordError, match=r"has shape .* expected"):
        unpack_update(of_anything({"change": change}), TASK)


@pytest.mark.parametrize("name", ["kind", "round", "held", "phase", "ranks", "folds", "steps", "slots", "scale", "up"])
@pytest.mark.parametrize("value", [*ODD[:-1], {}, [INF]], ids=lambda value: repr(value)[:10])
def test_a_task_may_hold_anything(name, value):
    header = {"kind": "train", "round": 3, "phase": 0, "held": 0, "folds": [], "ranks": [2, 2]}
    plan = {"client": "ann", "steps": 2, "slots": None, "scale": 1.0, "train": "AB", "down": "AB", "up": "AB"}
    good = _deflated(pack({"start": START.tensors()}, {**header, "plan": plan}))
    assert unpack_task(good, SPEC, FEDAVG, {}).plan == PLAN
    (header if name in header else plan)[name] = value
    if (name, repr(value)) in [("slots", "None"), ("slots", "[3]"), ("slots", "{}"), ("folds", "{}")] or (
        name == "scale" and isinstance(value, float | int) and value is not True
    ):
        return
    with pytest.raises(RecordError, match="not a task of ours"):
        unpack_task(_deflated(pack({"start": START.tensors()}, {**header, "plan": plan})), SPEC, FEDAVG, {})


def test_lists_in_lists_in_lists_are_no_message():
    head = b"[" * 100_000
    with pytest.raises(ValueError, match="not a letter"):
        Letter.unpacked(len(head).to_bytes(8, "little") + head)
    with pytest.raises(RecordError):
        unpack_update(_deflated(len(head).to_bytes(8, "little") + head), TASK)


def test_a_fold_that_nobody_has_is_missed():
    task = replace(TASK, folds=(Fold(1, START), Fold(2, START)), held=1)
    with pytest.raises(RecordError, match="fold 1"):
        unpack_task(pack_task(task, SPEC), SPEC, FEDAVG, {})
    found = unpack_task(pack_task(task, SPEC), SPEC, FEDAVG, {1: Fold(1, Adapter({}))})
    assert [fold.number for fold in found.folds] == [1, 2]
    assert found.folds[0].adapter.num_parameters == 0
    assert nbytes(START) < len(pack_task(task, SPEC)) < 2.9 * nbytes(START)
