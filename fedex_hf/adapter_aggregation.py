"""Adapters that a team has trained and pushed -> the next global model, without a `Trainer`, layer by layer.

    resolve, check everything -> per layer: read k pairs of factors, aggregate, write -> read back, certify -> rename

One layer's tensors are in memory at a time, whatever the number of adapters and the size of the base: the base's files
are copied by the operating system and changed in place, and the model exists on the meta device only, where PEFT says
how a product of factors lies in a layer's weight.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fedex_hf.adapter_files import AdapterFile
from fedex_hf.adapter_round import AdapterRound, warn_about_other_bases
from fedex_hf.adapter_sources import commit_of, resolve_adapter, resolve_base, split_spec
from fedex_hf.aggregate_output import Output, Target
from fedex_hf.aggregators import Aggregator, get_aggregator
from fedex_hf.aggregators.base import mean_factors, normalise
from fedex_hf.checkpoint import atomic_directory
from fedex_hf.evaluation import NOISE, Exactness, LayerExactness, norms_over, weighted_sum
from fedex_hf.lora_site import LoraSite
from fedex_hf.saving import FORMATS
from fedex_hf.skeleton import Skeleton
from fedex_hf.tensor_files import BaseWeights
from fedex_hf.updates import LowRankDelta


logger = logging.get_logger(__name__)

REPORT = "aggregation.json"


@dataclass(frozen=True)
class AggregationReport:
    """What was aggregated, and the certificate of what was written.

    Args:
        method: The aggregator's name.
        settings: Its arguments.
        adapters: The adapters as they were given.
        commits: Their commits on the Hub; `None` for local directories.
        weights: Their weights, sum 1.
        base: The base model as it was given.
        base_commit: Its commit on the Hub; `None` for a local directory.
        format: `"full"`, `"lora"` or `"merged"`.
        exactness: Layer by layer, what is in the files against the float64 mean of the adapters' products. The change
            it is relative to is that mean itself.
        ranks: Layer -> rank of the factors that were written; empty for `"merged"`.
        bytes_read: Of tensors and copied files.
        bytes_written: Of tensors and copied files.
        cast_survival: Share of the update that survives in a 16-bit base, between 0 and 1; `None` where the base is
            wider or not written.
    """

    method: str
    settings: Mapping[str, Any]
    adapters: tuple[str, ...]
    commits: tuple[str | None, ...]
    weights: tuple[float, ...]
    base: str
    base_commit: str | None
    format: str
    exactness: Exactness
    ranks: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    cast_survival: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As in `aggregation.json`; a relative error without a denominator is `None`."""
        ratios = {name: getattr(self.exactness, name) for name in ("aggregation_error", "fedit_deviation")}
        layers = {name: asdict(norms) for name, norms in self.exactness.layers.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in ratios.items()}
        return asdict(self) | {"exactness": finite | {"layers": layers}}


def aggregate_adapters(
    adapters: Sequence[str | os.PathLike],
    base_model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    aggregator: str | Aggregator = "fedex",
    aggregator_kwargs: Mapping[str, Any] | None = None,
    client_weights: Sequence[float] | None = None,
    format: str = "full",
    token: str | bool | None = None,
    progress: bool = True,
) -> AggregationReport:
    """Aggregate adapters of one base model into a directory that plain `from_pretrained` loads.

    Args:
        adapters: PEFT adapter directories, or Hub repositories `user/name` or `user/name@revision`.
        base_model: The model they were trained on, a directory or a repository.
        output_dir: Is created whole or not at all; must not exist, or be empty.
        aggregator: Name of a registered method, or an `Aggregator`. Its `aggregate` is called once per layer.
        aggregator_kwargs: Arguments of a method given by name, such as `{"residual_rank": 8}`.
        client_weights: One positive number per adapter, such as its number of examples; all equal if `None`.
        format: `"full"` is the next global adapter and the base with the residual in it, ready for another round;
            `"lora"` one plain LoRA, of the rank it needs, on the base as it is; `"merged"` one plain model.
        token: For private repositories; `None` takes the one that is logged in.
        progress: Whether to show a progress bar.

    Returns:
        The report, also written to `output_dir/aggregation.json`.

    Raises:
        AdapterNotFoundError: If a directory, repository or revision does not exist.
        AdapterFormatError: If a file is not what it has to be; the message names the key.
        UnsupportedModelError: If the base cannot hold the result exactly.
        ValueError: If the arguments or the adapters do not fit together, or `output_dir` is taken.
        RuntimeError: If what was written fails the certificate of an exact method; nothing is kept then.

    Example: `docs/howto/command-line.md`, which a test runs.
    """
    if format not in FORMATS:
        raise ValueError(f"`format={format!r}` is unknown. Allowed: {', '.join(map(repr, FORMATS))}.")
    if not adapters or isinstance(adapters, (str, os.PathLike)):
        raise ValueError(f"`adapters={adapters!r}`. Allowed: a list of at least one directory or repository.")
    method = get_aggregator(aggregator, **(aggregator_kwargs or {}))
    if method.keeps_client_adapters:
        raise ValueError(
            f"The aggregator `{method.name}` lets every client keep its own factors on a base of its own, and adapter "
            'directories do not say which. Aggregate with `assignment="average"`, or train with `FederatedTrainer`.'
        )
    weights = normalise([1.0] * len(adapters) if client_weights is None else client_weights, len(adapters))
    final = _free_directory(output_dir)
    files = [AdapterFile.open(resolve_adapter(spec, token)) for spec in adapters]
    base = resolve_base(base_model, token, weights=format != "lora")
    round = AdapterRound.check([str(spec) for spec in adapters], files, weights, method, base)
    warn_about_other_bases(round, base_model, base)
    target = Target(round, base, format)
    with atomic_directory(final) as folder:
        steps = [*round.skeleton.sites, *round.others, *round.skeleton.sites]
        with logging.tqdm(total=len(steps), desc="aggregate", unit="tensor", disable=not progress) as bar:
            with closing(Output(round, target, folder)) as output:
                for site in round.skeleton.sites.values():
                    output.put_layer(site, *round.aggregate(site.name))
                    bar.update()
                for key in round.others:
                    output.put_tensor(key, round.average(key))
                    bar.update()
                output.finish(*_named_base(base_model, base) if format == "lora" else (str(final), None))
            bar.set_description("verify")
            exactness = Exactness(dict(_certify(round, target, folder, bar)))
        report = _report(round, target, output, base_model, exactness)
        (folder / REPORT).write_text(json.dumps(report.to_json(), indent=2, sort_keys=True))
    if report.cast_survival is not None:
        logger.warning(
            f"{100 * report.cast_survival:.2f} % of the update survives in the 16-bit base; the rest rounds away. "
            '`format="lora"` keeps all of it: small factors beside the untouched base.'
        )
    return report


# ---- The certificate: what was written ----


def _certify(round: AdapterRound, target: Target, folder: Path, bar: Any) -> Iterator[tuple[str, LayerExactness]]:
    """Per layer, what the files in `folder` add to the base, against the float64 mean of the adapters' products.

    Raises:
        RuntimeError: If that is wrong for a method that is exact.
    """
    adapter = AdapterFile.open(folder) if target.format != "merged" else None
    written = None if adapter is None else Skeleton(round.skeleton.config, adapter.config)
    new = BaseWeights(folder) if target.layers else None
    must_hold = round.method.is_exact and not target.is_narrow

    def certified(site: LoraSite) -> tuple[LayerExactness, float]:
        factors = round.factors(site.name)
        largest = _sum_of_norms(factors, round.weights)
        rounding, resolution = (torch.finfo(dtype).eps * largest for dtype in (factors[0].A.dtype, torch.float32))
        installed: list[Callable[[slice], torch.Tensor]] = []
        if adapter is not None and written is not None:
            there = written.sites[site.name]
            installed.append(partial(there.rows, adapter.factors(site.name, there.scaling)))
        if new is not None and target.base is not None:
            before, after = (base.read(target.layers[site.name]) for base in (target.base, new))
            resolution = torch.finfo(before.dtype).eps * _norm(before)
            installed.append(partial(_difference, site.matrix(after), site.matrix(before)))
        change, error, fedit = _norms(site, factors, round.weights, installed)
        return LayerExactness(change if change > NOISE * largest else 0.0, error, fedit, resolution), rounding

    for name, site in round.skeleton.sites.items():
        norms, rounding = certified(site)
        if must_hold and norms.error > 10 * (norms.resolution + rounding):
            raise RuntimeError(
                f"`{name}`: what was written is {norms.aggregation_error:.1e} away from the mean of the adapters' "
                f"products, which rounding does not explain and `{round.method.name}` does not allow. Nothing is "
                "kept. Look at the disk, and at the aggregator if it is your own."
            )
        yield name, norms
        bar.update()


def _norms(
    site: LoraSite,
    factors: Sequence[LowRankDelta],
    weights: torch.Tensor,
    installed: Sequence[Callable[[slice], torch.Tensor]],
) -> tuple[float, ...]:
    """Of the ideal change, of what was written without it, and of FedIT's change without it.

    Args:
        site: The layer.
        factors: The adapters'.
        weights: Theirs.
        installed: Each makes rows of a part of what was written.
    """
    products, averaged = weighted_sum(factors, weights), mean_factors(factors, weights)

    def norms_of(rows: slice) -> tuple[float, ...]:
        ideal = site.rows(products, rows)
        written = torch.zeros_like(ideal)
        for part in installed:
            written += part(rows)
        return _norm(ideal), _norm(written.sub_(ideal)), _norm(site.rows(averaged, rows).sub_(ideal))

    return norms_over(site, norms_of)


def _difference(after: torch.Tensor, before: torch.Tensor, rows: slice) -> torch.Tensor:
    return after[rows].double().sub_(before[rows])


def _sum_of_norms(factors: Sequence[LowRankDelta], weights: torch.Tensor) -> float:
    """An upper bound of the norm of the mean product, which tells a small mean from rounding of a cancelled one."""
    return sum(
        weight * delta.scaling * _norm(delta.A) * _norm(delta.B)
        for delta, weight in zip(factors, weights.tolist(), strict=True)
    )


def _norm(matrix: torch.Tensor) -> float:
    """Frobenius, in float64."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()


def _report(
    round: AdapterRound, target: Target, output: Output, base_model: str | os.PathLike, exactness: Exactness
) -> AggregationReport:
    bases = [each for each in (target.base, output.base) if each is not None]
    files = [file.tensors for file in round.files] + [file for each in bases for file in each.files]
    writers = [each for each in (output.adapter, output.extra) if each is not None]
    plain = {name: value for name, value in vars(round.method).items() if _is_plain(value)}
    return AggregationReport(
        method=round.method.name,
        settings=plain,
        adapters=tuple(round.specs),
        commits=tuple(_commit(spec, file.directory) for spec, file in zip(round.specs, round.files, strict=True)),
        weights=tuple(round.weights.tolist()),
        base=str(base_model),
        base_commit=_commit(base_model, target.directory),
        format=target.format,
        exactness=exactness,
        ranks=output.ranks,
        bytes_read=output.copied + sum(file.bytes_read for file in files),
        bytes_written=output.copied + sum(file.bytes_written for file in files) + sum(each.size for each in writers),
        cast_survival=max(0.0, 1.0 - exactness.aggregation_error) if target.is_narrow else None,
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _named_base(base_model: str | os.PathLike, directory: Path) -> tuple[str, str | None]:
    """What an adapter's configuration names as its base: a repository at the commit that was read, or a directory."""
    commit = _commit(base_model, directory)
    return (str(directory.resolve()), None) if commit is None else (split_spec(base_model)[0], commit)


def _commit(spec: str | os.PathLike, directory: Path) -> str | None:
    return None if os.path.isdir(spec) else commit_of(directory)


def _free_directory(output_dir: str | os.PathLike) -> Path:
    final = Path(output_dir).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"`output_dir={str(output_dir)!r}` exists and is not empty. Choose another, or delete it.")
    return final
