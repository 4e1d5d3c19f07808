"""A tiny classifier with every kind of layer that LoRA adapts, as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from fedex_hf import FederatedTrainer


WIDTH = 16
CARRIED = ["embed", "conv1", "conv2", "conv3", "turned", "straight"]  # what a second adapter can ride beside
FOLDED = ["attention"]
PARAMETERS = ["experts.up", "experts.down", "stacked.weight", "matrix.weight"]


class ZooConfig(PretrainedConfig):
    model_type = "zoo"

    def __init__(self, vocab_size: int = tiny.VOCAB, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        super().__init__(**({"num_labels": tiny.LABELS} | kwargs))


class Experts(nn.Module):
    """Two parameters `(experts, in, out)`; PEFT nests one wrapper in the other."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.2 * torch.randn(3, WIDTH, 6))
        self.down = nn.Parameter(0.2 * torch.randn(3, 6, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bleo,eoi->bli", torch.einsum("bli,eio->bleo", x, self.up).tanh(), self.down)


class Stacked(nn.Module):
    """`(experts, out, in)`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(2, WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bli,eoi->blo", x, self.weight)


class Matrix(nn.Module):
    """`(out, in)`, a parameter of no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Zoo(PreTrainedModel):
    config_class = ZooConfig
    base_model_prefix = "zoo"
    main_input_name = "input_ids"

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.conv1 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 6, (3, 2), padding=1)
        self.conv3 = nn.Conv3d(2, 6, (1, 2, 3), padding=1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.experts, self.stacked, self.matrix = Experts(), Stacked(), Matrix()
        self.turned = Conv1D(24, WIDTH)
        self.straight = nn.Linear(24, WIDTH)
        self.score = nn.Linear(WIDTH, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What PyTorch drew is what we want."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        x = self.embed(input_ids)
        x = x + self.conv1(x.mT).mT.tanh()
        image = x.reshape(len(x), 2, -1, WIDTH)
        x = x + self.conv2(image).tanh().mean((1, 2, 3))[:, None, None]
        x = x + self.conv3(image[:, :, None]).tanh().mean((1, 2, 3, 4))[:, None, None]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.experts(x) + self.stacked(x) + self.matrix(x)
        x = x + self.straight(self.turned(x).tanh())
        logits = self.score(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def zoo(seed: int = 0) -> Zoo:
    torch.manual_seed(seed)
    return Zoo(ZooConfig())


def lora(folded: bool, **kwargs: Any) -> LoraConfig:
    """LoRA on everything; without `folded`, on what can have a second adapter beside the trained one."""
    given: dict[str, Any] = {"r": 2, "lora_alpha": 3, "modules_to_save": ["score"]}
    given["target_modules"] = CARRIED + (FOLDED if folded else [])
    if folded:
        given["target_parameters"] = PARAMETERS
    return LoraConfig(**(given | kwargs))


def federation(
    folder: Path,
    lora_config: LoraConfig,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = (12, 7, 9),
    **args: Any,
) -> FederatedTrainer:
    """A federation on a base that lies in `folder/base`."""
    zoo().to(dtype).save_pretrained(folder / "base")
    return FederatedTrainer(
        model=Zoo.from_pretrained(folder / "base"),
        args=tiny.arguments(folder / "run", **({"learning_rate": 3e-2} | args)),
        train_dataset=tiny.clients_of(list(sizes)),
        eval_dataset=tiny.classification_data(8, seed=1),
        peft_config=lora_config,
    )
