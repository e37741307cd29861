"""Algebra on low-rank factors. Nothing here forms a dense `[d_out, d_in]` product.

Every function is pure, keeps the dtype of what it is given (SVDs run in at least float32) and returns new tensors.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from anyrank.adapter import Adapter, LowRank

__all__ = [
    "by_slot",
    "compact",
    "fresh",
    "norm",
    "pad",
    "padded_mean",
    "resize",
    "scaled",
    "singular_values",
    "slot_shares",
    "stack",
    "svd",
    "tail",
    "take",
    "together",
    "truncate",
]


def fresh(rank: int, *, d_in: int, d_out: int, rng: torch.Generator) -> LowRank:
    """A new adapter that changes nothing yet and can learn: `A` Kaiming-uniform (a = sqrt 5), `B` zero, as LoRA starts."""
    bound = d_in**-0.5
    A = torch.empty(rank, d_in).uniform_(-bound, bound, generator=rng)
    return LowRank(A, torch.zeros(d_out, rank))


def truncate(part: LowRank, rank: int) -> LowRank:
    """The first `rank` slots (all of them when there are fewer)."""
    return LowRank(part.A[:rank], part.B[:, :rank])


def tail(part: LowRank, rank: int) -> LowRank:
    """The slots from `rank` on: what `truncate` leaves out."""
    return LowRank(part.A[rank:], part.B[:, rank:])


def take(part: LowRank, slots: Sequence[int]) -> LowRank:
    """Some of the slots, in the order named."""
    return LowRank(part.A[list(slots)], part.B[:, list(slots)])


def pad(part: LowRank, rank: int, slots: Sequence[int] | None = None) -> LowRank:
    """The same product at a larger rank, filled up with zero slots.

    Args:
        part: factors of rank `r <= rank`.
        rank: slots of the result.
        slots: where the part's slots go; None for the first ones.
    """
    at = list(range(part.rank) if slots is None else slots)
    A, B = part.A.new_zeros(rank, part.A.shape[1]), part.B.new_zeros(part.B.shape[0], rank)
    A[at], B[:, at] = part.A, part.B
    return LowRank(A, B)


def resize(part: LowRank, rank: int, rng: torch.Generator) -> LowRank:
    """The same product at another rank: the best approximation if smaller, fresh slots that add nothing if larger."""
    if rank < part.rank:
        return svd(part, rank, rng)
    new = fresh(rank - part.rank, d_in=part.A.shape[1], d_out=part.B.shape[0], rng=rng)
    return LowRank(torch.cat([part.A, new.A.to(part.A)]), torch.cat([part.B, new.B.to(part.B)], dim=1))


def stack(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum of products, `sum_k w_k B_k A_k`, exactly: rank `sum_k r_k`. The weight goes on B alone."""
    B = torch.cat([weight * part.B for part, weight in zip(parts, weights, strict=True)], dim=1)
    return LowRank(torch.cat([part.A for part in parts]), B)


def scaled(part: LowRank, factors: Float[Tensor, " r"]) -> LowRank:
    """Each slot's product times a factor of its own: `sum_j f_j B[:, j] A[j]`."""
    return LowRank(part.A, part.B * factors.to(part.B))


def together(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose products are the sums of the given ones', exactly. It has no dense tensors."""
    parts: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        for name, part in adapter.layers.items():
            parts.setdefault(name, []).append(part)
    return Adapter({name: stack(some, [1.0] * len(some)) if some[1:] else some[0] for name, some in parts.items()})


def norm(part: LowRank) -> Float[Tensor, ""]:
    """Frobenius norm of the product, from `||B A||^2 = <B^T B, A A^T>`; `O(r^2 (d_in + d_out))`."""
    A, B = part.A.double(), part.B.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt().to(part.A.dtype)


Slots = Sequence[Sequence[int] | None]


def padded_mean(
    parts: Sequence[LowRank], weights: Sequence[float], previous: LowRank, slots: Slots | None = None
) -> LowRank:
    """Mean of the factors, each padded with zero slots to the rank of `previous`: `A = sum_k w_k pad(A_k) / sum_k w_k`.

    Slots that no part holds keep their value in `previous`.

    Args:
        parts: `[r_k, d_in]` and `[d_out, r_k]` each.
        weights: one for each part; they are divided by their sum.
        previous: the value so far.
        slots: for each part the slots of `previous` that it holds; None for the first ones.
    """
    total = sum(weights)
    shares = [
        torch.full((part.rank,), weight / total, dtype=torch.float64)
        for part, weight in zip(parts, weights, strict=True)
    ]
    return _mean(parts, shares, previous, slots)


def by_slot(
    parts: Sequence[LowRank], weights: Sequence[float], previous: LowRank, slots: Slots | None = None
) -> LowRank:
    """Mean of each slot over the parts that hold it: `A[j] = sum_{k: r_k > j} w_k A_k[j] / sum_{k: r_k > j} w_k`.

    Slots that no part holds keep their value in `previous`. Arguments as of `padded_mean`.
    """
    return _mean(parts, slot_shares(parts, weights, previous, slots), previous, slots)


def slot_shares(
    parts: Sequence[LowRank], weights: Sequence[float], previous: LowRank, slots: Slots | None = None
) -> list[Float[Tensor, " r"]]:
    """For each part, its share of the weight of each of its slots: `w_k / sum_{i holds j} w_i`, `[r_k]`.

    Arguments as of `padded_mean`.
    """
    places = _places(parts, slots)
    owned = torch.zeros(previous.rank, dtype=torch.float64)
    for at, weight in zip(places, weights, strict=True):
        owned[at] += weight
    # A weight of zero in a slot that nobody else holds leaves that slot uncovered.
    owned = owned.clamp(min=torch.finfo(owned.dtype).tiny)
    return [weight / owned[at] for at, weight in zip(places, weights, strict=True)]


def _places(parts: Sequence[LowRank], slots: Slots | None) -> list[list[int]]:
    given = slots or [None] * len(parts)
    return [list(range(part.rank) if at is None else at) for part, at in zip(parts, given, strict=True)]


def _mean(parts: Sequence[LowRank], shares: Sequence[Tensor], previous: LowRank, slots: Slots | None) -> LowRank:
    """`A[j] = sum_k share_k[j] A_k[j]`, and the same of B; slots without a share keep their value in `previous`."""
    # Sums are taken in at least float32: in bfloat16 the thousandth term of a mean is lost.
    dtype = torch.promote_types(previous.A.dtype, torch.float32)
    A, B = torch.zeros_like(previous.A, dtype=dtype), torch.zeros_like(previous.B, dtype=dtype)
    covered = torch.zeros(previous.rank, dtype=torch.bool)
    for part, share, at in zip(parts, shares, _places(parts, slots), strict=True):
        A[at] += share[:, None].to(dtype) * part.A.to(dtype)
        B[:, at] += share.to(dtype) * part.B.to(dtype)
        covered[at] |= share > 0
    A, B = A.to(previous.A), B.to(previous.B)
    return LowRank(torch.where(covered[:, None], A, previous.A), torch.where(covered, B, previous.B))


def svd(part: LowRank, rank: int, rng: torch.Generator, *, energy: float = 1.0) -> LowRank:
    """The best approximation of the product at `rank`, with its singular values in B: `A = V^T`, `B = U S`.

    QR of both factors leaves an SVD of at most `R x R`, `R = part.rank`: `O(R^2 (d_in + d_out) + R^3)`. Slots come sorted, so
    that a prefix is again the best approximation of its rank. Where the product has fewer than `rank` directions, the
    remaining rows of A are drawn from `rng`, orthonormal to the others while there is room, and B is zero there, so that
    these slots can learn. Signs are fixed: the entry of largest size in each row of A is positive.

    With `energy` below 1, only as many directions are kept as hold this share of all squared singular values.
    """
    U, S, Vt = _factored_svd(part)
    kept = min(rank, _significant(S, part), _holding(S, energy))
    A = _complete(Vt[:kept], rank, rng)
    B = torch.cat([U[:, :kept] * S[:kept], U.new_zeros(U.shape[0], rank - kept)], dim=1)
    sign = torch.where(A.gather(1, A.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    return LowRank((A * sign).to(part.A.dtype), (B * sign.T).to(part.B.dtype))


def compact(part: LowRank) -> LowRank:
    """The same product, but for rounding, at the smallest rank that holds it (at least 1)."""
    U, S, Vt = _factored_svd(part)
    kept = max(1, _significant(S, part))
    return LowRank(Vt[:kept].to(part.A.dtype), (U[:, :kept] * S[:kept]).to(part.B.dtype))


def singular_values(part: LowRank) -> Float[Tensor, " s"]:
    """Singular values of the product, descending; at most `min(r, d_in, d_out)` of them."""
    return _factored_svd(part)[1]


def _significant(S: Tensor, part: LowRank) -> int:
    # What rounding leaves of a zero singular value is a few eps of the largest (6 eps at rank 128, measured).
    noise = torch.finfo(S.dtype).eps * max(10, part.rank)
    return int((S[:1] * noise < S).sum())


def _holding(S: Tensor, energy: float) -> int:
    """How many singular values, from the largest on, hold this share of the sum of their squares."""
    left = S.double().square().flip(0).cumsum(0).flip(0)  # from each of them on, summed from the small end
    return int((left > (1 - energy) * left[:1]).sum())


def _factored_svd(part: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(part.A.dtype, torch.float32)
    Q_B, R_B = torch.linalg.qr(part.B.to(dtype))
    Q_A, R_A = torch.linalg.qr(part.A.to(dtype).T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vt @ Q_A.T


def _complete(rows: Tensor, rank: int, rng: torch.Generator) -> Tensor:
    """Add unit rows from `rng` to orthonormal `rows`, orthogonal to all before them while `d_in` allows."""
    missing, d_in = rank - rows.shape[0], rows.shape[1]
    if missing == 0:
        return rows
    noise = torch.randn(missing, d_in, generator=rng).to(rows)
    room = min(missing, d_in - rows.shape[0])
    orthogonal = torch.linalg.qr(torch.cat([rows, noise[:room]]).T).Q.T[rows.shape[0] :]
    rest = torch.nn.functional.normalize(noise[room:], dim=1)
    return torch.cat([rows, orthogonal, rest])
