"""What clients answer when they are met, read strictly: it is of foreign origin."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anyrank.config import Recipe
from anyrank.errors import RecordError
from anyrank.federation import Layer, ModelCost, Spec
from anyrank.flower.letter import Letter
from anyrank.job import Outline
from anyrank.wire import decode, encode

__all__ = ["Agreed", "Hello", "clean", "difference", "union"]

_MOST = 10**9  # examples, or steps, or folds, that somebody may say to have
_Number = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=0, le=_MOST)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


_Kind = TypeVar("_Kind", bound=_Strict)


class _Profile(_Strict):
    forward_flops: _Number
    backward_flops: _Number
    memory_bytes: _Number
    up_bps: _Number
    down_bps: _Number


class Hello(_Strict):
    """Who a client is, and what it has."""

    client: Annotated[str, Field(pattern=r"^[\w .@-]{1,100}$")]
    anyrank: Annotated[str, Field(max_length=50)]
    kind: Annotated[str, Field(max_length=100)]
    profile: _Profile | None
    num_examples: Annotated[int, Field(ge=1, le=_MOST)]
    label_names: Annotated[list[Annotated[str, Field(max_length=500)]], Field(max_length=1000)]
    folds: _Count

    @staticmethod
    def read(values: Mapping[str, Any]) -> "Hello":
        """A client's answer.

        Raises:
            RecordError: it is none.
        """
        return _read(Hello, values)


class _Labels(_Strict):
    labels: Annotated[list[_Count], Field(max_length=1000)]


@dataclass(frozen=True)
class Agreed:
    """What is learned, as a client finds it with its model.

    Args:
        outline: what is learned.
        spec: of the run, without its levels.
        digest: of all of it that has to be the same everywhere, SHA-256 (hex).
        labels: how many examples of each class this client has.
    """

    outline: Outline
    spec: Spec
    digest: str
    labels: Sequence[int]

    @staticmethod
    def read(recipe: Recipe, answer: Letter) -> "Agreed":
        """A client's answer.

        Raises:
            RecordError: it is none.
        """
        values, labels = answer.values, _read(_Labels, answer.values).labels
        try:
            start = decode(answer.payload)[0]["start"]
            layers = tuple(Layer(**layer) for layer in values["layers"])
            spec = Spec(layers, (), recipe.lora.scale, recipe.seed, start, ModelCost(**values["cost"]))
            same = json.dumps([values["outline"], values["layers"], values["cost"]], sort_keys=True).encode()
            digest = hashlib.sha256(same + encode({"start": start}, {})).hexdigest()
            return Agreed(Outline(**values["outline"]), spec, digest, labels)
        except Exception as error:  # whatever a stranger can think of
            raise RecordError(f"its answer cannot be read ({type(error).__name__}: {error})") from error


def _read(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    try:
        return kind.model_validate({name: values[name] for name in kind.model_fields if name in values})
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise RecordError(f"its answer cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error


def union(hellos: Sequence[Hello]) -> list[str]:
    """The labels of all clients: as all have them, or else in order."""
    names = [hello.label_names for hello in hellos]
    return names[0] if all(each == names[0] for each in names) else sorted({name for each in names for name in each})


def difference(found: Agreed, known: Agreed) -> str:
    """What of a client's answer is not as agreed."""
    for name, value in vars(known.outline).items():
        if (own := getattr(found.outline, name)) != value:
            return f"its {name.replace('_', ' ')} is {own}, the others' {value}"
    if found.spec.layers != known.spec.layers:
        return "other layers of its model are adapted"
    if found.spec.cost != known.spec.cost:
        return "a step of its model costs otherwise; the versions of its libraries may differ"
    return "the adapter that it starts from is another one"


def clean(text: object, *, most: int = 500) -> str:
    """A text of foreign origin as a terminal may show it."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[: most + 1])
    return shown if len(shown) <= most else shown[:most] + "..."
