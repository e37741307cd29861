"""The server's entry point: plays a recipe."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from anyrank.flower.server_app import main

app = ServerApp()


@app.main()
def start(grid: Grid, context: Context) -> None:
    """Play the recipe that the run's configuration names."""
    main(grid, context)
