"""anyrank's side of `simulate.py`: a federation of its own parts, as `anyrank run` puts them together, without a run folder."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch

from anyrank import hf
from anyrank.adapter import Adapter
from anyrank.clock import Clock
from anyrank.compute import devices, settled
from anyrank.config import ComputeTable
from anyrank.device import PROFILES
from anyrank.engine import Evaluation, Federation, begin, rounds
from anyrank.federation import Device, Method, Spec
from anyrank.local import LOCALS
from anyrank.memory import Memory
from anyrank.methods import METHODS
from anyrank.pretrained import Pretrained
from anyrank.problem import CLASSIFICATION
from anyrank.topology import TOPOLOGIES
from anyrank.train import Score, Training
from anyrank.transport import InProcess, Transport, Workers
from peers.prepare import LABELS, MODEL
from peers.work import Example, Result, State, Work, collate

__all__ = ["anyrank"]

_PREFIX = "base_model.model."  # of PEFT's names


def anyrank(work: Work, *, dtype: str = "float32", sequential: bool = False, group_by_length: bool = False) -> Result:
    """Play all rounds through the engine.

    Args:
        work: what is to be done.
        dtype: of the base model.
        sequential: one process, one client after another; or else the plan that a run makes by itself.
        group_by_length: clients put examples of about the same length into a batch.
    """
    torch.use_deterministic_algorithms(True)  # as in every run
    packaged = Pretrained(work.model, MODEL)
    base = hf.load_classifier(packaged, label_names=LABELS, seed=work.seed, dtype=getattr(torch, dtype))
    model = hf.AdaptedModel(base, scale=work.scale, target_modules=work.targets)
    start = hf.read_adapter(work.folder / "start", scale=work.scale)
    method, examples = METHODS["fedavg"](), work.examples()
    longest = max(examples, key=lambda example: example["length"])
    cost = model.cost(collate([longest] * work.batch, pad_to=work.length), CLASSIFICATION.loss)
    spec = Spec(model.layers, (work.rank,), work.scale, work.seed, start, cost)
    plan = settled(
        ComputeTable(workers=1, cohort=1) if sequential else ComputeTable(),
        cost=cost,
        dtype=dtype,
        lengths=[example["length"] for example in examples],
        batch_size=work.batch,
        clients=work.clients,
        apart=False,
    )
    result = Result({}, plan=f"{plan.workers} x {plan.cohort}")
    with _transport(work, plan, model, method, examples, group_by_length) as transport:
        federation = _federation(work, method, transport)
        progress = begin(federation, method.init(spec), _fleet(work))
        began = time.perf_counter()
        for progress in islice(rounds(federation, progress), work.rounds):  # noqa: B007, B020 - the last is the result
            result.seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
    result.state, result.loss = _named(progress.state.adapter), progress.record["train_loss"]
    return result


@contextlib.contextmanager
def _transport(
    work: Work,
    plan: ComputeTable,
    model: hf.AdaptedModel,
    method: Method,
    examples: Sequence[Example],
    group_by_length: bool,
) -> Iterator[Transport]:
    """The clients, in as many processes as planned."""
    inner = InProcess(
        model=model,
        method=method,
        training=Training(
            local=LOCALS["lora"](),
            learning_rate=work.learning_rate,
            weight_decay=work.weight_decay,
            batch_size=work.batch,
            collate=partial(collate, pad_to=work.pad_to),
            group_by_length=group_by_length,
        ),
        data=examples,
        shards={str(i): np.arange(work.per_client) + i * work.per_client for i in range(work.clients)},
        test=[],
        held_out=0.0,
        seed=work.seed,
        memory=Memory(work.folder / "memory"),
        cohort=plan.cohort or 1,
    )
    threads, workers = plan.threads or 1, plan.workers or 1
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        transport: Transport = inner
        if workers > 1:
            transport = Workers(inner, count=workers, threads=max(1, threads // workers), devices=devices())
            stack.enter_context(transport)
        model.to(devices()[0])
        yield transport


def _federation(work: Work, method: Method, transport: Transport) -> Federation:
    """One round more is planned than is played: the last one would evaluate."""
    return Federation(
        method=method,
        topology=TOPOLOGIES["star"](),
        transport=transport,
        clock=Clock(seed=work.seed),
        score=lambda adapter, at_end: Score(0.0, {"accuracy": 0.0}, 0),
        per_round=work.clients,
        rounds=work.rounds + 1,
        norm_limit=1000.0,
        evaluation=Evaluation(every=work.rounds + 1),
        seed=work.seed,
    )


def _fleet(work: Work) -> dict[str, Device]:
    names = [str(i) for i in range(work.clients)]
    return {n: Device(n, "laptop", PROFILES["laptop"], work.rank, work.per_client, work.steps) for n in names}


def _named(adapter: Adapter) -> State:
    """The adapter and head under PEFT's names."""
    state = {_PREFIX + name: tensor for name, tensor in adapter.dense.items()}
    for name, part in adapter.layers.items():
        state |= {f"{_PREFIX}{name}.lora_A.weight": part.A, f"{_PREFIX}{name}.lora_B.weight": part.B}
    return state
