"""Clients that fit linear maps: the whole of a client's half of a round, without a language model, in milliseconds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyrank.adapter import CHANGE, Adapter, LowRank
from anyrank.clock import Clock
from anyrank.engine import Evaluation, Federation
from anyrank.federation import Device, Failure, Layer, Method, ModelCost, Profile, Spec, Task, Update
from anyrank.local import LOCALS
from anyrank.seeding import generator
from anyrank.topology import TOPOLOGIES, Topology
from anyrank.train import Score
from federations import low_rank

PROFILE = Profile(forward_flops=1.0, backward_flops=1.0, memory_bytes=1e9, up_bps=1e6, down_bps=1e6)
COST = ModelCost(
    forward_flops=1,
    block_backward_flops=1,
    num_blocks=2,
    base_bytes=0,
    block_activation_bytes=0,
    working_bytes=0,
    tokens_per_step=1,
)
LAYERS = (Layer("block.0.q", 6, 5, 0), Layer("block.1.q", 4, 7, 1))
RANKS = {"ann": 1, "bob": 2, "cat": 4, "dan": 4}
SPEC = Spec(LAYERS, (1, 2, 4), 2.0, 0, Adapter({}, {"head": torch.zeros(3)}), COST)
LABELS = {"ann": (9, 1), "bob": (1, 9), "cat": (8, 2), "dan": (2, 8)}
FLEET = {
    client: Device(client, f"rank {rank}", PROFILE, rank, 10 + rank, steps=4, labels=LABELS[client])
    for client, rank in RANKS.items()
}
LORA = LOCALS["lora"]()
Data = Mapping[str, tuple[Tensor, Tensor]]


def linear_data(client: str) -> Data:
    """For each layer inputs of the client's own and the outputs of one map of rank 1, with a little noise."""
    data = {}
    for layer in LAYERS:
        target = low_rank(rank=1, d_in=layer.d_in, d_out=layer.d_out, key=("target", layer.name)).product
        rng = generator("inputs", client, layer.name)
        x = torch.randn(40, layer.d_in, generator=rng)
        data[layer.name] = (x, x @ target.T + 0.05 * torch.randn(40, layer.d_out, generator=rng))
    return data


DATA = {client: linear_data(client) for client in RANKS}


def loss_of(adapter: Adapter, data: Data, *, frozen: Mapping[str, LowRank] = {}, scale: float = 1.0) -> Tensor:
    """Mean squared error over all layers; the head has an optimum of its own."""
    total = (adapter.dense["head"] - 1).square().mean()
    for name, (x, y) in data.items():
        out = torch.zeros_like(y) + x @ adapter.dense.get(name + CHANGE, torch.zeros(y.shape[1], x.shape[1])).T
        for part, factor in ((adapter.layers.get(name), SPEC.scale * scale), (frozen.get(name), SPEC.scale)):
            if part is not None:
                out = out + factor * ((x @ part.A.T) @ part.B.T)
        total = total + (out - y).square().mean()
    return total


def whole_loss(adapter: Adapter) -> float:
    """Mean over all clients' data."""
    return sum(float(loss_of(adapter, data)) for data in DATA.values()) / len(DATA)


def train(method: Method, task: Task, kept: Adapter | None) -> tuple[Update, Adapter | None]:
    """Local training on the client's linear data, with all the hooks of a method."""
    client, plan, frozen = task.plan.client, task.plan, task.applied.layers
    start = method.enter(task.start, kept) if method.enter else task.start
    local = method.local or LORA
    inner = local.enter(start)
    live = Adapter(
        {
            name: LowRank(
                part.A.clone().requires_grad_("A" in plan.train), part.B.clone().requires_grad_("B" in plan.train)
            )
            for name, part in inner.layers.items()
        },
        {name: tensor.clone().requires_grad_() for name, tensor in inner.dense.items()},
    )
    optimizer = local.optimizer(live, 0.15, 0.0)
    rng = generator("toy", task.round, client, task.phase)
    observed: dict[str, float] = {}
    for step in range(plan.steps):
        used = local.form(live, rng) if local.form else live
        loss = loss_of(Adapter(used.layers, live.dense), DATA[client], frozen=frozen, scale=plan.scale)
        objective = loss + method.penalty(live, inner) if method.penalty else loss
        optimizer.zero_grad()
        objective.backward()
        for name, value in (method.observe(live) if method.observe else {}).items():
            observed[name] = observed.get(name, 0.0) + value
        if local.on_grad:
            local.on_grad(live, step)
        optimizer.step()
        if local.on_step:
            with torch.no_grad():
                local.on_step(live, optimizer, step)
    adapter = local.leave(live.map(lambda tensor: tensor.detach().clone()))
    update = Update(client, task.round, method.leave(adapter, start), 40, {"loss": float(loss.detach()), **observed})
    return update, method.keep(adapter) if method.keep else None


@dataclass
class Clients:
    """A transport of such clients; remembers its tasks, and what the clients keep."""

    method: Method
    asked: list[Task] = field(default_factory=list)
    kept: dict[str, dict[int, Adapter]] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        self.asked += tasks
        for task in tasks:
            client, mine = task.plan.client, self.kept.setdefault(task.plan.client, {})
            known = [round for round in mine if round < task.round + (task.kind != "train")]
            kept = mine[max(known)] if known else None
            if task.kind == "train":
                update, keeps = train(self.method, task, kept)
                if keeps:
                    mine[task.round] = keeps
                yield update
            else:
                start = self.method.enter(task.start, kept) if self.method.enter else task.start
                frozen = task.applied.layers
                loss = float(loss_of(start, DATA[client], frozen=frozen, scale=task.plan.scale))
                yield Update(client, task.round, None, 40, {"loss": loss, "accuracy": 1 / (1 + loss)})


def federation(method: Method, topology: Topology | None = None, **changes) -> Federation:
    """A federation of the four linear clients."""

    def score(adapter: Adapter, at_end: bool) -> Score:
        loss = whole_loss(adapter)
        return Score(loss, {"accuracy": 1 / (1 + loss)}, 160)

    settings = {
        "method": method,
        "topology": topology or TOPOLOGIES["star"](),
        "transport": Clients(method),
        "clock": Clock(seed=0),
        "score": score,
        "per_round": 4,
        "rounds": 4,
        "norm_limit": 1e6,
        "evaluation": Evaluation(every=100),  # the last round is always evaluated
        "seed": 3,
    }
    return Federation(**(settings | changes))
