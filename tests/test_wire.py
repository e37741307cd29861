"""Adapters as bytes, and what is let into a round."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.errors import RecordError, UpdateRejected
from anyrank.federation import Task, Update
from anyrank.wire import check_norms, check_update, decode, encode, nbytes, norms
from federations import (
    Setup,
    assert_same,
    low_rank,
    plan_for,
    random_adapter,
    reply,
    setups,
    spec_of,
)

SPEC = spec_of(Setup())
PLAN = plan_for(SPEC, "ann", 2)
START = random_adapter(SPEC, PLAN.ranks, "start")
TASK = Task("train", 3, PLAN, START)
TRAINED = random_adapter(SPEC, PLAN.ranks, "trained")


# --- bytes --------------------------------------------------------------------------------------------------------


@given(setups(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_what_is_unpacked_is_what_was_packed(setup, dtype):
    spec = spec_of(setup)
    plan = plan_for(spec, "ann", max(setup.ranks))
    adapters = {who: random_adapter(spec, plan.ranks, who, dtype=dtype) for who in ("adapter", "extra: odd/name")}
    header = {"round": 3, "ranks": {"ann": 2}, "target": None, "text": "ä \u2028 \"'"}
    packed = encode(adapters, header)
    back, found = decode(packed)
    assert found == header
    assert set(back) == set(adapters)
    for name, adapter in adapters.items():
        assert_same(back[name], adapter)
    assert encode(back, found) == packed
    assert encode(dict(reversed(adapters.items())), dict(reversed(header.items()))) == packed


def test_an_empty_adapter_survives():
    back, _ = decode(encode({"adapter": Adapter({})}, {}))
    assert back["adapter"].num_parameters == 0


def test_the_order_of_layers_survives():
    layers = {name: low_rank(rank=1, d_in=2, d_out=3, key=(name,)) for name in ("z", "a", "m")}
    assert list(decode(encode({"adapter": Adapter(layers)}, {}))[0]["adapter"].layers) == ["z", "a", "m"]


def test_views_and_transposes_and_shared_tensors_can_be_packed():
    # A client that returns the prefix it was sent shares memory with the server's adapter.
    prefix = Adapter({name: lowrank.truncate(part, 1) for name, part in START.layers.items()})
    turned = Adapter({"t": LowRank(START.layers["layer 0"].B.T, START.layers["layer 0"].A.T)})
    trained = START.map(lambda tensor: tensor.clone().requires_grad_())
    adapters = {"a": START, "b": START, "prefix": prefix, "turned": turned, "trained": trained}
    back, _ = decode(encode(adapters, {}))
    for name in ("a", "b", "prefix", "turned"):
        assert_same(back[name], adapters[name])
    assert_same(back["trained"], START)
    assert not any(tensor.requires_grad for tensor in back["trained"].tensors().values())


@given(setups(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["AB", "A", "B", ""]))
def test_nbytes_is_the_length_of_what_travels(setup, dtype, factors):
    spec = spec_of(setup)
    adapter = random_adapter(spec, plan_for(spec, "ann", max(setup.ranks)).ranks, dtype=dtype)
    travels = {
        f"adapter:{name}": tensor
        for name, tensor in adapter.tensors().items()
        if name.startswith("dense/") or name[0] in factors
    }
    order = {"adapter": [name.partition(":")[2] for name in travels]}
    metadata = {"anyrank": json.dumps({"header": {}, "order": order}, sort_keys=True)}
    assert nbytes(adapter, factors) == len(save(travels, metadata=metadata))
    if factors == "AB":
        assert nbytes(adapter) == len(encode({"adapter": adapter}, {}))


def test_nbytes_tells_names_shapes_and_dtypes_apart():
    part = low_rank(rank=2, d_in=5, d_out=5, key=("part",))
    for other in (
        Adapter({"query": part}),
        Adapter({"q": part}, {"head": torch.ones(3)}),
        Adapter({"q": lowrank.truncate(part, 1)}),
        Adapter({"q": part.map(torch.Tensor.half)}),
        Adapter({"q": LowRank(part.B.T, part.A.T)}),
        Adapter({}),
        Adapter({"größer": part}),
    ):
        assert nbytes(other) == len(encode({"adapter": other}, {}))


def test_nbytes_is_hardly_more_than_the_numbers():
    numbers = 4 * START.num_parameters
    assert numbers < nbytes(START) < numbers + 2000
    halved = START.map(torch.Tensor.half)
    assert nbytes(START) - nbytes(halved) == pytest.approx(numbers / 2, abs=20)


PACKED = encode({"adapter": START}, {"round": 3})


def test_every_truncation_is_recognised():
    for length in range(len(PACKED)):
        with pytest.raises(RecordError, match="not a complete anyrank file"):
            decode(PACKED[:length])


@given(st.binary(min_size=1, max_size=40))
def test_a_longer_file_is_recognised(more):
    with pytest.raises(RecordError):
        decode(PACKED + more)


@given(st.binary(max_size=200))
def test_garbage_is_recognised(garbage):
    with pytest.raises(RecordError):
        decode(garbage)


@given(st.data())
def test_a_damaged_header_is_recognised_or_harmless(data):
    length = int.from_bytes(PACKED[:8], "little")
    position, byte = data.draw(st.integers(0, 8 + length - 1)), data.draw(st.integers(0, 255))
    damaged = PACKED[:position] + bytes([byte]) + PACKED[position + 1 :]
    try:
        back, _ = decode(damaged)
    except RecordError:
        return
    assert all(isinstance(adapter, Adapter) for adapter in back.values())


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


FLAT = {f"adapter:{name}": tensor for name, tensor in START.tensors().items()}
FOREIGN = {
    "empty": b"",
    "no metadata": save(FLAT),
    "another program's metadata": save(FLAT, metadata={"format": "pt"}),
    "metadata that is no JSON": save(FLAT, metadata={"anyrank": "{"}),
    "metadata that is a number": save(FLAT, metadata={"anyrank": "3"}),
    "metadata that is a list": save(FLAT, metadata={"anyrank": "[]"}),
    "no order": save(FLAT, metadata={"anyrank": '{"header": {}}'}),
    "an order that is a list": save(FLAT, metadata={"anyrank": '{"header": {}, "order": []}'}),
    "an order of a number": save(FLAT, metadata={"anyrank": '{"header": {}, "order": {"adapter": 1}}'}),
    "no header": save(FLAT, metadata={"anyrank": json.dumps({"order": {}})}),
    "a tensor that is not there": save(
        FLAT, metadata={"anyrank": json.dumps({"header": {}, "order": {"adapter": ["A/none"]}})}
    ),
    "a factor without its partner": save(
        FLAT, metadata={"anyrank": json.dumps({"header": {}, "order": {"adapter": ["A/layer 0"]}})}
    ),
    "names that are not ours": save(
        {"adapter:q.weight": torch.ones(2)},
        metadata={"anyrank": json.dumps({"header": {}, "order": {"adapter": ["q.weight"]}})},
    ),
    "a header that is a list": framed(b"[]"),
    "a header nested too deeply": framed(b"[" * 100_000),
    "not UTF-8": framed(b"\xff\xfe{}"),
    "a zip file": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_files_are_recognised(content):
    with pytest.raises(RecordError, match="not a complete anyrank file"):
        decode(content)


# --- what is let in -----------------------------------------------------------------------------------------------


def with_tensor(name, tensor, *, partner=None):
    flat = {**TRAINED.tensors(), name: tensor}
    if partner:
        flat |= partner
    return Adapter.from_tensors(flat)


def at_rank(rank, layer="layer 0"):
    old = TRAINED.layers[layer]
    new = low_rank(rank=rank, d_in=old.A.shape[1], d_out=old.B.shape[0], key=("other rank",))
    return Adapter({**TRAINED.layers, layer: new}, TRAINED.dense)


def poisoned(name, value):
    tensor = TRAINED.tensors()[name].clone()
    tensor.view(-1)[-1] = value
    return with_tensor(name, tensor)


def without(name):
    layers = {key: part for key, part in TRAINED.layers.items() if key != name}
    return Adapter(layers, {key: tensor for key, tensor in TRAINED.dense.items() if key != name})


def wider(layer):
    part = TRAINED.layers[layer]
    return Adapter({**TRAINED.layers, layer: LowRank(torch.cat([part.A, part.A], dim=1), part.B)}, TRAINED.dense)


NAN, INF = float("nan"), float("inf")
BAD = {
    "NaN in A": (poisoned("A/layer 0", NAN), "A/layer 0", "not finite"),
    "inf in B": (poisoned("B/layer 1", INF), "B/layer 1", "not finite"),
    "-inf in the head": (poisoned("dense/head", -INF), "dense/head", "not finite"),
    "d_in of another layer": (wider("layer 1"), "A/layer 1", "has shape"),
    "a head of another shape": (with_tensor("dense/head", torch.ones(3, 2)), "dense/head", "has shape"),
    "a head of another size": (with_tensor("dense/head", torch.ones(6)), "dense/head", "has shape"),
    "another dtype": (TRAINED.map(torch.Tensor.double), "A/layer 0", "has dtype"),
    "a head of another dtype": (with_tensor("dense/head", torch.ones(2, 3).half()), "dense/head", "has dtype"),
    "a rank above the plan": (at_rank(3), "A/layer 0", "above the planned 2"),
    "a rank above the plan further on": (at_rank(3, "layer 1"), "A/layer 1", "above the planned 2"),
    "no slots at all": (at_rank(0), "A/layer 0", "has rank 0"),
    "a missing layer": (without("layer 1"), "A/layer 1", "missing"),
    "a missing head": (without("head"), "dense/head", "missing"),
    "an extra layer": (
        Adapter({**TRAINED.layers, "layer 9": TRAINED.layers["layer 0"]}, TRAINED.dense),
        "A/layer 9",
        "was not asked for",
    ),
    "an extra dense tensor": (with_tensor("dense/bias", torch.ones(2)), "dense/bias", "was not asked for"),
    "nothing": (Adapter({}), "A/layer 0", "missing"),
}


@pytest.mark.parametrize("may_prune", [False, True])
@pytest.mark.parametrize(("adapter", "tensor", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_updates_are_rejected_by_client_and_tensor(adapter, tensor, reason, may_prune):
    with pytest.raises(UpdateRejected, match=reason) as caught:
        check_update(TASK, reply(TASK, adapter), may_prune=may_prune)
    assert (caught.value.client, caught.value.tensor) == ("ann", tensor)
    assert str(caught.value).startswith(f"client ann: {tensor}: ")


@pytest.mark.parametrize("may_prune", [False, True])
def test_a_good_update_is_let_in(may_prune):
    check_update(TASK, reply(TASK, TRAINED), may_prune=may_prune)
    check_update(TASK, reply(TASK, START), may_prune=may_prune)


def test_large_numbers_whose_sum_overflows_are_let_in():
    large = TRAINED.map(lambda tensor: torch.full_like(tensor, 3e38))
    check_update(TASK, reply(TASK, large), may_prune=False)


def test_a_rank_below_the_plan_is_for_methods_that_prune():
    check_update(TASK, reply(TASK, at_rank(1)), may_prune=True)
    with pytest.raises(UpdateRejected, match="has rank 1; planned was 2") as caught:
        check_update(TASK, reply(TASK, at_rank(1)), may_prune=False)
    assert caught.value.tensor == "A/layer 0"


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1.7e308, -1e30])
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_metrics_must_be_finite(metric, value):
    with pytest.raises(UpdateRejected, match="expected a finite number") as caught:
        check_update(TASK, Update("ann", 3, TRAINED, 1, {"loss": 1.0, metric: value}), may_prune=False)
    assert caught.value.tensor == metric


@pytest.mark.parametrize(
    ("update", "culprit"),
    [
        (Update("ann", 3, None, 1, {"loss": 1.0}), "A/layer 0"),
        (Update("ann", 3, TRAINED, 1, {}), "loss"),
        (Update("ann", 2, TRAINED, 1, {"loss": 1.0}), "round"),
    ],
    ids=["without an adapter", "without a loss", "of another round"],
)
def test_an_incomplete_or_stale_reply_is_rejected(update, culprit):
    with pytest.raises(UpdateRejected) as caught:
        check_update(TASK, update, may_prune=False)
    assert caught.value.tensor == culprit


# --- norms --------------------------------------------------------------------------------------------------------


def of_norm(norm, layer="q"):
    """An adapter whose only product has the given norm."""
    return Adapter({layer: LowRank(torch.tensor([[1.0, 0]]), torch.tensor([[norm], [0]]))})


def checked(limit, **adapters):
    return check_norms({c: norms(adapter) for c, adapter in adapters.items()}, limit)


@given(setups())
def test_norms_are_those_of_products_slots_and_dense_tensors(setup):
    adapter = random_adapter(spec_of(setup), plan_for(spec_of(setup), "ann", max(setup.ranks)).ranks)
    expected = {f"dense/{name}": tensor.norm() for name, tensor in adapter.dense.items()}
    for name, part in adapter.layers.items():
        expected[name] = part.product.norm()
        expected[f"A/{name}"] = part.A.norm(dim=1).max()
        expected[f"B/{name}"] = part.B.norm(dim=0).max()
    assert norms(adapter) == {name: pytest.approx(float(norm), rel=1e-5) for name, norm in expected.items()}


@pytest.mark.parametrize(
    ("by_client", "rejected"),
    [
        ({"a": 1.0, "b": 1.0, "c": 10.0}, []),  # exactly at the limit
        ({"a": 1.0, "b": 1.0, "c": 10.5}, ["c"]),
        ({"a": 1.0, "b": 1.0, "c": 3.0, "d": 20.0}, []),  # of four the median is between the middle two
        ({"a": 1.0, "b": 1.0, "c": 3.0, "d": 20.5}, ["d"]),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 99.0, "e": 50.0}, ["d", "e"]),
        ({"a": 1.0, "b": 1e9}, []),  # of two, none is over twice the median
        ({"a": 1e9}, []),
        ({"a": 0.0, "b": 0.0, "c": 5.0}, []),  # before anyone has a product there is nothing to compare with
        ({"a": 0.0, "b": 1.0, "c": 1.0}, []),
        ({}, []),
    ],
)
def test_norms_over_the_limit_times_the_median_are_rejected(by_client, rejected):
    found = checked(10.0, **{client: of_norm(norm) for client, norm in by_client.items()})
    assert sorted(found) == rejected
    for client, error in found.items():
        assert (error.client, error.tensor) == (client, "q")
        assert "over 10 times the round's median" in error.reason


@pytest.mark.parametrize("others", [{}, {"b": 1.0}, {"b": 1.0, "c": 1.0}, {"b": 0.0, "c": 0.0}])
def test_a_norm_that_overflows_is_rejected_whatever_the_others(others):
    # Both factors are finite, their product is not.
    huge = Adapter({"q": LowRank(torch.full((1, 2), 1e30), torch.full((2, 1), 1e30))})
    found = checked(10.0, a=huge, **{client: of_norm(norm) for client, norm in others.items()})
    assert list(found) == ["a"]
    assert "not finite" in found["a"].reason


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_far_too_large_is_rejected_though_the_product_is_not(factor):
    """Such a one alone would carry away the mean of the factors."""
    generator = torch.Generator().manual_seed(0)
    ranks = {"weak": 1, "middle": 8, "strong": 64}
    clients = {
        client: LowRank(torch.randn(rank, 100, generator=generator), torch.randn(100, rank, generator=generator))
        for client, rank in ranks.items()
    }
    assert not checked(4.0, **{client: Adapter({"q": part}) for client, part in clients.items()})
    A, B = clients["weak"].A, clients["weak"].B
    clients["weak"] = LowRank(A * 1e4, B / 1e4) if factor == "A" else LowRank(A / 1e4, B * 1e4)
    found = checked(1000.0, **{client: Adapter({"q": part}) for client, part in clients.items()})
    assert {client: error.tensor for client, error in found.items()} == {"weak": f"{factor}/q"}
    assert "largest slot" in found["weak"].reason


def test_without_slots_there_are_no_norms():
    assert norms(Adapter({"q": LowRank(torch.zeros(0, 3), torch.zeros(2, 0))}, {"head": torch.ones(4)})) == {
        "dense/head": 2.0
    }


def test_norms_are_compared_layer_by_layer():
    def adapter(q, v):
        return Adapter({**of_norm(q, "q").layers, **of_norm(v, "v").layers})

    found = checked(10.0, a=adapter(1.0, 100.0), b=adapter(1.0, 100.0), c=adapter(50.0, 100.0))
    assert {client: error.tensor for client, error in found.items()} == {"c": "q"}


@pytest.mark.parametrize(
    ("by_client", "rejected"),
    [
        ({"a": 1.0, "b": 1.0, "c": 10.0}, []),
        ({"a": 1.0, "b": 1.0, "c": 10.5}, ["c"]),
        ({"a": 0.0, "b": 0.0, "c": 5.0}, []),
        ({"a": 1.0, "b": 3e38}, ["b"]),  # its square overflows
        ({"a": 1.0}, []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_tensors_have_norms_too(by_client, rejected, dtype):
    heads = {client: torch.tensor([norm, 0], dtype=dtype) for client, norm in by_client.items()}
    found = checked(10.0, **{client: Adapter(of_norm(1.0).layers, {"head": head}) for client, head in heads.items()})
    assert {client: error.tensor for client, error in found.items()} == dict.fromkeys(rejected, "dense/head")
    assert all(str(error.reason).startswith("its norm") for error in found.values())


def test_the_norm_of_many_halves_is_one_that_halves_cannot_hold():
    head = torch.full((1000, 1000), 100.0, dtype=torch.float16)
    assert norms(Adapter({}, {"head": head})) == {"dense/head": pytest.approx(1e5, rel=1e-2)}
