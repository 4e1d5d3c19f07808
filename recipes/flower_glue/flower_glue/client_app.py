"""A client: it trains on its own data with `FederatedTrainer`."""

from __future__ import annotations

from flwr.app import Context

from fedex_hf import FederatedTrainer
from fedex_hf.flower import make_client_app
from fedex_hf.partition import client_names, partition_dataset
from flower_glue.task import arguments, load_task


def trainer_fn(context: Context) -> FederatedTrainer:
    """The trainer of this node: of its own data, or of its `partition-id`-th part of the run's dataset."""
    task, args = load_task(context), arguments(context)
    among = int(context.run_config["num-clients"])
    name = client_names(among)[int(context.node_config["partition-id"])]
    data = task.train if "data" in context.node_config else partition_dataset(task.train, among, seed=args.seed)[name]
    return FederatedTrainer(
        task.make_model(args.seed),
        args,
        train_dataset={name: data},
        eval_dataset=task.validation,
        peft_config=task.peft_config,
        **task.trainer_kwargs,
    )


app = make_client_app(trainer_fn)
