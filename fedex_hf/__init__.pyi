# What the package offers, for type checkers and, by `lazy_loader`, for the import itself.
from .adapter_aggregation import AggregationReport, aggregate_adapters
from .aggregators import (
    AGGREGATORS,
    Aggregator,
    FedExAggregator,
    FedITAggregator,
    FFALoRAAggregator,
    get_aggregator,
)
from .base_model import AdaptedModel
from .base_versions import StaleUpdateError
from .callbacks import FederatedCallback
from .checkpoint import CheckpointMismatchError, RoundState
from .conversion import convert_from_plain_lora, convert_to_plain_lora
from .evaluation import Exactness, LayerExactness, measure_exactness
from .hub import HubConflictError, UnpublishedRoundsError
from .hub_files import UnsafeRepositoryError
from .hub_rounds import UnloadableRoundError
from .layouts import UnsupportedModelError
from .ledger import Ledger
from .ledger_difference import LedgerDifference, LedgerMismatchError
from .partition import describe_partition, partition_dataset
from .saving import SavedModel
from .tensor_files import AdapterFormatError
from .trainer import FederatedTrainer
from .training_args import FederatedTrainingArguments
from .updates import ClientUpdate, GlobalUpdate, LowRankDelta, NonFiniteUpdateError

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
