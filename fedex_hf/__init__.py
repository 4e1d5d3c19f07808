"""Federated LoRA fine-tuning with exact aggregation (FedEx-LoRA, arXiv 2410.09432) for the Hugging Face stack."""

import lazy_loader

from fedex_hf import _versions  # noqa: F401  an unsupported transformers is refused before it is used


# By `__init__.pyi`, each on first use: `fedex-hf --help` need not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
