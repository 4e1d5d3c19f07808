"""Room 4: aggregation methods, one file each, behind one registry."""

from __future__ import annotations

from typing import Any

from fedex_hf.aggregators.base import Aggregator
from fedex_hf.aggregators.fedex import FedExAggregator
from fedex_hf.aggregators.fedit import FedITAggregator
from fedex_hf.aggregators.ffa import FFALoRAAggregator


AGGREGATORS: dict[str, type[Aggregator]] = {
    "fedex": FedExAggregator,
    "fedit": FedITAggregator,
    "ffa": FFALoRAAggregator,
}


def get_aggregator(name: str | Aggregator, **kwargs: Any) -> Aggregator:
    """Look up an aggregation method by name; an `Aggregator` is returned as it is.

    Args:
        name: A key of `AGGREGATORS`, or an instance.
        kwargs: Arguments of the method, such as `residual_rank` of `fedex`.

    Raises:
        ValueError: If the name is unknown, or `kwargs` come with an instance.
        TypeError: If `name` is neither a string nor an `Aggregator`, or the method does not take `kwargs`.

    Example:
        >>> get_aggregator("fedex", residual_rank=8).is_exact
        False
    """
    if isinstance(name, Aggregator):
        if kwargs:
            raise ValueError(
                f"`aggregator` is already a `{type(name).__name__}`, so `aggregator_kwargs={kwargs}` would be "
                "ignored. Pass the arguments to its constructor."
            )
        return name
    if not isinstance(name, str):
        raise TypeError(f"`aggregator` is a `{type(name).__name__}`. Allowed: an `Aggregator`, or a name.")
    if name not in AGGREGATORS:
        raise ValueError(
            f"`aggregator={name!r}` is unknown. Allowed: {', '.join(map(repr, sorted(AGGREGATORS)))}, or an instance "
            "of your own `Aggregator`."
        )
    try:
        return AGGREGATORS[name](**kwargs)
    except TypeError as error:
        raise TypeError(f"`aggregator_kwargs={kwargs}` do not fit the aggregator `{name}`: {error}.") from error


__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "FFALoRAAggregator",
    "FedExAggregator",
    "FedITAggregator",
    "get_aggregator",
]
