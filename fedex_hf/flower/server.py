"""The server's trainer: `FederatedTrainer` whose clients train elsewhere. Rounds come from the strategy."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import ProgressCallback
from transformers.trainer_utils import SaveStrategy

from fedex_hf.client import ClientRunner
from fedex_hf.evaluation import Exactness
from fedex_hf.flower.roster import Member
from fedex_hf.trainer import FederatedTrainer
from fedex_hf.updates import ClientUpdate, GlobalUpdate


if TYPE_CHECKING:
    from fedex_hf.flower.strategy import FedExStrategy


logger = logging.getLogger("flwr")


class RemoteDataset(torch.utils.data.Dataset):
    """Stands for data that stays where it is; nothing is known of it here but that there is some."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> NoReturn:
        raise RuntimeError(
            "This data stays with its client, so the server can neither train nor evaluate on it. Give the server an "
            "`eval_dataset` of its own, or let the clients evaluate."
        )


class RemoteClients(ClientRunner):
    """The sizes of clients whose data is elsewhere, as they told; unknown ones count with the mean of the others."""

    members: Mapping[str, Member] = {}

    def num_examples(self, client_id: str) -> int:
        return round(self._of(client_id, "num_examples"))

    def is_stream(self, client_id: str) -> bool:
        return False

    def _size(self, client_id: str) -> tuple[int, float]:
        return round(self._of(client_id, "num_steps")), self._of(client_id, "num_samples")

    def _of(self, client_id: str, name: str) -> float:
        if client_id in self.members:
            return getattr(self.members[client_id], name)
        return mean(getattr(member, name) for member in self.members.values()) if self.members else 1


class ServerTrainer(FederatedTrainer):
    """`FederatedTrainer` on the coordinator; see `FedExStrategy`, which builds and drives it."""

    runner_class = RemoteClients
    strategy: FedExStrategy
    _theirs: Mapping[str, float] = {}  # the clients' metrics, while the server's are formed

    def fingerprint(self) -> dict[str, Any]:
        """As in one process, without the clients' sizes, which may change between rounds."""
        return super().fingerprint() | {"clients": sorted(self.clients.datasets)}

    def run_round(self, round: int) -> dict[str, float]:
        """One server round over Flower."""
        start_time = time.perf_counter()
        clients = self.sample_clients(round)
        self._call_federated("on_round_begin", round=round, clients=clients)
        return self.strategy.run_round(round, start_time)

    def plan_steps(self, round: int) -> None:
        """Plan the steps of this round and the later ones anew, now that more clients have told their size."""
        planned = self.planned_steps(first=round)
        self._steps_of_round = {**self._steps_of_round, **planned}
        self.state.max_steps = self.state.global_step + sum(planned.values())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.total = self.state.max_steps

    def count_steps(self, steps: int) -> None:
        """Steps that a client has made elsewhere: for progress bar, and for what acts every so many steps."""
        for _ in range(steps):
            self.end_client_step()  # nothing to log: losses of single steps stay with the clients

    def round_metrics(
        self, updates: Sequence[ClientUpdate], update: GlobalUpdate, exactness: Exactness
    ) -> dict[str, float]:
        """As in one process, and the bytes that were sent to and received from all clients in this round."""
        return super().round_metrics(updates, update, exactness) | self.strategy.traffic

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate here, on the clients, or both; see `FedExStrategy`.

        Returns:
            Metrics of the server's `eval_dataset`; those of the clients, weighted by their examples, under
            `eval_clients_...`, or under `eval_...` where the server has no dataset.
        """
        here = not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, RemoteDataset)
        theirs: dict[str, float] = {}
        if eval_dataset is None and self.strategy.evaluates_on_clients and self.strategy.is_running:
            prefix = f"{metric_key_prefix}_clients" if here else metric_key_prefix
            named = self.strategy.run_evaluation(self.federation.round)
            theirs = {f"{prefix}_{name}": value for name, value in named.items()}
        if theirs:
            self.log(dict(theirs))
        if here:
            self._theirs = theirs
            try:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs) | theirs
            finally:
                self._theirs = {}
        if not self.strategy.is_running:
            raise RuntimeError("The clients evaluate while the run goes on, and the server has no `eval_dataset`.")
        if theirs:
            self.tell_evaluation(theirs)
        return theirs

    def tell_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Callbacks are told of both evaluations at once: early stopping may go by either."""
        super().tell_evaluation({**metrics, **self._theirs})

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if self.strategy.evaluates_on_clients and name not in metrics:
            logger.warning("Round %d: no `%s` from any client, so it is not the best.", self.federation.round, name)
            return False
        return super()._determine_best_metric(metrics, trial)


def wants_evaluation(args: Any) -> bool:
    """Whether a run evaluates at all."""
    return args.eval_strategy != "no" or args.save_strategy == SaveStrategy.BEST
