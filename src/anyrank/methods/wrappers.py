"""What can be put around any method: a proximal term on the clients, a learning rate and momentum on the server."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Method, State
from anyrank.seeding import generator

__all__ = ["proximal", "server_optimizer"]

_PREVIOUS = "previous adapter"


def proximal(method: Method, mu: float) -> Method:
    """FedProx (Li et al., MLSys 2020, arXiv 1812.06127): adds `mu / 2 ||theta - theta_start||^2` to the client's loss.

    Theta are all trained tensors, factors and dense ones; the method's own penalty stays.
    """

    def penalty(now: Adapter, start: Adapter) -> Tensor:
        before = start.tensors()
        moved = [(tensor - before[name]).square().sum() for name, tensor in now.tensors().items()]
        own = method.penalty(now, start) if method.penalty else 0.0
        return own + mu / 2 * torch.stack(moved).sum()

    return method._replace(penalty=penalty)


def server_optimizer(method: Method, *, learning_rate: float, momentum: float) -> Method:
    """Heavy-ball momentum on what the method aggregates (FedAvgM, Hsu et al., arXiv 1909.06335).

        x_{t+1} = x_t + learning_rate (agg(x_t) - x_t) + momentum (x_t - x_{t-1})

    `x` is each factor for methods that work on factors. For methods that work on products it is the product `B A`, kept
    factored: three stacked terms, then the truncated SVD. Dense tensors take the same step. With momentum, what was moving
    coasts on, whether or not a client holds it, so the claims about standing still are withdrawn.
    """

    def moved(x: Tensor, aggregated: Tensor, previous: Tensor) -> Tensor:
        return x + learning_rate * (aggregated - x) + momentum * (x - previous)

    def step(before: State, after: State) -> State:
        after = method.step(before, after)
        terms = (before.adapter, after.adapter, before.extra.get(_PREVIOUS, before.adapter))
        flat = [term.tensors() for term in terms]
        adapter = Adapter.from_tensors({name: moved(*(tensors[name] for tensors in flat)) for name in flat[0]})
        if method.claims.space == "product":
            coefficients = (1 - learning_rate + momentum, learning_rate, -momentum)
            adapter = Adapter(_combine_products(terms, coefficients, after), adapter.dense)
        return after.with_adapter(adapter).with_extra({_PREVIOUS: before.adapter})

    claims = method.claims._replace(keeps_uncovered=False, keeps_no_op=False) if momentum else method.claims
    return method._replace(step=step, claims=claims)


def _combine_products(terms: Sequence[Adapter], coefficients: Sequence[float], after: State) -> dict[str, LowRank]:
    layers = {}
    for name, part in after.adapter.layers.items():
        total = lowrank.stack([term.layers[name] for term in terms], coefficients)
        layers[name] = lowrank.svd(total, part.rank, generator(after.spec.seed, "server", after.round, name))
    return layers
