"""What enters the lowest adapted block is computed once, kept, and changes nothing but the time that a step takes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import anyrank
from anyrank import api, lowrank
from anyrank.adapter import NOTHING, Adapter
from anyrank.federation import Fold, Task, Update, make_task
from anyrank.hf import AdaptedModel, Stem, entering
from anyrank.job import Job, load_recipe, prepare
from anyrank.methods import METHODS
from anyrank.prefix import Prefix, Store, possible
from anyrank.record import RunFolder
from anyrank.seeding import generator
from anyrank.topology import reduce
from anyrank.train import collated
from anyrank.transport import InProcess, Workers
from tiny import BERT, GPT2, bare_model, in_process, recipe_toml, write_model, write_reviews

UPPER = ["layer.1.attention.self.query", "layer.1.attention.self.value"]
SMALL = {"vocab_size": 23, "num_labels": 3, "pad_token_id": 0, "initializer_range": 0.2}
FAMILIES = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, {**BERT, "num_hidden_layers": 3}),
    "gpt2": (transformers.GPT2ForSequenceClassification, transformers.GPT2Config, {**GPT2, "n_layer": 3}),
    "deberta": (  # blocks return tuples
        transformers.DebertaForSequenceClassification,
        transformers.DebertaConfig,
        {**BERT, "num_hidden_layers": 3, "pooler_hidden_size": 32, "relative_attention": True},
    ),
    "llama": (
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig,
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48},
    ),
    "electra": (  # a linear layer before the blocks
        transformers.ElectraForSequenceClassification,
        transformers.ElectraConfig,
        {**BERT, "num_hidden_layers": 3, "embedding_size": 16},
    ),
    "albert": (  # its layers are one block, used three times
        transformers.AlbertForSequenceClassification,
        transformers.AlbertConfig,
        {**BERT, "num_hidden_layers": 3, "embedding_size": 16},
    ),
    "bart": (  # blocks in two lists
        transformers.BartForSequenceClassification,
        transformers.BartConfig,
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "eos_token_id": 1,
        },
    ),
}
TARGETS = {"deberta": ["in_proj"], "albert": ["query"]}


def adapted(family: str, **settings) -> AdaptedModel:
    classifier, config, sizes = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = classifier(config(**{**SMALL, **sizes})).eval()
    return AdaptedModel(base, scale=2.0, **{"target_modules": TARGETS.get(family), **settings})


def batch_of(lengths, *, left: bool = False) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    ids = torch.randint(5, 23, (len(lengths), longest), generator=generator("tokens"))
    position = torch.arange(longest).expand(len(lengths), -1)
    size = torch.tensor(lengths)[:, None]
    mask = (position >= longest - size if left else position < size).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@contextmanager
def calls(modules) -> Iterator[list[int]]:
    """Which of the modules are called."""
    heard = []
    handles = [module.register_forward_hook(lambda *_, i=i: heard.append(i)) for i, module in enumerate(modules)]
    yield heard
    for handle in handles:
        handle.remove()


# --- passes that begin at a block -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "left"), [("bert", False), ("gpt2", False), ("gpt2", True), ("deberta", False), ("llama", True)]
)
def test_a_pass_can_begin_at_every_block(family, left):
    model = adapted(family)
    assert model.stem(batch_of([4, 7], left=left)) == Stem(2, 32, torch.float32)
    batch = batch_of([7, 3, 9, 9, 5], left=left)
    inner = [next(iter(block.children())) for block in model._blocks.modules]
    for block in (1, 2):
        upper = [layer for layer in model.layers if layer.block >= block]
        rng = generator(family)
        layers = {each.name: lowrank.fresh(2, d_in=each.d_in, d_out=each.d_out, rng=rng) for each in upper}
        layers = {name: part.map(lambda factor: factor + 0.1) for name, part in layers.items()}
        model.load(Adapter(layers, model.dense))
        with calls(inner) as heard:
            expected = model.logits(batch)
        assert heard == [0, 1, 2]
        with calls(inner) as heard:
            hidden = model.entering(batch, block)
        assert heard == list(range(block))
        states = [mine[own] for mine, own in zip(hidden, batch["attention_mask"].bool(), strict=True)]
        with calls(inner) as heard:
            got = model.logits({**batch, **entering(states, block, batch["attention_mask"])})
        assert heard == list(range(block, 3))
        assert (got - expected).abs().max() < 1e-5
        assert torch.equal(model.logits(batch), expected)


@pytest.mark.parametrize("family", ["albert", "bart"])
def test_where_blocks_do_not_follow_each_other_passes_begin_at_the_input(family):
    assert adapted(family).stem(batch_of([4, 7])).blocks == 0


def test_where_a_block_is_not_passed_passes_begin_at_the_input():
    model = adapted("bert")
    first, *others = model._blocks.modules
    model._blocks.modules = [first, torch.nn.Identity(), *others]
    assert model.stem(batch_of([4, 7])).blocks == 0


def test_where_the_answer_is_read_off_padding_passes_begin_at_the_input():
    assert adapted("bert").stem(batch_of([4, 7], left=True)).blocks == 0


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"family": "electra", "target_modules": ["query"]}, 2),
        ({"family": "electra", "target_modules": ["query", "embeddings_project"]}, 0),
        ({"modules_to_save": ["bert.embeddings"]}, 0),
        ({"modules_to_save": ["bert.encoder.layer.0.output.LayerNorm"]}, 0),
        ({"modules_to_save": ["bert.encoder.layer.1.output.LayerNorm"]}, 1),
        ({"modules_to_save": ["bert.pooler"]}, 2),
        ({"target_modules": ["query", "pooler.dense"]}, 2),
        ({"weights": "dora"}, 2),
        ({"weights": "whole"}, 0),
    ],
)
def test_nothing_that_is_trained_is_left_out(settings, blocks):
    assert adapted(**{"family": "bert", **settings}).stem(batch_of([4, 7])).blocks == blocks


def test_an_adapted_block_cannot_be_left_out():
    model, batch = adapted("bert"), batch_of([4, 7])
    layer = model.layers[0]
    part = lowrank.fresh(2, d_in=layer.d_in, d_out=layer.d_out, rng=generator("A"))
    model.load(Adapter({layer.name: part}, model.dense))
    states = [torch.zeros(4, 32), torch.zeros(7, 32)]
    with pytest.raises(AssertionError, match="left out"):
        model.logits({**batch, **entering(states, 1, batch["attention_mask"])})


# --- clients ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prefix")
    recipe = recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv", rows=150))
    (folder / "recipe.toml").write_text(recipe)
    return folder


def job_of(tiny: Path, method: str = "fedavg", **overrides: Any) -> Job:
    settings = {
        "partition.name": "quantity",
        "partition.clients": 6,
        "train.epochs": 2,
        "train.learning_rate": 3e-4,
        **overrides,
    }
    return prepare(load_recipe(tiny / "recipe.toml", {"method.name": method, **settings}))


@pytest.fixture(scope="module")
def job(tiny) -> Job:
    return job_of(tiny, "fedavg", **{"lora.target_modules": UPPER})


def prefix_of(job: Job, folder: Path, **changes) -> Prefix:
    settings = {
        "layers": job.spec.layers,
        "data": job.problem.train,
        "lengths": np.asarray(job.problem.train["length"]),
        "shards": job.cohort.shards,
        "per_round": job.cohort.per_round,
        "in_memory": 10**9,
        "folder": folder,
    }
    prefix = Prefix.of(job.model, job.training, **{**settings, **changes})
    assert prefix
    return prefix


def transport(job: Job, folder: Path, prefix: Prefix | None, *, cohort: int = 1) -> InProcess:
    return in_process(job, folder / "memory", cohort=cohort, prefix=prefix)


def tasks_of(job: Job, state=None) -> list[Task]:
    state = state or job.method.init(job.spec)
    return [make_task(job.method, state, plan) for plan in job.method.assign(state, list(job.cohort.fleet.values()))]


def replies(clients, tasks) -> dict[str, Update]:
    return {reply.client: reply for reply in clients.run(tasks)}


def after(job: Job, state, tasks, updates):
    """The state after a round."""
    inbox = [(task, updates[task.plan.client]) for task in tasks]
    return replace(reduce(job.method, state, inbox, [1 / len(inbox)] * len(inbox)), round=state.round + 1)


def adapter_of(update: Update) -> dict[str, torch.Tensor]:
    assert update.adapter
    return update.adapter.tensors()


def difference(one: dict[str, Update], other: dict[str, Update]) -> float:
    """The largest difference of a number, relative to the largest of its tensor."""
    assert one.keys() == other.keys()
    pairs = [
        (tensor, adapter_of(other[client])[name])
        for client, update in one.items()
        for name, tensor in adapter_of(update).items()
    ]
    return max(float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for a, b in pairs)


@pytest.fixture
def filled(monkeypatch) -> list[tuple[int, int]]:
    """Batches that were passed to fill: how many examples, and which block they enter."""
    seen, plain = [], AdaptedModel.entering

    def entering(self, batch, block):
        seen.append((len(batch["input_ids"]), block))
        return plain(self, batch, block)

    monkeypatch.setattr(AdaptedModel, "entering", entering)
    return seen


def on_gpt2(job: Job) -> Job:
    """The same clients on another model."""
    model = AdaptedModel(bare_model("gpt2"), scale=2.0, target_modules=["h.1.attn.c_attn"])
    return replace(job, model=model, spec=replace(job.spec, layers=model.layers, start=Adapter({}, model.dense)))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("cohort", [1, 4])
def test_clients_end_alike_and_are_filled_once(job, tmp_path, filled, family, cohort):
    job = on_gpt2(job) if family == "gpt2" else job
    plain, kept = (transport(job, tmp_path, prefix, cohort=cohort) for prefix in (None, prefix_of(job, tmp_path)))
    state = job.method.init(job.spec)
    for round in range(3):
        tasks = tasks_of(job, state)
        updates = replies(plain, tasks)
        filled.clear()
        assert difference(replies(kept, tasks), updates) < 1e-5
        trained = sum(update.num_examples for update in updates.values())
        assert sum(size for size, _ in filled) == (0 if round else trained)
        assert all(size <= job.training.batch_size for size, _ in filled)
        state = after(job, state, tasks, updates)


@pytest.mark.parametrize("cohort", [1, 4])
def test_lower_blocks_are_not_passed_in_training(job, tmp_path, cohort):
    clients = transport(job, tmp_path, prefix_of(job, tmp_path), cohort=cohort)
    tasks = tasks_of(job)
    replies(clients, tasks)
    with calls([block.attention for block in job.model._blocks.modules]) as heard:
        replies(clients, tasks)
    assert set(heard) == {1}


@pytest.mark.parametrize("local", ["dora", "msplora", "beamlora", "lora_pro"])
def test_other_ways_of_training_begin_there_too(tiny, tmp_path, filled, local):
    job = job_of(tiny, **{"local.name": local, "lora.target_modules": UPPER})
    tasks = tasks_of(job)
    updates = [replies(transport(job, tmp_path, prefix), tasks) for prefix in (None, prefix_of(job, tmp_path))]
    assert filled
    assert difference(*updates) < 1e-5


def test_clients_of_different_depth_begin_at_their_own_block(tiny, tmp_path, filled):
    job = job_of(tiny, "legend", **{"method.send_frozen": False})
    assert possible(job.method, job.spec.layers)
    prefix, state = prefix_of(job, tmp_path), job.method.init(job.spec)
    plans = job.method.assign(state, list(job.cohort.fleet.values()))
    depths = [{layer.name: 1 for layer in job.spec.layers if layer.block >= lowest} for lowest in (1, 0, 1, 0, 1, 0)]
    tasks = [make_task(job.method, state, replace(p, ranks=ranks)) for p, ranks in zip(plans, depths, strict=True)]
    assert [prefix.block(task, num_examples=8) for task in tasks] == [1, 0, 1, 0, 1, 0]
    updates = [replies(transport(job, tmp_path, each, cohort=4), tasks) for each in (None, prefix)]
    assert {block for _, block in filled} == {1}
    assert difference(*updates) < 1e-5


def test_what_is_applied_below_moves_the_block(tiny, tmp_path):
    job = job_of(tiny)
    prefix, task = prefix_of(job, tmp_path), tasks_of(job)[0]
    lower, upper = (
        Adapter({name: part for name, part in task.start.layers.items() if f".layer.{block}." in name})
        for block in (0, 1)
    )

    def block(**changes) -> int:
        return prefix.block(replace(task, start=upper, **changes), num_examples=8)

    assert block() == 1
    assert block(frozen=upper, folds=(Fold(1, upper),)) == 1
    assert block(frozen=lower) == 0
    assert block(folds=(Fold(1, lower),)) == 0
    assert prefix.block(task, num_examples=8) == 0
    assert prefix.block(replace(task, start=NOTHING), num_examples=8) == 1  # the head alone
    assert block(kind="evaluate") == 0
    higher = replace(prefix, blocks=dict.fromkeys(prefix.blocks, 2))
    assert higher.block(task, num_examples=8) == 1  # no pass of this model can begin later


def test_where_there_can_be_no_such_blocks(tiny, job):
    fedavg, legend = METHODS["fedavg"](), METHODS["legend"]
    everywhere = job_of(tiny).spec.layers
    assert possible(fedavg, job.spec.layers)
    assert not possible(fedavg, everywhere)
    assert not possible(legend(), everywhere)
    assert possible(legend(send_frozen=False), everywhere)


@pytest.mark.parametrize(
    ("steps", "per_round", "block"),
    [(1, 6, 0), (2, 6, 1), (2, 1, 0), (4, 1, 1)],  # of 8 examples each; the client has 16, and there are 6 clients
)
def test_filling_is_worth_it_where_examples_are_used_twice(job, tmp_path, steps, per_round, block):
    prefix, task = prefix_of(job, tmp_path, per_round=per_round), tasks_of(job)[0]
    task = replace(task, plan=replace(task.plan, steps=steps))
    assert prefix.block(task, num_examples=16) == block


def test_only_clients_that_begin_at_the_same_block_share_passes(tiny, tmp_path):
    job = job_of(tiny, "fedavg", **{"lora.target_modules": UPPER, "train.epochs": None, "train.steps": 2})
    clients = transport(job, tmp_path, prefix_of(job, tmp_path), cohort=4)
    begins = [{clients._begins(task) for task in group} for group in clients._groups(tasks_of(job))]
    assert sorted(map(tuple, begins)) == [(0,), (1,)]  # larger clients do not use all of their examples


def test_what_is_kept_depends_on_the_client_alone(job, tmp_path):
    """Also with a cache that is made anew in between, as after a resume, and whoever came before."""
    first, again = prefix_of(job, tmp_path), prefix_of(job, tmp_path)
    tasks = tasks_of(job)
    once = replies(transport(job, tmp_path, first), tasks)
    assert difference(replies(transport(job, tmp_path, again), tasks[::-1]), once) == 0.0
    assert difference(replies(transport(job, tmp_path, first), tasks[3:] + tasks[:3]), once) == 0.0


def test_some_without_states_make_a_batch_without(job):
    items = [
        {**job.problem.train[0], "entering": torch.zeros(job.problem.train[0]["length"], 32), "block": 1},
        job.problem.train[1],
    ]
    batch = collated(items, job.training)
    plain = collated([job.problem.train[0], job.problem.train[1]], job.training)
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[name], plain[name]) for name in plain)


# --- where it is kept ---------------------------------------------------------------------------------------------


def test_beyond_its_memory_it_is_in_a_file_and_the_same(job, tmp_path):
    tasks = tasks_of(job)
    size = 32 * 4 * int(np.sum(np.asarray(job.problem.train["length"])))
    updates = []
    for in_memory in (size, size // 3, 1):
        folder = tmp_path / str(in_memory)
        folder.mkdir()
        prefix = prefix_of(job, folder, in_memory=in_memory)
        updates.append(replies(transport(job, tmp_path, prefix), tasks))
        on_disk = os.fstat(prefix.store._file.fileno()).st_size
        assert list(folder.iterdir()) == []  # a file without a name
        assert (on_disk > 1) == (in_memory < size)
    assert difference(updates[1], updates[0]) == difference(updates[2], updates[0]) == 0.0


def test_clients_for_whom_there_is_no_room_do_without(job, tmp_path, monkeypatch, filled):
    tasks = tasks_of(job)
    plain = replies(transport(job, tmp_path, None), tasks)

    def full(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        crowded = replies(transport(job, tmp_path, prefix_of(job, tmp_path, in_memory=1)), tasks)
    assert not filled
    assert difference(crowded, plain) == 0.0
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 4000})())
    first = next(iter(job.cohort.shards))
    some = int(np.asarray(job.problem.train["length"])[job.cohort.shards[first]].sum()) * 32 * 4
    prefix = prefix_of(job, tmp_path, in_memory=some)
    assert next(client for client in job.cohort.shards if client in prefix.store) == first
    assert not all(client in prefix.store for client in job.cohort.shards)
    assert difference(replies(transport(job, tmp_path, prefix), tasks), plain) < 1e-5


def test_one_blocks_states_take_the_place_of_anothers(tmp_path):
    store = Store({"ann": 3}, Stem(2, 4, torch.bfloat16), in_memory=1000, folder=tmp_path)
    for block in (1, 2, 1):
        states = store.states("ann", block, fill=lambda states, block=block: states.fill_(block))
        assert states is not None
        assert (states.shape, states.dtype) == ((3, 4), torch.bfloat16)
        assert bool((states == block).all())
        again = store.states("ann", block, fill=lambda states: states.zero_())
        assert again is not None
        assert bool((again == block).all())


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("in_memory", [10**9, 1])
def test_workers_share_what_any_of_them_filled(job, tmp_path, in_memory, filled):
    prefix, tasks = prefix_of(job, tmp_path, in_memory=in_memory), tasks_of(job)
    inner = transport(job, tmp_path, prefix)
    with Workers(inner, count=2, threads=1) as workers:
        updates = [replies(workers, tasks), replies(workers, tasks[::-1])]
    here = replies(inner, tasks)
    assert not filled  # nothing was left to fill in this process
    assert difference(updates[0], here) == difference(updates[1], here) == 0.0


# --- runs ---------------------------------------------------------------------------------------------------------


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_runs_use_it_and_resume_to_the_same_bytes(tiny, tmp_path, filled):
    def recipe(rounds: int):
        return load_recipe(tiny / "recipe.toml", {"lora.target_modules": UPPER, "compute.workers": 1, "rounds": rounds})

    whole = anyrank.run(recipe(3), tmp_path / "whole")
    assert filled
    assert {block for _, block in filled} == {1}
    part = anyrank.run(recipe(1), tmp_path / "part")
    anyrank.resume(part.path, overrides={"rounds": 3})
    assert adapter_bytes(part.path) == adapter_bytes(whole.path)


def test_zero_keeps_nothing(tiny, tmp_path):
    folder = RunFolder(tmp_path, {})
    for memory_gb, kept in ((0.0, False), (0.001, True)):
        settings = {"lora.target_modules": UPPER, "compute.prefix_cache_gb": memory_gb}
        job = prepare(load_recipe(tiny / "recipe.toml", settings))
        assert job.recipe.compute.prefix_cache_gb == memory_gb
        assert bool(api._prefix(job, folder, anyrank.Observer())) == kept


def test_a_model_that_cannot_is_remarked_on(tiny, tmp_path):
    heard = []

    class Listener(anyrank.Observer):
        def noticed(self, remark: str) -> None:
            heard.append(remark)

    settings = {"lora.target_modules": UPPER, "lora.modules_to_save": ["bert.embeddings.LayerNorm"], "rounds": 1}
    recipe = load_recipe(tiny / "recipe.toml", settings)
    anyrank.run(recipe, tmp_path / "run", observer=Listener())
    assert any("computed at every step" in remark for remark in heard)
