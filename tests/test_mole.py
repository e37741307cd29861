"""A mixture of finished adapters: gates by hand, what is trained and averaged, what is refused and what is written."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import anyrank
from anyrank import hf
from anyrank.adapter import GATE, LOG_TAU, MAGNITUDE, Adapter, LowRank
from anyrank.errors import ConfigError, RecordError
from anyrank.federation import Update, make_task
from anyrank.job import load_recipe, local_of, prepare
from anyrank.local.mole import mole
from anyrank.methods import METHODS
from anyrank.seeding import generator
from anyrank.topology import combine
from anyrank.train import evaluate, train
from federations import assert_close
from test_hf import FAMILIES, batch, cost, families, merged, some_adapter, split
from tiny import bare_model, recipe_toml, write_model, write_reviews

TARGETS = torch.tensor([0, 1, 2, 0])


def penalty_of(q: list[float], balance: float) -> float:
    mixture = mole(experts=["a", "b"], balance=balance).mixture
    assert mixture
    assert mixture.penalty
    return float(mixture.penalty(torch.tensor(q)))


def mixed(family: str, tau: float = 1.0) -> tuple[Any, list[Adapter], hf.AdaptedModel]:
    """A bare model, two experts of different ranks, and a copy of the model that mixes them at scale 2."""
    bare = bare_model(family)
    how: Any = {"scale": 2.0, "target_modules": FAMILIES[family][1]}
    plain = hf.AdaptedModel(copy.deepcopy(bare), **how)
    experts = [some_adapter(plain, key="one"), some_adapter(plain, ranks=(4, 1, 2), key="two")]
    named = {f"expert-{i}": expert for i, expert in enumerate(experts)}
    return bare, experts, hf.AdaptedModel(copy.deepcopy(bare), weights="mole", experts=named, tau=tau, **how)


def without_factors(model: hf.AdaptedModel, *, spread: float) -> Adapter:
    """What can be trained, the gates drawn."""
    layers = {layer.name: LowRank(torch.zeros(0, layer.d_in), torch.zeros(layer.d_out, 0)) for layer in model.layers}
    gates = {
        name: spread * torch.randn(tensor.shape, generator=generator("gate", name))
        for name, tensor in model.dense.items()
        if name.endswith(GATE)
    }
    return Adapter(layers, model.dense | gates)


# --- the layer ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_token_by_hand():
    base = torch.nn.Linear(2, 1, bias=False)
    base.weight.copy_(torch.tensor([[1.0, 1.0]]))
    experts = [
        LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.5]])),
        LowRank(torch.eye(2), torch.tensor([[0.0, 2.0]])),
    ]
    layer = hf.layers.Mixture(base, experts, 2.0, tau=0.5)
    x = torch.tensor([[1.0, 1.0]])
    assert_close(layer(x), torch.tensor([[2 + 0.5 * 3 + 0.5 * 4]]))  # outputs are 2 * 1.5 and 2 * 2; gates are alike
    # z = (3, 4) / 5; logits (0.6, 0) over tau = 0.5.
    layer.gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    first = 1 / (1 + math.exp(-0.6 / 0.5))
    assert_close(layer(x), torch.tensor([[2 + first * 3 + (1 - first) * 4]]))
    assert_close(layer.gates, torch.tensor([[first, 1 - first]]))


@families
@torch.no_grad()
def test_gates_of_zero_apply_the_mean_of_the_experts(family):
    bare, experts, model = mixed(family)
    model.load(without_factors(model, spread=0.0))
    changes = {
        name: torch.stack([2.0 * expert.layers[name].product for expert in experts]).mean(0)
        for name in experts[0].layers
    }
    assert torch.allclose(model.model(**batch()).logits, merged(bare, changes)(**batch()).logits, atol=1e-4)
    assert_close(model.mean_gates(), torch.tensor([0.5, 0.5]))


@torch.no_grad()
def test_every_token_has_gates_of_its_own():
    rng = generator("tokens")
    x, base = torch.randn(2, 3, 4, generator=rng), torch.nn.Linear(4, 5)
    experts = [LowRank(torch.randn(r, 4, generator=rng), torch.randn(5, r, generator=rng)) for r in (1, 2, 3)]
    layer = hf.layers.Mixture(base, experts, 0.5, tau=0.25)
    layer.gate.copy_(torch.randn(3, 15, generator=rng))
    answer = layer(x)
    for example in range(2):
        for token in range(3):
            at = x[example, token]
            E = [0.5 * expert.B @ expert.A @ at for expert in experts]
            z = torch.cat(E)
            g = torch.softmax(layer.gate @ (z / z.norm()) / 0.25, 0)
            assert_close(layer.gates[example, token], g)
            assert_close(answer[example, token], base(at) + g[0] * E[0] + g[1] * E[1] + g[2] * E[2])


def test_experts_that_say_nothing_leave_numbers_finite():
    zero = LowRank(torch.ones(1, 4), torch.zeros(5, 1))
    layer = hf.layers.Mixture(torch.nn.Linear(4, 5), [zero, zero], 1.0, tau=1.0)
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.gate.grad is not None
    assert torch.isfinite(layer.gate.grad).all()


@torch.no_grad()
def test_padding_does_not_count_in_the_mean_gates():
    _, _, model = mixed("bert")
    model.load(without_factors(model, spread=3.0))
    inputs = batch()
    inputs["attention_mask"][:, 4:] = 0
    model.model(**inputs)
    with_padding = model.mean_gates()
    without = model.mean_gates(inputs["attention_mask"])
    by_layer = [model.model.get_submodule(layer.name).gates[:, :4].mean((0, 1)) for layer in model.layers]
    assert_close(without, torch.stack(by_layer).mean(0))
    assert float((with_padding - without).abs().max()) > 1e-4


def test_the_balancing_term_by_hand():
    assert penalty_of([0.5, 0.5], 1.0) == pytest.approx(2 * math.log(2))
    assert penalty_of([0.25, 0.75], 0.5) == pytest.approx(0.5 * math.log(16 / 3))
    mixture = mole(experts=["a", "b"], balance=0.0).mixture
    assert mixture
    assert mixture.penalty is None


# --- training -----------------------------------------------------------------------------------------------------


@families
def test_only_gates_temperatures_and_the_head_are_trained(family):
    _, _, model = mixed(family, tau=0.5)
    assert all(float(model.dense[layer.name + LOG_TAU]) == pytest.approx(-math.log(2)) for layer in model.layers)
    adapter = split(without_factors(model, spread=1.0), keep=(2, 3, 4, 5))
    fixed = {name: p.clone() for name, p in model.model.named_parameters() if name not in model.dense}
    live = model.load(adapter)
    optimizer = mole(experts=["a", "b"]).optimizer(live, 0.1, 0.01)
    model.model(**batch(), labels=TARGETS).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in live.dense.items() if not torch.equal(tensor, adapter.dense[name])}
    heads = {name for name in adapter.dense if not name.endswith((GATE, LOG_TAU))}
    assert moved == {name + own for name in adapter.layers for own in (GATE, LOG_TAU)} | heads
    assert all(torch.equal(model.model.get_parameter(name), value) for name, value in fixed.items())


def test_experts_are_part_of_the_base_that_a_device_holds_and_computes():
    bare, experts, model = mixed("bert")
    plain = hf.AdaptedModel(bare, scale=2.0, target_modules=FAMILIES["bert"][1])
    ours, theirs = cost(model), cost(plain)
    factors = sum(Adapter(expert.layers).num_parameters for expert in experts)
    assert ours.base_bytes == theirs.base_bytes + 4 * factors
    assert ours.forward_flops > theirs.forward_flops


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe that mixes two finished adapters, with overrides."""
    folder = tmp_path_factory.mktemp("mole")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv", rows=120)))
    short = {"rounds": 2, "train.epochs": 1, "evaluate.every": 2, "method.name": "fedavg"}
    experts = []
    for name, changes in {"one": {"seed": 1}, "two": {"seed": 2, "method.name": "hlora"}}.items():
        anyrank.run(load_recipe(file, short | changes), folder / name)
        experts.append(str(folder / name / "adapter"))
    mixing = short | {"local.name": "mole", "local.experts": experts}

    def make(**changes):
        return load_recipe(file, mixing | {key.replace("__", "."): value for key, value in changes.items()})

    return make


def learned(job, *, clients: int, steps: int = 3, seed: int = 0) -> tuple[Any, list[Any]]:
    """The first state, and an inbox of tasks that some clients have trained."""
    state, inbox = job.method.init(job.spec), []
    for plan in job.method.assign(state, list(job.cohort.fleet.values()))[:clients]:
        task = make_task(job.method, state, replace(plan, steps=steps))
        rng = generator(plan.client, seed)
        how: Any = {"training": job.training, "method": job.method, "rng": rng}
        adapter, metrics = train(job.model, task, task.start, job.problem.train, **how)
        inbox.append((task, Update(plan.client, 1, adapter, 1, metrics)))
    return state, inbox


def test_a_run_mixes_is_averaged_and_written_down(recipe, tmp_path):
    chosen = recipe(train__epochs=6)
    run = anyrank.run(chosen, tmp_path / "run")
    job = prepare(chosen)
    final, start = run.final_adapter(), job.spec.start
    assert set(final.ranks.values()) == {0}
    assert {tensor.numel() for name, tensor in final.dense.items() if name.endswith(GATE)} == {2 * 2 * 32, 2 * 2 * 48}
    score = evaluate(job.model, final, job.problem.test, training=job.training)
    assert score.loss < 0.9 * evaluate(job.model, start, job.problem.test, training=job.training).loss
    assert score.metrics["accuracy"] == pytest.approx(run.records()[-1]["score"])
    assert any("ranks in the recipe are not used" in remark for remark in job.remarks)
    # What is written: gates and head, from which the same model comes back; the experts stay where they are.
    adapter = run.path / "adapter"
    assert {file.name for file in adapter.iterdir()} == {
        "README.md",
        "anyrank.json",
        "mixture.json",
        "mixture.safetensors",
    }
    about = json.loads((adapter / "mixture.json").read_text())
    assert about["experts"] == chosen.local["experts"]
    card = (adapter / "README.md").read_text()
    assert "A mixture of 2 LoRA adapters" in card
    assert "load_mixture" in card
    assert all(expert in card for expert in about["experts"])
    job.model.load(final)
    again = hf.load_mixture(adapter, base=chosen.model.name)
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, job.model.model(**batch()).logits)
    with pytest.raises(RecordError, match="a mixture of adapters, which has no rank to be cut to"):
        anyrank.export(run.path, 1, tmp_path / "small")
    with pytest.raises(ConfigError, match="no mixture of adapters can be read there"):
        hf.load_mixture(tmp_path)


def test_experts_never_travel(recipe):
    demands, _ = anyrank.check(recipe())
    head = 2 * 32 + 2
    gates = 2 * (2 * (4 * 32 + 1) + (4 * 48 + 1))
    assert {demand.trainable for demand in demands} == {gates + head}


def test_the_server_takes_the_mean_of_gates_and_log_temperatures(recipe):
    job = prepare(recipe())
    state, inbox = learned(job, clients=2)
    after = combine(job.method, state, inbox, [0.1, 0.3])
    first, second = (update.adapter.dense for _, update in inbox)
    for name, mean in after.adapter.dense.items():
        assert not torch.equal(first[name], second[name])
        assert_close(mean, 0.25 * first[name] + 0.75 * second[name])


def test_the_balancing_term_keeps_every_expert_in_use(recipe):
    smallest = {}
    for balance in (0.0, 10.0):
        job = prepare(recipe(local__balance=balance, train__learning_rate=0.1))
        _, ((_, update),) = learned(job, clients=1, steps=20)
        evaluate(job.model, update.adapter, job.problem.test, training=job.training)
        smallest[balance] = float(job.model.mean_gates().min())
    assert smallest[10.0] > smallest[0.0] + 0.02
    assert smallest[10.0] == pytest.approx(0.5, abs=0.02)


def test_a_mixture_goes_with_edges_a_server_optimizer_and_a_proximal_term(recipe, tmp_path):
    changes = {"topology__name": "hierarchy", "server__momentum": 0.5, "train__prox_mu": 0.1}
    run = anyrank.run(recipe(**changes), tmp_path / "run")
    assert (run.path / "adapter" / "mixture.safetensors").exists()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_two_different_experts_are_needed(recipe):
    with pytest.raises(ConfigError, match=r"local\.experts: .*at least 2 items"):
        recipe(local__experts=["one"])
    with pytest.raises(ConfigError, match=r"local\.experts: a folder is named twice"):
        prepare(recipe(local__experts=["one", "one"]))
    with pytest.raises(ConfigError, match="nowhere: no PEFT adapter can be read there"):
        prepare(recipe(local__experts=["nowhere", "one"]))


def test_experts_that_do_not_fit_are_all_named():
    bare = bare_model("bert")
    how: Any = {"scale": 2.0, "target_modules": ["query", "value"]}
    plain = hf.AdaptedModel(copy.deepcopy(bare), **how)
    name = plain.layers[0].name
    good = Adapter({layer.name: LowRank(torch.ones(1, 32), torch.ones(32, 1)) for layer in plain.layers})
    bad = {
        "more": Adapter({**good.layers, "further": good.layers[name]}),
        "less": Adapter({key: part for key, part in good.layers.items() if key != name}),
        "wide": Adapter({**good.layers, name: LowRank(torch.ones(1, 32), torch.ones(33, 1))}),
        "broken": Adapter({**good.layers, name: LowRank(torch.ones(1, 32), torch.full((32, 1), math.inf))}),
        "dora": Adapter(good.layers, {name + MAGNITUDE: torch.ones(32)}),
    }
    with pytest.raises(ConfigError) as caught:
        hf.AdaptedModel(copy.deepcopy(bare), weights="mole", experts={"good": good, **bad}, **how)
    expected = [
        "local.experts: more adapts further, which lora.target_modules does not.",
        f"local.experts: less does not adapt {name}, which lora.target_modules does.",
        f"local.experts: wide: {name} is 33 x 32, not (32, 32).",
        f"local.experts: broken: {name} holds a number that is not finite.",
        "local.experts: dora is DoRA; expected plain LoRA, whose output can be weighted.",
    ]
    assert all(sentence in str(caught.value) for sentence in expected)
    assert "good" not in str(caught.value)


def test_methods_that_need_factors_are_refused_and_all_others_average_gates(recipe):
    job = prepare(recipe())
    devices = list(job.cohort.fleet.values())[:2]
    for name, make in METHODS.items():
        method = make()
        if method.local or method.claims.folds or method.frozen or method.observe:
            says = (
                "brings its own way of training" if method.local else f"mole trains no factors, and {name} needs them"
            )
            with pytest.raises(ConfigError, match=says):
                local_of(recipe(method__name=name))
            continue
        state = method.init(job.spec)
        tasks = [make_task(method, state, plan) for plan in method.assign(state, devices)]
        moved = [Adapter(t.start.layers, {n: x + i for n, x in t.start.dense.items()}) for i, t in enumerate(tasks)]
        updates = [Update(t.plan.client, 1, adapter, 1, {}) for t, adapter in zip(tasks, moved, strict=True)]
        after = combine(method, state, list(zip(tasks, updates, strict=True)), [0.25, 0.75]).adapter
        assert set(after.ranks.values()) == {0}
        for key, before in job.spec.start.dense.items():
            assert_close(after.dense[key], before + 0.75)


def test_a_mixture_starts_from_the_base_model(recipe):
    with pytest.raises(ConfigError, match="can only start from the base model"):
        prepare(recipe(lora__start=recipe().local["experts"][0]))
