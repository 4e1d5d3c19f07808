"""The server: it aggregates, evaluates on the task's validation split, keeps the rounds and publishes them."""

from __future__ import annotations

from typing import Any

from flwr.app import Context

from fedex_hf.flower import FedExStrategy, make_server_app
from flower_glue.task import arguments, load_task


def strategy_fn(context: Context) -> FedExStrategy:
    """The strategy with model, arguments and the data that the server evaluates on."""
    config: dict[str, Any] = dict(context.run_config)
    task = load_task(context)
    args = arguments(
        context,
        num_clients=config["num-clients"],
        min_clients=config["min-clients"],
        eval_strategy="epoch",
        resume_from_checkpoint=config["resume"],
        push_to_hub=config["push-to-hub"],
        hub_model_id=config["hub-model-id"] or None,
    )
    return FedExStrategy(
        task.make_model(args.seed),
        args,
        timeout=config["timeout"],
        connect_timeout=config["connect-timeout"],
        peft_config=task.peft_config,
        eval_dataset=next(iter(task.tests.values())),
        **task.trainer_kwargs,
    )


app = make_server_app(strategy_fn)
