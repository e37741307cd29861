"""From a recipe to the objects it names: model, data, clients, devices, ranks, method. Everything is checked here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import DataCollatorWithPadding

from anyrank import config, data, hf
from anyrank.adapter import Adapter
from anyrank.allocate import RANK_POLICIES, Candidate, deal_classes, ordered
from anyrank.baselines import BASELINES, Cohort
from anyrank.compute import settled
from anyrank.config import Baseline, Choices, Recipe
from anyrank.device import PROFILES, too_small
from anyrank.errors import ConfigError
from anyrank.federation import Device, Local, Method, Plan, Profile, Spec
from anyrank.fused import why_apart
from anyrank.hf import AdaptedModel
from anyrank.local import LOCALS
from anyrank.methods import METHODS, proximal, server_optimizer
from anyrank.pretrained import Pretrained, resolve
from anyrank.seeding import numpy_generator
from anyrank.topology import TOPOLOGIES, Topology, check_topology
from anyrank.train import Examples, Training

__all__ = ["CHOICES", "QUICKSTART", "Job", "load_recipe", "prepare", "with_baseline"]

QUICKSTART = Path(__file__).with_name("quickstart.toml")
CHOICES: Choices = {
    "method": METHODS,
    "local": LOCALS,
    "partition": data.PARTITIONS,
    "ranks": RANK_POLICIES,
    "topology": TOPOLOGIES,
}


@dataclass(frozen=True, eq=False)
class Job:
    """A recipe with everything it names loaded and checked.

    Args:
        recipe: the resolved recipe.
        base: where the base model is.
        model: the base model with LoRA injected.
        examples: the data set.
        encoded: its tokenised training part.
        test: its tokenised test part, in order of length.
        training: how clients train.
        cohort: who takes part.
        spec: the run's constants.
        method: the method, with proximal term and server optimizer around it.
        topology: who averages with whom.
    """

    recipe: Recipe
    base: Pretrained
    model: AdaptedModel
    examples: data.Labelled
    encoded: Any
    test: Any
    training: Training
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
        remarks = []
        if largest > narrow:
            remarks.append(f"rank {largest} is above {narrow}, the smaller side of a layer: some slots are redundant")
        if not self.training.local.has_factors:
            remarks.append("clients train no factors: every layer's rank is 0, and ranks in the recipe are not used")
        elif not self.method.claims.mixed_ranks and len(levels) > 1:
            which = "the smallest" if largest == levels[0] else "the largest"
            remarks.append(f"{self.cohort.method} has no mixed ranks: everyone trains at rank {largest}, {which}")
        if apart := why_apart(self.model, self.training.local):
            remarks.append(f"clients do not share passes, they train one after another: {apart}")
        idle = self.cohort.fleet.keys() - {plan.client for plan in self.plans}
        if idle:
            remarks.append(
                f"{self.cohort.method} has no work that the devices of {len(idle)} of {len(self.cohort.fleet)} clients can "
                f"hold; they sit out: {', '.join(sorted(idle)[:3])}{', ...' if len(idle) > 3 else ''}"
            )
        return remarks


def load_recipe(file: Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe, the embedded default if none is named.

    Args:
        file: a TOML file.
        overrides: values by dotted key, or `key=value` strings.

    Raises:
        ConfigError: with all problems of the recipe.
    """
    values = overrides if isinstance(overrides, Mapping) else config.parse_overrides(overrides)
    return config.load(file or QUICKSTART, values, CHOICES)


def prepare(recipe: Recipe) -> Job:
    """Load model and data, deal out clients, devices and ranks.

    Raises:
        ConfigError: whatever does not fit, before anything is trained.
    """
    base = resolve(recipe.model.name)
    examples = _load_data(recipe)
    shards = _partition(recipe, examples)
    local = _local(recipe)
    model, start = _load_model(recipe, base, examples, local)
    tokenizer = hf.load_tokenizer(base)
    _check_length(recipe, model, tokenizer)
    encode = partial(data.encode, tokenizer=tokenizer, text=examples.text, max_length=recipe.data.max_length)
    test = encode(examples.test)
    training = Training(
        local=local,
        learning_rate=recipe.train.learning_rate,
        weight_decay=recipe.train.weight_decay,
        batch_size=recipe.train.batch_size,
        collate=_Collate(DataCollatorWithPadding(tokenizer)),
        max_grad_norm=recipe.train.max_grad_norm,
        group_by_length=recipe.train.group_by_length,
    )
    encoded = encode(examples.train)
    model.probe(_seven_of_four_tokens(encoded, training))
    cohort = _cohort(recipe, _fleet(recipe, examples, shards), shards)
    method = _method(recipe, cohort)
    levels = tuple(sorted({device.rank for device in cohort.fleet.values()}))
    cost = model.cost(batch_size=recipe.train.batch_size, tokens=recipe.data.max_length)
    compute = settled(
        recipe.compute,
        cost=cost,
        dtype=recipe.model.dtype,
        lengths=encoded["length"][:],
        batch_size=recipe.train.batch_size,
        clients=cohort.per_round,
        apart=bool(why_apart(model, local)),
    )
    spec = Spec(local.layers(model.layers), levels, recipe.lora.scale, recipe.seed, start, cost)
    job = Job(
        recipe=recipe.model_copy(update={"compute": compute}),
        base=base,
        model=model,
        examples=examples,
        encoded=encoded,
        test=Subset(test, np.argsort(test["length"], kind="stable").tolist()),  # pyright: ignore
        training=training,
        cohort=cohort,
        spec=spec,
        method=method,
        topology=_topology(recipe, cohort, method),
    )
    _check_ranks(job)
    return job


def _seven_of_four_tokens(encoded: Examples, training: Training) -> Mapping[str, torch.Tensor]:
    batch = training.collate([encoded[i % len(encoded)] for i in range(7)])
    return {name: tensor[:, :4] if tensor.ndim == 2 else tensor for name, tensor in batch.items()}


class _Collate:
    """Pads to the longest example of a batch, and leaves out what only we need."""

    def __init__(self, pad: DataCollatorWithPadding):
        self.pad = pad

    def __call__(self, items: list[dict]) -> Mapping[str, torch.Tensor]:
        return self.pad([{key: value for key, value in item.items() if key != "length"} for item in items])


def _arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a table that chooses by name says beside the name."""
    return {key: value for key, value in table.items() if key != "name"}


def _load_data(recipe: Recipe) -> data.Labelled:
    table = recipe.data
    return data.load(
        table.source,
        text=table.text,
        label=table.label,
        test=table.test,
        test_share=table.test_share,
        seed=recipe.seed,
    )


def _partition(recipe: Recipe, examples: data.Labelled) -> dict[str, np.ndarray]:
    divide = data.PARTITIONS[recipe.partition["name"]]
    shards = divide(examples.train, numpy_generator(recipe.seed, "partition"), **_arguments(recipe.partition))
    if recipe.fleet.per_round > len(shards):
        raise ConfigError(f"fleet.per_round: {recipe.fleet.per_round} clients a round, but there are {len(shards)}.")
    return shards


def _local(recipe: Recipe) -> Local:
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


def _load_model(
    recipe: Recipe, base: Pretrained, examples: data.Labelled, local: Local
) -> tuple[AdaptedModel, Adapter]:
    """The model, and the adapter to start from: one that the recipe names, or just the head's first values."""
    dtype = getattr(torch, recipe.model.dtype)
    classifier = hf.load_classifier(base, label_names=examples.label_names, seed=recipe.seed, dtype=dtype)
    table = recipe.lora
    model = AdaptedModel(
        classifier,
        scale=table.scale,
        target_modules=table.target_modules,
        modules_to_save=table.modules_to_save,
        weights=local.weights,
        dropout=table.dropout,
        **_experts(local, scale=table.scale),
    )
    if table.start is None:
        return model, Adapter({}, model.dense)
    start = _read("lora.start", table.start, scale=table.scale)
    _check_start(table.start, start, model, local)
    return model, Adapter(start.layers, {**model.dense, **start.dense})


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


def _check_length(recipe: Recipe, model: AdaptedModel, tokenizer: Any) -> None:
    positions, wanted = model.positions, recipe.data.max_length
    problems = []
    if positions is not None and wanted > positions:
        problems.append(f"data.max_length: {wanted} tokens, but the model has {positions} positions.")
    if tokenizer.pad_token is None:
        problems.append(f"model.name: the tokenizer of {recipe.model.name} has no padding token, which batches need.")
    if problems:
        raise ConfigError(problems)


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


def _fleet(recipe: Recipe, examples: data.Labelled, shards: Mapping[str, np.ndarray]) -> dict[str, Device]:
    """Deal device classes and ranks to the clients."""
    profiles = _profiles(recipe)
    classes = recipe.fleet.classes
    kinds = deal_classes(
        list(shards), {name: c.share for name, c in classes.items()}, numpy_generator(recipe.seed, "classes")
    )
    kept = {client: _kept(recipe, client, shard) for client, shard in shards.items()}
    sizes = {client: len(rows) for client, rows in kept.items()}
    labels = np.asarray(examples.train["label"][:])
    candidates = [Candidate(c, kinds[c], sizes[c], classes[kinds[c]].rank) for c in shards]
    if not _local(recipe).has_factors:
        ranks = dict.fromkeys(shards, 0)
    else:
        policy = RANK_POLICIES[recipe.ranks["name"]]
        ranks = policy(candidates, numpy_generator(recipe.seed, "ranks"), **_arguments(recipe.ranks))
        ranks = ordered(ranks, sizes, order=recipe.fleet.rank_order)
    return {
        c: Device(
            c,
            kinds[c],
            profiles[kinds[c]],
            ranks[c],
            sizes[c],
            _steps(recipe, sizes[c]),
            _labels(labels[kept[c]], len(examples.label_names)),
        )
        for c in shards
    }


def _labels(labels: np.ndarray, classes: int) -> tuple[int, ...]:
    """How many of these training examples have each label."""
    return tuple(np.bincount(labels, minlength=classes).tolist())


def _profiles(recipe: Recipe) -> dict[str, Profile]:
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


def _steps(recipe: Recipe, num_examples: int) -> int:
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


def _method(recipe: Recipe, cohort: Cohort) -> Method:
    if recipe.baseline == "centralised":
        return METHODS[cohort.method]()  # nothing to average: a server step or proximal term would only hold it back
    own = cohort.method == recipe.method["name"]
    arguments = _arguments(recipe.method) if own else {}
    method = METHODS[cohort.method](**arguments)
    if recipe.train.prox_mu:
        method = proximal(method, recipe.train.prox_mu)
    if recipe.server.learning_rate != 1 or recipe.server.momentum:
        if method.claims.folds:
            raise ConfigError(
                f"server: {cohort.method} adds products to the base model, on which a server learning rate or momentum cannot "
                "act. Leave server.learning_rate and server.momentum out, or use another method."
            )
        method = server_optimizer(method, learning_rate=recipe.server.learning_rate, momentum=recipe.server.momentum)
    return method


def _topology(recipe: Recipe, cohort: Cohort, method: Method) -> Topology:
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
            "devices, or lower train.batch_size, data.max_length or the ranks."
        )
    if sentences := too_small(
        plans, devices, model=job.spec.cost, layers=job.spec.layers, dense_parameters=job.dense_parameters
    ):
        raise ConfigError(sentences)


def with_baseline(job: Job, baseline: Baseline, examples: int) -> Job:
    """The same model and data, with a baseline in place of the method; it is not compared any further.

    Args:
        job: the federated run.
        baseline: a name in `BASELINES`.
        examples: how many training examples the federated run went through.
    """
    recipe = job.recipe.model_copy(update={"baseline": baseline, "compare": []})
    cohort = _cohort(recipe, _fleet(recipe, job.examples, job.cohort.shards), job.cohort.shards, examples)
    levels = tuple(sorted({device.rank for device in cohort.fleet.values()}))
    method = _method(recipe, cohort)
    return replace(
        job,
        recipe=recipe,
        cohort=cohort,
        spec=replace(job.spec, levels=levels),
        method=method,
        topology=_topology(recipe, cohort, method),
    )
