"""Made-up federations: shapes, ranks and data sizes from hypothesis, numbers from a seeded generator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from anyrank.adapter import Adapter, LowRank
from anyrank.federation import (
    Device,
    Inbox,
    Layer,
    Method,
    ModelCost,
    Plan,
    Profile,
    Spec,
    State,
    Task,
    Update,
    make_task,
)
from anyrank.seeding import generator
from anyrank.wire import completed

PROFILE = Profile(forward_flops=1.0, backward_flops=1.0, memory_bytes=1e9, up_bps=1000.0, down_bps=1000.0)
COST = ModelCost(
    forward_flops=1,
    block_backward_flops=0,
    num_blocks=6,
    base_bytes=0,
    block_activation_bytes=0,
    working_bytes=0,
    tokens_per_step=1,
)  # a step takes one second


@dataclass(frozen=True)
class Setup:
    """What a federation is made from; `spare` slots of the server are above every client's rank."""

    shapes: tuple[tuple[int, int], ...] = ((4, 3), (3, 5))
    ranks: tuple[int, ...] = (1, 2, 2)
    sizes: tuple[int, ...] = (1, 2, 3)
    spare: int = 0
    seed: int = 0

    @property
    def server_rank(self) -> int:
        return max(self.ranks) + self.spare


@st.composite
def setups(draw, *, equal_ranks: bool = False, least: int = 1) -> Setup:
    """One to three layers, none square; one to five clients; ranks that repeat and pass the sides of a layer."""
    side = st.integers(2, 6)
    shape = st.tuples(side, side).filter(lambda sides: sides[0] != sides[1])
    shapes = draw(st.lists(shape, min_size=1, max_size=3))
    ranks = draw(st.lists(st.integers(1, 6), min_size=least, max_size=5))
    if equal_ranks:
        ranks = [ranks[0]] * len(ranks)
    sizes = draw(st.lists(st.integers(1, 100), min_size=len(ranks), max_size=len(ranks)))
    return Setup(tuple(shapes), tuple(ranks), tuple(sizes), draw(st.integers(0, 2)), draw(st.integers(0, 2**20)))


def low_rank(*, rank: int, d_in: int, d_out: int, key: Sequence[str | int], dtype=torch.float32) -> LowRank:
    rng = generator("low_rank", *key)
    A, B = torch.randn(rank, d_in, generator=rng), torch.randn(d_out, rank, generator=rng)
    return LowRank(A.to(dtype), B.to(dtype))


def spec_of(setup: Setup) -> Spec:
    layers = tuple(Layer(f"layer {i}", d_in, d_out, i) for i, (d_out, d_in) in enumerate(setup.shapes))
    levels = tuple(sorted({*setup.ranks, setup.server_rank}))
    return Spec(layers, levels, scale=2.0, seed=setup.seed, start=Adapter({}, {"head": torch.ones(2, 3)}), cost=COST)


def device(client: str, rank: int, *, num_examples: int = 1) -> Device:
    return Device(client, "any", PROFILE, rank, num_examples, steps=2)


def devices_of(setup: Setup) -> list[Device]:
    pairs = zip(setup.ranks, setup.sizes, strict=True)
    return [device(f"client {i}", rank, num_examples=size) for i, (rank, size) in enumerate(pairs)]


def weights_of(setup: Setup) -> list[float]:
    return [size / sum(setup.sizes) for size in setup.sizes]


def random_adapter(spec: Spec, ranks: Mapping[str, int], *key: str | int, dtype=torch.float32) -> Adapter:
    layers = {
        layer.name: low_rank(
            rank=ranks[layer.name], d_in=layer.d_in, d_out=layer.d_out, key=(spec.seed, layer.name, *key), dtype=dtype
        )
        for layer in spec.layers
        if layer.name in ranks
    }
    head = torch.randn(2, 3, generator=generator("head", spec.seed, *key)).to(dtype)
    return Adapter(layers, {"head": head})


def state_of(method: Method, setup: Setup, dtype=torch.float32) -> State:
    """A state in the middle of a run: as the method starts it, but with random factors, and a fold if it makes any.

    Factors that do not travel down are what they were at the start: everyone can work them out.
    """
    state = method.init(spec_of(setup))
    drawn = random_adapter(state.spec, state.adapter.ranks, "server", dtype=dtype)
    if method.claims.folds:
        one = {layer.name: 1 for layer in state.spec.layers}
        state = state.with_fold(random_adapter(state.spec, one, "fold", dtype=dtype).layers)
    down = method.assign(state, devices_of(setup))[0].down
    known = method.dispatch(state, Plan("server", state.adapter.ranks, steps=1)).layers
    layers = {
        name: LowRank(
            part.A if "A" in down else known[name].A.to(dtype), part.B if "B" in down else known[name].B.to(dtype)
        )
        for name, part in drawn.layers.items()
    }
    further = {name: t.to(dtype) for name, t in state.adapter.dense.items() if name not in drawn.dense}
    return state.with_adapter(Adapter(layers, {**drawn.dense, **further}))


def tasks_of(method: Method, setup: Setup, state: State) -> list[Task]:
    return [make_task(method, state, plan) for plan in method.assign(state, devices_of(setup))]


def reply(task: Task, adapter: Adapter, *, loss: float = 1.0, num_examples: int = 1) -> Update:
    return Update(task.plan.client, task.round, adapter, num_examples, {"loss": loss})


def inbox_of(method: Method, setup: Setup, state: State, *key: str | int) -> Inbox:
    """Everyone returns random numbers of the right shapes."""
    dtype = state.adapter.dense["head"].dtype
    return [
        (
            task,
            completed(
                task, reply(task, random_adapter(state.spec, task.plan.ranks, task.plan.client, *key, dtype=dtype))
            ),
        )
        for task in tasks_of(method, setup, state)
    ]


def echo_of(method: Method, setup: Setup, state: State) -> Inbox:
    """Everyone returns what they received."""
    return [(task, reply(task, task.start)) for task in tasks_of(method, setup, state)]


def plan_for(spec: Spec, client: str, rank: int) -> Plan:
    return Plan(client, {layer.name: rank for layer in spec.layers}, steps=2)


def one_layer(A, B, dtype=torch.float32) -> Adapter:
    """An adapter of a single layer `q` from nested lists."""
    return Adapter({"q": LowRank(torch.tensor(A, dtype=dtype), torch.tensor(B, dtype=dtype))})


def products(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: part.map(torch.Tensor.double).product for name, part in adapter.layers.items()}


def copied(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.tensors().items()}


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Close in the Frobenius norm, relative to the larger of the expected norm and 1."""
    assert found.shape == expected.shape
    distance = float((found.double() - expected.double()).norm())
    assert distance <= tolerance * max(1.0, float(expected.double().norm())), f"off by {distance:.3g}"


def assert_same(found: Adapter, expected: Adapter | Mapping[str, torch.Tensor]) -> None:
    """The same names in the same order, dtypes and bits."""
    wanted = expected.tensors() if isinstance(expected, Adapter) else expected
    assert list(found.tensors()) == list(wanted)
    for name, tensor in found.tensors().items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name


def assert_factors_close(found: Adapter, expected: Adapter, tolerance: float = 1e-5) -> None:
    assert list(found.tensors()) == list(expected.tensors())
    for name, tensor in found.tensors().items():
        assert_close(tensor, expected.tensors()[name], tolerance)


def assert_products_close(found: Adapter, expected: Adapter, tolerance: float = 1e-5) -> None:
    assert list(found.layers) == list(expected.layers)
    for name, product in products(found).items():
        assert_close(product, products(expected)[name], tolerance)
