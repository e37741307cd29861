"""The virtual clock: when each client's reply would arrive on the devices that a run simulates.

Nothing here waits. Who drops out and who is slow is a function of seed, round and client, so it is known
before anyone is trained and is the same after a restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from anyrank.errors import ConfigError
from anyrank.federation import Profile
from anyrank.seeding import numpy_generator

__all__ = ["Arrival", "Change", "Clock", "Workload", "round_seconds"]


@dataclass(frozen=True)
class Change:
    """From a round on, the devices of a class compute more slowly, or faster again.

    Args:
        round: the first round, from 1.
        kind: the device class.
        slowdown: factor on their compute time, above 0; below 1 they are faster. It replaces that of an earlier change.
    """

    round: Annotated[int, Ge(1)]
    kind: str
    slowdown: Annotated[float, Gt(0)]


@dataclass(frozen=True)
class Workload:
    """What one client has to do in a round.

    Args:
        client: who.
        kind: its device class.
        compute_seconds: for its local steps, on an undisturbed device.
        bytes_down: what it receives.
        bytes_up: what it sends back.
        profile: its device; gives the bandwidths.
    """

    client: str
    kind: str
    compute_seconds: float
    bytes_down: int
    bytes_up: int
    profile: Profile


@dataclass(frozen=True)
class Arrival:
    """How a client's round ends.

    Args:
        client: who.
        seconds: from the start of the round until its reply is there, or would have been.
        outcome: `in time`, `late` (after the deadline) or `dropped` (never).
        slowdown: by which its compute time was longer than on an undisturbed device.
    """

    client: str
    seconds: float
    outcome: Literal["in time", "late", "dropped"]
    slowdown: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What can go wrong in a round, and how long the server waits.

    Args:
        deadline: seconds after which a reply is late; None waits for all that still come.
        dropout: probability that a sampled client vanishes in a round.
        straggler: probability that a client is slow in a round.
        slowdown: factor on a slow client's compute time.
        changes: of device classes in the course of the run.
        seed: the run's.

    Raises:
        ConfigError: a value out of range.
    """

    deadline: float | None = None
    dropout: float = 0.0
    straggler: float = 0.0
    slowdown: float = 4.0
    changes: Sequence[Change] = ()
    seed: int

    def __post_init__(self):
        """Refuse settings that mean nothing, all at once."""
        problems = []
        if self.deadline is not None and not self.deadline > 0:
            problems.append(
                f"deadline: expected seconds above 0, got {self.deadline}; leave it out to wait for everyone"
            )
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: expected a probability from 0 to below 1, got {self.dropout}")
        if not 0 <= self.straggler <= 1:
            problems.append(f"straggler: expected a probability from 0 to 1, got {self.straggler}")
        if not 1 <= self.slowdown < inf:
            problems.append(f"slowdown: expected a factor of at least 1, got {self.slowdown}")
        if problems:
            raise ConfigError(problems)

    def arrivals(self, workloads: Sequence[Workload], round: int) -> list[Arrival]:
        """When each reply of a round arrives, in the order of the workloads."""
        return [self._arrival(workload, round) for workload in workloads]

    def _arrival(self, workload: Workload, round: int) -> Arrival:
        # Both numbers are always drawn: a change of one probability must not change who the other one hits.
        drop, slow = numpy_generator(self.seed, "clock", round, workload.client).random(2)
        slowdown = self._changed(workload.kind, round) * (self.slowdown if slow < self.straggler else 1.0)
        down = workload.bytes_down / workload.profile.down_bps
        seconds = down + workload.compute_seconds * slowdown + workload.bytes_up / workload.profile.up_bps
        if drop < self.dropout:
            return Arrival(workload.client, seconds, "dropped", slowdown)
        late = self.deadline is not None and seconds > self.deadline
        return Arrival(workload.client, seconds, "late" if late else "in time", slowdown)

    def _changed(self, kind: str, round: int) -> float:
        past = [change for change in self.changes if change.kind == kind and change.round <= round]
        return max(past, key=lambda change: change.round).slowdown if past else 1.0


def round_seconds(arrivals: Sequence[Arrival], deadline: float | None) -> float:
    """How long a round takes: until the last reply, or until the deadline if a reply is missing.

    Without a deadline the server is taken to notice a dropped client at once; a round in which nobody replies
    then takes 0 s.

    Args:
        arrivals: of all clients of the round.
        deadline: the clock's, in seconds.
    """
    if deadline is not None and any(arrival.outcome != "in time" for arrival in arrivals):
        return deadline
    return max((arrival.seconds for arrival in arrivals if arrival.outcome == "in time"), default=0.0)
