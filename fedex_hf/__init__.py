"""Federated LoRA fine-tuning with exact aggregation (FedEx-LoRA, arXiv 2410.09432) for the Hugging Face stack."""

from fedex_hf import _versions  # noqa: F401  first: an unsupported transformers is refused before it is used
from fedex_hf.aggregate_adapters import AggregationReport, aggregate_adapters
from fedex_hf.aggregators import (
    AGGREGATORS,
    Aggregator,
    FedExAggregator,
    FedITAggregator,
    FFALoRAAggregator,
    get_aggregator,
)
from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_versions import StaleUpdateError
from fedex_hf.callbacks import FederatedCallback
from fedex_hf.checkpoint import CheckpointMismatchError, RoundState
from fedex_hf.conversion import convert_from_plain_lora, convert_to_plain_lora
from fedex_hf.evaluation import Exactness, LayerExactness, measure_exactness
from fedex_hf.hub import HubConflictError, UnpublishedRoundsError
from fedex_hf.hub_files import UnsafeRepositoryError
from fedex_hf.hub_rounds import UnloadableRoundError
from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.ledger import Ledger
from fedex_hf.ledger_difference import LedgerDifference, LedgerMismatchError
from fedex_hf.partition import describe_partition, partition_dataset
from fedex_hf.saving import SavedModel
from fedex_hf.tensor_files import AdapterFormatError
from fedex_hf.trainer import FederatedTrainer
from fedex_hf.training_args import FederatedTrainingArguments
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta, NonFiniteUpdateError


__all__ = [
    "AGGREGATORS",
    "AdaptedModel",
    "AdapterFormatError",
    "AggregationReport",
    "Aggregator",
    "CheckpointMismatchError",
    "ClientUpdate",
    "Exactness",
    "FFALoRAAggregator",
    "FedExAggregator",
    "FedITAggregator",
    "FederatedCallback",
    "FederatedTrainer",
    "FederatedTrainingArguments",
    "GlobalUpdate",
    "HubConflictError",
    "LayerExactness",
    "Ledger",
    "LedgerDifference",
    "LedgerMismatchError",
    "LowRankDelta",
    "NonFiniteUpdateError",
    "RoundState",
    "SavedModel",
    "StaleUpdateError",
    "UnloadableRoundError",
    "UnpublishedRoundsError",
    "UnsafeRepositoryError",
    "UnsupportedModelError",
    "aggregate_adapters",
    "convert_from_plain_lora",
    "convert_to_plain_lora",
    "describe_partition",
    "get_aggregator",
    "measure_exactness",
    "partition_dataset",
]
