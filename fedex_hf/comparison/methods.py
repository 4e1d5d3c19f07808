"""The methods of a comparison, as they are written on a command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fedex_hf.aggregators import Aggregator, get_aggregator


CENTRALIZED = "centralized"


@dataclass(frozen=True)
class Method:
    """An aggregator with its arguments, or LoRA on all data in one place.

    Args:
        name: As it was written, such as `"fedex:residual_rank=8"`.
        aggregator: Name in `fedex_hf.AGGREGATORS`.
        kwargs: Arguments of the aggregator.

    Example:
        >>> Method.parse("fedex:residual_rank=8").kwargs
        {'residual_rank': 8}
    """

    name: str
    aggregator: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read `name` or `name:key=value,key=value`; values are JSON, or else strings.

        Raises:
            ValueError, TypeError: If the aggregator is unknown or does not take the arguments.
        """
        name, _, rest = text.partition(":")
        kwargs = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"`{text}` cannot be read: `{pair}` is not `key=value`.")
            kwargs[key.strip()] = _value(value)
        if name == CENTRALIZED:
            if kwargs:
                raise ValueError(f"`{text}`: centralized training takes no arguments.")
            return cls(text, "fedit")
        method = cls(text, name, kwargs)
        method.make()
        return method

    @property
    def is_centralized(self) -> bool:
        """Whether all data lie with one client."""
        return self.name == CENTRALIZED

    def make(self, seed: int = 0) -> Aggregator:
        """A new aggregator; one that draws, draws by `seed` if the method was not given one of its own."""
        drawn = {"seed": seed} if self.kwargs.get("assignment") == "reinitialise" else {}
        return get_aggregator(self.aggregator, **{**drawn, **self.kwargs})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
