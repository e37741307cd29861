"""What becomes of an adapted layer's weight: DoRA, whole weights by GaLore, and pairs that layers share."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch

import anyrank
from anyrank import hf
from anyrank.adapter import CHANGE, MAGNITUDE, Adapter, LowRank
from anyrank.errors import ConfigError
from anyrank.federation import Layer, Update, make_task
from anyrank.job import Job, load_recipe, prepare
from anyrank.local import LOCALS
from anyrank.local.galore import GaLore
from anyrank.methods import METHODS
from anyrank.record import RunFolder
from anyrank.seeding import generator
from anyrank.topology import combine
from anyrank.train import evaluate, train
from federations import assert_close
from test_hf import FAMILIES, batch, cost, families, merged, same, save, some_adapter, split
from tiny import bare_model, recipe_toml, write_model, write_reviews

TARGETS = torch.tensor([0, 1, 2, 0])


def adapted(family: str, weights: Any) -> tuple[Any, hf.AdaptedModel]:
    """A bare model, and its copy adapted in one of the three ways at scale 2."""
    bare = bare_model(family)
    return bare, hf.AdaptedModel(copy.deepcopy(bare), scale=2.0, target_modules=FAMILIES[family][1], weights=weights)


def weight_of(bare: Any, name: str) -> torch.Tensor:
    """`[d_out, d_in]`, however the layer stores it."""
    module = bare.get_submodule(name)
    return module.weight.detach() if isinstance(module, torch.nn.Linear) else module.weight.detach().T


def with_head(bare: Any, adapter: Adapter) -> Any:
    """The bare model with the adapter's head."""
    model = copy.deepcopy(bare)
    for name, tensor in adapter.dense.items():
        if not name.endswith((MAGNITUDE, CHANGE)):
            model.get_parameter(name).data.copy_(tensor)
    return model


def stock(bare: Any, folder: Any) -> Any:
    """The bare model with the adapter in a folder, as PEFT loads it."""
    with warnings.catch_warnings():  # PEFT sees that a layer is transposed, and says so
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(folder)).eval()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of a second, with overrides."""
    folder = tmp_path_factory.mktemp("parametrisations")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv", rows=120)))
    short = {"rounds": 2, "train.epochs": 1, "evaluate.every": 2}
    return lambda **changes: load_recipe(file, short | {key.replace("__", "."): v for key, v in changes.items()})


def answers_as_stock_peft(job: Job, folder: RunFolder) -> bool:
    """What is exported answers as the run's own model with its final adapter."""
    final = job.training.local.spread(folder.final_adapter())
    job.model.load(final)
    model = hf.load_classifier(job.base, label_names=job.problem.label_names, seed=0)
    inputs = batch()
    ours = job.model.model(**inputs).logits
    return torch.allclose(stock(model, folder.path / "adapter")(**inputs).logits, ours, atol=1e-4)


# --- DoRA ---------------------------------------------------------------------------------------------------------


@families
def test_magnitudes_are_the_row_norms_of_the_base_at_first(family):
    bare, model = adapted(family, "dora")
    for layer in model.layers:
        assert_close(model.dense[layer.name + MAGNITUDE], weight_of(bare, layer.name).norm(dim=1))
        assert model.dense[layer.name + MAGNITUDE].shape == (layer.d_out,)


@families
@pytest.mark.parametrize("held", [(), (0, 1, 2, 3, 4, 5), (3, 5)])
@torch.no_grad()
def test_a_zero_adapter_with_first_magnitudes_changes_nothing(family, held):
    bare, model = adapted(family, "dora")
    zero = {n: LowRank(p.A, torch.zeros_like(p.B)) for n, p in some_adapter(model).layers.items()}
    model.load(split(Adapter(zero, model.dense), keep=held))
    assert torch.allclose(model.model(**batch()).logits, bare(**batch()).logits, atol=1e-6)


@families
@torch.no_grad()
def test_rows_get_the_direction_of_the_sum_and_the_length_of_the_magnitude(family):
    bare, model = adapted(family, "dora")
    adapter = split(some_adapter(model), keep=(0, 2, 4))  # magnitudes are 0.1 away from the norms, skipped layers' too
    model.load(adapter, scale=0.5)
    changes = {}
    for name, part in adapter.layers.items():
        W0 = weight_of(bare, name)
        V = W0 + 0.5 * 2.0 * part.product
        changes[name] = adapter.dense[name + MAGNITUDE][:, None] * V / V.norm(dim=1, keepdim=True) - W0
    expected = merged(with_head(bare, adapter), changes)(**batch()).logits
    assert torch.allclose(model.model(**batch()).logits, expected, atol=1e-4)


@families
@torch.no_grad()
def test_stock_peft_loads_our_dora_and_reading_gives_it_back(family, tmp_path):
    bare, model = adapted(family, "dora")
    adapter = some_adapter(model)
    save(tmp_path, adapter, model)
    assert same(hf.read_adapter(tmp_path, scale=2.0), adapter)
    model.load(adapter)
    ours, theirs = model.model(**batch()).logits, stock(bare, tmp_path)
    assert torch.allclose(theirs(**batch()).logits, ours, atol=1e-5)
    assert torch.allclose(theirs.merge_and_unload()(**batch()).logits, ours, atol=1e-4)


def test_the_magnitude_of_a_skipped_layer_is_not_trained():
    _, model = adapted("bert", "dora")
    adapter = split(some_adapter(model), keep=(3, 4, 5))
    live = model.load(adapter)
    optimizer = LOCALS["dora"]().optimizer(live, 0.1, 0.0)
    model.model(**batch(), labels=TARGETS).loss.backward()
    optimizer.step()
    moved = {
        name for name, t in live.dense.items() if name.endswith(MAGNITUDE) and not torch.equal(t, adapter.dense[name])
    }
    assert moved == {name + MAGNITUDE for name in adapter.layers}


def test_weight_decay_leaves_magnitudes_alone():
    _, model = adapted("bert", "dora")
    adapter = some_adapter(model)
    live = model.load(adapter)
    optimizer = LOCALS["dora"]().optimizer(live, 0.1, 0.5)
    for tensor in live.tensors().values():
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for name, tensor in live.tensors().items():
        factor = 1.0 if name.endswith(MAGNITUDE) else 0.95
        assert_close(tensor.detach(), factor * adapter.tensors()[name])


def test_a_dora_run_is_averaged_and_exported_whole(recipe, tmp_path):
    folder = anyrank.run(recipe(local__name="dora", method__name="rbla"), tmp_path / "run")
    job = prepare(recipe(local__name="dora", method__name="rbla"))
    final = folder.final_adapter()
    for layer in job.model.layers:
        name = layer.name + MAGNITUDE
        assert 1e-5 < float((final.dense[name] - job.spec.start.dense[name]).norm()) < 1
    assert answers_as_stock_peft(job, folder)
    # It can go on from there, at the server's rank; an adapter without magnitudes cannot be meant.
    again = prepare(recipe(local__name="dora", lora__start=str(folder.path / "adapter")))
    name = job.model.layers[0].name + MAGNITUDE
    assert torch.equal(again.spec.start.dense[name], final.dense[name])
    with pytest.raises(ConfigError, match=r"magnitude \[32\] is nothing that this run trains"):
        prepare(recipe(lora__start=str(folder.path / "adapter")))
    save(tmp_path / "plain", Adapter(final.layers), job.model)
    with pytest.raises(ConfigError, match=r"lacks .*query\.magnitude; expected an adapter of the same kind"):
        prepare(recipe(local__name="dora", lora__start=str(tmp_path / "plain")))


def test_dora_is_refused_where_clients_apply_products_besides(recipe):
    refused = [name for name, make in METHODS.items() if make().claims.folds or make().frozen]
    assert refused
    for name in refused:
        with pytest.raises(ConfigError, match=f"dora does not work with {name}, whose clients apply products"):
            prepare(recipe(local__name="dora", method__name=name))


# --- whole weights ------------------------------------------------------------------------------------------------


def matrix(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).requires_grad_()


def galore(matrices, rest=(), **changes) -> GaLore:
    arguments: Any = {"lr": 0.1, "weight_decay": 0.0, "rank": 1, "interval": 2, "scale": 0.5} | changes
    return GaLore(matrices, rest, **arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_first_step_by_hand(transposed):
    # G = u v^T, so P = u or -u; Adam's first step is the sign of P^T G; and P sign(P^T G) = u sign(v)^T.
    u, v = torch.tensor([0.6, 0.8]), torch.tensor([1.0, -2.0, 0.5])
    W, G = matrix([1, 2, 3], [4, 5, 6]), torch.outer(u, v)
    expected = torch.tensor([[1 - 0.03, 2 + 0.03, 3 - 0.03], [4 - 0.04, 5 + 0.04, 6 - 0.04]])
    if transposed:
        W, G, expected = W.detach().T.clone().requires_grad_(), G.T, expected.T
    W.grad = G
    galore([W]).step()
    assert_close(W.detach(), expected)


def test_a_basis_is_kept_for_its_interval_and_moments_outlive_it():
    W = torch.zeros(3, 5).requires_grad_()
    optimizer = galore([W], rank=2, interval=3)
    bases = []
    for step in range(7):
        W.grad = torch.randn(3, 5, generator=generator("gradient", step))
        optimizer.step()
        bases.append(optimizer.state[W]["P"].clone())
        if step % 3 == 0:
            U = torch.linalg.svd(W.grad).U[:, :2]
            assert_close(bases[-1] @ bases[-1].T, U @ U.T, 1e-4)  # a basis of the leading directions
        assert torch.equal(bases[-1], bases[step // 3 * 3])
        assert optimizer.state[W]["m"].shape == optimizer.state[W]["v"].shape == (2, 5)
    assert not torch.equal(bases[0], bases[3])
    assert optimizer.state[W]["step"] == 7


def test_steps_stay_in_the_subspace():
    W, tall = torch.zeros(4, 6).requires_grad_(), torch.zeros(6, 4).requires_grad_()
    optimizer = galore([W, tall], rank=2, interval=100)
    for step in range(5):
        for tensor in (W, tall):
            tensor.grad = torch.randn(tensor.shape, generator=generator(step))
        optimizer.step()
    assert int(torch.linalg.matrix_rank(W.detach(), rtol=1e-4)) == 2
    assert int(torch.linalg.matrix_rank(tall.detach(), rtol=1e-4)) == 2


def test_what_is_not_projected_takes_the_steps_of_adamw():
    start = [torch.randn(3, 4, generator=generator("head")), torch.randn(3, generator=generator("bias"))]
    ours = [tensor.clone().requires_grad_() for tensor in start]
    theirs = [tensor.clone().requires_grad_() for tensor in start]
    one = galore([], ours, lr=0.05, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1)
    for step in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator("g", step))
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.detach(), b.detach(), 1e-6)


def whole_adapter(model: hf.AdaptedModel) -> Adapter:
    """Rank 0 in every layer; a change of its own in every other one, nothing in the rest."""
    layers = {layer.name: LowRank(torch.zeros(0, layer.d_in), torch.zeros(layer.d_out, 0)) for layer in model.layers}
    dense = model.dense
    for i, layer in enumerate(model.layers):
        rng = generator("change", layer.name)
        if i % 2 == 0:
            dense[layer.name + CHANGE] = 0.1 * torch.randn(layer.d_out, layer.d_in, generator=rng)
    return Adapter(layers, dense)


@families
@torch.no_grad()
def test_the_change_is_added_whether_or_not_it_is_trained(family):
    bare, model = adapted(family, "whole")
    adapter = whole_adapter(model)
    changes = {layer.name: adapter.dense[layer.name + CHANGE] for layer in model.layers}
    expected = merged(with_head(bare, adapter), changes)(**batch()).logits
    for keep in ((0, 1, 2, 3, 4, 5), (3, 5), ()):
        model.load(split(adapter, keep=keep))
        assert torch.allclose(model.model(**batch()).logits, expected, atol=1e-5)
    model.load(
        Adapter(adapter.layers, model.dense | {name + CHANGE: torch.zeros_like(t) for name, t in changes.items()})
    )
    assert torch.allclose(model.model(**batch()).logits, bare(**batch()).logits, atol=1e-6)


@families
def test_backward_stops_at_the_first_layer_whose_change_is_trained(family):
    _, model = adapted(family, "whole")
    adapter = split(whole_adapter(model), keep=(3, 4))
    live = model.load(adapter)
    entered = []
    upper = model.model.get_submodule(FAMILIES[family][0] + ".1")
    upper.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].requires_grad))
    model.model(**batch(), labels=TARGETS).loss.backward()
    assert entered == [False]
    trained = {name for name, t in live.dense.items() if t.grad is not None}
    assert {name for name in trained if name.endswith(CHANGE)} == {name + CHANGE for name in adapter.layers}


@families
@torch.no_grad()
def test_changes_are_exported_as_products_of_their_exact_rank(family, tmp_path):
    bare, model = adapted(family, "whole")
    adapter = whole_adapter(model)
    name = model.layers[2].name
    rows, columns = adapter.dense[name + CHANGE].shape
    adapter.dense[name + CHANGE].copy_(torch.outer(torch.arange(rows) / rows, torch.arange(columns) / columns))  # pyright: ignore
    plain = hf.factored(adapter, scale=2.0)
    assert plain.dense.keys() == {"classifier.weight", "classifier.bias"} or plain.dense.keys() == {"score.weight"}
    for i, layer in enumerate(model.layers):
        part = plain.layers[layer.name]
        assert part.rank == (1 if i % 2 or layer.name == name else min(layer.d_in, layer.d_out))
        assert_close(2.0 * part.product, adapter.dense[layer.name + CHANGE])
    save(tmp_path, plain, model)
    model.load(adapter)
    assert torch.allclose(stock(bare, tmp_path)(**batch()).logits, model.model(**batch()).logits, atol=1e-4)


@families
def test_costs_do_not_depend_on_what_becomes_of_the_weights(family):
    costs = [cost(adapted(family, weights)[1]) for weights in ("lora", "dora", "whole")]
    assert len({(each.base_bytes, each.num_blocks, each.tokens_per_step) for each in costs}) == 1
    assert [each.forward_flops for each in costs] == pytest.approx([costs[0].forward_flops] * 3, rel=0.05)


def test_the_server_takes_the_mean_of_the_weights(recipe):
    job = prepare(recipe(method__name="galore"))
    state = job.method.init(job.spec)
    plans = job.method.assign(state, list(job.cohort.fleet.values()))[:2]
    tasks = [make_task(job.method, state, plan) for plan in plans]
    inbox = []
    for task in tasks:
        adapter, metrics = train(
            job.model,
            replace(task, plan=replace(task.plan, steps=3)),
            task.start,
            job.problem.train,
            training=job.training,
            method=job.method,
            rng=generator(task.plan.client),
        )
        inbox.append((task, Update(task.plan.client, 1, adapter, 1, metrics)))
    after = combine(job.method, state, inbox, [0.1, 0.3])
    assert set(after.adapter.ranks.values()) == {0}
    for name, mean in after.adapter.dense.items():
        first, second = (update.adapter.dense[name] for _, update in inbox)
        assert not torch.equal(first, second)
        assert_close(mean, 0.25 * first + 0.75 * second)
    for layer in job.model.layers:  # one projection in three steps: what each client learned has its rank
        change = inbox[0][1].adapter.dense[layer.name + CHANGE]
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 8


def test_a_run_without_factors_is_played_and_exported(recipe, tmp_path):
    chosen = recipe(method__name="galore", compare=["centralised", "local_only"])
    folder = anyrank.run(chosen, tmp_path / "run")
    record = folder.records()[-1]
    assert set(record["planned_ranks"].values()) == set(record["returned_ranks"].values()) == {0}
    assert set(record["planned_blocks"].values()) == {2}  # whole weights, so all of the depth costs time
    assert record["energy"] == {}
    assert {member["rank"] for member in folder.info["fleet"].values()} == {0}
    for name in ("centralised", "local_only"):  # they train the same weights in the same way
        other = RunFolder.open(folder.path / "compare" / name)
        assert set(other.records()[-1]["returned_ranks"].values()) == {0}
    job = prepare(chosen)
    assert any("ranks in the recipe are not used" in remark for remark in job.remarks)
    assert answers_as_stock_peft(job, folder)
    small = anyrank.export(folder.path, 2, tmp_path / "small")
    assert set(small.ranks.values()) == {2}
    demands, _ = anyrank.check(chosen)
    assert {demand.rank for demand in demands} == {0}
    assert {demand.trainable for demand in demands} == {job.dense_parameters}


def test_a_way_that_is_not_followed_is_refused(recipe):
    with pytest.raises(ConfigError, match="galore brings its own way of training; leave 'dora' out"):
        prepare(recipe(method__name="galore", local__name="dora"))


# --- shared pairs -------------------------------------------------------------------------------------------------

ROLES = (("q", 4, 4), ("up", 4, 6))
NUMBERED = [Layer(f"m.layer.{i}.{role}", d_in, d_out, i) for i in range(5) for role, d_in, d_out in ROLES]
MODEL = (*NUMBERED, Layer("pooler", 4, 4, 4))


def test_layers_of_one_role_share_bricks():
    layers = LOCALS["msplora"]().layers(MODEL)
    assert len({layer.name for layer in layers}) == len(layers) == 2 * (4 + 3 * 2 + 5) + (4 + 2 + 1)
    queries = {layer.name: layer for layer in layers if layer.name.endswith(".q")}
    sharing = {name.partition(".")[0]: set() for name in queries}
    for name in queries:
        sharing[name.partition(".")[0]].add(name.partition(" ")[2])
    assert sharing == {
        "shared": {"m.layer.{0,1,2,3,4}.q"},
        "group": {"m.layer.{0,1}.q", "m.layer.{2,3}.q", "m.layer.{4}.q"},
        "own": {f"m.layer.{{{block}}}.q" for block in range(5)},
    }
    assert queries["group.1 m.layer.{2,3}.q"] == Layer("group.1 m.layer.{2,3}.q", 4, 4, 2)
    assert all((layer.d_in, layer.d_out) == (4, 6) for layer in layers if layer.name.endswith(".up"))
    assert "own.0 pooler" in {layer.name for layer in layers}
    assert len(LOCALS["msplora"](groups=1).layers(MODEL)) == 2 * (4 + 2 + 5) + 7


def test_layers_of_other_shapes_share_nothing():
    odd = (Layer("m.0.q", 4, 4, 0), Layer("m.1.q", 4, 8, 1), Layer("m.2.q", 4, 4, 2))
    names = {layer.name.partition(" ")[2] for layer in LOCALS["msplora"](groups=1).layers(odd)}
    assert names == {"m.{0,2}.q", "m.{0}.q", "m.{2}.q", "m.{1}.q"}


def bricks(rank: int = 2) -> Adapter:
    layers = {}
    for layer in LOCALS["msplora"]().layers(MODEL):
        rng = generator("brick", layer.name)
        A, B = torch.randn(rank, layer.d_in, generator=rng), torch.randn(layer.d_out, rank, generator=rng)
        layers[layer.name] = LowRank(A, B)
    return Adapter(layers, {"head": torch.ones(2)})


def test_a_layer_computes_with_the_sum_of_its_three_pairs():
    adapter = bricks()
    spread = LOCALS["msplora"]().spread(adapter)
    assert sorted(spread.layers) == sorted(layer.name for layer in MODEL)
    assert set(spread.ranks.values()) == {7 * 2}  # R0 = 4 r, R0 / 2 and R0 / 4 side by side
    assert spread.dense is adapter.dense
    groups = {0: "{0,1}", 1: "{0,1}", 2: "{2,3}", 3: "{2,3}", 4: "{4}"}
    for block, group in groups.items():
        product = {name: part.product for name, part in adapter.layers.items()}
        expected = sum(product[f"shared.{i} m.layer.{{0,1,2,3,4}}.up"] for i in range(4))
        expected = expected + 2 * sum(product[f"group.{i} m.layer.{group}.up"] for i in range(2))
        expected = expected + 4 * product[f"own.0 m.layer.{{{block}}}.up"]
        assert_close(spread.layers[f"m.layer.{block}.up"].product, expected)


def test_a_shared_brick_learns_from_all_its_layers():
    local = LOCALS["msplora"]()
    live = bricks().map(lambda tensor: tensor.requires_grad_())
    assert local.form
    formed = local.form(live, torch.Generator())
    grads = {name: torch.randn(part.B.shape, generator=generator("grad", name)) for name, part in formed.layers.items()}
    torch.stack([(grads[name] * part.B).sum() for name, part in formed.layers.items()]).sum().backward()
    for i in range(4):  # the first four pairs of slots of every layer are the shared bricks, at factor 1
        expected = sum(grads[f"m.layer.{block}.q"][:, 2 * i : 2 * i + 2] for block in range(5))
        assert_close(live.layers[f"shared.{i} m.layer.{{0,1,2,3,4}}.q"].B.grad, expected)


def test_a_run_with_shared_pairs_is_averaged_once_and_exported_in_the_models_layers(recipe, tmp_path):
    chosen = recipe(local__name="msplora")
    folder = anyrank.run(chosen, tmp_path / "run")
    job = prepare(chosen)
    final = folder.final_adapter()
    assert list(final.layers) == [layer.name for layer in job.spec.layers]
    exported = hf.read_adapter(folder.path / "adapter", scale=2.0)
    assert set(exported.layers) == {layer.name for layer in job.model.layers}
    assert set(exported.ranks.values()) == {7 * 4}
    assert answers_as_stock_peft(job, folder)
    # Two blocks, so two groups: 4 + 2 * 2 + 2 bricks for each of the roles q, v and up.
    per_slot = 10 * (32 + 32) + 10 * (32 + 32) + 10 * (32 + 48)
    assert sum(part.A.numel() + part.B.numel() for part in final.layers.values()) == 4 * per_slot
    small = anyrank.export(folder.path, 1, tmp_path / "small")
    assert set(small.ranks.values()) == {1}
    assert "This adapter was not scored." in (tmp_path / "small" / "README.md").read_text()  # no client is sent it
    with pytest.raises(ConfigError, match="can only start from the base model"):
        prepare(recipe(local__name="msplora", lora__start=str(folder.path / "adapter")))


def test_folds_reach_all_layers_of_a_brick_in_training_and_in_evaluation(recipe):
    job = prepare(recipe(local__name="msplora", method__name="flora"))
    brick = next(layer for layer in job.spec.layers if layer.name.startswith("shared"))
    rng = generator("fold")
    fold = LowRank(torch.randn(1, brick.d_in, generator=rng), torch.randn(brick.d_out, 1, generator=rng))
    state = job.method.init(job.spec).with_fold({brick.name: fold})
    (plan,) = job.method.assign(state, list(job.cohort.fleet.values())[:1])
    task = make_task(job.method, state, replace(plan, steps=1))
    applied = job.training.local.spread(task.applied)
    assert len(applied.layers) == 2
    for part in applied.layers.values():
        assert_close(part.product, fold.product)
    data = [
        job.problem.train[i] for i in range(8)
    ]  # one batch, so that the loss of the first step is that of the start
    how: Any = {"training": job.training}
    _, metrics = train(job.model, task, task.start, data, method=job.method, rng=generator("order"), **how)
    with_fold = evaluate(job.model, task.start, data, frozen=task.applied, **how)
    assert metrics["loss"] == pytest.approx(with_fold.loss, rel=1e-5)
    assert abs(evaluate(job.model, task.start, data, **how).loss - with_fold.loss) > 1e-3
