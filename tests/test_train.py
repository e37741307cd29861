"""What a client does: the seams around its optimizer steps, the order of its examples, what it leaves behind."""

from dataclasses import replace

import pytest
import torch

from anyrank import hf
from anyrank.adapter import Adapter
from anyrank.client import Assignment, work
from anyrank.federation import Task, Update, make_task
from anyrank.job import load_recipe, prepare
from anyrank.local import LOCALS
from anyrank.seeding import generator
from anyrank.train import evaluate, examples_in, train
from tiny import recipe_toml, write_model, write_reviews


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(write_model(folder / "model"), write_reviews(folder / "reviews.csv")))
    return prepare(load_recipe(file))


def start(job) -> Adapter:
    return task_of(job).start


def task_of(job, *, steps=3, **changes) -> Task:
    state = job.method.init(job.spec)
    plan = job.method.assign(state, list(job.cohort.fleet.values()))[0]
    return make_task(job.method, state, replace(plan, steps=steps, **changes))


def trained(job, *, steps=3, local=None, key="order", penalty=None, **changes) -> tuple[Adapter, dict[str, float]]:
    task = task_of(job, steps=steps, **changes)
    method = job.method._replace(local=local, penalty=penalty)
    return train(
        job.model, task, task.start, job.problem.train, training=job.training, method=method, rng=generator(key)
    )


def equal(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))


def test_training_is_a_function_of_its_arguments_whoever_trained_before(job):
    first, loss = trained(job)
    trained(job, key="someone else", steps=5)
    evaluate(job.model, first, job.problem.test, training=job.training)
    again, same_loss = trained(job)
    assert equal(first, again)
    assert loss == same_loss
    assert not equal(first, trained(job, key="other order")[0])
    assert not equal(first, start(job))


def test_the_hooks_act_before_and_after_each_step(job):
    heard = []
    plain = LOCALS["lora"]()

    def freeze_A(live: Adapter, step: int) -> None:
        heard.append("grad")
        for part in live.layers.values():
            part.A.grad = None

    def clip_B(live: Adapter, optimizer, step: int) -> None:
        heard.append("step")
        for part in live.layers.values():
            part.B.clamp_(-1e-3, 1e-3)

    adapter, _ = trained(job, local=plain._replace(on_grad=freeze_A, on_step=clip_B))
    assert heard == ["grad", "step"] * 3
    for name, part in start(job).layers.items():
        assert torch.equal(adapter.layers[name].A, part.A)
        assert 0 < adapter.layers[name].B.abs().max() <= 1e-3


def test_a_method_may_bring_its_own_way_of_training(job):
    def stop(live: Adapter, step: int) -> None:
        for tensor in live.tensors().values():
            tensor.grad = None

    still = LOCALS["lora"]()._replace(on_grad=stop)
    task = task_of(job)
    asked = Assignment(task, {"train": job.problem.train})
    update, kept = work(job.model, job.method._replace(local=still), asked, training=job.training, seed=0)
    assert kept is None
    assert isinstance(update, Update)
    assert update.adapter
    assert equal(update.adapter, task.start)
    assert update.metrics["examples"] == examples_in(task.plan.steps, num_examples=len(job.problem.train), batch_size=8)


def test_a_penalty_pulls(job):
    def penalty(now: Adapter, before: Adapter) -> torch.Tensor:
        return 100 * sum(part.B.square().sum() for part in now.layers.values())

    def size(adapter: Adapter) -> float:
        return sum(float(part.B.norm()) for part in adapter.layers.values())

    assert size(trained(job, steps=20, penalty=penalty)[0]) < size(trained(job, steps=20)[0])


@pytest.mark.parametrize(("steps", "examples"), [(1, 8), (2, 16), (3, 20), (4, 28), (6, 40)])
def test_the_last_batch_of_an_epoch_is_smaller(steps, examples):
    assert examples_in(steps, num_examples=20, batch_size=8) == examples


def test_scores_do_not_depend_on_how_examples_are_batched(job):
    adapter, _ = trained(job)
    whole = evaluate(job.model, adapter, job.problem.test, training=job.training)
    alone = [
        evaluate(job.model, adapter, [job.problem.test[i]], training=job.training) for i in range(len(job.problem.test))
    ]
    assert whole.metrics["accuracy"] == sum(score.metrics["accuracy"] for score in alone) / len(alone)
    assert whole.loss == pytest.approx(sum(score.loss for score in alone) / len(alone), abs=1e-5)
    assert isinstance(job.model, hf.AdaptedModel)
