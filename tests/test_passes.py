"""A step in several passes, blocks that are computed again, and models that are loaded in other ways."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

import anyrank
from anyrank import fused
from anyrank.adapter import Adapter
from anyrank.errors import ConfigError
from anyrank.federation import Task, make_task
from anyrank.job import Job, load_recipe, prepare
from anyrank.seeding import generator
from anyrank.train import train
from federations import assert_close
from tiny import recipe_toml, write_model, write_reviews


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv")))
    return lambda *settings: load_recipe(file, [*settings, "train.steps=3"])


def tasks(job: Job) -> list[Task]:
    state = job.method.init(job.spec)
    plans = job.method.assign(state, list(job.cohort.fleet.values()))
    return [make_task(job.method, state, plan) for plan in plans[:3]]


def data(job: Job, client: str) -> Subset:
    return Subset(job.problem.train, job.cohort.shards[client].tolist())


def same(one: Adapter, other: Adapter, tolerance: float) -> None:
    tensors = other.tensors()
    for name, tensor in one.tensors().items():
        assert_close(tensor, tensors[name], tolerance)


def alone(job: Job) -> dict[str, Adapter]:
    return {
        task.plan.client: train(
            job.model,
            task,
            task.start,
            data(job, task.plan.client),
            training=job.training,
            method=job.method,
            rng=generator("order", task.plan.client),
        )[0]
        for task in tasks(job)
    }


def together(job: Job) -> dict[str, Adapter]:
    clients = [
        fused.Client(task, task.start, data(job, task.plan.client), generator("order", task.plan.client))
        for task in tasks(job)
    ]
    room = len(clients)
    trained = fused.train_together(job.model, clients, room=room, training=job.training, method=job.method)
    return {client.task.plan.client: adapter for client, adapter in trained}


WAYS = {
    "lora": [],
    "with a penalty": ["train.prox_mu=0.1"],
    "with formed factors": ["local.name=beamlora"],
    "with clipping": ["train.max_grad_norm=0.5"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", [alone, together])
def test_a_step_in_several_passes_is_the_same_step(recipe, way, how):
    whole = how(prepare(recipe(*WAYS[way])))
    for size in (1, 3, 8):  # 3 leaves a smaller last pass, 8 is the whole batch
        parts = how(prepare(recipe(*WAYS[way], f"train.micro_batch={size}")))
        for client, adapter in whole.items():
            same(parts[client], adapter, 1e-5)


@pytest.mark.parametrize(
    "settings", [["train.steps=3"], ["lora.dropout=0.3"], ["train.micro_batch=3", "lora.dropout=0.3"]]
)
@pytest.mark.parametrize("how", [alone, together])
def test_blocks_that_are_computed_again_give_the_same(recipe, settings, how):
    usual, again = (how(prepare(recipe(*settings, f"model.checkpointing={on}"))) for on in ("false", "true"))
    for client, adapter in usual.items():
        same(again[client], adapter, 1e-6)


def test_blocks_that_are_computed_again_keep_less(recipe):
    usual, again = (prepare(recipe(f"model.checkpointing={on}")).spec.cost for on in ("false", "true"))
    assert again.block_activation_bytes < 0.5 * usual.block_activation_bytes
    half = prepare(recipe("train.micro_batch=4")).spec.cost
    assert half.tokens_per_step * 2 == usual.tokens_per_step
    assert half.forward_flops == pytest.approx(usual.forward_flops, rel=1e-3)  # two passes of half the size


def test_a_prefix_is_kept_beside_blocks_that_are_computed_again(recipe, tmp_path):
    settings = ["model.checkpointing=true", 'lora.target_modules=["encoder.layer.1.attention.self.query"]']
    kept, plain = (
        anyrank.run(recipe(*settings, f"compute.prefix_cache_gb={size}"), tmp_path / str(size))
        for size in ("0.01", "0")
    )
    same(kept.final_adapter(), plain.final_adapter(), 1e-5)


def test_a_quantised_base_needs_a_gpu(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for bits in ("4bit", "8bit"):
        with pytest.raises(ConfigError, match=f"model.quantize: {bits} needs a GPU, and there is none here"):
            prepare(recipe(f"model.quantize={bits}"))
    with pytest.raises(ConfigError, match=r"model\.quantize"):
        recipe("model.quantize=2bit")


def test_a_model_can_be_spread_over_devices_by_transformers(recipe, tmp_path):
    spread = anyrank.run(recipe('model.device_map="auto"', "rounds=1"), tmp_path / "spread")
    usual = anyrank.run(recipe("rounds=1"), tmp_path / "usual")
    same(spread.final_adapter(), usual.final_adapter(), 1e-5)


def test_the_base_must_be_the_one_that_the_run_was_started_with(recipe, tmp_path):
    folder = anyrank.run(recipe("rounds=1"), tmp_path / "run")
    weights = Path(folder.info["recipe"]["model"]["name"]) / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"\0\0\0\0")
        with pytest.raises(anyrank.RecordError, match="was started on another base model: SHA-256"):
            anyrank.resume(folder.path, overrides=["rounds=2"])
    finally:
        weights.write_bytes(before)
    anyrank.resume(folder.path, overrides=["rounds=2"])
