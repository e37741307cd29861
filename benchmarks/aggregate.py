"""The server's step: the mean of the clients' products, cut to a rank. Seconds, memory and error of several routes.

    python benchmarks/aggregate.py [--quick]

Every route gets the same factors in single precision, equal weights, and returns factors of the kept rank. Memory is by how
much the process grew at its largest, inputs apart. The error is that of the returned product, relative to the best one of its
rank, `||found - best|| / ||best||`, which is found in double precision or, where that would take minutes, is anyrank's own.

The routes:
- anyrank: `lowrank.svd(lowrank.weighted_sum(...))`, as its methods call it;
- randomized: `lowrank.randomized_svd` of the stacked factors, `oversample` 8, its own error estimate included;
- dense SVD: the dense product and `torch.linalg.svd` of it, which takes about a minute at 4096;
- svd_lowrank: the dense product and `torch.svd_lowrank` of it, at q = 16 and, as it is used for accuracy, at q = 24 cut to 16;
- QR: of both stacked factors, and an SVD of the core, in single precision: the route of the HLoRA aggregator in NVFlare's
  `medgemma` example, written anew.

Clients have directions in common that fall in size from 1 to 1/10, as trained adapters do, and random ones of their own of
30 % that size. What takes more than five seconds is run once, and not at all where there would be nothing to compare; what
takes less than a tenth of a second is called for that long in each of its turns, as by a server with many matrices.
The last rows are whole steps of a method on a model's worth of matrices, through `Method.aggregate`.
"""

import argparse
import ctypes
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import measure
from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.federation import Device, Inbox, Layer, Method, ModelCost, Profile, Spec, State, Update, make_task
from anyrank.methods import METHODS
from anyrank.seeding import generator

KEPT = 16
MIXED = (4, 4, 8, 8, 8, 8, 12, 16, 16, 16)  # 100 slots
REPEATS = 7
TURN = 0.1  # seconds
Route = Callable[[Sequence[LowRank]], LowRank]


def client(layer: str, number: int, *, rank: int, d_in: int, d_out: int) -> LowRank:
    """A client's factors: the first of the directions that all have, and noise of its own."""
    common, own = generator("common", layer), generator("own", layer, number)
    A, B = torch.randn(KEPT, d_in, generator=common), torch.randn(KEPT, d_out, generator=common)
    A, B = (each[:rank] + 0.3 * torch.randn(rank, each.shape[1], generator=own) for each in (A, B))
    return LowRank(A, B.T * torch.logspace(0, -1, KEPT)[:rank])


# --- routes -------------------------------------------------------------------------------------------------------


def anyrank(parts: Sequence[LowRank]) -> LowRank:
    """What FlexLoRA, HLoRA and their kin do here."""
    return lowrank.svd(lowrank.weighted_sum(parts, shares(parts)), KEPT, generator("svd"))


def randomized(parts: Sequence[LowRank]) -> LowRank:
    """The same with `method.oversample = 8`."""
    return lowrank.randomized_svd(lowrank.stack(parts, shares(parts)), KEPT, generator("svd"), oversample=8)[0]


def dense_svd(parts: Sequence[LowRank]) -> LowRank:
    """The dense mean and all of its singular vectors."""
    U, S, Vt = torch.linalg.svd(dense_mean(parts), full_matrices=False)
    return LowRank(Vt[:KEPT], U[:, :KEPT] * S[:KEPT])


def svd_lowrank(parts: Sequence[LowRank], q: int) -> LowRank:
    """The dense mean and PyTorch's randomised SVD."""
    U, S, V = torch.svd_lowrank(dense_mean(parts), q=q, niter=2)
    return LowRank(V[:, :KEPT].T, U[:, :KEPT] * S[:KEPT])


def qr(parts: Sequence[LowRank]) -> LowRank:
    """QR of both stacked factors with the root of the weights in each, and an SVD of the core."""
    roots = [math.sqrt(share) for share in shares(parts)]
    Q_B, R_B = torch.linalg.qr(torch.cat([part.B * root for part, root in zip(parts, roots, strict=True)], dim=1))
    Q_A, R_A = torch.linalg.qr(torch.cat([part.A * root for part, root in zip(parts, roots, strict=True)]).T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return LowRank(S[:KEPT, None] * (Vt[:KEPT] @ Q_A.T), Q_B @ U[:, :KEPT])


ROUTES: Mapping[str, Route] = {
    "anyrank": anyrank,
    "randomized, oversample 8": randomized,
    "QR": qr,
    "svd_lowrank, q = 16": lambda parts: svd_lowrank(parts, KEPT),
    "svd_lowrank, q = 24": lambda parts: svd_lowrank(parts, KEPT + 8),
    "dense SVD": dense_svd,
}

SKETCHED = ("anyrank", "randomized, oversample 8")


def shares(parts: Sequence[LowRank]) -> list[float]:
    """Equal weights."""
    return [1 / len(parts)] * len(parts)


def dense_mean(parts: Sequence[LowRank]) -> Tensor:
    """One product of the stacked factors: faster than one for each client."""
    return lowrank.stack(parts, shares(parts)).product


# --- what is measured ---------------------------------------------------------------------------------------------


def square_of(side: int, ranks: Sequence[int]) -> list[LowRank]:
    """What clients of these ranks return for one square matrix."""
    return [client(f"{side}", i, rank=rank, d_in=side, d_out=side) for i, rank in enumerate(ranks)]


def one_matrix(
    parts: Sequence[LowRank], best: LowRank | None, routes: Sequence[str] = tuple(ROUTES)
) -> list[dict[str, Any]]:
    """Routes on one matrix, and how far each is from the best product of the kept rank; None for what the first one finds."""
    rows, again, calls = {}, {}, {}
    for name in routes:
        run = partial(ROUTES[name], parts)
        found, seconds, memory = watched(run)
        rows[name] = {"clients": len(parts), "side": parts[0].A.shape[1], "slots": sum(part.rank for part in parts)}
        rows[name] |= {"route": name, "seconds": seconds, "runs": 1}
        rows[name] |= {"error": distance(found, best) if best else None, "memory_mb": memory}
        best = best or found
        if seconds < 5:
            calls[name] = max(1, int(TURN / seconds))
            again[name] = partial(repeated, run, calls[name])
    for name, seconds in measure.median_of(again, REPEATS).items():
        rows[name] |= {"seconds": statistics.median(seconds) / calls[name], "runs": REPEATS * calls[name]}
    for row in rows.values():
        row["times"] = row["seconds"] / rows["anyrank"]["seconds"]
        error = "" if row["error"] is None else f"error {row['error']:.1e}"
        print("  {route:26} {seconds:9.4f} s {times:7.1f} x {memory_mb:6.0f} MB ".format(**row), error)
    return list(rows.values())


def repeated(function: Callable[[], object], times: int) -> None:
    """Call a function again and again."""
    for _ in range(times):
        function()


def best_of(parts: Sequence[LowRank]) -> LowRank:
    """The best product of the kept rank, in double precision."""
    mean = lowrank.weighted_sum([part.map(Tensor.double) for part in parts], shares(parts))
    return lowrank.svd(mean, KEPT, generator("best"))


def distance(found: LowRank, best: LowRank) -> float:
    """Relative, of the products, from QR of the four factors: no digits are lost to a difference of norms."""
    found, best = found.map(Tensor.double), best.map(Tensor.double)
    off = lowrank.stack([found, best], [1.0, -1.0])
    core = torch.linalg.qr(off.B, mode="r").R @ torch.linalg.qr(off.A.T, mode="r").R.T
    return float(core.norm() / lowrank.norm(best))


def steps(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Whole aggregations of ten clients' adapters: some methods', and the QR route on every matrix."""
    rows = []
    for name in ("flexlora", "anyrank", "rbla", "QR"):
        method = METHODS.get(name, METHODS["flexlora"])()
        state, inbox = federation(method, layers)
        weights = [1 / len(inbox)] * len(inbox)
        if name == "QR":
            run = partial(lambda held: [qr(parts) for _, parts, _, _ in held], list(state.holders(inbox, weights)))
        else:
            run = partial(method.aggregate, state, inbox, weights)
        _, _, memory = watched(run)
        seconds = measure.median_of({name: run}, REPEATS)[name]
        row = {"matrices": len(layers), "side": layers[0].d_in, "slots": sum(MIXED), "route": name, "runs": REPEATS}
        rows.append(row | {"seconds": statistics.median(seconds), "memory_mb": memory})
        print("  {route:26} {seconds:9.4f} s  {memory_mb:6.0f} MB".format(**rows[-1]))
    return rows


def federation(method: Method, layers: Sequence[Layer]) -> tuple[State, Inbox]:
    """The server's state after init, and a round's updates of mixed ranks."""
    cost = ModelCost(1, 1, num_blocks=1, base_bytes=0, block_activation_bytes=0, working_bytes=0, tokens_per_step=1)
    spec = Spec(tuple(layers), tuple(sorted({*MIXED})), 2.0, 0, Adapter({}), cost)
    profile = Profile(forward_flops=1.0, backward_flops=1.0, memory_bytes=1.0, up_bps=1.0, down_bps=1.0)
    devices = [Device(f"client {i}", "any", profile, rank, num_examples=1, steps=1) for i, rank in enumerate(MIXED)]
    state, inbox = method.init(spec), []
    for i, plan in enumerate(method.assign(state, devices)):
        trained = {
            layer.name: client(layer.name, i, rank=plan.ranks[layer.name], d_in=layer.d_in, d_out=layer.d_out)
            for layer in layers
        }
        task = make_task(method, state, plan)
        inbox.append((task, Update(plan.client, task.round, Adapter(trained), 1, {})))
    return state, inbox


def watched(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its seconds, and by how many MiB the process grew at most meanwhile."""
    before, found = resident_again(), []
    seconds = measure.median_of({"once": lambda: found.append(function())}, 1)["once"][0]
    return found[0], seconds, resident("VmHWM") - before


def resident_again() -> float:
    """Give free memory back to the system and forget the largest size so far; the size now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> float:
    """A field of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def run(quick: bool) -> list[dict[str, Any]]:
    """All rows."""
    for route in ROUTES.values():
        route(square_of(256, [16] * 32))  # whatever is loaded or started on first use
    rows = []
    for side in (768,) if quick else (768, 2048, 4096):
        print(f"10 clients of ranks {MIXED}, one matrix of {side} x {side}, kept rank {KEPT}")
        parts = square_of(side, MIXED)
        rows += one_matrix(parts, best_of(parts))
    print(f"1,000 clients of rank 8, one matrix of 768 x 768, kept rank {KEPT}")
    parts = square_of(768, [8] * 1000)
    rows += one_matrix(parts, best_of(parts))
    for count in () if quick else (125, 250, 1000):
        print(f"{count:,} clients of rank 8, one matrix of 4096 x 4096, kept rank {KEPT}")
        parts = square_of(4096, [8] * count)
        rows += one_matrix(parts, None, ("anyrank", "randomized, oversample 8"))
    for count, side in () if quick else ((12, 384), (64, 4096)):
        print(f"10 clients of ranks {MIXED}, a whole step on {count} matrices of {side} x {side}")
        rows += steps([Layer(f"layer {i}", side, side, i) for i in range(count)])
    return rows


# --- tables -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table of the routes for each matrix, and one of whole steps."""
    lines = []
    for (clients, side), group in groupby((r for r in rows if "clients" in r), key=itemgetter("clients", "side")):
        first, *others = group
        lines += [f"{clients:,} clients with {first['slots']:,} slots together, one matrix of {side} x {side}:", ""]
        lines += ["| route | seconds | times anyrank's | relative error | memory, MB |", "|---|---|---|---|---|"]
        for row in (first, *others):
            seconds = f"{row['seconds']:.4f}" + " (one run)" * (row["runs"] == 1)
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            lines.append(f"| {row['route']} | {seconds} | {row['times']:.1f} | {error} | {row['memory_mb']:.0f} |")
        lines.append("")
    whole = [row for row in rows if "matrices" in row]
    if whole:
        lines += [f"Whole server steps, 10 clients with {whole[0]['slots']} slots together:", ""]
        lines += ["| matrices | route | seconds | memory, MB |", "|---|---|---|---|"]
    for row in whole:
        shape = f"{row['matrices']} of {row['side']} x {row['side']}"
        lines.append(f"| {shape} | {row['route']} | {row['seconds']:.3f} | {row['memory_mb']:.0f} |")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="matrices of 768 x 768 only")
    options = parser.parse_args()
    settings = {"quick": options.quick, "kept": KEPT, "ranks": MIXED, "repeats": REPEATS, "dtype": "float32"}
    print(measure.save("aggregate", settings, run(options.quick)))
