"""The server's Flower app."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedex_hf.flower.strategy import FedExStrategy
from fedex_hf.training_args import FederatedTrainingArguments


def make_server_app(
    model_fn: Callable[[Context], nn.Module],
    args_fn: Callable[[Context], FederatedTrainingArguments],
    clients: Sequence[str] | None = None,
    trainer_kwargs_fn: Callable[[Context], Mapping[str, Any]] | None = None,
    *,
    timeout: float = 3600,
    connect_timeout: float = 60,
    evaluate_on_clients: bool | None = None,
) -> ServerApp:
    """A Flower `ServerApp` that runs a federation and leaves the model in `args.output_dir`.

    Args:
        model_fn: Builds the model from Flower's context, the same on the server and on all clients.
        args_fn: Builds the arguments. With `resume_from_checkpoint=True` a run that was stopped goes on.
        clients: The federation's clients; `client-0`, `client-1`, ... of `args.num_clients` if `None`.
        trainer_kwargs_fn: Builds further arguments of `FederatedTrainer`, such as `peft_config`, `eval_dataset`,
            `compute_metrics` and `processing_class`.
        timeout: Seconds to wait for a round's replies.
        connect_timeout: Seconds to wait, at the start of a round, for clients that are not connected.
        evaluate_on_clients: Whether clients evaluate; if `None`, where the server has no `eval_dataset`.

    Example:
        >>> app = make_server_app(load_model, arguments, clients=["north", "south", "east"])
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedExStrategy(
            model_fn(context),
            args_fn(context),
            clients,
            connect_timeout=connect_timeout,
            evaluate_on_clients=evaluate_on_clients,
            **(trainer_kwargs_fn(context) if trainer_kwargs_fn is not None else {}),
        )
        strategy.start(grid, timeout=timeout)
        strategy.trainer.save_model()

    return app
