"""Algebra on low-rank factors. Nothing here forms a dense `[d_out, d_in]` product, but of a layer with more slots than sides.

Every function is pure, keeps the dtype of what it is given (decompositions run in double precision) and returns new tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from threadpoolctl import ThreadpoolController
from torch import Tensor

from anyrank.adapter import Adapter, LowRank

__all__ = [
    "by_slot",
    "compact",
    "fresh",
    "norm",
    "pad",
    "padded_mean",
    "randomized_svd",
    "resize",
    "singular_values",
    "slot_shares",
    "stack",
    "svd",
    "tail",
    "take",
    "together",
    "truncate",
    "weighted_sum",
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


def stack(parts: Sequence[LowRank], weights: Sequence[float | Tensor] | None = None) -> LowRank:
    """The weighted sum of products, `sum_k w_k B_k A_k`, exactly: rank `sum_k r_k`. The weights go on B alone.

    Args:
        parts: `[r_k, d_in]` and `[d_out, r_k]` each.
        weights: for each part one number, or one for each of its slots, `[r_k]`; None for ones.
    """
    B = [part.B for part in parts]
    if weights is not None:
        B = [(b * weight).to(b.dtype) for b, weight in zip(B, weights, strict=True)]
    return LowRank(torch.cat([part.A for part in parts]), torch.cat(B, dim=1))


def weighted_sum(parts: Sequence[LowRank], weights: Sequence[float | Tensor]) -> LowRank:
    """The same sum at no more slots than the layer's narrower side has dimensions.

    Beyond that many it is the dense product, beside an identity: memory is `O(d_in d_out)`, whatever the number of parts,
    which are read in their order, about a thousand slots at a time. Arguments as of `stack`.
    """
    ranks, first = [part.rank for part in parts], parts[0]
    d_in, d_out = _sides(first)
    if sum(ranks) <= min(d_in, d_out):
        return stack(parts, weights)
    total, count = first.A.new_zeros(d_out, d_in, dtype=_working(first)), max(1, _BLOCK // max(ranks))
    for i in range(0, len(parts), count):
        some = stack(parts[i : i + count], weights[i : i + count])
        total.addmm_(some.B.to(total), some.A.to(total))
    total, identity = total.to(first.A.dtype), torch.eye(min(d_in, d_out)).to(first.A)
    return LowRank(identity, total) if d_in <= d_out else LowRank(total, identity)


def together(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose products are the sums of the given ones', exactly. It has no dense tensors."""
    parts: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        for name, part in adapter.layers.items():
            parts.setdefault(name, []).append(part)
    return Adapter({name: stack(some) if some[1:] else some[0] for name, some in parts.items()})


def norm(part: LowRank) -> Float[Tensor, ""]:
    """Frobenius norm of the product: `||B A||^2 = <B^T B, A A^T>`, in `O(r^2 (d_in + d_out))`, or `O(r d_in d_out)` if less."""
    part = LowRank(part.A, part.B)  # read only once, should it be on disk
    return _squared_norm(part).sqrt().to(part.A.dtype)


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


def _places(parts: Sequence[LowRank], slots: Slots | None) -> list[slice | Tensor]:
    given = slots or [None] * len(parts)
    return [
        slice(part.rank) if at is None else torch.tensor(at, dtype=torch.long)
        for part, at in zip(parts, given, strict=True)
    ]


def _mean(parts: Sequence[LowRank], shares: Sequence[Tensor], previous: LowRank, slots: Slots | None) -> LowRank:
    """`A[j] = sum_k share_k[j] A_k[j]`, and the same of B; slots without a share keep their value in `previous`."""
    # Sums are taken in at least float32: in bfloat16 the thousandth term of a mean is lost.
    dtype = torch.promote_types(previous.A.dtype, torch.float32)
    A, B = torch.zeros_like(previous.A, dtype=dtype), torch.zeros_like(previous.B, dtype=dtype)
    covered = torch.zeros(previous.rank, dtype=torch.bool)
    for part, share, at in zip(parts, shares, _places(parts, slots), strict=True):
        covered[at] |= share > 0
        share = share.to(A)
        if isinstance(at, slice):  # a view, several times as fast
            A[at].addcmul_(share[:, None], part.A)
            B[:, at].addcmul_(share, part.B)
        else:
            A.index_add_(0, at, share[:, None] * part.A)
            B.index_add_(1, at, share * part.B)
    A, B = A.to(previous.A), B.to(previous.B)
    return LowRank(torch.where(covered[:, None], A, previous.A), torch.where(covered, B, previous.B))


def svd(part: LowRank, rank: int, rng: torch.Generator, *, energy: float = 1.0) -> LowRank:
    """The best approximation of the product at `rank`, with its singular values in B: `A = V^T`, `B = U S`.

    `O(R^2 (d_in + d_out) + R^3)` with `R = part.rank`, or `O(d_in d_out (R + n) + n^3)` where R passes the narrower side n.
    Slots come sorted, so that a prefix is again the best approximation of its rank. Where the product has fewer than `rank`
    directions, the remaining rows of A are drawn from `rng`, orthonormal to the others while there is room, and B is zero
    there, so that these slots can learn. Signs are fixed: the entry of largest size in each row of A is positive.

    With `energy` below 1, only as many directions are kept as hold this share of all squared singular values.
    """
    spectrum = _spectrum(part, rank)
    kept = min(rank, spectrum.significant, _holding(spectrum, energy) if energy < 1 else rank)
    return _readout(part, spectrum.rows(kept), rank, rng)


def randomized_svd(part: LowRank, rank: int, rng: torch.Generator, *, oversample: int) -> tuple[LowRank, float]:
    """`svd` from a random sketch of `rank + oversample` rows (Halko, Martinsson, Tropp, SIAM Review 2011), and its error.

    Nothing of the size of the layer or of `R x R` is decomposed, `R = part.rank`: two power iterations, each followed by a QR
    of the sketch, take `O(R (rank + oversample) (d_in + d_out))`. Knowing the error takes as long as `norm`.

    Returns:
        The approximation, as `svd` returns it, and `||B A - approximation|| / ||B A||` in the Frobenius norm, truncation
        included; 0 for a zero product.
    """
    precise = part.map(lambda tensor: tensor.to(_working(part)))
    A, B = precise.A, precise.B
    sketch = torch.randn(min(rank + oversample, part.rank, *_sides(part)), B.shape[0], generator=rng).to(B) @ B @ A
    for _ in range(_POWER_ITERATIONS):
        sketch = _orthonormal(_orthonormal(sketch) @ A.T @ B.T) @ B @ A
    basis = _orthonormal(sketch)
    image = B @ (A @ basis.T)
    S, turn, _ = _roots(_gram(image.T), rank)
    kept = _above(S, _NOISE * torch.finfo(B.dtype).eps * S[:1])
    found = _readout(part, turn[:, :kept].T.to(basis) @ basis, rank, rng)
    return found, _relative_distance(found, part)


def compact(part: LowRank) -> LowRank:
    """The same product, but for rounding, at the smallest rank that holds it (at least 1)."""
    spectrum = _spectrum(part, part.rank)
    if spectrum.significant == 0:
        return LowRank(part.A[:1], torch.zeros_like(part.B[:, :1]))
    V, US = _leading(part, spectrum.rows(spectrum.significant))
    return LowRank(V.to(part.A.dtype), US.T.contiguous().to(part.B.dtype))


def singular_values(part: LowRank) -> Float[Tensor, " s"]:
    """Singular values of the product, descending; at most `min(r, d_in, d_out)` of them."""
    return _spectrum(part, part.rank).S.to(_working(part))


# --- decompositions -----------------------------------------------------------------------------------------------

_BLOCK = 1024  # of the longest side of a product, cast to double precision at a time
_CACHED = 2**17  # numbers that fit a core's second-level cache in double precision
_LIFT = 4 * torch.finfo(torch.float64).eps  # times the root of the rank: more than rounding takes from a Gram matrix
_NOISE = 10  # rounding leaves less of a zero singular value than so many eps of what was summed
_POWER_ITERATIONS = 2
_LARGE = 128  # rows of a matrix of which all eigenvectors take longer than a few


class _Spectrum(NamedTuple):
    """The largest singular values of a product, descending.

    Attributes:
        S: as many as were wanted, or all there are.
        rest: the sum of the squares of all others.
        significant: how many of S are more than rounding.
        rows: for k, rows that span the first k right directions.
    """

    S: Tensor
    rest: Tensor
    significant: int
    rows: Callable[[int], Tensor]


def _spectrum(part: LowRank, wanted: int) -> _Spectrum:
    if part.A.dtype == torch.float64:
        return _spectrum_by_qr(part)
    return (_spectrum_by_product if part.rank >= min(_sides(part)) else _spectrum_by_grams)(part, wanted)


def _spectrum_by_qr(part: LowRank) -> _Spectrum:
    """QR of both factors and an SVD of what is left, for double precision, of which Gram matrices keep only half the digits."""
    Q, R = torch.linalg.qr(part.A.T)
    _, S, Vt = torch.linalg.svd(torch.linalg.qr(part.B, mode="r").R @ R.T, full_matrices=False)
    noise = max(_NOISE, part.rank) * torch.finfo(S.dtype).eps * S[:1]
    return _Spectrum(S, torch.zeros_like(noise), _above(S, noise), lambda k: Vt[:k] @ Q.T)


def _spectrum_by_grams(part: LowRank, wanted: int) -> _Spectrum:
    """From `A A^T` and `B^T B` in double precision, which hold all digits of single precision.

    With `A A^T = L L^T` and `L^T (B^T B) L = Y S^2 Y^T`, the right directions are the rows of `S^-2 Y^T L^T (B^T B) A`.
    """
    gram_A, gram_B = _gram(part.A), _gram(part.B.T)
    # Slots are scaled to equal sizes in A and B, so that neither matrix is worse conditioned than the product.
    square_A, square_B = gram_A.diagonal(), gram_B.diagonal()
    there = (square_A > 0) & (square_B > 0)
    ratio = torch.where(there, square_B / square_A, 1.0) ** 0.25
    scale_A, scale_B = ratio * there, there / ratio
    gram_A.mul_(torch.outer(scale_A, scale_A))
    gram_B.mul_(torch.outer(scale_B, scale_B))
    summed = (gram_A.square().sum() * gram_B.square().sum()) ** 0.25
    # With what rounding may have taken from the eigenvalues added, there is a Cholesky factor.
    gram_A.diagonal().add_(torch.where(there, _LIFT * part.rank**0.5 * gram_A.diagonal(), 1.0))
    L = torch.linalg.cholesky(gram_A)
    S, Y, rest = _roots(L.T @ gram_B @ L, wanted)
    noise = _NOISE * torch.finfo(_working(part)).eps * summed

    def rows(k: int) -> Tensor:
        mixed = gram_B @ (L @ Y[:, :k]) / S[:k] ** 2
        return _dot(mixed.T * scale_A, part.A)

    return _Spectrum(S, rest, _above(S, noise), rows)


def _spectrum_by_product(part: LowRank, wanted: int) -> _Spectrum:
    """From the dense product of this one layer, where it is smaller than the Gram matrices of its slots."""
    product = (part.B.to(_working(part)) @ part.A.to(_working(part))).double()
    tall = part.B.shape[0] >= part.A.shape[1]
    S, vectors, rest = _roots(product.T @ product if tall else product @ product.T, wanted)

    def rows(k: int) -> Tensor:
        return vectors[:, :k].T if tall else vectors[:, :k].T @ product / S[:k, None]

    return _Spectrum(S, rest, _above(S, _NOISE * torch.finfo(_working(part)).eps * S[:1]), rows)


def _roots(squares: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a positive semi-definite matrix, which is lost, the roots of the largest eigenvalues, descending, their vectors,
    and the sum of all other eigenvalues."""
    total, few = squares.trace(), len(squares) >= _LARGE and 0 < wanted <= len(squares) // 8
    values, vectors = _few_eigenvectors(squares, wanted) if few else torch.linalg.eigh(squares)
    values = values.flip(0)[:wanted].clamp(min=0)
    return values.sqrt(), vectors.flip(1)[:, :wanted], (total - values.sum()).clamp(min=0)


def _few_eigenvectors(matrix: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Those of the largest eigenvalues alone, which PyTorch does not offer and LAPACK finds in a third of the time."""
    from scipy.linalg import eigh

    last, columns = len(matrix) - 1, matrix.cpu().numpy().T  # in LAPACK's order, so that no copy is made
    with _openblas().limit(limits=1):
        values, vectors = eigh(columns, overwrite_a=True, subset_by_index=(last + 1 - wanted, last))
    return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)


@cache
def _openblas() -> ThreadpoolController:
    """SciPy's own linear algebra, whose threads keep the cores from PyTorch's when they have nothing to do."""
    return ThreadpoolController().select(internal_api="openblas")


def _above(S: Tensor, noise: Tensor) -> int:
    return int((noise < S).sum())


def _holding(spectrum: _Spectrum, energy: float) -> int:
    """How many singular values, from the largest on, hold this share of the sum of all squares."""
    # From each of them on, summed from the small end.
    left = spectrum.S.double().square().flip(0).cumsum(0).flip(0) + spectrum.rest
    return int((left > (1 - energy) * left[:1]).sum())


def _leading(part: LowRank, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows V of the same span as `rows`, prefix by prefix, and `(B A V^T)^T`."""
    L = torch.linalg.cholesky(_gram(rows))
    V = torch.linalg.solve_triangular(L, torch.eye(len(rows)).to(L), upper=False) @ rows.double()
    return V, _dot(_dot(V, part.A.T), part.B.T)


def _readout(part: LowRank, rows: Tensor, rank: int, rng: torch.Generator) -> LowRank:
    """The product's projection on the span of `rows`, filled up to `rank`, with signs fixed."""
    V, US = _leading(part, rows)
    A = _complete(V, rank, rng)
    sign = torch.where(A.gather(1, A.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    B = part.B.new_zeros(part.B.shape[0], rank)
    B[:, : len(V)] = (US * sign[: len(V)]).T
    return LowRank((A * sign).to(part.A.dtype), B)


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


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T).Q.T


# --- arithmetic in double precision -------------------------------------------------------------------------------


def _working(part: LowRank) -> torch.dtype:
    """The precision in which factors are multiplied: at least single."""
    return torch.promote_types(part.A.dtype, torch.float32)


def _sides(part: LowRank) -> tuple[int, int]:
    return part.A.shape[1], part.B.shape[0]


def _dot(X: Tensor, Y: Tensor) -> Tensor:
    """`X Y` in double precision, to which the factors are cast a block of their longest side at a time."""
    m, n, p = X.shape[0], *Y.shape
    if max(m, n, p) <= _BLOCK:
        return X.double() @ Y.double()
    if m > max(n, p):
        return _dot(Y.T, X.T).T
    blocks = [slice(i, i + _BLOCK) for i in range(0, max(n, p), _BLOCK)]
    if p > n:
        X = X.double()
        return torch.cat([X @ Y[:, block].double() for block in blocks], dim=1)
    total = X.new_zeros(m, p, dtype=torch.float64)
    for block in blocks:
        total.addmm_(X[:, block].double(), Y[block].double())
    return total


def _gram(X: Tensor) -> Tensor:
    """`X X^T` in double precision, to which X is cast some columns at a time."""
    if X.numel() <= _CACHED:
        X = X.double()
        return X @ X.T
    total, count = X.new_zeros(len(X), len(X), dtype=torch.float64), max(256, _CACHED // len(X))
    for i in range(0, X.shape[1], count):
        x = X[:, i : i + count].double()
        total.addmm_(x, x.T)
    return total


def _inner(one: LowRank, other: LowRank) -> Tensor:
    """The inner product of two products, `<B A, D C> = <B^T D, A C^T>`."""
    return (_dot(one.B.T, other.B) * _dot(one.A, other.A.T)).sum()


def _squared_norm(part: LowRank) -> Tensor:
    if _has_few_slots(part):
        return torch.vdot(_gram(part.B.T).flatten(), _gram(part.A).flatten()).clamp(min=0)
    return torch.stack([product.square().sum() for product in _rows(part)]).sum()


def _relative_distance(found: LowRank, part: LowRank) -> float:
    """`||found - part|| / ||part||` of the products, and 0 where both are zero."""
    if _has_few_slots(part):
        whole = _squared_norm(part)
        missed = (whole - 2 * _inner(part, found) + _inner(found, found)).clamp(min=0)
    else:
        pairs = zip(_rows(part), _rows(found), strict=True)
        whole, missed = torch.tensor(
            [(wanted.square().sum(), (wanted - product).square().sum()) for wanted, product in pairs]
        ).sum(dim=0)
    return float((missed / whole).sqrt()) if whole > 0 else 0.0


def _has_few_slots(part: LowRank) -> bool:
    """Whether Gram matrices of the factors take less than the dense product."""
    d_in, d_out = _sides(part)
    return part.rank * (d_in + d_out) <= d_in * d_out


def _rows(part: LowRank) -> Iterator[Tensor]:
    """The dense product, some rows at a time."""
    A, B = part.A.to(_working(part)), part.B.to(_working(part))
    return ((rows @ A).double() for rows in B.split(_BLOCK))
