"""Many clients in one forward and backward pass over one frozen base.

The factors of the clients are stacked, `A [clients, r, d_in]` and `B [clients, d_out, r]`, and applied by batched products;
all else in the model works on the clients' examples as on one large batch. Smaller ranks end in zero slots. That is exact:
where a slot is zero in A and B both its gradients are zero, and AdamW leaves a zero there.

The places in a pass are filled from a queue: a client that has done its steps leaves, and the next one takes its place, so
that no pass carries a client that only waits. What a client ends with does not depend on who trained beside it, but for
rounding: the order of its examples, its optimizer's memory and its count of steps are its own.
"""

import math
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from anyrank.adapter import NOTHING, Adapter, LowRank, Stack
from anyrank.federation import Local, Method, Task
from anyrank.hf import AdaptedModel
from anyrank.problem import Examples
from anyrank.train import Training, after_backward, batches, collated, pieces

__all__ = ["Client", "alike", "train_together", "why_apart"]

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # torch's defaults for AdamW


@dataclass(eq=False)
class Client:
    """One client, and how far it has come.

    Args:
        task: what is asked: at least one step.
        start: where to start from.
        data: its examples; at least one.
        rng: draws the order of the examples, what is dropped, and whatever the way of training draws.
        step: steps done.
        total: sum of their losses, without penalties.
        seen: examples in them.
        observed: sums of what the method observed.
        error: what stopped it early, if anything did.
    """

    task: Task
    start: Adapter
    data: Examples
    rng: torch.Generator
    step: int = 0
    total: float = 0.0
    seen: int = 0
    observed: Counter[str] = field(default_factory=Counter)
    error: Exception | None = None

    @property
    def diverged(self) -> bool:
        """Whether there is no way on."""
        return not math.isfinite(self.total) or self.error is not None

    @property
    def metrics(self) -> dict[str, float]:
        """What it reports."""
        return {"loss": self.total / self.task.plan.steps, "examples": float(self.seen), **self.observed}


def why_apart(model: AdaptedModel, local: Local) -> str:
    """Why clients have to train one after another; empty if they need not."""
    return model.unbatched or ("a mixture's loss looks at all examples of a pass" if local.mixture else "")


def alike(task: Task) -> Hashable:
    """Clients for which this is the same can share a pass: the same layers, so the same depth, and the same folds."""
    folds = tuple(id(fold.adapter) for fold in task.folds)
    return frozenset(task.plan.ranks), task.plan.train, frozenset(task.frozen.layers), folds


def train_together(
    model: AdaptedModel, clients: Sequence[Client], *, room: int, training: Training, method: Method
) -> Iterator[tuple[Client, Adapter]]:
    """What `train.train` does, for clients that are alike, several at a time.

    Args:
        model: the shared base model; its adapters are replaced.
        clients: they begin in this order.
        room: how many train at once.
        training: learning rate, batch size and the like.
        method: its penalty, its observations, its way of training if it has one.

    Yields:
        each client with its adapter, as soon as it is through.
    """
    local = method.local or training.local
    cohort = _cohort(model, clients, local, training, method)
    waiting, running, frozen = deque(clients), list[Client](), NOTHING
    order = {client: batches(client.data, client.task.plan.steps, training, client.rng) for client in clients}
    while waiting or running:
        if newcomers := [waiting.popleft() for _ in range(min(room - len(running), len(waiting)))]:
            cohort.admit(newcomers)
            running += newcomers
            frozen = _frozen(running, local)
        parts = [next(order[client]) for client in running]  # before `form` and dropout, which draw from `rng` too
        model.load_together(cohort.stack(), frozen=frozen)
        for loss, more in _losses(model, running, parts, training):
            cohort.backward(loss, more)
        # As in training alone, who has diverged ends with what it had before this step.
        through = {place: cohort.adapter(place) for place, client in enumerate(running) if client.diverged}
        cohort.step()
        for place, client in enumerate(running):
            client.step += 1
            if client.diverged or client.step == client.task.plan.steps:
                through.setdefault(place, cohort.adapter(place))
        if through:
            yield from ((running[place], local.leave(adapter)) for place, adapter in sorted(through.items()))
            staying = [place for place in range(len(running)) if place not in through]
            cohort.keep(staying)
            running = [running[place] for place in staying]
            frozen = _frozen(running, local)


def _losses(
    model: AdaptedModel, running: Sequence[Client], parts: Sequence[list[Any]], training: Training
) -> Iterator[tuple[Tensor, bool]]:
    """The loss of each client, `[clients]`, pass by pass, and whether there are more passes."""
    objective, rngs = training.objective, [client.rng for client in running]
    each = [pieces(part, training.micro_batch) for part in parts]
    passes = [[own[i] if i < len(own) else [] for own in each] for i in range(max(map(len, each)))]
    sizes = [[len(part) for part in mine] for mine in passes]
    batches = [collated([example for part in mine for example in part], training) for mine in passes]
    targets = [
        torch.stack([own.sum() for own in objective.targets(batch).split(size)])
        for batch, size in zip(batches, sizes, strict=True)
    ]
    count = torch.stack(targets).sum(0)
    for number, (batch, size) in enumerate(zip(batches, sizes, strict=True), start=1):
        each_loss = objective.loss(model.logits(batch, size, rngs=rngs), batch)
        loss = torch.stack([own.sum() for own in each_loss.split(size)]) / count.to(each_loss.device)
        for client, value in zip(running, loss.tolist(), strict=True):
            client.total += value
        yield loss, number < len(passes)
    for client, part in zip(running, parts, strict=True):
        client.seen += len(part)


def _frozen(running: Sequence[Client], local: Local) -> Adapter | Stack:
    """What the clients apply and do not train: one adapter where it is the same for all, or each one's own."""
    tasks = [client.task for client in running]
    if not tasks or not tasks[0].frozen.layers:
        return local.spread(tasks[0].applied) if tasks else NOTHING
    return Stack.of([local.spread(task.applied) for task in tasks])


# --- whose tensors are where ---------------------------------------------------------------------------------------
#
# Both kinds of cohort hold those who train now, in the order of their places:
#   admit     gives newcomers the next places
#   keep      goes on with some places; the others have left
#   stack     what the model applies in the next step
#   backward  adds up the gradients of a pass, from the loss of each
#   step      moves all that have not diverged
#   adapter   a copy of what the one in a place has now


def _cohort(
    model: AdaptedModel, clients: Sequence[Client], local: Local, training: Training, method: Method
) -> "_Apart | _Rows":
    """One AdamW for all, where nothing else acts on a client's own tensors; or else an optimizer for each."""
    apart = _Apart(model.device, local, training, method)
    first = apart.leaves(clients[0], local.enter(clients[0].start))
    optimizer = local.optimizer(first, training.learning_rate, training.weight_decay)
    if local.form or local.on_grad or local.on_step or method.observe or not _is_plain_adamw(optimizer):
        return apart
    return _Rows(_columns(clients, first, optimizer), model.device, local, training, method)


def _is_plain_adamw(optimizer: Optimizer) -> bool:
    """Whether `_Rows` computes what this optimizer does; learning rates and decays may be any."""
    usual = {"betas": (_BETA1, _BETA2), "eps": _EPS, "amsgrad": False, "maximize": False}
    return type(optimizer) is AdamW and all(
        group[key] == value for group in optimizer.param_groups for key, value in usual.items()
    )


def _scaled(B: Tensor, clients: Sequence[Client]) -> Tensor:
    """Up projections with each client's factor on the run's scale."""
    scales = [client.task.plan.scale for client in clients]
    return B if all(scale == 1 for scale in scales) else B * B.new_tensor(scales)[:, None, None]


class _Apart:
    """Every client has tensors and an optimizer of its own, as if it trained alone; only the pass is shared."""

    def __init__(self, device: torch.device, local: Local, training: Training, method: Method):
        self.device, self.local, self.training, self.method = device, local, training, method
        self.members: list[tuple[Client, Adapter, Adapter, Optimizer]] = []  # with what it started from and what moves

    def leaves(self, client: Client, inner: Adapter) -> Adapter:
        """The tensors that an optimizer moves."""

        def leaf(tensor: Tensor, trained: bool) -> Tensor:
            return tensor.to(self.device, copy=True).requires_grad_(trained)

        train = client.task.plan.train
        layers = {n: LowRank(leaf(p.A, "A" in train), leaf(p.B, "B" in train)) for n, p in inner.layers.items()}
        return Adapter(layers, {name: leaf(tensor, True) for name, tensor in inner.dense.items()})

    def admit(self, newcomers: Sequence[Client]) -> None:
        for client in newcomers:
            inner = self.local.enter(client.start).map(lambda tensor: tensor.to(self.device))
            live = self.leaves(client, inner)
            optimizer = self.local.optimizer(live, self.training.learning_rate, self.training.weight_decay)
            self.members.append((client, inner, live, optimizer))

    def keep(self, places: Sequence[int]) -> None:
        self.members = [self.members[place] for place in places]

    def stack(self) -> Stack:
        form = self.local.form
        used = [
            Adapter(
                (form(live, client.rng) if form else live).layers,
                {name: live.dense[name] for name in client.start.dense},
            )
            for client, _, live, _ in self.members
        ]
        stack = Stack.of(used)
        clients = [client for client, *_ in self.members]
        return replace(stack, B={name: _scaled(B, clients) for name, B in stack.B.items()})

    def backward(self, loss: Tensor, more: bool) -> None:
        objective = loss.sum()
        if self.method.penalty and not more:
            for _, inner, live, _ in self.members:
                objective = objective + self.method.penalty(live, inner)
        objective.backward(retain_graph=more)

    def step(self) -> None:
        for client, _, live, optimizer in self.members:
            if not client.diverged:
                self._move(client, live, optimizer)
            optimizer.zero_grad()

    def _move(self, client: Client, live: Adapter, optimizer: Optimizer) -> None:
        try:
            if self.method.observe:
                client.observed.update(self.method.observe(live))
            after_backward(live, optimizer, client.step, local=self.local, max_grad_norm=self.training.max_grad_norm)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            client.error = error

    def adapter(self, place: int) -> Adapter:
        return self.members[place][2].map(lambda tensor: tensor.detach().to("cpu", copy=True))


class _Column(NamedTuple):
    """Where a tensor of each client is in its row: its name in `Adapter.tensors`, its largest shape, how it is trained."""

    name: str
    shape: tuple[int, ...]
    at: slice
    trained: bool
    rate: float
    decay: float


def _columns(clients: Sequence[Client], like: Adapter, optimizer: Optimizer) -> list[_Column]:
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    tensors = like.tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for layer, part in like.layers.items():
        rank = max(client.task.plan.ranks[layer] for client in clients)
        shapes |= {f"A/{layer}": (rank, part.A.shape[1]), f"B/{layer}": (part.B.shape[0], rank)}
    ends = accumulate((math.prod(shape) for shape in shapes.values()), initial=0)
    return [
        _Column(name, shapes[name], slice(*at), tensor.requires_grad, *settings.get(id(tensor), (0.0, 0.0)))
        for (name, tensor), at in zip(tensors.items(), pairwise(ends), strict=True)
    ]


class _Rows:
    """The clients' tensors are rows of one matrix, moved by one AdamW that counts each row's steps.

    What is not trained has a learning rate of zero.
    """

    def __init__(
        self, columns: Sequence[_Column], device: torch.device, local: Local, training: Training, method: Method
    ):
        def spread(numbers: Sequence[float]) -> Tensor:
            widths = torch.tensor([column.at.stop - column.at.start for column in columns])
            return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(widths).to(device)

        self.columns, self.local, self.training, self.method = columns, local, training, method
        rate, decay = spread([column.rate for column in columns]), spread([column.decay for column in columns])
        self.rate, self.shrink = rate.float(), (1 - rate * decay).float()
        self.members: list[tuple[Client, Adapter]] = []  # with what it started from
        self.used = set[str]()  # columns with a gradient in this step
        empty = torch.empty(0, len(rate), device=device)
        self._become(empty, empty, empty)

    def _become(self, values: Tensor, m: Tensor, v: Tensor) -> None:
        """Take these rows and their moments; a pass sees views of them."""
        self.values, self.m, self.v, self.grads = values, m, v, torch.zeros_like(values)
        self.tensors = {
            column.name: values[:, column.at].view(-1, *column.shape).requires_grad_(column.trained)
            for column in self.columns
        }

    def _row(self, adapter: Adapter) -> Tensor:
        tensors = adapter.tensors()
        row = self.values.new_zeros(self.values.shape[1])
        for column in self.columns:
            tensor = tensors[column.name]
            row[column.at].view(column.shape)[tuple(slice(size) for size in tensor.shape)] = tensor.to(row)
        return row

    def admit(self, newcomers: Sequence[Client]) -> None:
        inner = [
            self.local.enter(client.start).map(lambda tensor: tensor.to(self.values.device)) for client in newcomers
        ]
        rows = torch.stack([self._row(adapter) for adapter in inner])
        self.members += zip(newcomers, inner, strict=True)
        self._become(*(torch.cat(pair) for pair in ((self.values, rows), (self.m, 0 * rows), (self.v, 0 * rows))))

    def keep(self, places: Sequence[int]) -> None:
        self.members = [self.members[place] for place in places]
        self._become(*(rows[list(places)] for rows in (self.values, self.m, self.v)))

    def stack(self) -> Stack:
        kinds: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "dense": {}}
        for key, tensor in self.tensors.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = tensor
        clients = [client for client, _ in self.members]
        return Stack(kinds["A"], {name: _scaled(B, clients) for name, B in kinds["B"].items()}, kinds["dense"])

    def backward(self, loss: Tensor, more: bool) -> None:
        objective = loss.sum()
        if self.method.penalty and not more:
            own = {name: tensor.unbind() for name, tensor in self.tensors.items()}
            for place, (_, inner) in enumerate(self.members):
                live = self._cut({name: rows[place] for name, rows in own.items()}, inner)
                objective = objective + self.method.penalty(live, inner)
        trained = [column for column in self.columns if column.trained]
        tensors = [self.tensors[column.name] for column in trained]
        gradients = torch.autograd.grad(objective, tensors, retain_graph=more, allow_unused=True)
        for column, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                self.grads[:, column.at] += gradient.flatten(1)
                self.used.add(column.name)

    @torch.no_grad()
    def step(self) -> None:
        """Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019, arXiv 1711.05101."""
        if largest := self.training.max_grad_norm:
            self.grads.mul_((largest / (self.grads.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))
        t = torch.tensor([[client.step + 1] for client, _ in self.members], dtype=torch.float64)
        c1, c2 = ((1 - beta**t).to(self.values) for beta in (_BETA1, _BETA2))
        shrink = self.shrink
        for column in self.columns:
            if column.decay and column.name not in self.used:  # an optimizer of its own would leave it as it is
                shrink = shrink.clone()
                shrink[column.at] = 1
        self.used.clear()
        self.values.mul_(shrink)
        self.m.lerp_(self.grads, 1 - _BETA1)
        self.v.mul_(_BETA2).addcmul_(self.grads, self.grads, value=1 - _BETA2)
        self.values.sub_(self.m.div(c1).mul_(self.rate).div_(self.v.div(c2).sqrt_().add_(_EPS)))
        self.grads.zero_()

    def _cut(self, tensors: Mapping[str, Tensor], like: Adapter) -> Adapter:
        """Of a client's padded tensors, its own slots."""
        layers = {
            name: LowRank(tensors[f"A/{name}"][: part.rank], tensors[f"B/{name}"][:, : part.rank])
            for name, part in like.layers.items()
        }
        return Adapter(layers, {name: tensors[f"dense/{name}"] for name in like.dense})

    def adapter(self, place: int) -> Adapter:
        own = {name: tensor.detach()[place] for name, tensor in self.tensors.items()}
        return self._cut(own, self.members[place][1]).map(lambda tensor: tensor.to("cpu", copy=True).contiguous())
