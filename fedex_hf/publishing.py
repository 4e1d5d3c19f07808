"""The run's way out: `save_model` in three formats, model cards, and rounds staged for the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from tqdm.auto import tqdm
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from fedex_hf import checkpoint as ckpt
from fedex_hf.hub import HubConflictError, RoundPublisher, RoundQueue, may_pass, tag_of
from fedex_hf.hub_rounds import write_origin
from fedex_hf.round_trainer import RoundTrainer
from fedex_hf.saving import BaseReference, SavedModel, check_format, save_model
from fedex_hf.trainer_utils import without_token


if TYPE_CHECKING:
    from fedex_hf.run_card import RunCard

logger = logging.get_logger(__name__)


class PublishingTrainer(RoundTrainer):
    """What `FederatedTrainer` does with its results: folders, cards and the Hub."""

    publisher: RoundPublisher | None = None
    _card_details: dict[str, Any] = {}
    _unstaged: frozenset[int] = frozenset()  # rounds whose commit could not be written

    # ---- Folders ----

    def save_model(  # type: ignore[override]  # further formats
        self,
        output_dir: str | None = None,
        _internal_call: bool = False,
        *,
        format: str = "full",
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str | None = None,
    ) -> SavedModel:
        """Write the model for plain `from_pretrained`, with tokenizer and card; nothing is sent to the Hub.

        Args:
            output_dir: Folder; `args.output_dir` if `None`.
            format: `"full"` (base with residuals, and adapter), `"lora"` (one plain LoRA on the original base) or
                `"merged"` (one plain model).
            dtype: Cast what is written to `"bfloat16"` or `"float16"`; what that loses of the update is measured.
            max_shard_size: As in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: If the format or dtype is unknown, or `"lora"` has no base that can be named.
        """
        directory = Path(str(self.args.output_dir if output_dir is None else output_dir))
        saved = save_model(
            self.adapted, self.federation.ledger, directory, format, dtype=dtype, max_shard_size=max_shard_size
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        torch.save(without_token(self.args), directory / TRAINING_ARGS_NAME)
        self._write_card(directory, saved)
        return saved

    def create_model_card(self, **kwargs: Any) -> None:  # type: ignore[override]  # the card writes itself
        """Write `README.md` into `args.output_dir`; `language`, `license` and `dataset` go into its metadata."""
        self._card_details = _card_details(kwargs)
        directory = Path(str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        self._write_card(directory, SavedModel("full", "float32", None))

    def _write_card(self, directory: Path, saved: SavedModel, tag: str | None = None) -> None:
        from fedex_hf.model_card import write_card  # on use: runs that write no card are quicker to start

        try:
            write_card(self._card(saved, tag), directory)
        except Exception as error:  # a page about the model is no reason to lose the model
            logger.warning(f"The model card could not be written: {type(error).__name__}: {error}")

    def _card(self, saved: SavedModel, tag: str | None) -> RunCard:
        from fedex_hf.model_facts import model_facts
        from fedex_hf.run_card import RunCard, non_default_arguments, versions, was_cut

        clients = [self.clients.num_examples(client_id) for client_id in self.clients.datasets]
        rounds: dict[Any, int] = {
            int(entry["step"]): int(entry["round"]) for entry in self.state.log_history if "aggregation_error" in entry
        }
        return RunCard(
            round=self.federation.round,
            num_rounds=self.args.num_rounds,
            method=self.aggregator.name,
            paper=self.aggregator.paper,
            is_exact=self.aggregator.is_exact and not was_cut(self.state.log_history),
            log_history=self.state.log_history,
            repo_id=self.publisher.repo_id if tag is not None and self.publisher is not None else None,
            tag=tag,
            num_clients=len(clients),
            client_examples=clients,
            private_names=list(self.clients.datasets),
            arguments=non_default_arguments(self.args),
            versions=versions(),
            best_round=rounds.get(self.state.best_global_step) if self.args.load_best_model_at_end else None,
            best_metric_name=self.args.metric_for_best_model,
            **model_facts(self.adapted, saved),
            **self._card_details,
        )

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Set the publisher up and create the repository; a Hub that cannot be reached now may be there later.

        Raises:
            ValueError: If it cannot be reached and `hub_model_id` lacks the `user/` that only it could add.
            HfHubHTTPError: If the Hub refuses (token, name, rights), before anything is trained.
        """
        if not self.is_world_process_zero():
            return
        check_format(self.args.hub_round_format, None, BaseReference.of(self.adapted.model))
        output_dir = Path(str(self.args.output_dir))
        publisher = RoundPublisher(
            self.args.hub_model_id or output_dir.absolute().name,
            RoundQueue(output_dir),
            token=self.args.hub_token if token is None else token,
            private=self.args.hub_private_repo if private is None else private,
            branch=self.args.hub_revision,
            retries=self.args.hub_retries,
        )
        self.push_in_progress = None
        try:
            publisher.prepare()
        except Exception as error:
            if not may_pass(error) and not isinstance(error, OfflineModeIsEnabled):
                raise
            if "/" not in publisher.repo_id:
                raise ValueError(
                    f"The Hub cannot be reached, so `hub_model_id={publisher.repo_id!r}` cannot be completed. Give "
                    "the whole id, `user/name`; rounds then wait on the disk until the Hub is back."
                ) from None
            logger.warning(f"The Hub cannot be reached now: {publisher.scrubbed(error)} Rounds will wait on the disk.")
        self.publisher = publisher
        self.hub_model_id = publisher.repo_id  # type: ignore[assignment]  # annotated by its start, `None`

    def begin_rounds(self, resume_from_checkpoint: str | None) -> None:
        """Refuse to mix two runs; stage the round that a killed process had saved and not yet staged."""
        if self.publisher is None:
            return
        self._unstaged = frozenset()
        waiting = [staged.round for staged in self.publisher.queue.waiting()]
        if resume_from_checkpoint is None and waiting:
            raise ValueError(
                f"`{self.publisher.queue.directory}` holds the rounds {waiting} of another run, not yet published. "
                "Publish them with `fedex-hf push`, delete the folder, or choose another `output_dir`."
            )
        published = self._published()
        if resume_from_checkpoint is None and published:
            raise HubConflictError(
                f"`{self.publisher.repo_id}` already has the rounds {published} of another run. Choose another "
                "`hub_model_id`, or continue that run with `resume_from_checkpoint`."
            )
        self._refuse_other_rounds(published)
        if resume_from_checkpoint is not None:
            self._stage_missing(published, present=self._publishes(self.federation.round))
            self.publisher.submit()

    def end_round(self, round: int) -> None:
        """Stage the round and have it published in the background; training goes on whatever happens to it."""
        if self.publisher is None or not self._publishes(round):
            return
        self._stage_failed()
        self._stage_present()
        if not self._unstaged:
            self.publisher.submit()

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Complete what is missing on the Hub, in order: rounds that wait, rounds in checkpoints, the present one.

        Args:
            commit_message: Ignored: a round's commit is named after it.
            blocking: Return when all is published; otherwise publish in the background.
            token, revision, private: As in `Trainer.push_to_hub`, for a run without `push_to_hub=True`.
            kwargs: Metadata for the cards of rounds that are staged now: `language`, `license`, `dataset`.

        Returns:
            The `CommitInfo` of the last commit made by this run, or `None` if there was none.

        Raises:
            HubConflictError: If the repository holds the rounds of another run.
            UnpublishedRoundsError: If a round cannot be published; with what went before, nothing is lost.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._card_details = self._card_details | _card_details(kwargs)
        if revision is not None and self.publisher is None:
            self.args.hub_revision = revision
        if self.publisher is None or token is not None:
            self.init_hf_repo(token=token, private=private)
        publisher = cast(RoundPublisher, self.publisher)
        published = self._published()
        self._refuse_other_rounds(published)
        self._stage_missing(published)
        if not blocking:
            publisher.submit()
            return None
        waiting = publisher.queue.waiting()
        with tqdm(total=len(waiting), desc="Publishing rounds", unit="round", disable=not waiting) as bar:
            publisher.publish(on_round=lambda staged: bar.update())
        return publisher.last_commit

    def _finish_current_push(self) -> None:
        """At the end of training: wait for the background, and say what is left."""
        if self.publisher is None:
            return
        if self._unstaged:
            self._stage_failed()
            self.publisher.submit()
        if not self.publisher.is_done():
            total = len(self.publisher.queue.waiting())
            with tqdm(total=total, desc="Publishing rounds", unit="round", disable=self.args.disable_tqdm) as bar:
                while not self.publisher.is_done():
                    self.publisher.join(0.2)
                    bar.update(total - len(self.publisher.queue.waiting()) - bar.n)
        left = [staged.round for staged in self.publisher.queue.waiting()]
        if left:
            logger.warning(
                f"Rounds {left} are not on the Hub yet; they wait in `{self.publisher.queue.directory}`. Call "
                "`trainer.push_to_hub()` or `fedex-hf push` when it can be reached."
            )

    def _publishes(self, round: int) -> bool:
        ends = round == self.args.num_rounds or self.control.should_training_stop
        return ends or self.args.hub_strategy != HubStrategy.END

    def _published(self) -> list[int] | None:
        """Rounds that are on the Hub, or `None` where it does not say."""
        publisher = cast(RoundPublisher, self.publisher)
        try:
            return publisher.published()
        except Exception as error:
            logger.warning(f"The Hub did not list its rounds: {publisher.scrubbed(error)}")
            return None

    def _refuse_other_rounds(self, published: list[int] | None) -> None:
        """Refuse a repository whose rounds were logged with other numbers than this run's."""
        ours = _logged_rounds(self.state.log_history)
        if not published or not ours:
            return
        publisher = cast(RoundPublisher, self.publisher)
        try:
            theirs = _logged_rounds(publisher.log_of(published[-1]))
        except Exception as error:
            logger.warning(f"The Hub did not show its rounds: {publisher.scrubbed(error)}")
            return
        if not theirs or any(ours[round] != theirs[round] for round in ours.keys() & theirs.keys()):
            raise HubConflictError(
                f"`{publisher.repo_id}` has the rounds {published} of another run. Choose another `hub_model_id`."
            )

    def _stage_missing(self, published: list[int] | None, present: bool = True) -> None:
        """Stage rounds that are in a checkpoint, or in the model if `present`, and neither wait nor are published.

        Where the Hub did not say what is published, none from checkpoints: writing them all may be much.
        """
        known = {
            *(published or []),
            *(staged.round for staged in cast(RoundPublisher, self.publisher).queue.waiting()),
        }
        newest, now = max(published or [], default=0), self.federation.round
        last = max([now, *_logged_rounds(self.state.log_history)])  # `now` is an earlier one if that was the best
        look = self.args.push_to_hub and published is not None
        for path in ckpt.checkpoints_in(str(self.args.output_dir)) if look else []:
            round = ckpt.read_meta(path)["round"]
            if newest < round <= last and round not in {*known, now} and self._publishes(round):
                self._stage_checkpoint(path)
        if present and now > newest and now not in known:
            self._stage_present()

    def _stage_checkpoint(self, path: Path) -> None:
        """Stage an earlier round: install it, write it, and go back."""
        federation, state, exactness = self.federation, self.state, self.exactness
        try:
            self._load_from_checkpoint(str(path))
            self.state = type(state).load_from_json(str(path / TRAINER_STATE_NAME))
            self._stage()
        finally:
            self.federation, self.state, self.exactness = federation, state, exactness
            self.adapted.write(federation.state)
            self.adapted.install(federation.ledger)

    def _stage_failed(self) -> None:
        """Try again what could not be staged: rounds are published in order, so later ones wait for it.

        A round without a checkpoint is given up, so that the others need not wait for ever.
        """
        if not self._unstaged:
            return
        paths = {ckpt.read_meta(path)["round"]: path for path in ckpt.checkpoints_in(str(self.args.output_dir))}
        for round in sorted(self._unstaged):
            if round in paths:
                self._stage_checkpoint(paths[round])
            else:
                logger.warning(f"Round {round} has no checkpoint, so it will be missing on the Hub.")
                self._unstaged -= {round}

    def _stage_present(self) -> None:
        self._collect_callback_states()
        self._stage()

    def _stage(self) -> None:
        """Write the round's commit to the disk; a failure is told and does not stop training."""
        publisher = cast(RoundPublisher, self.publisher)
        round = self.federation.round
        try:
            target = {"repo_id": publisher.repo_id, "branch": publisher.branch}
            with publisher.queue.stage(round, target) as folder:
                self._write_round(folder, publisher.repo_id)
            self._unstaged -= {round}
        except Exception as error:
            self._unstaged |= {round}
            logger.warning(
                f"Round {round} could not be staged for the Hub: {publisher.scrubbed(error)} The next round and "
                "`trainer.push_to_hub()` try again, from its checkpoint if there is one."
            )

    def _write_round(self, folder: Path, repo_id: str) -> None:
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        # Optimizer states belong to the clients and stay with them.
        federation = replace(self.federation, optimizer_states={})
        write_origin(folder / ckpt.FOLDER, self.adapted, self.exactness)
        ckpt.save_round(folder, federation, self.fingerprint(), list(self.clients.datasets))
        tag = tag_of(self.federation.round)
        saved = save_model(
            self.adapted,
            self.federation.ledger,
            folder,
            self.args.hub_round_format,
            repo_id=repo_id,
            revision=tag,
            max_shard_size=self.args.hub_max_shard_size,
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        self._write_card(folder, saved, tag)


def _card_details(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Trainer.create_model_card` that our card knows."""
    details = {name: kwargs[name] for name in ("language", "license") if kwargs.get(name)}
    datasets = kwargs.get("dataset_tags") or kwargs.get("dataset")
    if datasets:
        details["datasets"] = [datasets] if isinstance(datasets, str) else list(datasets)
    return details


def _logged_rounds(log_history: list[dict[str, Any]]) -> dict[int, str]:
    """What tells the rounds of two runs apart; as text, because NaN equals nothing."""
    return {
        int(entry["round"]): f"{entry['train_loss']} {entry['aggregation_error']}"
        for entry in log_history
        if "aggregation_error" in entry
    }
