"""The client's entry point: hands every message to a worker on this machine that has everything loaded."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from anyrank.flower.client_app import answer

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who the client is, and what it has."""
    return answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A training task."""
    return answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """An evaluation."""
    return answer(message, context)
