"""The server's Flower app."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedex_hf.flower.strategy import FedExStrategy


def make_server_app(strategy_fn: Callable[[Context], FedExStrategy]) -> ServerApp:
    """A Flower `ServerApp` that runs a federation and leaves the model in `args.output_dir`.

    Args:
        strategy_fn: Builds the strategy, with model, arguments and the server's data, from Flower's context.

    Example:
        >>> def strategy_fn(context):
        ...     return FedExStrategy(load_model(), arguments(context), clients=["north", "south", "east"])
        >>> app = make_server_app(strategy_fn)
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = strategy_fn(context)
        strategy.start(grid)
        strategy.trainer.save_model()

    return app
