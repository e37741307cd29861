"""Flower's simulation engine, for `anyrank run --engine flower-sim`: a process with Flower and Ray, and the actors.

The process hands on what comes through a pipe from the run: each message is a share of a round's tasks, with what their
clients have kept; its answer holds the updates, and what the clients keep now. Virtual nodes are only places to send messages
to, and any actor does the work of any client.

Nothing heavy is loaded before an actor needs it.
"""

import contextlib
import math
import os
import pickle
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from anyrank.flower.grid import GridPost, from_flower, to_flower
from anyrank.flower.letter import Letter

__all__ = ["main"]

_LONG = 1e9  # seconds until Flower gives a message up
_START = 30.0  # seconds that Ray may take to start; ended in the middle of that, it leaves processes for a minute
_SOON = 0.05  # seconds between two looks at what has come; Flower's own are 0.1 apart


# --- the process between the run and the actors -------------------------------------------------------------------


def main(pipe: int, count: int, threads: int) -> None:
    """Run the engine until the pipe closes.

    Args:
        pipe: the file descriptor of a `Connection`; numbered pickles come and go through it.
        count: of actors on this machine. On the cluster of `RAY_ADDRESS` there are as many as fit.
        threads: of each.
    """
    run, started = Connection(pipe), threading.Event()
    came, server_app = queue.Queue[tuple[int, bytes]](), ServerApp()

    @server_app.main()
    def relay(grid: Grid, context: Context) -> None:
        post, numbers = GridPost(grid, ttl=_LONG, trusted=True), dict[str, int]()
        while True:
            nodes = list(post.nodes())
            while nodes and not came.empty():
                number, content = came.get()
                (sent,) = post.send({nodes[number % len(nodes)]: Letter(payload=content)})
                numbers[sent] = number
            for sent, letter in post.collect(list(numbers)).items():
                error = letter.values.get("error")
                run.send((numbers.pop(sent), pickle.dumps(error) if error else letter.payload))
            time.sleep(_SOON)

    def receive() -> None:
        with _told(run, started):
            try:
                while True:
                    came.put(run.recv())
            finally:
                started.wait(_START)

    threading.Thread(target=receive, daemon=True).start()
    with _told(run, started):
        _start_ray(count * threads)
        started.set()
        _simulate(server_app, count, threads)


def _start_ray(cores: int) -> None:
    """Start Ray, or connect to the cluster that is named."""
    own: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # Ray runs whatever it is asked to. So it listens on loopback alone, and answers who knows the token.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        own = {"address": "local", "num_cpus": cores}
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, **own)


def _simulate(server_app: ServerApp, count: int, threads: int) -> None:
    import ray
    from flwr.simulation import run_simulation

    gpus = ray.cluster_resources().get("GPU", 0)
    share = math.floor(min(1, gpus / count) * 1e4) / 1e4  # Ray counts in ten-thousandths
    run_simulation(
        server_app,
        _client_app,
        num_supernodes=2 * count,  # as many as messages under way: each is handed one every tenth of a second
        backend_config={"client_resources": {"num_cpus": threads, "num_gpus": share}},
    )


@contextlib.contextmanager
def _told(run: Connection, started: threading.Event) -> Iterator[None]:
    """Tell the run what goes wrong, and end the process: a thread that waits for an actor can only be ended so."""
    try:
        yield
    except EOFError:  # the run has closed the pipe
        pass
    except Exception as error:
        from anyrank.transport.pickles import dumps, told

        with contextlib.suppress(OSError):
            run.send((0, dumps(told(error))))
    finally:
        if started.is_set():
            import ray

            ray.shutdown()
        os._exit(1)


# --- an actor -----------------------------------------------------------------------------------------------------

_client_app = ClientApp()


@_client_app.query()
def _answer(message: Message, context: Context) -> Message:
    from anyrank.flower.actor import carried_out

    return Message(to_flower(Letter(payload=carried_out(from_flower(message.content).payload))), reply_to=message)
