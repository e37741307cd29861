"""Recipes: TOML files with overrides, checked as a whole before anything is loaded.

Unknown keys are errors. All problems of a recipe are reported at once. A table that chooses something by `name` (`method`,
`local`, `partition`, `ranks`, `topology`) accepts as further keys the keyword-only arguments of the chosen function: the
function's signature is the table's schema.
"""

import inspect
import tomllib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from anyrank.clock import Change
from anyrank.errors import ConfigError
from anyrank.federation import Profile

__all__ = ["OWN", "Baseline", "Choices", "ComputeTable", "Recipe", "chosen", "load", "parse_overrides", "resolve"]

Baseline = Literal["centralised", "local_only", "homogeneous_smallest", "homogeneous_largest", "strong_only"]

OWN = "own"
"""The problem that is handed over in Python, with its model and its data."""

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Choices = Mapping[str, Mapping[str, Callable[..., Any]]]
# Strict: `true` is no number, and 2.0 no whole one. Not the tables as such, which could then hold no dataclass.
Number = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[Whole, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)  # JSON, hence `run.json`, has no inf


class _Arguments(_Table):
    model_config = ConfigDict(strict=True)


class ModelTable(_Table):
    """`[model]`: the base model."""

    name: Annotated[str, Field(min_length=1)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["8bit", "4bit"] | None = None
    attention: str | None = None
    device_map: str | None = None
    checkpointing: bool = False


class DataTable(_Table):
    """`[data]`: the examples."""

    source: Annotated[str, Field(min_length=1)] | None = None
    test: str | None = None
    test_share: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    held_out: Share = 0.1


class LoraTable(_Table):
    """`[lora]`: what is adapted, and how strongly."""

    scale: Positive = 2.0
    dropout: Share = 0.0
    target_modules: list[str] | None = None
    modules_to_save: list[str] = []
    start: str | None = None


class TrainTable(_Table):
    """`[train]`: local training on every client."""

    learning_rate: Positive = 2e-3
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    batch_size: Count = 16
    micro_batch: Count | None = None
    epochs: Count | None = None
    steps: Count | None = None
    max_grad_norm: Positive | None = None
    group_by_length: bool = False
    prox_mu: Annotated[Number, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _one_length(self):
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both given; keep one")
        return self


class ServerTable(_Table):
    """`[server]`: the step after aggregation, and what is let in."""

    learning_rate: Positive = 1.0
    momentum: Share = 0.0
    norm_limit: Annotated[Number, Field(gt=1)] = 1000.0
    quorum: Count = 1


class ClassTable(_Table):
    """`[fleet.classes.NAME]`: a device class."""

    device: str
    share: Positive = 1.0
    rank: Count | None = None


class FleetTable(_Table):
    """`[fleet]`: who takes part."""

    per_round: Count
    classes: Annotated[dict[str, ClassTable], Field(min_length=1)]
    rank_order: Literal["as_drawn", "with_data", "against_data"] = "as_drawn"


class ClockTable(_Table):
    """`[clock]`: what can go wrong in a simulated round."""

    deadline: Positive | None = None
    dropout: Share = 0.0
    straggler: Annotated[Number, Field(ge=0, le=1)] = 0.0
    slowdown: Annotated[Number, Field(ge=1)] = 4.0
    changes: list[Change] = []


class ComputeTable(_Table):
    """`[compute]`: how this machine does the work. What is left out is settled when a run starts, and noted with it."""

    threads: Count | None = None
    workers: Count | None = None
    cohort: Count | None = None
    memory_gb: Positive | None = None
    prefix_cache_gb: Annotated[Number, Field(ge=0)] | None = None


class EvaluateTable(_Table):
    """`[evaluate]`: when what is scored."""

    every: Count = 1
    classes: Literal["last", "always"] = "last"
    target: Number | None = None
    stop_at_target: bool = False

    @model_validator(mode="after")
    def _target_to_stop_at(self):
        if self.stop_at_target and self.target is None:
            raise ValueError("stop_at_target needs a target")
        return self


class SaveTable(_Table):
    """`[save]`: what is kept beside the global adapter."""

    classes: bool = True
    clients: bool = False


class Recipe(_Table):
    """A whole run. Tables of choice (`problem`, `method` and so on) hold a `name` and that function's arguments."""

    seed: Annotated[Whole, Field(ge=0)] = 0
    rounds: Count
    baseline: Baseline | None = None
    compare: list[Baseline] = []
    method: dict[str, Any]
    model: ModelTable = ModelTable()
    problem: dict[str, Any] = {"name": "classification"}
    data: DataTable = DataTable()
    partition: dict[str, Any]
    ranks: dict[str, Any] = {"name": "per_class"}
    local: dict[str, Any] = {"name": "lora"}
    topology: dict[str, Any] = {"name": "star"}
    lora: LoraTable = LoraTable()
    train: TrainTable = TrainTable()
    server: ServerTable = ServerTable()
    fleet: FleetTable
    devices: dict[str, Profile] = {}
    clock: ClockTable = ClockTable()
    compute: ComputeTable = ComputeTable()
    evaluate: EvaluateTable = EvaluateTable()
    save: SaveTable = SaveTable()
    track: list[Tracker] = []


def load(file: Path, overrides: Mapping[str, Any], choices: Choices) -> Recipe:
    """Read a TOML recipe, apply overrides, check it.

    Args:
        file: the recipe.
        overrides: values by dotted key, as `parse_overrides` returns them.
        choices: for each table that chooses by name, the functions that it can choose.

    Raises:
        ConfigError: with all problems.
    """
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {file}: cannot be read ({error.strerror or error}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {file}: is not valid TOML: {error}.") from error
    return resolve(raw, overrides, choices)


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` strings into values by dotted key; a value is read as TOML, or else as a plain string.

    Raises:
        ConfigError: a setting without `=`.
    """
    problems = [
        f"--set {setting}: expected key=value, such as --set rounds=20 or --set method.name=rbla."
        for setting in settings
        if "=" not in setting or not all(part.strip() for part in setting.split("=", 1)[0].split("."))
    ]
    if problems:
        raise ConfigError(problems)
    pairs = [setting.split("=", 1) for setting in settings]
    return {key.strip(): _toml_value(value.strip()) for key, value in pairs}


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def resolve(raw: Mapping[str, Any], overrides: Mapping[str, Any], choices: Choices) -> Recipe:
    """Check a recipe given as nested mappings and fill in every default.

    Raises:
        ConfigError: with all problems.
    """
    merged = _copy(raw)
    for table in choices:
        chosen = overrides.get(f"{table}.name")
        if isinstance(merged.get(table), dict) and chosen is not None and chosen != merged[table].get("name"):
            merged[table] = {}  # the arguments in the file were those of another function
    problems: list[str] = []
    for key, value in overrides.items():
        problems += _override(merged, key, value)
    for table, functions in choices.items():
        if table in merged:
            merged[table], found = _chosen(table, merged[table], functions)
            problems += found
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise ConfigError([*problems, *(_sentence(Recipe, problem) for problem in error.errors())]) from None
    if recipe.server.quorum > recipe.fleet.per_round:
        problems.append(
            f"server.quorum: {recipe.server.quorum} clients, but a round samples {recipe.fleet.per_round} (fleet.per_round)."
        )
    if recipe.problem["name"] != OWN:
        missing = {"model.name": recipe.model.name, "data.source": recipe.data.source}
        problems += [f"{key}: is missing." for key, value in missing.items() if value is None]
    elif recipe.model != ModelTable() or recipe.data.source is not None:
        problems.append(f'problem.name: "{OWN}" brings its model and its data; leave [model] and data.source out.')
    if problems:
        raise ConfigError(problems)
    if recipe.train.epochs is None and recipe.train.steps is None:
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    return recipe


def chosen(table: str, value: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """A table of choice with all arguments of what it names.

    Args:
        table: its name.
        value: what it holds.
        functions: what it can name.

    Raises:
        ConfigError: with all problems of the table.
    """
    filled, problems = _chosen(table, dict(value), functions)
    if problems:
        raise ConfigError(problems)
    return filled


def _copy(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in raw.items()}


def _override(raw: dict[str, Any], key: str, value: Any) -> list[str]:
    *tables, last = key.split(".")
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            return [f"{key}: {table} is a value, not a table; it has no key {last}."]
    if last in ("epochs", "steps") and tables == ["train"]:
        raw.pop("steps" if last == "epochs" else "epochs", None)  # one replaces the other
    raw[last] = value
    return []


def _chosen(table: str, value: Any, functions: Mapping[str, Callable[..., Any]]) -> tuple[dict[str, Any], list[str]]:
    """The table with all arguments of the function it names, or else of the default's, and what is wrong with it."""
    if not isinstance(value, dict):
        return {}, [f'{table}: expected a table with a name, such as [{table}] name = "{next(iter(functions))}".']
    field = Recipe.model_fields[table]
    value = value if field.is_required() else {**field.default, **value}
    name = value.get("name")
    if name is None:
        return value, [f"{table}.name: is missing; there are: {', '.join(functions)}."]
    if not isinstance(name, str) or name not in functions:
        near = _suggestion(str(name), functions)
        return value, [f"{table}.name: there is no {name!r}{near}; there are: {', '.join(functions)}."]
    schema = _schema(name, functions[name])
    try:
        return schema.model_validate(value).model_dump(), []
    except ValidationError as error:
        return value, [f"{table}.{_sentence(schema, problem)}" for problem in error.errors()]


def _schema(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in parameters}
    return create_model(name, __base__=_Arguments, name=(str, ...), **fields)  # pyright: ignore


def _sentence(schema: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # the latter by a dataclass
        accepted = _accepted(schema, problem["loc"][:-1])
        near = _suggestion(str(problem["loc"][-1]), accepted)
        here = "here" if issubclass(schema, Recipe) else f"by {schema.__name__}"
        return f"{where}: unknown key{near}; accepted {here}: {', '.join(accepted)}."
    if problem["type"] == "missing":
        return f"{where}: is missing."
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}."
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}."


def _suggestion(key: str, accepted: Sequence[str] | Mapping[str, Any]) -> str:
    near = get_close_matches(key, list(accepted), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _accepted(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys of the table at a location such as `("fleet", "classes", "weak")`."""
    here: Any = schema
    for part in location:
        here = get_args(here)[-1] if get_origin(here) in (dict, list) else here.model_fields[part].annotation
    return list(getattr(here, "model_fields", None) or getattr(here, "__dataclass_fields__", {}))
