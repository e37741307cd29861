"""The words of the domain: who takes part, what is asked of them, what comes back, and what a method is.

A round reads: the engine samples devices, `Method.assign` gives each a `Plan`, `Method.dispatch` turns a plan into the
adapter that is sent, the transport turns the resulting `Task` into an `Update`, and `Method.aggregate` turns the round's
inbox of (task, update) pairs into the next `State`.

Tasks and updates are whole in memory: whatever the other side has already, or can work out from the seed, is in them too.
`Plan.down`, `Plan.up` and `Task.held` say what of it travels; `wire` leaves out and counts accordingly.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Generator, Tensor
from torch.optim import Optimizer

from anyrank import lowrank
from anyrank.adapter import NOTHING, Adapter, LowRank

__all__ = [
    "Claims",
    "Device",
    "Factors",
    "Failure",
    "Fold",
    "Inbox",
    "Layer",
    "Local",
    "Method",
    "Mixture",
    "ModelCost",
    "Plan",
    "Profile",
    "Spec",
    "State",
    "Task",
    "Times",
    "Update",
    "Weights",
    "holders_tasks",
    "make_task",
]

Factors = Literal["AB", "A", "B", ""]
Topology = Literal["star", "hierarchy", "ring", "gossip"]
Weights = Literal["lora", "dora", "whole", "mole"]


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


@dataclass(frozen=True)
class ModelCost:
    """What one local step of a model costs at the recipe's batch size and length.

    Args:
        forward_flops: floating-point operations of the whole forward pass.
        block_backward_flops: those of the backward pass through one block whose weights are frozen.
        num_blocks: transformer blocks of the model.
        base_bytes: size of the frozen weights.
        block_activation_bytes: what each trained block keeps for its backward pass, what enters adapters included.
        working_bytes: what a step needs for a moment only, whatever the depth.
        tokens_per_step: rows that enter an adapter in one pass.
    """

    forward_flops: int
    block_backward_flops: int
    num_blocks: int
    base_bytes: int
    block_activation_bytes: int
    working_bytes: int
    tokens_per_step: int


@dataclass(frozen=True, eq=False)
class Spec:
    """What is fixed for a whole run.

    Args:
        layers: the adapted layers, from input to output.
        levels: the distinct ranks of the fleet, ascending; the last is the server's rank.
        scale: the factor in front of every product `B A`, the same for all clients and ranks.
        seed: every random number of the run is a function of it.
        start: the adapter to start from at any rank (its dense tensors are the head's first values), or one without layers.
        cost: what a local step costs, for methods that plan by time or memory.
    """

    layers: tuple[Layer, ...]
    levels: tuple[int, ...]
    scale: float
    seed: int
    start: Adapter
    cost: ModelCost

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that hold an adapted layer, from input to output."""
        return tuple(sorted({layer.block for layer in self.layers}))


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
class Times:
    """What the server has measured of a device: moving averages over the rounds in which it replied.

    Args:
        forward: seconds of a step that do not depend on depth.
        backward: seconds of a step for each trained block.
        up: seconds to send a byte.
    """

    forward: float
    backward: float
    up: float


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
        labels: how many of its examples have each label; empty where it does not tell.
        times: what was measured of it; None before its first reply.
        folds: number of the newest fold that it holds.
    """

    client: str
    kind: str
    profile: Profile
    rank: int
    num_examples: int
    steps: int
    labels: tuple[int, ...] = ()
    times: Times | None = None
    folds: int = 0


@dataclass(frozen=True)
class Plan:
    """What one client is asked to hold and train in one round.

    Args:
        client: who.
        ranks: rank by layer; a layer that is absent is not trained, which is what a smaller depth means.
        steps: local steps.
        slots: which of the server's slots these are, the same in every layer; None for the first ones.
        scale: a factor on the run's scale in this client's forward pass.
        train: the factors that are trained.
        down: the factors that travel to the client; the others it has, or draws from the seed.
        up: the factors that travel back; the others are what they were in the task.
        group: its edge in a hierarchy; None leaves that to the topology.
        repeats: how often its edge asks it in a round.
    """

    client: str
    ranks: Mapping[str, int]
    steps: int
    slots: tuple[int, ...] | None = None
    scale: float = 1.0
    train: Factors = "AB"
    down: Factors = "AB"
    up: Factors = "AB"
    group: str | None = None
    repeats: int = 1

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(self.ranks.values(), default=0)


@dataclass(frozen=True, eq=False)
class Fold:
    """A product that has become part of the base model. Folds are numbered from 1.

    A client that holds folds up to a number needs those after it. If that number is below the first fold's in the state, it
    starts again from the base model as published: the folds up to that first one were compressed into it.
    """

    number: int
    adapter: Adapter


@dataclass(frozen=True, eq=False)
class Task:
    """A plan with the adapter to start from: the message from server to client.

    Args:
        kind: `train`; `evaluate` (on the client's held-out part; nothing is trained); `test` (the same on the server's test
            set, in simulation).
        round: number of the round, from 1.
        plan: what was asked.
        start: the adapter as the client receives it.
        frozen: an adapter that the client applies besides and does not train.
        folds: all products that are part of the base model.
        held: the client has the folds up to this number.
        phase: counts the tasks that a client gets in one round, from 0.
    """

    kind: Literal["train", "evaluate", "test"]
    round: int
    plan: Plan
    start: Adapter
    frozen: Adapter = NOTHING
    folds: tuple[Fold, ...] = ()
    held: int = 0
    phase: int = 0

    @property
    def applied(self) -> Adapter:
        """Everything that is applied and not trained: the frozen adapter and the folds, as one."""
        return lowrank.together([self.frozen, *(fold.adapter for fold in self.folds)])

    @property
    def whole(self) -> Adapter:
        """What is trained, before the first step, and everything that is applied, as one."""
        start = Adapter({name: LowRank(part.A, part.B * self.plan.scale) for name, part in self.start.layers.items()})
        return Adapter(lowrank.together([start, self.applied]).layers, self.start.dense)


@dataclass(frozen=True, eq=False)
class Update:
    """A client's reply.

    Args:
        client: who replies.
        round: the task's round.
        adapter: the trained adapter; None after an evaluation.
        num_examples: of the client: its training examples, or those it was scored on.
        metrics: plain numbers, such as the mean training `loss`, and what `Method.observe` sums up.
        seconds: that its steps took on its device, where that was measured; None goes by the device's profile.
    """

    client: str
    round: int
    adapter: Adapter | None
    num_examples: int
    metrics: Mapping[str, float]
    seconds: float | None = None


@dataclass(frozen=True)
class Failure:
    """A client without a usable reply: at which stage (`dropped`, `late`, `rejected`) and why."""

    client: str
    round: int
    stage: str
    reason: str


Inbox = Sequence[tuple[Task, Update]]


def holders_tasks(inbox: Inbox, layer: str) -> list[Task]:
    """The tasks of those who returned a layer, in the order of `State.holders`."""
    return [task for task, update in inbox if update.adapter and layer in update.adapter.layers]


@dataclass(frozen=True, eq=False)
class State:
    """What the server keeps between rounds.

    Args:
        spec: the run's constants.
        adapter: the global adapter.
        round: rounds finished.
        folds: products that have become part of the base model.
        extra: adapters that a method needs to remember, by name.
        notes: numbers and text that a method needs to remember, by name; anything JSON holds.
    """

    spec: Spec
    adapter: Adapter
    round: int = 0
    folds: tuple[Fold, ...] = ()
    extra: Mapping[str, Adapter] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> Adapter:
        """The adapter and all folds as one: what the federation has learned."""
        if not self.folds:
            return self.adapter
        together = lowrank.together([self.adapter, *(fold.adapter for fold in self.folds)])
        return Adapter(together.layers, self.adapter.dense)

    def prefix(self, ranks: Mapping[str, int]) -> Adapter:
        """The first slots of each planned layer, as many as `ranks` says, with the global dense tensors."""
        layers = {name: lowrank.truncate(self.adapter.layers[name], rank) for name, rank in ranks.items()}
        return Adapter(layers, self.adapter.dense)

    def rest(self, ranks: Mapping[str, int]) -> Adapter:
        """What `prefix` leaves: the slots above, and the layers that are not planned."""
        layers = {name: lowrank.tail(part, ranks.get(name, 0)) for name, part in self.adapter.layers.items()}
        return Adapter({name: part for name, part in layers.items() if part.rank})

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

    def with_fold(self, layers: Mapping[str, LowRank]) -> "State":
        """The state with one more product in the base model.

        Folds are kept apart until together they have more slots than a layer has dimensions. Then those before the new one
        are compressed into one, exactly but for rounding.
        """
        number = self.folds[-1].number + 1 if self.folds else 1
        new, before = Fold(number, Adapter(layers)), self.folds
        slots: Counter[str] = Counter()
        for fold in (*before, new):
            slots.update(fold.adapter.ranks)
        if before and any(slots[layer.name] > min(layer.d_in, layer.d_out) for layer in self.spec.layers):
            old = lowrank.together([fold.adapter for fold in before]).layers
            before = (Fold(number - 1, Adapter({name: lowrank.compact(part) for name, part in old.items()})),)
        return replace(self, folds=(*before, new))

    def with_notes(self, **notes: Any) -> "State":
        """The state with these remembered notes added or replaced."""
        return replace(self, notes={**self.notes, **notes})

    def with_extra(self, extra: Mapping[str, Adapter]) -> "State":
        """The state with these remembered adapters added or replaced."""
        return replace(self, extra={**self.extra, **extra})


class Claims(NamedTuple):
    """What a method promises. The conformance suite tests exactly this, and the documentation's table is made from it.

    Attributes:
        paper: authors, title, arXiv number.
        cost: of the server's step per layer; `r_k` client ranks, `R` their sum.
        space: `factor` (A and B are averaged apart) or `product` (B A is averaged).
        down: numbers that travel to a client, per layer; `r_k` its rank, `r` the server's, `m` = d_out, `n` = d_in.
        up: numbers that travel back.
        exact: before truncation, the aggregate with its new fold is the weighted mean of the clients' products.
        mixed_ranks: clients may have different ranks.
        mixed_depths: the method gives clients different layers to train.
        folds: products are added to the base model.
        keeps_uncovered: slots that no client of the round holds keep the server's value.
        keeps_no_op: a round in which clients return what they received changes nothing, at any mix of ranks.
        prunes: clients may return a smaller rank than planned, and keep it.
        personal: there is no global adapter; every client has its own, or a part of its own.
        change: the aggregate adds what clients changed, so that weights that sum to less than one make a smaller step, and
            a reply that comes late counts in a later round.
        topologies: those in which it works.
        needs: why it does not work in the others.
    """

    paper: str
    cost: str
    space: Literal["factor", "product"]
    down: str = "(m + n) r_k"
    up: str = "(m + n) r_k"
    exact: bool = False
    mixed_ranks: bool = True
    mixed_depths: bool = False
    folds: bool = False
    keeps_uncovered: bool = False
    keeps_no_op: bool = False
    prunes: bool = False
    personal: bool = False
    change: bool = False
    topologies: tuple[Topology, ...] = ("star", "hierarchy", "ring", "gossip")
    needs: str = ""


class Mixture(NamedTuple):
    """Finished adapters that are applied together, each as much as a trained gate says.

    Attributes:
        experts: the folders of these adapters.
        tau: the first temperature of the gates.
        penalty: from the mean gate of each expert in a step, a term added to the loss; None adds nothing.
    """

    experts: tuple[str, ...]
    tau: float
    penalty: Callable[[Tensor], Tensor] | None


class Local(NamedTuple):
    """How a client trains. The hooks around a step act in place on the live adapter, whose tensors the optimizer moves.

    Attributes:
        optimizer: from the live adapter, the learning rate and the weight decay, a fresh optimizer of those of its tensors
            that require a gradient.
        on_grad: after each backward pass, before the optimizer's step `step` (from 0); may change gradients. None does nothing.
        on_step: after each step; may change the parameters and the optimizer's memory of them. None does nothing.
        enter: from the adapter that was received, the one whose tensors are trained.
        form: from the live adapter, at every step, the factors that the forward pass uses; may draw random numbers. None
            where those are the trained tensors themselves.
        leave: from the trained adapter, the one to send; the inverse of `enter`.
        layers: from the model's layers, those of the run's adapters, where these are not the same: layers may share factors.
        spread: from an adapter in the run's layers, the one in the model's.
        weights: what the forward pass makes of the factors: `lora` adds their product; `dora` adds it and rescales the rows
            of the sum; `whole` and `mole` have none: dense tensors are trained, a change of the layer's weight or a gate over
            finished adapters.
        mixture: these adapters, with `mole`.
    """

    optimizer: Callable[[Adapter, float, float], Optimizer]
    on_grad: Callable[[Adapter, int], None] | None
    on_step: Callable[[Adapter, Optimizer, int], None] | None
    enter: Callable[[Adapter], Adapter]
    form: Callable[[Adapter, Generator], Adapter] | None
    leave: Callable[[Adapter], Adapter]
    layers: Callable[[tuple[Layer, ...]], tuple[Layer, ...]]
    spread: Callable[[Adapter], Adapter]
    weights: Weights = "lora"
    mixture: Mixture | None = None

    @property
    def has_factors(self) -> bool:
        """Whether layers have factors; where they have none, every rank is 0."""
        return self.weights in ("lora", "dora")


class Method(NamedTuple):
    """A federated method: pure functions, called in this order each round.

    Attributes:
        init: the state before the first round.
        assign: who of the sampled devices holds what; a device without a plan sits the round out.
        dispatch: the adapter a client starts from, with exactly the plan's ranks.
        frozen: what a client applies besides and does not train; None where that is nothing.
        enter: on the client, before training: from the adapter received and what it kept from its last round (None the first
            time), the adapter to start from.
        penalty: on the client, a term added to the loss, from the adapter now and as received; a scalar.
        observe: on the client, after each backward pass: numbers by name, which are summed over the steps and sent along.
        leave: on the client, after training: from the adapter now and as received, the adapter to send.
        keep: on the client, after training: what it keeps for itself until its next round; never sent.
        aggregate: the reducer: the inbox's layers, weighted, become the next state's. Weights are the members' shares;
            they sum to one over all who were asked. Dense tensors are averaged by the engine, the round is counted there.
        step: what the server makes of the state before and the aggregate (server learning rate, momentum).
        local: how clients train, where the method needs a certain way; None leaves it to the recipe.
        claims: what the conformance suite holds the method to.
    """

    init: Callable[[Spec], State]
    assign: Callable[[State, Sequence[Device]], list[Plan]]
    dispatch: Callable[[State, Plan], Adapter]
    frozen: Callable[[State, Plan], Adapter] | None
    enter: Callable[[Adapter, Adapter | None], Adapter] | None
    penalty: Callable[[Adapter, Adapter], Tensor] | None
    observe: Callable[[Adapter], Mapping[str, float]] | None
    leave: Callable[[Adapter, Adapter], Adapter]
    keep: Callable[[Adapter], Adapter] | None
    aggregate: Callable[[State, Inbox, Sequence[float]], State]
    step: Callable[[State, State], State]
    local: Local | None
    claims: Claims


def make_task(
    method: Method,
    state: State,
    plan: Plan,
    *,
    kind: Literal["train", "evaluate", "test"] = "train",
    held: int = 0,
    phase: int = 0,
) -> Task:
    """The task that a plan becomes in the round after `state`; an evaluation belongs to the round before.

    Args:
        method: says what is sent.
        state: of the server, edge or peer that asks.
        plan: what is asked.
        kind: of the task.
        held: number of the newest fold that the client holds.
        phase: counts a client's tasks within a round.
    """
    round = state.round + (kind == "train")
    frozen = method.frozen(state, plan) if method.frozen else NOTHING
    return Task(kind, round, plan, method.dispatch(state, plan), frozen, state.folds, held, phase)
