"""What is global and yet belongs to one client's fit: random numbers, and notes of the libraries."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from fedex_hf.trainer import FederatedTrainer


@dataclass(frozen=True)
class GlobalState:
    """A copy that can be put back.

    Args:
        python, numpy: States of their random number generators.
        cpu, cuda: States of torch's, tensors of bytes; `cuda` is the current device's, `None` where none is in use.
        fitting: The client that the logs name.
        steps_now: Whether accelerate's optimizers take the next step, which they do not while gradients accumulate.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None
    fitting: dict[str, Any] | None
    steps_now: bool

    @classmethod
    def of(cls, federation: FederatedTrainer) -> GlobalState:
        """As things are now."""
        return cls(
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            federation._fitting,
            federation.accelerator.gradient_state.sync_gradients,
        )

    def restore(self, federation: FederatedTrainer) -> None:
        """Put it back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        federation._fitting = self.fitting
        federation.accelerator.gradient_state._set_sync_gradients(self.steps_now)
