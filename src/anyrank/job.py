"""From a recipe to the objects it names: model, data, clients, devices, ranks, method. Everything is checked here."""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from anyrank import config, data, hf
from anyrank.adapter import Adapter
from anyrank.allocate import RANK_POLICIES, Candidate, affordable, deal_classes, ordered
from anyrank.baselines import BASELINES, Cohort
from anyrank.compute import settled
from anyrank.config import Baseline, Choices, Recipe
from anyrank.device import PROFILES, too_small
from anyrank.errors import ConfigError
from anyrank.federation import Device, Local, Method, ModelCost, Plan, Profile, Spec
from anyrank.fused import why_apart
from anyrank.hf import AdaptedModel
from anyrank.local import LOCALS
from anyrank.methods import METHODS, proximal, server_optimizer
from anyrank.pretrained import Pretrained, resolve
from anyrank.problem import Answers, Batch, Metric, Problem
from anyrank.problems import PROBLEMS, Given
from anyrank.seeding import numpy_generator, seed_of
from anyrank.topology import TOPOLOGIES, Topology, check_topology
from anyrank.train import Training

__all__ = [
    "CHOICES",
    "QUICKSTART",
    "Job",
    "Learner",
    "Outline",
    "Simulation",
    "check_handed_over",
    "content_hash",
    "learner",
    "load_recipe",
    "local_of",
    "method_of",
    "prepare",
    "problem_of",
    "profiles",
    "ranked",
    "steps_of",
    "topology_of",
    "with_baseline",
]

QUICKSTART = Path(__file__).with_name("quickstart.toml")
CHOICES: Choices = {
    "problem": PROBLEMS,
    "method": METHODS,
    "local": LOCALS,
    "partition": data.PARTITIONS,
    "ranks": RANK_POLICIES,
    "topology": TOPOLOGIES,
}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is learned, as it is told to whoever has neither model nor data, and as it is written down.

    Args:
        base: name of the base model.
        base_hash: of its weights, SHA-256 (hex).
        metric: name of what a run is judged by.
        higher_is_better: or else lower is.
        label_names: class names in label order, where there are classes.
        modules_to_save: what is trained whole.
        patches: of layers that are convolutions, see `AdaptedModel.patches`.
        task_type: PEFT's name for what the model does, if it has one.
        auto_class: the class of transformers that loads such a model, if one does.
        model_arguments: what that class is told beside the model's name.
        form: of conversations.
    """

    base: str
    base_hash: str
    metric: str
    higher_is_better: bool
    label_names: Sequence[str]
    modules_to_save: Sequence[str]
    patches: Mapping[str, Sequence[int]]
    task_type: str | None
    auto_class: str | None
    model_arguments: Mapping[str, Any]
    form: str | None


@dataclass(frozen=True, eq=False)
class Job:
    """A recipe with everything that the server needs of what it names.

    Args:
        recipe: the resolved recipe.
        outline: what is learned.
        local: how clients train.
        cohort: who takes part.
        spec: the run's constants.
        method: the method, with proximal term and server optimizer around it.
        topology: who averages with whom.
    """

    recipe: Recipe
    outline: Outline
    local: Local
    cohort: Cohort
    spec: Spec
    method: Method
    topology: Topology

    @property
    def dense_parameters(self) -> int:
        """How many parameters are trained whole, beside the low-rank factors."""
        return sum(tensor.numel() for tensor in self.spec.start.dense.values())

    @property
    def largest_rank(self) -> int:
        """The rank of the server's adapter before the first round."""
        return max(self.method.init(self.spec).adapter.ranks.values())

    @property
    def plans(self) -> list[Plan]:
        """What the method would ask of the whole fleet in the first round."""
        return self.method.assign(self.method.init(self.spec), list(self.cohort.fleet.values()))

    @property
    def remarks(self) -> list[str]:
        """What is allowed but worth knowing."""
        levels, narrow = self.spec.levels, min(min(layer.d_in, layer.d_out) for layer in self.spec.layers)
        largest = self.largest_rank
        remarks = list[str]()
        if largest > narrow:
            remarks.append(f"rank {largest} is above {narrow}, the smaller side of a layer: some slots are redundant")
        if not self.local.has_factors:
            remarks.append("clients train no factors: every layer's rank is 0, and ranks in the recipe are not used")
        elif not self.method.claims.mixed_ranks and len(levels) > 1:
            which = "the smallest" if largest == levels[0] else "the largest"
            remarks.append(f"{self.cohort.method} has no mixed ranks: everyone trains at rank {largest}, {which}")
        remarks += self._shallow()
        idle = self.cohort.fleet.keys() - {plan.client for plan in self.plans}
        if idle:
            remarks.append(
                f"{self.cohort.method} has no work that the devices of {len(idle)} of {len(self.cohort.fleet)} clients can "
                f"hold; they sit out: {', '.join(sorted(idle)[:3])}{', ...' if len(idle) > 3 else ''}"
            )
        return remarks

    def _shallow(self) -> list[str]:
        """Who cannot train all blocks, where ranks are chosen by what devices afford."""
        if self.recipe.ranks["name"] != "auto" or not self.local.has_factors:
            return []
        settings, deepest = _arguments(self.recipe.ranks), len(self.spec.blocks)
        depths = [affordable(self.spec, device, **settings)[1] for device in self.cohort.fleet.values()]
        shallow = [depth for depth in depths if depth < deepest]
        return (
            [
                f"auto: {len(shallow)} of {len(depths)} clients afford rank 1 in the last {min(shallow)} to {max(shallow)} of "
                f"{deepest} blocks only; a method that chooses depths can use them"
            ]
            if shallow
            else []
        )


@dataclass(frozen=True, eq=False)
class Simulation(Job):
    """A job with the clients' side of it: everything is loaded and checked.

    Args:
        base: where the base model is.
        problem: what is learned.
        model: the base model with LoRA injected.
        training: how clients train.
    """

    base: Pretrained
    problem: Problem
    model: AdaptedModel
    training: Training

    @property
    def remarks(self) -> list[str]:
        """What is allowed but worth knowing."""
        apart = why_apart(self.model, self.local)
        alone = [f"clients do not share passes, they train one after another: {apart}"] if apart else []
        return [*self.problem.remarks, *super().remarks, *alone]


def load_recipe(
    recipe: Path | Mapping[str, Any] | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """Check a recipe and fill in every default.

    Args:
        recipe: a TOML file, or tables as TOML would give them; None takes the embedded default.
        overrides: values by dotted key, or `key=value` strings.

    Raises:
        ConfigError: with all problems of the recipe.
    """
    values = overrides if isinstance(overrides, Mapping) else config.parse_overrides(overrides)
    if isinstance(recipe, Mapping):
        return config.resolve(recipe, values, CHOICES)
    return config.load(recipe or QUICKSTART, values, CHOICES)


class Learner(NamedTuple):
    """What trains, before it is known who does.

    Attributes:
        base: where the base model is.
        problem: what is learned.
        model: the base model with LoRA injected.
        base_hash: of the base model's weights, SHA-256 (hex).
        start: the adapter to start from.
        training: how clients train.
        batch: of the largest examples there can be, for one pass.
        passes: in a local step.
        cost: of a local step.
    """

    base: Pretrained
    problem: Problem
    model: AdaptedModel
    base_hash: str
    start: Adapter
    training: Training
    batch: Batch
    passes: int
    cost: ModelCost

    @property
    def outline(self) -> Outline:
        """What is learned, as it is told."""
        problem, metric = self.problem, self.problem.objective.metric
        return Outline(
            base=self.base.name,
            base_hash=self.base_hash,
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            label_names=list(problem.label_names),
            modules_to_save=self.model.modules_to_save,
            patches={name: list(patch) for name, patch in self.model.patches.items()},
            task_type=problem.task_type,
            auto_class=problem.auto_class,
            model_arguments=problem.model_arguments,
            form=problem.form,
        )

    def spec(self, *, scale: float, seed: int, levels: tuple[int, ...] = ()) -> Spec:
        """The run's constants."""
        layers = self.training.local.layers(self.model.layers)
        return Spec(layers, levels, scale, seed, self.start, self.cost)


def problem_of(recipe: Recipe, **changes: Any) -> Problem:
    """What a recipe is to learn.

    Args:
        recipe: names model, data and problem.
        changes: of what `Given` says about them.

    Raises:
        ConfigError: they cannot be had, or do not fit.
    """
    base, table = _base(recipe), recipe.model
    loading = hf.Loading(getattr(torch, table.dtype), table.quantize, table.attention, table.device_map)
    given = Given(base, loading, recipe.data.source or "", recipe.data.test, recipe.data.test_share, recipe.seed)
    return PROBLEMS[recipe.problem["name"]](replace(given, **changes), **_arguments(recipe.problem))


def _base(recipe: Recipe) -> Pretrained:
    return resolve(recipe.model.name) if recipe.model.name else Pretrained("", config.OWN)


def learner(recipe: Recipe, problem: Problem | None = None) -> Learner:
    """Load the model, for a problem.

    Args:
        recipe: what is to be run.
        problem: what is learned; None leaves that to the recipe.

    Raises:
        ConfigError: model or data cannot be had, or do not fit.
    """
    base = _base(recipe)
    problem = problem or problem_of(recipe)
    if recipe.train.group_by_length and problem.lengths is None:
        raise ConfigError("train.group_by_length: the examples of this problem are all of one size; leave it out.")
    local = local_of(recipe)
    model, start, base_hash = _load_model(recipe, problem, local)
    training = Training(
        local=local,
        learning_rate=recipe.train.learning_rate,
        weight_decay=recipe.train.weight_decay,
        batch_size=recipe.train.batch_size,
        collate=problem.collate,
        objective=problem.objective,
        max_grad_norm=recipe.train.max_grad_norm,
        group_by_length=recipe.train.group_by_length,
        micro_batch=recipe.train.micro_batch,
    )
    if recipe.problem["name"] == config.OWN:
        _check_own(recipe, problem, model)
    model.probe(_seven_of_four_tokens(problem))
    at_once = min(recipe.train.batch_size, recipe.train.micro_batch or recipe.train.batch_size)
    batch, passes = problem.batch_of_largest(at_once), math.ceil(recipe.train.batch_size / at_once)
    cost = model.cost(batch, problem.objective.loss, passes=passes)
    return Learner(base, problem, model, base_hash, start, training, batch, passes, cost)


def check_handed_over(recipe: Recipe, problem: Problem | None) -> None:
    """Refuse a problem that is handed over for a recipe that names another.

    Raises:
        ConfigError: it is one.
    """
    if problem is not None and recipe.problem["name"] != config.OWN:
        raise ConfigError(
            f'problem.name: a problem is handed over; expected "{config.OWN}", got {recipe.problem["name"]!r}.'
        )


def prepare(recipe: Recipe, problem: Problem | None = None) -> Simulation:
    """Load model and data, deal out clients, devices and ranks.

    Args:
        recipe: what is to be run.
        problem: for a recipe that leaves it to its caller.

    Raises:
        ConfigError: whatever does not fit, before anything is trained.
    """
    check_handed_over(recipe, problem)
    loaded = learner(recipe, problem)
    problem, model, training, cost = loaded.problem, loaded.model, loaded.training, loaded.cost
    shards = _partition(recipe, _columns(problem))
    local = training.local
    spec = loaded.spec(scale=recipe.lora.scale, seed=recipe.seed)
    cohort = _cohort(recipe, _fleet(recipe, problem, shards, spec), shards)
    method = method_of(recipe, cohort.method)
    compute = settled(
        recipe.compute,
        cost=replace(
            cost,
            forward_flops=cost.forward_flops // loaded.passes,
            block_backward_flops=cost.block_backward_flops // loaded.passes,
        ),
        dtype=recipe.model.dtype,
        lengths=[1] if problem.lengths is None else problem.lengths.tolist(),
        batch_size=min(recipe.train.batch_size, recipe.train.micro_batch or recipe.train.batch_size),
        clients=cohort.per_round,
        apart=bool(why_apart(model, local)),
    )
    job = Simulation(
        recipe=recipe.model_copy(update={"compute": compute}),
        outline=loaded.outline,
        local=local,
        base=loaded.base,
        problem=problem,
        model=model,
        training=training,
        cohort=cohort,
        spec=replace(spec, levels=tuple(sorted({device.rank for device in cohort.fleet.values()}))),
        method=method,
        topology=topology_of(recipe, cohort, method),
    )
    _check_ranks(job)
    return job


def _check_own(recipe: Recipe, problem: Problem, model: AdaptedModel) -> None:
    """Try model and objective on the first training example, twice: what is wrong with them would show late, or not at all."""
    first, objective = problem.train[0], problem.objective
    if recipe.train.group_by_length and not (isinstance(first, Mapping) and "length" in first):
        raise ConfigError(
            "train.group_by_length: expected examples that are mappings with their `length`, which `collate` leaves out; got "
            f"{type(first).__name__}. Leave it out, or hand over such examples."
        )
    batch = problem.collate([first] * 2)
    model.load(Adapter({}, model.dense))
    with torch.inference_mode(), model.model.register_forward_hook(_check_output):
        output = model.logits(batch)
        loss, targets = objective.loss(output, batch), objective.targets(batch)
        predictions, labels = objective.predict(output, batch)
    for what, found in {"a number of targets": targets, "a loss": loss}.items():
        if not isinstance(found, Tensor) or found.shape != (2,):
            raise ConfigError(
                f"problem.objective: expected {what} for each example, a tensor [2] for two of them, got {_shape(found)}. "
                'Leave the mean out, such as with reduction="none", and add up further dimensions.'
            )
    if (count := int(targets.sum())) < 1:
        raise ConfigError(
            "problem.objective: targets: expected 1 or more in each example, as the loss is divided by them, got 0 for the "
            "first training example. Leave such examples out."
        )
    for name, found in {"predictions": predictions, "labels": labels}.items():
        if not isinstance(found, Tensor) or found.shape != (count,):
            raise ConfigError(
                f"problem.objective: predict: {name}: expected a tensor with one for each target, [{count}] for two examples, "
                f"got {_shape(found)}."
            )
    answers = Answers(predictions.cpu().numpy(), labels.cpu().numpy(), float(loss.sum()) / count)
    for metric in objective.metrics:
        _check_metric(metric, answers)


def _check_output(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that refuses what is no tensor and has none for `logits`."""
    if not isinstance(getattr(output, "logits", output), Tensor):
        raise ConfigError(
            f"problem.model: expected a model that answers a tensor, or something with `logits`, got {_shape(output)}."
        )


def _check_metric(metric: Metric, answers: Answers) -> None:
    """Refuse a metric that is no number; one that two equal examples are too few for may fail here, and be fine later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            metric.value(answers)
        except ConfigError:
            raise
        except Exception:
            return


def _shape(found: Any) -> str:
    """What was found in place of a tensor of some shape."""
    return str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__


def _columns(problem: Problem) -> Dataset:
    """What a partition can go by; at least there is a row for each training example."""
    return Dataset.from_dict(dict(problem.columns) or {"row": range(len(problem.train))})


def _seven_of_four_tokens(problem: Problem) -> Batch:
    """A batch whose tokens, where it has any, cannot be taken for examples."""
    batch = problem.collate([problem.train[i % len(problem.train)] for i in range(7)])
    shape = batch["input_ids"].shape if "input_ids" in batch else None
    return {name: tensor[..., :4] if tensor.shape == shape else tensor for name, tensor in batch.items()}


def _arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a table that chooses by name says beside the name."""
    return {key: value for key, value in table.items() if key != "name"}


def _partition(recipe: Recipe, columns: Dataset) -> dict[str, np.ndarray]:
    divide = data.PARTITIONS[recipe.partition["name"]]
    shards = divide(columns, numpy_generator(recipe.seed, "partition"), **_arguments(recipe.partition))
    if recipe.fleet.per_round > len(shards):
        raise ConfigError(f"fleet.per_round: {recipe.fleet.per_round} clients a round, but there are {len(shards)}.")
    return shards


def local_of(recipe: Recipe) -> Local:
    """How clients train: the method's way, where it brings one, or the recipe's."""
    method = METHODS[recipe.method["name"]](**_arguments(recipe.method))
    own, name, chosen = method.local, recipe.method["name"], recipe.local["name"]
    local = own or LOCALS[chosen](**_arguments(recipe.local))
    problems = []
    if own and recipe.local != Recipe.model_fields["local"].default:
        problems.append(f"local.name: {name} brings its own way of training; leave {chosen!r} out.")
    if local.mixture and (method.claims.folds or method.frozen or method.observe):
        problems.append(
            f"local.name: {chosen} trains no factors, and {name} needs them. Use a method that does nothing but average."
        )
    elif local.weights != "lora" and (method.claims.folds or method.frozen):
        problems.append(
            f"local.name: {chosen} does not work with {name}, whose clients apply products that they do not train: these "
            "have no place under the magnitudes. Use another way of training, or another method."
        )
    if local.weights != "lora" and recipe.lora.dropout:
        problems.append(
            f"lora.dropout: {recipe.lora.dropout:g} of what goes into the factors of plain LoRA, and this way of training has "
            "none. Leave it out."
        )
    if problems:
        raise ConfigError(problems)
    return local


def _load_model(recipe: Recipe, problem: Problem, local: Local) -> tuple[AdaptedModel, Adapter, str]:
    """The model, the adapter to start from (the recipe's, or just the head's first values), and the base's hash."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, "head"))
        base = problem.model()
    if not isinstance(base, torch.nn.Module):
        raise ConfigError(
            f"problem.model: expected what makes a torch.nn.Module, got what makes {type(base).__name__}."
        )
    base_hash = content_hash(base)
    table = recipe.lora
    model = AdaptedModel(
        base,
        scale=table.scale,
        target_modules=table.target_modules,
        modules_to_save=table.modules_to_save,
        weights=local.weights,
        dropout=table.dropout,
        checkpointed=recipe.model.checkpointing,
        **_experts(local, scale=table.scale),
    )
    if table.start is None:
        return model, Adapter({}, model.dense), base_hash
    start = _read("lora.start", table.start, scale=table.scale)
    _check_start(table.start, start, model, local)
    return model, Adapter(start.layers, {**model.dense, **start.dense}), base_hash


def content_hash(model: torch.nn.Module) -> str:
    """Of all that a model computes with, SHA-256 (hex)."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # a quantised layer keeps more than tensors
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(name.encode() + flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _experts(local: Local, *, scale: float) -> dict[str, Any]:
    """The finished adapters that a way of training mixes, if any, and their first temperature."""
    if local.mixture is None:
        return {}
    experts = {folder: _read("local.experts", folder, scale=scale) for folder in local.mixture.experts}
    return {"experts": experts, "tau": local.mixture.tau}


def _read(key: str, folder: str, *, scale: float) -> Adapter:
    try:
        return hf.read_adapter(Path(folder), scale=scale)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _check_start(folder: str, start: Adapter, model: AdaptedModel, local: Local) -> None:
    shapes = {layer.name: (layer.d_out, layer.d_in) for layer in model.layers}
    if not local.has_factors or local.layers(model.layers) != model.layers:
        raise ConfigError("lora.start: this way of training can only start from the base model; leave it out.")
    problems = hf.misfits(f"lora.start: {folder}", start, shapes)
    dense = model.dense
    for name, tensor in start.dense.items():
        if name not in dense or dense[name].shape != tensor.shape:
            problems.append(f"lora.start: {folder}: {name} {list(tensor.shape)} is nothing that this run trains.")
    lacking = [name for name in dense if name not in start.dense and name.rpartition(".")[0] in start.layers]
    if lacking:
        problems.append(f"lora.start: {folder} lacks {lacking[0]}; expected an adapter of the same kind, such as DoRA.")
    if problems:
        raise ConfigError(problems)


def _fleet(recipe: Recipe, problem: Problem, shards: Mapping[str, np.ndarray], spec: Spec) -> dict[str, Device]:
    """Deal device classes and ranks to the clients."""
    known = profiles(recipe)
    classes = recipe.fleet.classes
    kinds = deal_classes(
        list(shards), {name: c.share for name, c in classes.items()}, numpy_generator(recipe.seed, "classes")
    )
    kept = {client: _kept(recipe, client, shard) for client, shard in shards.items()}
    sizes = {client: len(rows) for client, rows in kept.items()}
    labels = np.asarray(problem.columns["label"]) if problem.label_names and "label" in problem.columns else None
    devices = {
        c: Device(
            c,
            kinds[c],
            known[kinds[c]],
            0,
            sizes[c],
            steps_of(recipe, sizes[c]),
            () if labels is None else _labels(labels[kept[c]], len(problem.label_names)),
        )
        for c in shards
    }
    ranks = ranked(recipe, devices, spec)
    return {c: replace(device, rank=ranks[c]) for c, device in devices.items()}


def ranked(recipe: Recipe, devices: Mapping[str, Device], spec: Spec) -> dict[str, int]:
    """The rank of each device, by the recipe's policy; 0 where no factors are trained.

    Raises:
        ConfigError: the policy cannot say.
    """
    if not local_of(recipe).has_factors:
        return dict.fromkeys(devices, 0)
    classes = recipe.fleet.classes
    candidates = [
        Candidate(
            c, d.kind, d.num_examples, classes[d.kind].rank if d.kind in classes else None, partial(affordable, spec, d)
        )
        for c, d in devices.items()
    ]
    policy = RANK_POLICIES[recipe.ranks["name"]]
    ranks = policy(candidates, numpy_generator(recipe.seed, "ranks"), **_arguments(recipe.ranks))
    return ordered(ranks, {c: d.num_examples for c, d in devices.items()}, order=recipe.fleet.rank_order)


def _labels(labels: np.ndarray, classes: int) -> tuple[int, ...]:
    """How many of these training examples have each label."""
    return tuple(np.bincount(labels, minlength=classes).tolist())


def profiles(recipe: Recipe) -> dict[str, Profile]:
    """What each device class can do.

    Raises:
        ConfigError: a class or a change names a device that there is not, or a profile has no number above 0.
    """
    known = {**PROFILES, **recipe.devices}
    problems = [
        f"devices.{name}.{field}: expected a number above 0, got {value}."
        for name, profile in recipe.devices.items()
        for field, value in vars(profile).items()
        if not value > 0
    ]
    problems += [
        f"fleet.classes.{name}.device: there is no {c.device!r}; there are: {', '.join(sorted(known))}."
        for name, c in recipe.fleet.classes.items()
        if c.device not in known
    ]
    problems += [
        f"clock.changes: there is no device class {change.kind!r}; there are: {', '.join(recipe.fleet.classes)}."
        for change in recipe.clock.changes
        if change.kind not in recipe.fleet.classes
    ]
    if problems:
        raise ConfigError(problems)
    return {name: known[c.device] for name, c in recipe.fleet.classes.items()}


def _kept(recipe: Recipe, client: str, shard: np.ndarray) -> np.ndarray:
    return data.held_out(shard, share=recipe.data.held_out, seed=recipe.seed, client=client)[0]


def steps_of(recipe: Recipe, num_examples: int) -> int:
    """The local steps that a recipe asks of a client each round."""
    return recipe.train.steps or (recipe.train.epochs or 1) * math.ceil(num_examples / recipe.train.batch_size)


def _cohort(
    recipe: Recipe, fleet: Mapping[str, Device], shards: Mapping[str, np.ndarray], examples: int | None = None
) -> Cohort:
    cohort = Cohort(
        fleet=fleet,
        shards=shards,
        rounds=recipe.rounds,
        per_round=recipe.fleet.per_round,
        method=recipe.method["name"],
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        examples=examples,
    )
    return BASELINES[recipe.baseline](cohort) if recipe.baseline else cohort


def method_of(recipe: Recipe, name: str | None = None) -> Method:
    """The method with proximal term and server optimizer around it.

    Args:
        recipe: names it, and its arguments.
        name: of a baseline's, if that is another one.

    Raises:
        ConfigError: they do not go together.
    """
    if recipe.baseline == "centralised":
        return METHODS[
            name or recipe.method["name"]
        ]()  # nothing to average: a server step or proximal term holds it back
    chosen = recipe.method["name"] if name is None else name
    method = METHODS[chosen](**(_arguments(recipe.method) if chosen == recipe.method["name"] else {}))
    if recipe.train.prox_mu:
        method = proximal(method, recipe.train.prox_mu)
    if recipe.server.learning_rate != 1 or recipe.server.momentum:
        if method.claims.folds:
            raise ConfigError(
                f"server: {chosen} adds products to the base model, on which a server learning rate or momentum cannot "
                "act. Leave server.learning_rate and server.momentum out, or use another method."
            )
        method = server_optimizer(method, learning_rate=recipe.server.learning_rate, momentum=recipe.server.momentum)
    return method


def topology_of(recipe: Recipe, cohort: Cohort, method: Method) -> Topology:
    """Who averages with whom.

    Raises:
        ConfigError: the method does not work so.
    """
    if recipe.baseline in ("centralised", "local_only"):
        return TOPOLOGIES["star"]()  # there is nobody to average with
    check_topology(cohort.method, method.claims, recipe.topology["name"])
    return TOPOLOGIES[recipe.topology["name"]](**_arguments(recipe.topology))


def _check_ranks(job: Job) -> None:
    largest = job.largest_rank
    narrowest = min(job.spec.layers, key=lambda layer: max(layer.d_in, layer.d_out))
    if largest > max(narrowest.d_in, narrowest.d_out):
        raise ConfigError(
            f"rank {largest} is above the larger side of {narrowest.name} ({narrowest.d_out} x {narrowest.d_in}); "
            f"expected at most {max(narrowest.d_in, narrowest.d_out)}. Lower the rank in [fleet.classes] or [ranks]."
        )
    if job.recipe.baseline in ("centralised", "homogeneous_largest"):
        return  # these ask what would be if the devices could do it
    devices, plans = list(job.cohort.fleet.values()), job.plans
    if not plans:
        raise ConfigError(
            f"fleet.classes: {job.cohort.method} has no work that any of the devices can hold in memory. Name larger "
            "devices, or lower train.batch_size, problem.max_length or the ranks."
        )
    if sentences := too_small(
        plans, devices, model=job.spec.cost, layers=job.spec.layers, dense_parameters=job.dense_parameters
    ):
        raise ConfigError(sentences)


def with_baseline(job: Simulation, baseline: Baseline, examples: int) -> Simulation:
    """The same model and data, with a baseline in place of the method; it is not compared any further.

    Args:
        job: the federated run.
        baseline: a name in `BASELINES`.
        examples: how many training examples the federated run went through.
    """
    recipe = job.recipe.model_copy(update={"baseline": baseline, "compare": [], "track": []})
    cohort = _cohort(recipe, _fleet(recipe, job.problem, job.cohort.shards, job.spec), job.cohort.shards, examples)
    levels = tuple(sorted({device.rank for device in cohort.fleet.values()}))
    method = method_of(recipe, cohort.method)
    return replace(
        job,
        recipe=recipe,
        cohort=cohort,
        spec=replace(job.spec, levels=levels),
        method=method,
        topology=topology_of(recipe, cohort, method),
    )
