"""Federated averaging on Flower's simulation runtime: Ray actors with one core each.

The apps stand in an importable module: Ray pickles apps defined in a script by value, and a model kept beside them would be
lost with every message. What the actors need is told by environment variables, which they inherit.
"""
# pyright: reportMissingImports=false

import os
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from peers.work import Example, Result, Work, build, train

__all__ = ["flower"]

client_app = ClientApp()


@cache
def _work() -> Work:
    return Work.read(Path(os.environ["PEER_WORK"]))


@cache
def _examples() -> list[Example]:
    return _work().examples()


@cache
def _cached_model():
    return build(_work())


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    work, client = _work(), int(context.node_config["partition-id"])
    model = _cached_model() if os.environ["PEER_CACHES_MODEL"] == "yes" else build(work)
    round = int(message.content["config"]["server-round"])
    start = message.content["arrays"].to_torch_state_dict()
    trained, loss = train(model, start, work.batches(_examples(), round, client), work)
    metrics = MetricRecord({"num-examples": work.per_client, "loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=message)


def flower(work: Work, *, cached: bool, cores: int) -> Result:
    """Play all rounds.

    Args:
        work: what is to be done.
        cached: each actor builds its model once, and not for every task.
        cores: as many actors.
    """
    os.environ["PEER_WORK"] = str(work.folder)
    os.environ["PEER_CACHES_MODEL"] = "yes" if cached else "no"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    server_app, result, ticks = ServerApp(), Result({}), list[float]()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=work.clients, min_available_nodes=work.clients)
        played = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(dict(work.start())),
            num_rounds=work.rounds,
            # Called on the server before the first round and after each one.
            evaluate_fn=lambda round, arrays: ticks.append(time.perf_counter()),
        )
        result.state = played.arrays.to_torch_state_dict()
        result.loss = float(played.train_metrics_clientapp[work.rounds]["loss"])

    run_simulation(
        server_app,
        client_app,
        num_supernodes=work.clients,
        backend_config={
            "init_args": {"num_cpus": cores, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    result.seconds = [after - before for before, after in pairwise(ticks)]
    return result
