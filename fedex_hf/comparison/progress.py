"""What a comparison shows while it runs, and what it keeps of every round."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback
from transformers.trainer_callback import ExportableState

from fedex_hf.callbacks import FederatedCallback
from fedex_hf.comparison.results import LayerDeviation


class RoundLines(ProgressCallback):
    """The usual progress bar over the whole federation, with one readable line per round instead of raw logs.

    Args:
        name: What begins each line.
        metric: Key of the validation metric to show, without `eval_`.
        show_error: Whether the aggregation error is worth showing: one client has none.
    """

    def __init__(self, name: str, metric: str, show_error: bool) -> None:
        super().__init__()
        self.name = name
        self.metric = metric
        self.show_error = show_error
        self.round: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin the bar, if bars are wanted."""
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        """End the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Show no second bar inside a run."""
        if self.training_bar is None and not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep the round's own log, and print it once the evaluation that follows has come."""
        logs = logs or {}
        if "aggregation_error" in logs:
            self.round = dict(logs)
        if f"eval_{self.metric}" not in logs or not self.round or not state.is_world_process_zero:
            return
        line = (
            f"{self.name}, round {self.round['round']:.0f}/{args.num_rounds}: train loss "
            f"{self.round['train_loss']:.3f}, validation {self.metric} {logs[f'eval_{self.metric}']:.3f}"
        )
        if self.show_error:
            line += f", aggregation error {self.round['aggregation_error']:.1e}"
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)


class LayerDeviations(FederatedCallback, ExportableState):
    """Keeps every layer's deviation of every round, also over a resume.

    Attributes:
        rounds: Round, as a string, -> layer -> the values of a `LayerDeviation`.
    """

    def __init__(self) -> None:
        self.rounds: dict[str, dict[str, list[float]]] = {}

    def on_round_end(self, args, state, control, round, metrics, **kwargs):
        """Read the certificate of the round that ended."""
        trainer = kwargs["trainer"]
        self.rounds[str(round)] = {
            name: [
                norms.aggregation_error,
                norms.fedit_deviation,
                norms.fedit / trainer.adapted.sites[name].base_weight.numel() ** 0.5,
            ]
            for name, norms in trainer.exactness.layers.items()
        }

    def of(self, round: int) -> dict[str, LayerDeviation]:
        """The layers of one round."""
        return {name: LayerDeviation(*values) for name, values in self.rounds.get(str(round), {}).items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"rounds": self.rounds}}
