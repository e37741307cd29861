"""What a federated run is compared with. Each is a change of who takes part; the rest of the recipe stays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from anyrank.engine import sample
from anyrank.federation import Device
from anyrank.train import examples_in

__all__ = ["BASELINES", "Cohort"]


@dataclass(frozen=True, eq=False)
class Cohort:
    """Who takes part, with which data, for how long.

    Args:
        fleet: devices by client.
        shards: positions in the training data by client.
        rounds: of the run.
        per_round: clients sampled in each.
        method: the method's name.
        batch_size: of local training.
        seed: of the run.
        examples: how many a finished federated run went through; None where there is none to compare with.
    """

    fleet: Mapping[str, Device]
    shards: Mapping[str, np.ndarray]
    rounds: int
    per_round: int
    method: str
    batch_size: int
    seed: int
    examples: int | None = None


def centralised(cohort: Cohort) -> Cohort:
    """All data on one device of the largest rank, trained without a break on as many examples as the federated run.

    One round: the optimizer is never reset, and there is nothing to average.
    """
    examples = _planned_examples(cohort) if cohort.examples is None else cohort.examples
    strongest = max(cohort.fleet.values(), key=lambda device: device.rank)
    total = sum(device.num_examples for device in cohort.fleet.values())
    steps = max(1, round(examples / cohort.batch_size))
    device = replace(strongest, client="centralised", num_examples=total, steps=steps)
    shard = np.sort(np.concatenate(list(cohort.shards.values())))
    return replace(
        cohort,
        fleet={"centralised": device},
        shards={"centralised": shard},
        rounds=1,
        per_round=1,
        method="zero_padding",  # the mean over one client is the client
    )


def _planned_examples(cohort: Cohort) -> int:
    """What the federated run would go through if every sampled client took part."""
    return sum(
        examples_in(device.steps, num_examples=device.num_examples, batch_size=cohort.batch_size)
        for round in range(1, cohort.rounds + 1)
        for device in sample(cohort.fleet, per_round=cohort.per_round, seed=cohort.seed, round=round)
    )


def local_only(cohort: Cohort) -> Cohort:
    """Every client alone on its own data, with the rounds it would have had in the federation."""
    return replace(cohort, method="local_only")


def homogeneous_smallest(cohort: Cohort) -> Cohort:
    """Everyone at the smallest rank of the fleet."""
    return _at(cohort, min(device.rank for device in cohort.fleet.values()))


def homogeneous_largest(cohort: Cohort) -> Cohort:
    """Everyone at the largest rank of the fleet, whether its device affords it or not."""
    return _at(cohort, max(device.rank for device in cohort.fleet.values()))


def strong_only(cohort: Cohort) -> Cohort:
    """Only the clients of the largest rank take part; the data of the others is not used."""
    largest = max(device.rank for device in cohort.fleet.values())
    fleet = {client: device for client, device in cohort.fleet.items() if device.rank == largest}
    shards = {client: cohort.shards[client] for client in fleet}
    return replace(cohort, fleet=fleet, shards=shards, per_round=min(cohort.per_round, len(fleet)))


def _at(cohort: Cohort, rank: int) -> Cohort:
    return replace(cohort, fleet={c: replace(device, rank=rank) for c, device in cohort.fleet.items()})


BASELINES: Mapping[str, Callable[[Cohort], Cohort]] = {
    "centralised": centralised,
    "local_only": local_only,
    "homogeneous_smallest": homogeneous_smallest,
    "homogeneous_largest": homogeneous_largest,
    "strong_only": strong_only,
}
