"""Ways of local training: their equations on small numbers, what they promise, and a real model that learns with each."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer

from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Local, Task, make_task
from anyrank.job import load_recipe, prepare
from anyrank.local import LOCALS
from anyrank.local.beamlora import _weak, beamlora
from anyrank.local.lora_plus import lora_plus
from anyrank.local.lora_pro import lora_pro
from anyrank.local.lora_rite import lora_rite
from anyrank.local.rslora import rslora
from anyrank.seeding import generator
from anyrank.train import evaluate, train
from federations import assert_close, assert_products_close, assert_same, low_rank, one_layer
from tiny import recipe_toml, write_model, write_reviews

NAMES = ("rslora", "lora_plus", "lora_pro", "lora_rite", "beamlora")
names = pytest.mark.parametrize("name", NAMES)
F64 = torch.float64
sides = st.integers(2, 6)
ranks = st.integers(1, 6)
seeds = st.integers(0, 2**20)


def leaves(adapter: Adapter, *, train: str = "AB") -> Adapter:
    """A live adapter, as training makes one."""
    live = adapter.map(lambda tensor: tensor.clone().requires_grad_())
    for part in live.layers.values():
        part.A.requires_grad_("A" in train)
        part.B.requires_grad_("B" in train)
    return live


def give(tensor: torch.Tensor, grad: Any) -> None:
    """Set a gradient, as a backward pass would."""
    tensor.grad = torch.as_tensor(grad).to(tensor).reshape(tensor.shape).clone()


def after_backward(local: Local, live: Adapter, optimizer: Optimizer, step: int) -> None:
    """The rest of a local step."""
    if local.on_grad:
        local.on_grad(live, step)
    optimizer.step()
    if local.on_step:
        with torch.no_grad():
            local.on_step(live, optimizer, step)


def layer(d_out: int, d_in: int, rank: int, seed: int) -> tuple[LowRank, torch.Tensor]:
    """Factors in float64, and the gradient of a dense weight of their shape."""
    part = low_rank(rank=rank, d_in=d_in, d_out=d_out, key=("local", seed), dtype=F64)
    return part, torch.randn(d_out, d_in, generator=generator("gradient", seed), dtype=F64)


# What every way promises


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv")))
    return prepare(load_recipe(file))


def task_of(job, *, steps: int = 3, **changes) -> Task:
    state = job.method.init(job.spec)
    plans = job.method.assign(state, list(job.cohort.fleet.values()))
    plan = next(plan for plan in plans if plan.rank == 4)
    return make_task(job.method, state, replace(plan, steps=steps, **changes))


def trained(job, task: Task, local: Local, *, learning_rate: float = 1e-2) -> Adapter:
    training = replace(job.training, local=local, learning_rate=learning_rate)
    rng = generator("order")
    return train(job.model, task, task.start, job.problem.train, training=training, method=job.method, rng=rng)[0]


@names
def test_a_model_learns_and_what_is_sent_is_an_adapter_like_the_one_received(job, name):
    task = task_of(job, steps=24)
    rate = 2e-3 if name in ("lora_plus", "lora_rite") else 1e-2  # these two move further at the same rate
    adapter = trained(job, task, LOCALS[name](), learning_rate=rate)
    before, after = (evaluate(job.model, it, job.problem.test, training=job.training) for it in (task.start, adapter))
    assert after.loss < 0.8 * before.loss
    sent, received = adapter.tensors(), task.start.tensors()
    assert {key: (it.shape, it.dtype) for key, it in sent.items()} == {
        key: (it.shape, it.dtype) for key, it in received.items()
    }


@names
def test_a_frozen_factor_stays(job, name):
    task = task_of(job, train="B")
    adapter = trained(job, task, LOCALS[name]())
    for key, part in task.start.layers.items():
        assert torch.equal(adapter.layers[key].A, part.A)
        assert not torch.equal(adapter.layers[key].B, part.B)
    # What follows needs a B through which A can learn.
    task = replace(task_of(job, train="A"), start=adapter)
    again = trained(job, task, LOCALS[name]())
    for key, part in adapter.layers.items():
        assert_close(again.layers[key].B, part.B, 1e-6)
        assert not torch.equal(again.layers[key].A, part.A)


@names
def test_training_is_a_function_of_its_arguments_whoever_trained_before(job, name):
    local, task = LOCALS[name](), task_of(job, steps=6)
    first = trained(job, task, local)
    trained(job, task_of(job, steps=5), local)
    assert_same(trained(job, task, local), first)
    assert_same(task.start, task_of(job).start)


@names
def test_entering_and_leaving_at_once_changes_no_product(name):
    local = LOCALS[name]()
    received = Adapter({"q": layer(3, 5, 3, 0)[0], "v": layer(4, 2, 1, 1)[0]}, {"head": torch.ones(2, dtype=F64)})
    inner = local.enter(received)
    left = local.leave(inner)
    assert_products_close(left, received, 1e-12)
    assert list(left.dense) == ["head"]
    if local.form:
        assert_products_close(local.form(inner, torch.Generator()), received, 1e-12)


# rslora


@pytest.mark.parametrize(("rank", "c"), [(1, 4.0), (4, 2.0), (16, 1.0), (64, 0.5)])
def test_rslora_scales_by_the_root_of_the_rank(rank, c):
    local = rslora(rank=16)
    assert local.form
    part = LowRank(torch.ones(rank, 3), torch.full((2, rank), 2.0))
    inner = local.enter(Adapter({"q": part}))
    assert torch.equal(inner.layers["q"].B, torch.full((2, rank), 2.0 / c))
    assert torch.equal(inner.layers["q"].A, part.A)
    live = leaves(inner)
    formed = local.form(live, torch.Generator()).layers["q"]
    assert torch.equal(formed.B, part.B)
    # alpha / sqrt(r) in units of the run's scale, with the one alpha of all ranks: alpha = scale sqrt(16)
    assert c == math.sqrt(16) / math.sqrt(rank)
    formed.B.sum().backward()
    assert torch.equal(live.layers["q"].B.grad, torch.full((2, rank), c))
    assert_same(local.leave(inner), Adapter({"q": part}))


def test_rslora_is_lora_at_its_reference_rank(job):
    task = task_of(job)
    assert_same(trained(job, task, rslora(rank=4)), trained(job, task, LOCALS["lora"]()))
    apart = trained(job, task, rslora(rank=16))
    assert not torch.equal(next(iter(apart.layers.values())).B, next(iter(task.start.layers.values())).B)


def test_rslora_makes_b_move_in_proportion_under_adam():
    plain, local = LOCALS["lora"](), rslora(rank=4)
    assert local.form
    moved = []
    for way in (plain, local):
        live = leaves(way.enter(one_layer([[1.0, 2.0, 0.0]], [[1.0], [3.0]], F64)))
        used = way.form(live, torch.Generator()) if way.form else live
        optimizer = way.optimizer(live, 0.1, 0.0)
        (used.layers["q"].product * torch.tensor([[1.0, -2.0, 0.5], [0.5, 2.0, 1.0]], dtype=F64)).sum().backward()
        optimizer.step()
        moved.append(way.leave(live.map(torch.Tensor.detach)).layers["q"])
    assert_close(moved[1].A, moved[0].A, 1e-6)
    B = torch.tensor([[1.0], [3.0]], dtype=F64)
    assert_close(moved[1].B - B, 2 * (moved[0].B - B), 1e-6)


# lora_plus


def test_lora_plus_moves_b_at_a_multiple_of_the_rate():
    adapter = Adapter(one_layer([[1.0, 2.0]], [[0.0], [1.0], [2.0]], F64).layers, {"head": torch.zeros(2, dtype=F64)})
    live, local = leaves(adapter), lora_plus(ratio=8.0)
    optimizer = local.optimizer(live, 0.01, 0.5)
    for tensor in live.tensors().values():
        give(tensor, torch.ones_like(tensor))
    after_backward(local, live, optimizer, 0)
    # Adam's first step is the rate along the sign; the decay is the rate's share too.
    now = live.map(torch.Tensor.detach)
    assert_close(now.layers["q"].A, torch.tensor([[1.0, 2.0]], dtype=F64) * (1 - 0.005) - 0.01, 1e-8)
    assert_close(now.layers["q"].B, torch.tensor([[0.0], [1.0], [2.0]], dtype=F64) * (1 - 0.04) - 0.08, 1e-8)
    assert_close(now.dense["head"], torch.full((2,), -0.01, dtype=F64), 1e-8)


def test_lora_plus_with_ratio_one_is_lora(job):
    task = task_of(job)
    assert_same(trained(job, task, lora_plus(ratio=1.0)), trained(job, task, LOCALS["lora"]()))


# lora_pro


def adjusted(part: LowRank, G: torch.Tensor, *, scale: float = 2.0, train: str = "AB") -> LowRank:
    """A live pair whose gradients, those of `W + scale B A` under the gradient `G`, were adjusted."""
    live = leaves(Adapter({"q": part}), train=train).layers["q"]
    if "A" in train:
        give(live.A, scale * part.B.T @ G)
    if "B" in train:
        give(live.B, scale * G @ part.A.T)
    lora_pro().on_grad(Adapter({"q": live}), 0)
    return live


def implied(part: LowRank, live: LowRank, scale: float = 2.0) -> torch.Tensor:
    """How the adjusted gradients change W, in the paper's units."""
    change = torch.zeros(part.B.shape[0], part.A.shape[1], dtype=F64)
    if live.A.grad is not None:
        change += part.B @ live.A.grad
    if live.B.grad is not None:
        change += live.B.grad @ part.A
    return change * scale / scale**2


def projectors(part: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return part.B @ torch.linalg.pinv(part.B), torch.linalg.pinv(part.A) @ part.A


def test_lora_pro_on_small_numbers():
    part = LowRank(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0], [1.0]]))
    live = adjusted(part, torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    # grad_A = [8 8 8] and grad_B = [4 12]; B^T B = 2 and A A^T = 4, so that 6 X = -(1/2) 16
    assert_close(live.A.grad, torch.tensor([[4 - 8 / 3, 4.0, 4.0]]), 1e-6)
    assert_close(live.B.grad, torch.tensor([[-1 + 4 / 3], [1 + 4 / 3]]), 1e-6)


@given(d_out=sides, d_in=sides, rank=ranks, seed=seeds)
def test_lora_pro_implies_the_change_of_w_that_is_nearest_to_full_fine_tuning(d_out, d_in, rank, seed):
    part, G = layer(d_out, d_in, rank, seed)
    P_B, P_A = projectors(part)
    found = implied(part, adjusted(part, G))
    assert_close(found, P_B @ G + (G - P_B @ G) @ P_A, 1e-5)


@given(d_out=sides, d_in=sides, rank=st.integers(1, 2), seed=seeds)
def test_lora_pro_solves_the_sylvester_equation_and_picks_the_nearest_pair(d_out, d_in, rank, seed):
    part, G = layer(d_out, d_in, rank, seed)
    live, scale = adjusted(part, G), 2.0
    grad_A, grad_B = scale * part.B.T @ G, scale * G @ part.A.T
    half = torch.linalg.inv(part.B.T @ part.B) @ grad_A
    X = (live.A.grad - half) @ torch.linalg.pinv(part.A)
    left = part.B.T @ part.B @ X + X @ part.A @ part.A.T
    assert_close(left, -half @ part.A.T, 1e-6)
    # Any other X implies the same change of W and is further from the plain gradients.
    other = 0.1 * torch.randn(rank, rank, generator=generator("other", seed), dtype=F64)
    near = (live.A.grad - grad_A).square().sum() + (live.B.grad - grad_B).square().sum()
    A, B = live.A.grad + other @ part.A, live.B.grad - part.B @ other
    far = (A - grad_A).square().sum() + (B - grad_B).square().sum()
    assert_close(part.B @ A + B @ part.A, part.B @ live.A.grad + live.B.grad @ part.A, 1e-6)
    assert near <= far + 1e-9


def test_lora_pro_where_b_has_no_directions_yet():
    part, G = layer(4, 5, 3, 0)
    part = LowRank(part.A, torch.zeros_like(part.B))
    live = adjusted(part, G)
    assert not live.A.grad.any()
    assert_close(live.B.grad, 2.0 * G @ part.A.T @ torch.linalg.inv(part.A @ part.A.T), 1e-8)
    # Slots that the server has filled up with nothing: the identity holds there too.
    part = LowRank(part.A, torch.cat([torch.ones(4, 1, dtype=F64), torch.zeros(4, 2, dtype=F64)], dim=1))
    P_B, P_A = projectors(part)
    assert_close(implied(part, adjusted(part, G)), P_B @ G + (G - P_B @ G) @ P_A, 1e-8)


def test_lora_pro_with_one_factor_frozen_is_the_best_that_the_other_can_do():
    part, G = layer(4, 5, 2, 0)
    P_B, P_A = projectors(part)
    assert_close(implied(part, adjusted(part, G, train="B")), G @ P_A, 1e-8)
    assert_close(implied(part, adjusted(part, G, train="A")), P_B @ G, 1e-8)


# lora_rite


def descended(part: LowRank, target: torch.Tensor, *, steps: int = 5, local: Local | None = None) -> torch.Tensor:
    """The product after some steps of RITE down to a target."""
    local = local or lora_rite()
    live = leaves(Adapter({"q": part}))
    optimizer = local.optimizer(live, 0.05, 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (live.layers["q"].product - target).square().sum().backward()
        after_backward(local, live, optimizer, step)
    return live.layers["q"].product.detach()


def test_lora_rite_on_small_numbers():
    live, local = leaves(one_layer([[3.0, 4.0, 0.0]], [[0.0], [2.0]], F64)), lora_rite(clip=100.0, eps=1e-12)
    optimizer, q = local.optimizer(live, 0.1, 0.0), live.layers["q"]
    give(q.A, [0.0, 0.0, 6.0])
    give(q.B, [3.0, 4.0])
    after_backward(local, live, optimizer, 0)
    q = q.map(torch.Tensor.detach)
    # A: R = 2, g = [0 0 3], V = 9/3, g V^-1/2 = [0 0 sqrt 3].   B: R = 5, g = [.6 .8], V = 1/2.
    assert_close(q.A, torch.tensor([[3.0, 4.0, -0.1 * math.sqrt(3) / 2]], dtype=F64), 1e-9)
    assert_close(
        q.B, torch.tensor([[0.0], [2.0]], dtype=F64) - 0.1 * math.sqrt(2) / 5 * torch.tensor([[0.6], [0.8]]), 1e-9
    )


def test_lora_rite_decays_and_moves_what_is_trained_whole_as_adamw_does():
    adapter = Adapter(one_layer([[3.0, 4.0]], [[0.0], [2.0]], F64).layers, {"head": torch.ones(2, dtype=F64)})
    live, local = leaves(adapter, train="B"), lora_rite()
    optimizer = local.optimizer(live, 0.1, 0.5)
    give(live.layers["q"].B, [0.0, 0.0])
    give(live.dense["head"], [1.0, -1.0])
    after_backward(local, live, optimizer, 0)
    now = live.map(torch.Tensor.detach)
    assert_close(now.layers["q"].B, torch.tensor([[0.0], [1.9]], dtype=F64), 1e-9)
    assert_close(now.dense["head"], torch.tensor([0.85, 1.05], dtype=F64), 1e-6)
    optimizer.zero_grad()
    assert all(tensor.grad is None for tensor in live.tensors().values())


@given(d_out=st.integers(3, 6), d_in=st.integers(3, 6), rank=st.integers(1, 3), seed=seeds)
def test_lora_rite_does_not_see_how_a_product_is_split(d_out, d_in, rank, seed):
    part, target = layer(d_out, d_in, rank, seed)
    Q = torch.randn(rank, rank, generator=generator("Q", seed), dtype=F64) + 3 * torch.eye(rank, dtype=F64)
    split = LowRank(torch.linalg.inv(Q) @ part.A, part.B @ Q)
    assert_close(descended(split, target), descended(part, target), 1e-6)


def test_adam_does_see_it():
    part, target = layer(4, 5, 2, 0)
    split = LowRank(part.A / 4, part.B * 4)
    plain = LOCALS["lora"]()
    apart = descended(split, target, local=plain) - descended(part, target, local=plain)
    assert apart.norm() > 0.01


@pytest.mark.parametrize("shape", [(4, 5, 2), (2, 3, 6), (5, 3, 4)])
def test_lora_rite_starts_from_nothing_and_at_ranks_above_the_sides(shape):
    part, target = layer(*shape, 0)
    part = LowRank(part.A, torch.zeros_like(part.B))
    live, local = leaves(Adapter({"q": part})), lora_rite()
    optimizer, q = local.optimizer(live, 0.05, 0.0), live.layers["q"]
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = (q.product - target).square().sum()
        loss.backward()
        after_backward(local, live, optimizer, step)
        losses.append(loss.item())
        if step == 0:
            assert torch.equal(q.A, part.A)
            assert q.B.abs().min() > 0
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.7 * losses[0]


def test_lora_rite_clips_all_unmagnified_gradients_together():
    part, G = layer(4, 5, 2, 0)
    live, local = leaves(Adapter({"q": part})), lora_rite(clip=0.5)
    optimizer = local.optimizer(live, 0.1, 0.0)
    q = live.layers["q"]
    give(q.A, part.B.T @ G)
    give(q.B, G @ part.A.T)
    after_backward(local, live, optimizer, 0)
    # After the first step a second moment is g^T g / n.
    squares = sum(len(optimizer.state[factor]["M"]) * optimizer.state[factor]["V"].trace() for factor in (q.A, q.B))
    assert float(squares) == pytest.approx(0.25)


# beamlora


def gated(gates: list[float], *, train: str = "AB") -> Adapter:
    rank = len(gates)
    part = LowRank(torch.arange(3.0 * rank).reshape(rank, 3).to(F64), torch.ones(2, rank, dtype=F64))
    return leaves(Adapter({"q": part}, {"gate/q": torch.tensor(gates, dtype=F64)}), train=train)


def test_beamlora_gates_slots_and_folds_the_gates_into_b():
    local = beamlora(temperature=0.5)
    assert local.form
    live = gated([0.0, math.log(3) / 2])
    formed = local.form(live, torch.Generator()).layers["q"]
    # r softmax([0, log 3]) = 2 [1/4, 3/4]
    assert_close(formed.B.detach(), torch.tensor([[0.5, 1.5], [0.5, 1.5]], dtype=F64), 1e-12)
    assert torch.equal(formed.A, live.layers["q"].A)
    left = local.leave(live.map(torch.Tensor.detach))
    assert_close(left.layers["q"].B, formed.B.detach(), 1e-12)
    assert not left.dense
    # A gate learns with B and rests where B is frozen.
    assert formed.B.requires_grad
    frozen = gated([0.0, 1.0], train="A")
    assert local.form(frozen, torch.Generator()).layers["q"].B is frozen.layers["q"].B


def beam(local: Local, live: Adapter, steps: int) -> tuple[Optimizer, list[Adapter], list[dict[str, torch.Tensor]]]:
    """Train on made-up gradients; what the factors and their moments were after each step, the beam's own work included."""
    optimizer = local.optimizer(live, 0.01, 0.0)
    q, seen, moments = live.layers["q"], [], []
    for step in range(steps):
        for key, tensor in live.tensors().items():
            if tensor.requires_grad:
                give(tensor, torch.randn(tensor.shape, generator=generator(key, step)))
        give(live.dense["gate/q"], torch.zeros_like(live.dense["gate/q"]))  # the gates stay in their order
        after_backward(local, live, optimizer, step)
        seen.append(live.map(lambda tensor: tensor.detach().clone()))
        moments.append(
            {key: optimizer.state[q.A].get(key, torch.zeros(())).clone() for key in ("exp_avg", "exp_avg_sq")}
        )
    return optimizer, seen, moments


def test_beamlora_overwrites_weak_slots_by_what_strong_ones_were():
    live = gated([0.03, 0.0, 0.01, 0.02])  # from strong to weak: 0, 3, 2, 1
    optimizer, seen, moments = beam(beamlora(interval=4, end=100, top_p=0.8), live, 5)
    for early in range(4):
        assert torch.equal(seen[early].dense["gate/q"], torch.tensor([0.03, 0.0, 0.01, 0.02], dtype=F64))
    # q = [1.33, .73, .89, 1.09] sums to 4; at step 4 p is .8008, so 1.33 + 1.09 stay, and two are weak: at most half are
    earlier, now = seen[2].layers["q"], seen[4].layers["q"]
    assert torch.equal(now.A[[1, 2]], earlier.A[[0, 3]])
    assert torch.equal(now.B[:, [1, 2]], earlier.B[:, [0, 3]])
    assert torch.equal(moments[4]["exp_avg"][[1, 2]], moments[2]["exp_avg"][[0, 3]])
    assert torch.equal(moments[4]["exp_avg_sq"][[1, 2]], moments[2]["exp_avg_sq"][[0, 3]])
    assert_close(seen[4].dense["gate/q"], torch.tensor([0.015, 0.015, 0.015, 0.015], dtype=F64), 1e-12)
    assert not optimizer.state[live.dense["gate/q"]]["exp_avg_sq"].any()
    # The strong ones go on from where they are, so that a slot and its copy are not the same.
    assert not torch.equal(now.A[[0, 3]], earlier.A[[0, 3]])


@pytest.mark.parametrize(
    ("settings", "train"),
    [({"top_p": 1.0}, "AB"), ({"end": 4}, "AB"), ({"interval": 5}, "AB"), ({}, "A"), ({}, "B")],
    ids=["all stay", "after the end", "before the interval", "B frozen", "A frozen"],
)
def test_beamlora_leaves_slots_alone(settings, train):
    live = gated([0.3, 0.0], train=train)
    beam(beamlora(**{"interval": 4, "end": 100, "top_p": 0.5, **settings}), live, 5)
    assert torch.equal(live.dense["gate/q"], torch.tensor([0.3, 0.0], dtype=F64))


@pytest.mark.parametrize(("p", "weak"), [(0.8, [1, 1]), (0.79, [2, 1]), (0.1, [3, 2]), (1.0, [0, 0])])
def test_beamlora_compares_the_slots_of_all_layers(p, weak):
    assert _weak([torch.tensor([2.0, 0.5, 0.5]), torch.tensor([1.5, 0.5])], p) == weak


def test_a_single_slot_has_nothing_to_compete_with(job):
    state = job.method.init(job.spec)
    plan = next(p for p in job.method.assign(state, list(job.cohort.fleet.values())) if p.rank == 1)
    task = make_task(job.method, state, replace(plan, steps=6))
    plain = trained(job, task, LOCALS["lora"]())
    found = trained(job, task, beamlora(interval=2))
    assert_products_close(found, plain, 1e-6)
