"""What a client does: the seams around its optimizer steps, the order of its examples, what it leaves behind."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyrank
from anyrank import hf
from anyrank.adapter import Adapter
from anyrank.client import Assignment, work
from anyrank.errors import ConfigError
from anyrank.federation import Task, Update, make_task
from anyrank.job import load_recipe, prepare
from anyrank.local import LOCALS
from anyrank.problem import CLASSIFICATION, Answers, Metric, Problem, collate_pairs
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


# --- problems of one's own ----------------------------------------------------------------------------------------

OWN = {
    "rounds": 1,
    "problem": {"name": "own"},
    "method": {"name": "hlora"},
    "partition": {"name": "iid", "clients": 4},
    "train": {"steps": 2, "learning_rate": 1e-2, "batch_size": 4},
    "compute": {"threads": 1, "workers": 1},
    "fleet": {"per_round": 2, "classes": {"phone": {"device": "phone", "rank": 2}}},
}


class Net(nn.Module):
    """Two layers, and what they answer as this says."""

    def __init__(self, answer: Any = lambda logits: logits, width: int = 3):
        super().__init__()
        self.answer, self.hidden, self.head = answer, nn.Linear(8, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.head(torch.relu(self.hidden(x))))


POINTS = [(torch.full((8,), i / 40), i % 3) for i in range(40)]


def own(**changes: Any) -> Problem:
    return Problem(**{"model": Net, "train": POINTS, "test": POINTS[:8], **changes})


def checked(problem: Problem, **settings: Any) -> None:
    prepare(load_recipe(OWN, {key.replace("__", "."): value for key, value in settings.items()}), problem)


def refused(problem: Problem, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(problem, **settings)
    return str(caught.value)


def squares(logits: Tensor, batch: Any) -> Tensor:
    return (logits - batch["labels"].float()) ** 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": squares}, "a loss for each example, a tensor [2] for two of them, got [2, 2]. Leave"),
        ({"loss": lambda logits, batch: (logits - 1) ** 2}, "got [2, 3]"),
        ({"loss": lambda logits, batch: 1.0}, "a loss for each example, a tensor [2] for two of them, got float"),
        ({"targets": lambda batch: torch.ones(1)}, "a number of targets for each example, a tensor [2]"),
        ({"targets": lambda batch: torch.zeros(2)}, "targets: expected 1 or more in each example"),
        (
            {"predict": lambda logits, batch: (logits, batch["labels"])},
            "predict: predictions: expected a tensor with one",
        ),
        ({"predict": lambda logits, batch: (logits[:1, 0], batch["labels"])}, "[2] for two examples, got [1]"),
        ({"predict": lambda logits, batch: (logits[:, 0].numpy(), batch["labels"])}, "predictions: .* got ndarray"),
        ({"predict": lambda logits, batch: (logits[:, 0], batch["labels"][:1])}, "predict: labels: .*got [1]"),
        ({"metrics": [Metric("mine", lambda a: None)]}, "metric 'mine': expected a number, got None"),  # pyright: ignore
        ({"metrics": [Metric("mine", lambda a: a.labels)]}, "metric 'mine': expected a number, got array"),  # pyright: ignore
        (
            {"metrics": [CLASSIFICATION.metric, Metric("mine", lambda a: torch.ones(2))]},  # pyright: ignore
            "metric 'mine': expected a number, got tensor",
        ),
    ],
)
def test_what_is_wrong_with_an_objective_is_said_before_a_run(change, said):
    model = {"model": lambda: Net(width=1)} if change.get("loss") is squares else {}
    text = refused(own(objective=CLASSIFICATION._replace(**change), **model))
    assert text.startswith("problem.objective: ")
    assert all(part in text for part in said.split(".*"))


@pytest.mark.parametrize(("answer", "kind"), [(lambda x: (x, 1), "tuple"), (lambda x: None, "NoneType")])
def test_a_model_that_answers_no_tensor(answer, kind):
    text = refused(own(model=lambda: Net(answer)))
    assert f"problem.model: expected a model that answers a tensor, or something with `logits`, got {kind}." in text


def test_a_metric_for_which_two_examples_are_too_few_is_tried_later(tmp_path):
    def needs_all(answers: Answers) -> float:
        if len({*answers.labels.tolist()}) < 3:
            raise ValueError("one class only")
        return 0.5

    problem = own(objective=CLASSIFICATION._replace(metrics=[Metric("mine", needs_all)]))
    assert (
        anyrank.run(load_recipe(OWN, {"data.held_out": 0.0}), tmp_path / "run", problem=problem).records()[-1]["score"]
        == 0.5
    )


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(1), torch.tensor(0.25), True], ids=repr)
def test_any_kind_of_number_will_do_for_a_metric(number, tmp_path):
    problem = own(objective=CLASSIFICATION._replace(metrics=[Metric("mine", lambda answers: number)]))
    found = anyrank.run(load_recipe(OWN), tmp_path / "run", problem=problem).records()[-1]["score"]
    assert (found, type(found)) == (float(number), float)


def test_a_metric_that_is_no_number_for_all_answers_is_named(job):
    odd = Metric("mine", lambda answers: "good")  # pyright: ignore
    with pytest.raises(ConfigError, match=r"problem\.objective: metric 'mine': expected a number, got 'good'"):
        evaluate(job.model, start(job), job.problem.test, training=job.training, metrics=[odd])


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([(torch.zeros(8), 1, 0.5)] * 2, "got 3 values"),
        ([torch.zeros(8)] * 2, "got a Tensor"),
        ([{"x": torch.zeros(8)}] * 2, "got a mapping with x"),
        ([(torch.zeros(8),)] * 2, "got 1 values"),
    ],
)
def test_examples_are_pairs_or_mappings_with_labels(examples, said):
    with pytest.raises(ConfigError, match="problem.collate: expected examples that are pairs .*" + said):
        collate_pairs(examples)
    assert collate_pairs([(torch.zeros(8), 1)] * 2)["labels"].tolist() == [1, 1]
    assert collate_pairs([{"x": torch.zeros(8), "labels": 1}] * 2)["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (np.arange(1, 5), r"int64 \[4\]"),
        (np.full(40, np.nan), r"float64 \[40\]"),
        (np.arange(40), r"int64 \[40\]"),
        (np.ones((40, 1), int), r"int64 \[40, 1\]"),
    ],
)
def test_lengths_are_whole_numbers_for_each_example(lengths, said):
    with pytest.raises(ConfigError, match=r"problem\.lengths: expected a NumPy array of 40 whole .*, got " + said):
        own(lengths=lengths)
    assert own(lengths=np.arange(1, 41)).lengths is not None


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ([i % 3 for i in range(40)], ["a", "b"], "from 0 to 1, as there are 2 label_names, got 2"),
        ([-1] * 40, ["a", "b"], "got -1"),
        (["x"] * 40, ["a", "b"], "got 'x'"),
    ],
)
def test_labels_to_divide_by_are_numbers_of_named_classes(labels, names, said):
    with pytest.raises(ConfigError, match=r"problem\.columns: label: expected whole numbers .*" + said):
        own(columns={"label": labels}, label_names=names)
    assert own(columns={"label": labels})
    assert own(columns={"label": [i % 3 for i in range(40)]}, label_names=["a", "b", "c"])


def test_examples_to_be_grouped_have_a_length(tmp_path):
    lengths = np.arange(1, 41)
    assert "expected examples that are mappings with their `length`" in refused(
        own(lengths=lengths), train__group_by_length=True
    )

    def collate(examples: list[Any]) -> Any:
        return collate_pairs([{k: v for k, v in example.items() if k != "length"} for example in examples])

    rows = [{"inputs": x, "labels": y, "length": i + 1} for i, (x, y) in enumerate(POINTS)]
    problem = own(train=rows, test=rows[:8], lengths=lengths, collate=collate)
    recipe = load_recipe(OWN, {"train.group_by_length": True})
    assert anyrank.run(recipe, tmp_path / "run", problem=problem).records()


def test_the_loss_of_a_problem_of_ones_own_is_checked_without_its_mean():
    mean = CLASSIFICATION._replace(loss=lambda logits, batch: F.cross_entropy(logits, batch["labels"]))
    assert "got []. Leave the mean out" in refused(own(objective=mean))
    checked(own())
