"""Clients that share a pass end as if each had trained alone: every method, every way of training, odd sizes, divergence."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import transformers
from torch.optim import AdamW, Optimizer
from transformers import DebertaV2Config, LongformerConfig, OPTConfig

from anyrank import hf
from anyrank.adapter import Adapter, LowRank, Stack
from anyrank.federation import Failure, State, Task, Update, make_task
from anyrank.fused import why_apart
from anyrank.job import Job, load_recipe, prepare
from anyrank.local import LOCALS
from anyrank.local.lora import trained
from anyrank.methods import METHODS
from anyrank.topology import reduce
from anyrank.transport import InProcess
from federations import low_rank
from tiny import bare_model, in_process, recipe_toml, write_model, write_reviews

UNEVEN = {"partition.name": "quantity", "partition.clients": 6, "train.epochs": 2, "train.learning_rate": 3e-4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv", rows=150)))
    return file


def job_of(recipe, method: str = "fedavg", **overrides) -> Job:
    return prepare(load_recipe(recipe, {"method.name": method, **UNEVEN, **overrides}))


def assert_alike(one: Update, other: Update, tolerance: float = 1e-5) -> None:
    assert one.num_examples == other.num_examples
    assert one.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-6)
    ours, theirs = one.adapter.tensors(), other.adapter.tensors()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= tolerance * max(1.0, float(theirs[name].norm())), name


def compare(
    job: Job, one: InProcess, other: InProcess, *, rounds: int, state: State | None = None, tolerance: float = 1e-5
) -> None:
    """The same tasks to both, for some rounds; the server goes on from what the first returns."""
    state = state or job.method.init(job.spec)
    for _ in range(rounds):
        plans = job.method.assign(state, list(job.cohort.fleet.values()))
        tasks = [make_task(job.method, state, plan) for plan in plans]
        replies, others = ({reply.client: reply for reply in clients.run(tasks)} for clients in (one, other))
        assert replies.keys() == others.keys() == {plan.client for plan in plans}
        for client, reply in replies.items():
            assert_alike(others[client], reply, tolerance)
        inbox = [(task, replies[task.plan.client]) for task in tasks]
        state = replace(reduce(job.method, state, inbox, [1 / len(inbox)] * len(inbox)), round=state.round + 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_alike_in_one_pass(recipe, name, tmp_path):
    topology = "star" if "star" in METHODS[name]().claims.topologies else "hierarchy"
    job = job_of(recipe, name, **{"topology.name": topology})
    alone, together = (in_process(job, tmp_path / str(cohort), cohort=cohort) for cohort in (1, 4))
    compare(job, alone, together, rounds=2)


@pytest.mark.parametrize("name", [name for name in LOCALS if name not in ("dora", "mole")])
def test_every_way_of_training_is_alike_in_one_pass(recipe, name, tmp_path):
    job = job_of(recipe, "rbla", **{"local.name": name})
    assert not why_apart(job.model, job.training.local)
    alone, together = (in_process(job, tmp_path, cohort=cohort) for cohort in (1, 4))
    # As in the middle of a run: from B = 0, LoRA-RITE turns rounding into a direction. Elsewhere, too, it makes more than 1e-4
    # in one step of a relative difference of 1e-7 at its start, alone or not.
    state = job.method.init(job.spec)
    layers = {
        name: LowRank(part.A, 0.1 * low_rank(rank=part.rank, d_in=1, d_out=len(part.B), key=("start", name)).B)
        for name, part in state.adapter.layers.items()
    }
    state = state.with_layers(layers)
    compare(job, alone, together, rounds=1, state=state, tolerance=0.02 if name == "lora_rite" else 1e-5)


def test_an_optimizer_of_the_users_own_is_used_as_it_is(recipe, tmp_path):
    def quick(live: Adapter, learning_rate: float, weight_decay: float) -> Optimizer:
        return AdamW(trained(live), lr=learning_rate, weight_decay=weight_decay, betas=(0.5, 0.6), amsgrad=True)

    job = job_of(recipe, "rbla")
    training = replace(job.training, local=job.training.local._replace(optimizer=quick))
    compare(job, *(in_process(job, tmp_path, cohort=cohort, training=training) for cohort in (1, 4)), rounds=1)


@pytest.mark.parametrize("room", [2, 3, 6])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.05},
        {"group_by_length": True},
        {"weight_decay": 0.5},
        {"batch_size": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whoever_trains_beside_a_client_does_not_matter(recipe, room, changes, tmp_path):
    job = job_of(recipe, "hetlora")
    training = replace(job.training, **changes)
    alone, together = (in_process(job, tmp_path, cohort=cohort, training=training) for cohort in (1, room))
    compare(job, alone, together, rounds=1)


@pytest.mark.parametrize("room", [2, 6])
@pytest.mark.parametrize("local", ["lora", "beamlora"])  # one that draws its own numbers besides
def test_what_a_client_drops_does_not_depend_on_who_trains_beside_it(recipe, room, local, tmp_path):
    plain, job = (job_of(recipe, "rbla", **{"lora.dropout": share, "local.name": local}) for share in (0.0, 0.3))
    alone, together = (in_process(job, tmp_path, cohort=cohort) for cohort in (1, room))
    compare(job, alone, together, rounds=1)
    (task,) = tasks_of(job)[:1]
    (free,), (dropped,) = (list(in_process(each, tmp_path).run([task])) for each in (plain, job))
    assert dropped.metrics["loss"] != free.metrics["loss"]


def test_clipping_bites(recipe, tmp_path):
    job = job_of(recipe)
    (task,) = tasks_of(job)[:1]
    free, held = (
        next(in_process(job, tmp_path, cohort=1, training=replace(job.training, max_grad_norm=norm)).run([task]))
        for norm in (None, 1e-6)
    )
    moved = [
        max(float((part.B - task.start.layers[name].B).norm()) for name, part in reply.adapter.layers.items())
        for reply in (free, held)
    ]
    assert 0 < moved[1] < moved[0]  # AdamW is all but blind to scale, except where gradients come near its epsilon


def tasks_of(job: Job, clients: Sequence[str] | None = None, **changes) -> list[Task]:
    state = job.method.init(job.spec)
    devices = [device for device in job.cohort.fleet.values() if clients is None or device.client in clients]
    return [make_task(job.method, state, replace(plan, **changes)) for plan in job.method.assign(state, devices)]


def test_passes_are_shared_by_clients_of_one_depth_and_filled_up_from_a_queue(recipe, tmp_path):
    """Counted at the model: no pass holds clients of two depths, or more than there is room for."""
    job = job_of(recipe, "zero_padding", **{"train.steps": 3})
    tasks = tasks_of(job)
    deep = {name for task in tasks for name in task.plan.ranks}
    shallow = {name for name in deep if ".layer.1." in name}
    tasks = [
        replace(task, plan=replace(task.plan, ranks={n: task.plan.ranks[n] for n in task.plan.ranks if n in shallow}))
        if i % 2
        else task
        for i, task in enumerate(tasks)
    ]
    tasks = [
        replace(task, start=Adapter({n: task.start.layers[n] for n in task.plan.ranks}, task.start.dense))
        for task in tasks
    ]
    seen = []
    load = job.model.load_together

    def watched(stack, **arguments):
        seen.append((len(next(iter(stack.dense.values()))), frozenset(stack.A)))
        return load(stack, **arguments)

    job.model.load_together = watched
    replies = list(in_process(job, tmp_path, cohort=2).run(tasks))
    assert {reply.client for reply in replies} == {task.plan.client for task in tasks}
    assert {layers for _, layers in seen} == {frozenset(task.plan.ranks) for task in tasks}
    assert max(count for count, _ in seen) == 2
    # Three clients of each depth, two at a time, three steps each: the third takes the place of the first two.
    assert [count for count, _ in seen] == [2, 2, 2, 1, 1, 1] * 2


@pytest.mark.parametrize("local", ["lora", "lora_rite", "lora_pro"])
def test_one_client_that_diverges_leaves_the_others_alone(recipe, local, tmp_path):
    job = job_of(recipe, **{"local.name": local})
    tasks = tasks_of(job)
    mad = tasks[1].start.map(lambda tensor: tensor * float("nan"))
    mixed = [tasks[0], replace(tasks[1], start=mad), *tasks[2:]]
    usual = {r.client: r for r in in_process(job, tmp_path, cohort=6).run(tasks)}
    beside = {r.client: r for r in in_process(job, tmp_path, cohort=6).run(mixed)}
    for client, reply in beside.items():
        if client != tasks[1].plan.client:
            assert_alike(reply, usual[client])
        else:
            assert isinstance(reply, Failure) or reply.metrics["loss"] != reply.metrics["loss"]


def test_who_is_through_stands_still(recipe, tmp_path):
    """A client with one step beside one with twenty ends where one step leads, whatever decay would do to it."""
    job = job_of(recipe)
    training = replace(job.training, weight_decay=1.0, learning_rate=1e-2)
    long, short = tasks_of(job)[:2]
    tasks = [replace(long, plan=replace(long.plan, steps=20)), replace(short, plan=replace(short.plan, steps=1))]
    alone, together = (
        {r.client: r for r in in_process(job, tmp_path, cohort=cohort, training=training).run(tasks)}
        for cohort in (1, 2)
    )
    assert_alike(together[short.plan.client], alone[short.plan.client])


@pytest.mark.parametrize("prox_mu", [0.0, 0.1])
def test_a_layer_that_a_model_has_and_does_not_use_trains_alike(recipe, prox_mu, tmp_path, monkeypatch):
    def unused(self, hidden):
        return hidden.repeat(1, 1, 2)[..., :48]

    monkeypatch.setattr(transformers.models.bert.modeling_bert.BertIntermediate, "forward", unused)
    job = job_of(recipe, "rbla", **{"train.prox_mu": prox_mu})
    training = replace(job.training, weight_decay=5.0)
    alone, together = (
        {r.client: r for r in in_process(job, tmp_path, cohort=cohort, training=training).run(tasks_of(job))}
        for cohort in (1, 4)
    )
    for client, reply in together.items():
        assert_alike(reply, alone[client])


def test_modules_trained_whole_are_stacked_too(recipe, tmp_path):
    saved = ["bert.encoder.layer.1.output.LayerNorm", "bert.encoder.layer.1.output.dense"]
    job = job_of(recipe, **{"lora.modules_to_save": saved})
    assert not job.model.unbatched
    compare(job, *(in_process(job, tmp_path, cohort=cohort) for cohort in (1, 4)), rounds=1)


def test_what_has_no_stacked_form_trains_one_after_another_and_says_so(recipe, tmp_path):
    for changes, why in (
        ({"local.name": "dora"}, "only the factors of plain LoRA"),
        ({"lora.modules_to_save": ["bert.embeddings.word_embeddings"]}, r"word_embeddings \(Embedding\)"),
    ):
        job = job_of(recipe, **changes)
        assert job.recipe.compute.cohort == 1
        (remark,) = [remark for remark in job.remarks if "one after another" in remark]
        assert re.search(why, remark)
        replies = in_process(job, tmp_path, cohort=4).run(tasks_of(job))
        assert all(isinstance(reply, Update) for reply in replies)


BATCH = {"input_ids": torch.full((7, 4), 5), "attention_mask": torch.ones(7, 4, dtype=torch.long)}


SHARED = {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]}


@pytest.mark.parametrize(
    ("config", "further", "targets", "odd"),
    [
        # DeBERTa projects its relative positions by the layers that project tokens, in one row for all examples.
        (DebertaV2Config, SHARED, ["query_proj"], "query_proj"),
        (DebertaV2Config, {}, ["query_proj"], ""),
        (LongformerConfig, {"attention_window": 4}, ["query"], "query"),  # tokens before examples
        (OPTConfig, {"word_embed_proj_dim": 32}, ["fc1"], "fc1"),  # tokens of all examples in a row
        (OPTConfig, {"word_embed_proj_dim": 32}, ["q_proj"], ""),
    ],
)
def test_passes_are_not_shared_where_rows_are_not_examples(config, further, targets, odd):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0}
    bare = transformers.AutoModelForSequenceClassification.from_config(config(**sizes, **further))
    model = hf.AdaptedModel(bare, scale=2.0, target_modules=targets)
    assert not model.unbatched
    model.probe(BATCH)
    assert odd in model.unbatched
    assert bool(odd) == ("not one example after the other" in model.unbatched)


def test_every_model_is_probed_before_a_run(recipe, monkeypatch):
    probed = []
    monkeypatch.setattr(hf.AdaptedModel, "probe", lambda self, batch: probed.append(batch["input_ids"].shape))
    job_of(recipe)
    assert probed == [(7, 4)]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_other_families_give_each_client_its_own_answers(family):
    targets = ["query", "value"] if family == "bert" else ["c_attn"]
    model = hf.AdaptedModel(bare_model(family), scale=2.0, target_modules=targets)
    adapters = [
        Adapter(
            {
                layer.name: low_rank(rank=rank, d_in=layer.d_in, d_out=layer.d_out, key=(rank, layer.name))
                for layer in model.layers
            },
            {name: tensor + rank for name, tensor in model.dense.items()},
        )
        for rank in (1, 3)
    ]
    ids = torch.randint(5, 20, (6, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for parts in ([3, 3], [1, 5]):
        model.load_together(Stack.of(adapters))
        together = model.logits(batch, parts).split(parts)
        for adapter, mine, rows in zip(adapters, together, ids.split(parts), strict=True):
            model.load(adapter)
            alone = model.logits({"input_ids": rows, "attention_mask": torch.ones_like(rows)})
            assert torch.allclose(mine, alone, atol=1e-5)


def test_a_base_in_bfloat16_trains_in_float32(recipe, tmp_path):
    half = job_of(recipe, **{"model.dtype": "bfloat16"})
    full = job_of(recipe)
    assert half.spec.cost.base_bytes < 0.6 * full.spec.cost.base_bytes
    tasks = tasks_of(full)
    alone, together, exact = (
        {reply.client: reply for reply in in_process(job, tmp_path, cohort=cohort).run(tasks)}
        for job, cohort in ((half, 1), (half, 4), (full, 1))
    )
    for client, reply in alone.items():
        assert all(tensor.dtype == torch.float32 for tensor in reply.adapter.tensors().values())
        assert reply.metrics["loss"] == pytest.approx(exact[client].metrics["loss"], rel=0.03)
        assert together[client].metrics["loss"] == pytest.approx(reply.metrics["loss"], rel=0.03)
