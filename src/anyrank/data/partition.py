"""Who has which training examples: partitions of one data set over clients, and each client's held-out part.

A partition is a function from the labelled training data, a random generator and its own keyword arguments (which
are its settings in a recipe) to the sorted row numbers of each client. A row belongs to one client at most.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from datasets import Dataset
from jaxtyping import Int64

from anyrank.data.read import absent_columns
from anyrank.errors import ConfigError
from anyrank.seeding import numpy_generator

__all__ = ["PARTITIONS", "Indices", "by_column", "dirichlet", "held_out", "iid", "quantity", "shards"]

Indices = Int64[np.ndarray, "_"]

TRIES = 1000

logger = logging.getLogger(__name__)


def iid(data: Dataset, rng: np.random.Generator, *, clients: int) -> dict[str, Indices]:
    """Equal parts at random.

    Args:
        data: the training examples.
        rng: where the randomness comes from.
        clients: how many clients there are.

    Raises:
        ConfigError: there are more clients than examples.
    """
    _check(data, {"clients": clients})
    return _named(np.array_split(rng.permutation(len(data)), clients))


def dirichlet(
    data: Dataset, rng: np.random.Generator, *, clients: int, alpha: float = 0.5, min_examples: int = 10
) -> dict[str, Indices]:
    """Label skew: each class is shared out in proportions from a Dirichlet distribution (Hsu et al., 2019).

    Args:
        data: the training examples.
        rng: where the randomness comes from.
        clients: how many clients there are.
        alpha: concentration; small is skewed, large is close to iid.
        min_examples: the partition is drawn again until every client has this many.

    Raises:
        ConfigError: no draw gives every client enough.
    """
    _check(data, {"clients": clients, "min_examples": min_examples}, alpha)
    _check_labels(data, "dirichlet")
    labels = np.asarray(data["label"][:])
    for _ in range(TRIES):
        parts = _by_class(labels, rng, clients, alpha)
        if min(len(part) for part in parts) >= min_examples:
            return _named(parts)
    raise ConfigError(
        f"partition dirichlet: in {TRIES} draws of {len(data)} examples over clients = {clients} with alpha = {alpha}, "
        f"some client always had fewer than min_examples = {min_examples}; raise alpha, or lower clients or "
        "min_examples"
    )


def shards(data: Dataset, rng: np.random.Generator, *, clients: int, per_client: int = 2) -> dict[str, Indices]:
    """Label skew: the data, sorted by label, is cut into equal shards that are dealt out (McMahan et al., 2017).

    Args:
        data: the training examples.
        rng: where the randomness comes from.
        clients: how many clients there are.
        per_client: shards for each; about the number of labels a client sees.

    Raises:
        ConfigError: there are more shards than examples.
    """
    _check(data, {"clients": clients, "per_client": per_client})
    _check_labels(data, "shards")
    ordered = np.argsort(np.asarray(data["label"][:]), kind="stable")
    cut = np.array_split(ordered, clients * per_client)
    dealt = rng.permutation(len(cut)).reshape(clients, per_client)
    return _named([np.concatenate([cut[shard] for shard in hand]) for hand in dealt])


def quantity(
    data: Dataset, rng: np.random.Generator, *, clients: int, alpha: float = 1.0, min_examples: int = 1
) -> dict[str, Indices]:
    """Size skew: the clients' sizes follow a Dirichlet distribution, their labels the whole data's.

    Args:
        data: the training examples.
        rng: where the randomness comes from.
        clients: how many clients there are.
        alpha: concentration; small is skewed, large gives equal sizes.
        min_examples: every client gets this many before the rest is shared out.

    Raises:
        ConfigError: there are too few examples.
    """
    _check(data, {"clients": clients, "min_examples": min_examples}, alpha)
    rest = len(data) - clients * min_examples
    ends = np.round(np.cumsum(rng.dirichlet([alpha] * clients)) * rest).astype(int)
    ends[-1] = rest
    cuts = ends + min_examples * np.arange(1, clients + 1)
    return _named(np.split(rng.permutation(len(data)), cuts[:-1]))


def by_column(data: Dataset, rng: np.random.Generator, *, column: str, min_examples: int = 2) -> dict[str, Indices]:
    """Natural clients: the values of a column, such as a speaker or a package.

    Args:
        data: the training examples.
        rng: not used; nothing is random here.
        column: the client's name in each row; rows without one, or with an empty one, are left out.
        min_examples: clients with fewer are left out, which is logged.

    Raises:
        ConfigError: the column is not there, or no client is left.
    """
    if problems := absent_columns(data, [column], where="partition.column"):
        raise ConfigError(problems)
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(data[column][:]):
        if value not in (None, ""):
            rows.setdefault(str(value), []).append(row)
    kept = {client: np.array(rows[client]) for client in sorted(rows) if len(rows[client]) >= min_examples}
    if not kept:
        raise ConfigError(
            f"partition by_column: none of the {len(rows)} clients in column {column!r} has min_examples = "
            f"{min_examples} training examples; lower it, or choose another column"
        )
    _report_left_out(len(rows) - len(kept), len(data) - sum(map(len, kept.values())), min_examples)
    return kept


PARTITIONS: Mapping[str, Callable[..., dict[str, Indices]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "by_column": by_column,
}


def held_out(indices: Indices, *, share: float, seed: int, client: str) -> tuple[Indices, Indices]:
    """A client's training rows and the rows it keeps back to evaluate on, the same wherever it is asked.

    Args:
        indices: all rows of the client.
        share: part to keep back, 0 to below 1; rounded, but at least one row of two or more, and never all.
        seed: of the run.
        client: its name.
    """
    most = len(indices) - 1
    size = min(max(round(share * len(indices)), 1), most) if share > 0 and most > 0 else 0
    order = numpy_generator(seed, "held out", client).permutation(indices)
    return np.sort(order[size:]), np.sort(order[:size])


def _check(data: Dataset, counts: Mapping[str, int], alpha: float = 1.0) -> None:
    problems = [f"partition.{key}: expected 1 or more, got {count}" for key, count in counts.items() if count < 1]
    if not 0 < alpha < np.inf:
        problems.append(f"partition.alpha: expected a number above 0, got {alpha}")
    needed = math.prod(counts.values())
    if not problems and needed > len(data):
        asked = " x ".join(f"{key} = {count}" for key, count in counts.items())
        problems.append(f"partition: {asked} needs {needed} training examples, found {len(data)}; lower it")
    if problems:
        raise ConfigError(problems)


def _check_labels(data: Dataset, name: str) -> None:
    if "label" not in data.column_names:
        raise ConfigError(
            f"partition.name: {name} goes by labels, and these examples have none; use iid, quantity or by_column "
            f"(columns: {', '.join(data.column_names)})"
        )


def _by_class(labels: np.ndarray, rng: np.random.Generator, clients: int, alpha: float) -> list[np.ndarray]:
    hands: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.round(np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(rows)).astype(int)
        for hand, rows_of_client in zip(hands, np.split(rows, cuts), strict=True):
            hand.append(rows_of_client)
    return [np.concatenate(hand) for hand in hands]


def _named(parts: Sequence[np.ndarray]) -> dict[str, Indices]:
    width = max(2, len(str(len(parts) - 1)))
    return {f"client-{number:0{width}}": np.sort(part) for number, part in enumerate(parts)}


def _report_left_out(clients: int, rows: int, min_examples: int) -> None:
    if rows:
        logger.warning(
            "partition by_column: %d clients with fewer than min_examples = %d, and %d training examples in all "
            "(those without a client too), are left out",
            clients,
            min_examples,
            rows,
        )
