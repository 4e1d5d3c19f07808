"""A run's state between two rounds: in memory, on the disk and back, and by which name clients know it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from fedex_hf import checkpoint as ckpt
from fedex_hf.aggregators import Aggregator
from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_versions import PendingVersion
from fedex_hf.client import ClientRunner
from fedex_hf.client_adapters import NOT_PUBLISHED, read_client_adapters, write_client_adapters
from fedex_hf.client_states import StateFile, StateFolder, StatesOnDisk
from fedex_hf.evaluation import Exactness
from fedex_hf.hub_rounds import find_round, read_exactness, write_origin
from fedex_hf.ledger import Ledger
from fedex_hf.ledger_difference import LedgerDifference, LedgerHistory
from fedex_hf.trainer_utils import without_token
from fedex_hf.training_args import FederatedTrainingArguments
from fedex_hf.updates import LowRankDelta


logger = logging.get_logger(__name__)

_PLAIN = (str, int, float, bool, type(None))  # settings of an aggregator that a checkpoint can compare


class CheckpointedTrainer(Trainer):
    """The part of `FederatedTrainer` that keeps `federation`, the state after the last completed round."""

    args: FederatedTrainingArguments
    aggregator: Aggregator
    adapted: AdaptedModel
    clients: ClientRunner
    federation: ckpt.RoundState
    exactness: Exactness | None
    _cached_fingerprint: dict[str, Any] | None = None
    _pending_version: PendingVersion | None = None
    _holds_client: bool = False

    # ---- In memory ----

    def restore_global_state(self) -> None:
        """Put the last good round back into the model: adapters at the global rank, other tensors, and the base."""
        self.adapted.write(self.federation.state)
        if self.adapted.needs_restoring:
            self.adapted.install(self.federation.ledger)
        self._holds_client = False

    @property
    def base_version(self) -> str:
        """Name of the present base: a hash of the original base weights and of the ledger."""
        return self.ledger_history.version_of(self.federation.ledger)

    @property
    def pending_version(self) -> PendingVersion:
        """`base_version`, hashed only if someone asks for it; one object per ledger."""
        if self._pending_version is None or self._pending_version.ledger is not self.federation.ledger:
            self._pending_version = PendingVersion(self.federation.ledger, self._version_of)
        return self._pending_version

    def _version_of(self, ledger: Ledger) -> str:
        return self.ledger_history.version_of(ledger)

    def note_round(self, residuals: Mapping[str, LowRankDelta], ledger: Ledger) -> None:
        """Note a round's residuals for clients elsewhere; not before anyone has asked for a base version.

        Args:
            residuals: Layer name -> the round's residual.
            ledger: The ledger after it.
        """
        if "ledger_history" in vars(self):
            self.ledger_history.append(self.federation.ledger, residuals, ledger)

    def ledger_difference(self, since: str | None = None) -> LedgerDifference:
        """What a client is sent that has missed rounds; see `LedgerDifference.apply`.

        Args:
            since: The base version that the client holds; `None` for a client that has the original base only. It
                gets the residuals of the rounds since then, or the whole ledger where these are no longer at hand:
                after a resume, for a version that this trainer was not asked for, or when they would be more bytes
                than the ledger.
        """
        return self.ledger_history.difference(since, self.federation.ledger)

    @cached_property
    def ledger_history(self) -> LedgerHistory:
        """The residuals of the last rounds, noted from the first look on: a run that nobody asks hashes nothing."""
        base = self.fingerprint()[ckpt.BASE]
        return LedgerHistory(base, self.args.residual_rank, self.args.residual_tolerance)

    # ---- On the disk ----

    @cached_property
    def state_folder(self) -> StateFolder | None:
        """Where the clients' optimizer states lie; `None` if they are kept in memory."""
        return None if self.args.client_state_dir is None else StateFolder(self.args.client_state_dir)

    def keep_states(self, new: Mapping[str, Mapping[str, Any] | StateFile]) -> None:
        """Let the states of a round take the place of the clients' earlier ones."""
        earlier = self.federation.optimizer_states
        if self.state_folder is not None and not isinstance(earlier, StatesOnDisk):
            earlier = StatesOnDisk(self.state_folder) | earlier
        self.federation.optimizer_states = earlier | new  # type: ignore[operator]  # of dictionaries, or `StatesOnDisk`

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(str(self.args.output_dir))
        final = self._checkpoint_path()
        self.store_flos()
        self._find_best_checkpoint(final)
        if not self.args.should_save:
            return
        durable: set[Path] = set()
        with ckpt.atomic_directory(final, durable) as folder:
            torch.save(without_token(self.args), folder / TRAINING_ARGS_NAME)
            self._save_rng_state(str(folder))
            self._collect_callback_states()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            write_origin(folder / ckpt.FOLDER, self.adapted, self.exactness)
            clients = list(self.clients.datasets)
            write_client_adapters(folder, self.federation.client_adapters, clients)
            durable |= ckpt.save_round(folder, self.federation, self.fingerprint(), clients)
        ckpt.rotate(run_dir, self.args.save_total_limit, keep=self.state.best_model_checkpoint)

    def _checkpoint_path(self) -> Path:
        return Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _find_best_checkpoint(self, about_to_be_written: Path | None = None) -> None:
        """The best round's checkpoint in this `output_dir`, wherever the folder was when it was written."""
        best = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == about_to_be_written or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _collect_callback_states(self) -> None:
        states: dict[str, Any] = {}
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                states.setdefault(type(each).__name__, []).append(each.state())
        single = {name: values[0] if len(values) == 1 else values for name, values in states.items()}
        self.state.stateful_callbacks = single  # type: ignore[assignment]  # annotated as the list it starts as

    def find_round(self, where: str) -> str:
        """The folder of a round: `where` itself, or what was downloaded of `user/run@revision`.

        Raises:
            ValueError: If optimizer states or adapters are kept by clients: these are never published.
        """
        path = find_round(where, self.args.hub_token)
        if path != where and self.aggregator.keeps_client_adapters:
            raise ValueError(f"`{where}` {NOT_PUBLISHED}")
        if path != where and self.args.client_optimizer_state == "keep":
            raise ValueError(
                f"`{where}` has no optimizer states of clients: they are never published, so "
                '`client_optimizer_state="keep"` cannot go on exactly. Resume from a local checkpoint, or set "reset".'
            )
        return path

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._holds_client:
            self.restore_global_state()
        self.federation = self._read_checkpoint(resume_from_checkpoint)
        self.adapted.write(self.federation.state)
        self.adapted.install(self.federation.ledger)
        self.exactness = read_exactness(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best round from `{self.state.best_model_checkpoint}` ({self.state.best_metric}).")
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _read_checkpoint(self, directory: str) -> ckpt.RoundState:
        # Optimizer states are pickles: read only where they are needed, and never from the Hub (`find_round`).
        clients = list(self.clients.datasets)
        with_optimizers = clients if self.args.client_optimizer_state == "keep" else None
        federation = ckpt.load_round(directory, self.fingerprint(), self.adapted, with_optimizers, self.state_folder)
        if self.aggregator.keeps_client_adapters:
            federation.client_adapters = read_client_adapters(directory, self.adapted, clients)
        return federation

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to continue this run; the first call reads the whole base."""
        if self._cached_fingerprint is None:
            plain = {name: value for name, value in vars(self.aggregator).items() if isinstance(value, _PLAIN)}
            self._cached_fingerprint = ckpt.fingerprint_of(
                self.adapted,
                aggregator={"name": self.aggregator.name} | plain,
                clients={client_id: self.clients.num_examples(client_id) for client_id in self.clients.datasets},
                # Seeds and the files of kept optimizer states go by a client's place.
                **{"order of clients": list(self.clients.datasets)},
                client_ranks=self.args.parsed_client_ranks or None,
                seed=self.args.seed,
                data_seed=self.args.data_seed,
            )
        return self._cached_fingerprint
