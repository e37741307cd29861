"""The words of the domain: who takes part, what is asked of them, what comes back, and what a method is.

A round reads: the engine samples devices, `Method.assign` gives each a `Plan`, `Method.dispatch` turns a plan into the
adapter that is sent, the transport turns the resulting `Task` into an `Update`, and `Method.aggregate` turns the round's
inbox of (task, update) pairs into the next `State`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank

__all__ = [
    "Claims",
    "Device",
    "Failure",
    "Inbox",
    "Layer",
    "Local",
    "Method",
    "Plan",
    "Profile",
    "Spec",
    "State",
    "Task",
    "Update",
]


@dataclass(frozen=True)
class Layer:
    """One matrix of the base model that can be adapted.

    Args:
        name: the module's name in the base model.
        d_in: columns of its weight.
        d_out: rows of its weight.
        block: index of the transformer block it sits in, 0 nearest to the input; depth is counted from the last block.
    """

    name: str
    d_in: int
    d_out: int
    block: int


@dataclass(frozen=True, eq=False)
class Spec:
    """What is fixed for a whole run.

    Args:
        layers: the adapted layers, from input to output.
        levels: the distinct ranks of the fleet, ascending; the last is the server's rank.
        scale: the factor in front of every product `B A`, the same for all clients and ranks.
        seed: every random number of the run is a function of it.
        start: the adapter to start from at any rank (its dense tensors are the head's first values), or one without layers.
    """

    layers: tuple[Layer, ...]
    levels: tuple[int, ...]
    scale: float
    seed: int
    start: Adapter


@dataclass(frozen=True)
class Profile:
    """What a kind of device can do.

    Args:
        forward_flops: floating-point operations a second that it reaches in a forward pass.
        backward_flops: the same in a backward pass.
        memory_bytes: memory that training may use.
        up_bps: upload, bytes a second.
        down_bps: download, bytes a second.
    """

    forward_flops: float
    backward_flops: float
    memory_bytes: float
    up_bps: float
    down_bps: float


@dataclass(frozen=True)
class Device:
    """One client as the server knows it.

    Args:
        client: its name, unique in the fleet.
        kind: its device class.
        profile: what that class can do.
        rank: the rank it can afford; shrinks when the client prunes.
        num_examples: its training examples; the weight of its update.
        steps: local steps that the recipe asks of it each round.
    """

    client: str
    kind: str
    profile: Profile
    rank: int
    num_examples: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """What one client is asked to hold and train in one round: the rank of each layer, and how many local steps."""

    client: str
    ranks: Mapping[str, int]
    steps: int


@dataclass(frozen=True, eq=False)
class Task:
    """A plan with the adapter to start from: the message from server to client.

    Args:
        kind: `train`, or `evaluate` (on the client's held-out part; nothing is trained).
        round: number of the round, from 1.
        plan: what was asked.
        start: the adapter as the client receives it.
    """

    kind: Literal["train", "evaluate"]
    round: int
    plan: Plan
    start: Adapter


@dataclass(frozen=True, eq=False)
class Update:
    """A client's reply.

    Args:
        client: who replies.
        round: the task's round.
        adapter: the trained adapter; None after an evaluation.
        num_examples: of the client: its training examples, or the held-out ones after an evaluation.
        metrics: plain numbers, such as the mean training `loss`.
    """

    client: str
    round: int
    adapter: Adapter | None
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Failure:
    """A client without a usable reply: at which stage (`dropped`, `late`, `rejected`) and why."""

    client: str
    round: int
    stage: str
    reason: str


Inbox = Sequence[tuple[Task, Update]]


@dataclass(frozen=True, eq=False)
class State:
    """What the server keeps between rounds.

    Args:
        spec: the run's constants.
        adapter: the global adapter.
        round: rounds finished.
        extra: adapters that a method needs to remember, by name.
    """

    spec: Spec
    adapter: Adapter
    round: int = 0
    extra: Mapping[str, Adapter] = field(default_factory=dict)

    def prefix(self, ranks: Mapping[str, int]) -> Adapter:
        """The first slots of each planned layer, as many as `ranks` says, with the global dense tensors."""
        layers = {name: lowrank.truncate(self.adapter.layers[name], rank) for name, rank in ranks.items()}
        return Adapter(layers, self.adapter.dense)

    def holders(
        self, inbox: Inbox, weights: Sequence[float]
    ) -> Iterator[tuple[str, list[LowRank], list[float], LowRank]]:
        """For each layer that somebody returned: its name, the returned parts, their weights, the part before."""
        for name, previous in self.adapter.layers.items():
            held = [
                (update.adapter.layers[name], weight)
                for (_, update), weight in zip(inbox, weights, strict=True)
                if update.adapter and name in update.adapter.layers
            ]
            if held:
                parts, shares = zip(*held, strict=True)
                yield name, list(parts), list(shares), previous

    def with_layers(self, layers: Mapping[str, LowRank]) -> "State":
        """The state with these layers replaced; the others stay as they are."""
        return self.with_adapter(Adapter({**self.adapter.layers, **layers}, self.adapter.dense))

    def with_adapter(self, adapter: Adapter) -> "State":
        """The state with another global adapter."""
        return replace(self, adapter=adapter)

    def with_extra(self, extra: Mapping[str, Adapter]) -> "State":
        """The state with these remembered adapters added or replaced."""
        return replace(self, extra={**self.extra, **extra})


class Claims(NamedTuple):
    """What a method promises. The conformance suite tests exactly this, and the documentation's table is made from it.

    Attributes:
        paper: authors, title, arXiv number.
        cost: of the server's step per layer; `r_k` client ranks, `R` their sum.
        space: `factor` (A and B are averaged apart) or `product` (B A is averaged).
        exact: before truncation, the aggregate is the weighted mean of the clients' products.
        mixed_ranks: clients may have different ranks.
        keeps_uncovered: slots that no client of the round holds keep the server's value.
        keeps_no_op: a round in which clients return what they received changes nothing, at any mix of ranks.
        prunes: clients may return a smaller rank than planned, and keep it.
        personal: there is no global adapter; every client has its own.
    """

    paper: str
    cost: str
    space: Literal["factor", "product"]
    exact: bool = False
    mixed_ranks: bool = True
    keeps_uncovered: bool = False
    keeps_no_op: bool = False
    prunes: bool = False
    personal: bool = False


class Local(NamedTuple):
    """How a client trains: the optimizer, and what happens around its steps. The hooks act in place on the live adapter.

    Attributes:
        optimizer: from the trained tensors, the learning rate and the weight decay, a fresh optimizer.
        on_grad: after each backward pass, before the optimizer's step; may change gradients.
        on_step: after each step; may change the parameters.
    """

    optimizer: Callable[[Sequence[Tensor], float, float], Optimizer]
    on_grad: Callable[[Adapter], None]
    on_step: Callable[[Adapter], None]


class Method(NamedTuple):
    """A federated method: pure functions, called in this order each round.

    Attributes:
        init: the state before the first round.
        assign: who of the sampled devices holds what; a device without a plan sits the round out.
        dispatch: the adapter a client starts from, with exactly the plan's ranks.
        penalty: on the client, a term added to the loss, from the adapter now and as received; a scalar.
        leave: on the client, after training: from the adapter now and as received, the adapter to send.
        aggregate: the reducer: the inbox's layers, weighted, become the next state's. Weights are the members' shares;
            they sum to one over all who were asked. Dense tensors are averaged by the engine, the round is counted there.
        step: what the server makes of the state before and the aggregate (server learning rate, momentum).
        local: how clients train, where the method needs a certain way; None leaves it to the recipe.
        claims: what the conformance suite holds the method to.
    """

    init: Callable[[Spec], State]
    assign: Callable[[State, Sequence[Device]], list[Plan]]
    dispatch: Callable[[State, Plan], Adapter]
    penalty: Callable[[Adapter, Adapter], Tensor] | None
    leave: Callable[[Adapter, Adapter], Adapter]
    aggregate: Callable[[State, Inbox, Sequence[float]], State]
    step: Callable[[State, State], State]
    local: Local | None
    claims: Claims
