"""The command line, `fedex-hf`: what the package does without a training script.

A subcommand is two functions and one line of `COMMANDS`: `add_<name>(subparsers)` describes it and `run_<name>(args)`
does it and returns the exit code. Whatever is slow to import is imported in the second one.

Exit codes: 0 done, 1 failed (one line on stderr; `--debug` shows where), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fedex_hf.cli_publish import add_export, add_push
from fedex_hf.inspection import inspect, tell_adapter, tell_aggregation, tell_model, tell_round


class UsageError(Exception):
    """Arguments that do not fit together: exit code 2."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


# ---- aggregate ----


def add_aggregate(subparsers: Any) -> None:
    """Describe `fedex-hf aggregate`."""
    parser = subparsers.add_parser(
        "aggregate",
        help="aggregate adapters that several people have trained",
        formatter_class=_Formatter,
        description=(
            "Aggregate LoRA adapters of one base model, layer by layer, in the memory of about one layer.\n\n"
            "ADAPTER and BASE are directories, or repositories on the Hub: user/name, or user/name@revision.\n"
            "Only JSON and safetensors are read. A private repository is read with the token that you are logged in\n"
            "with (`hf auth login`, or HF_TOKEN)."
        ),
        epilog=(
            "examples:\n"
            "  fedex-hf aggregate adapters/north adapters/south --base team/base --output global\n"
            "  fedex-hf aggregate north/lora@round-1 south/lora@main --base team/base@round-0 --output global \\\n"
            "      --weights 300,100 --format lora\n"
            "  fedex-hf aggregate adapters/* --base base --output global --aggregator-kwargs '{\"residual_rank\": 8}'"
        ),
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapter to aggregate")
    parser.add_argument("--base", required=True, help="model that the adapters were trained on")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="directory to write; must not exist, or be empty"
    )
    parser.add_argument("--aggregator", default="fedex", metavar="NAME", help="fedex (default), fedit, ffa, ...")
    parser.add_argument(
        "--aggregator-kwargs", type=_json_object, default={}, metavar="JSON", help="arguments of the aggregator"
    )
    parser.add_argument(
        "--weights", type=_numbers, metavar="W,W,...", help="weight of each adapter, in order (default: all equal)"
    )
    parser.add_argument(
        "--format",
        choices=("full", "lora", "merged"),
        default="full",
        help="full: next adapter and updated base (default); lora: one plain LoRA on the base as it is; merged: one "
        "plain model",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run_aggregate)


def run_aggregate(args: argparse.Namespace) -> int:
    """Do `fedex-hf aggregate`."""
    from fedex_hf.adapter_aggregation import aggregate_adapters
    from fedex_hf.aggregators import AGGREGATORS

    if args.aggregator not in AGGREGATORS:
        raise UsageError(f"--aggregator {args.aggregator}: unknown. Allowed: {', '.join(sorted(AGGREGATORS))}.")
    if args.weights is not None and len(args.weights) != len(args.adapters):
        raise UsageError(f"--weights has {len(args.weights)} numbers for {len(args.adapters)} adapters.")
    report = aggregate_adapters(
        args.adapters,
        args.base,
        args.output,
        aggregator=args.aggregator,
        aggregator_kwargs=args.aggregator_kwargs,
        client_weights=args.weights,
        format=args.format,
        progress=not args.quiet,
    )
    found = {"what": "aggregation", "where": args.output} | report.to_json()
    _print(_as_json(found) if args.json else "\n".join(tell_aggregation(found, layers=False)))
    return 0


# ---- inspect ----


def add_inspect(subparsers: Any) -> None:
    """Describe `fedex-hf inspect`."""
    parser = subparsers.add_parser(
        "inspect",
        help="what a directory or repository is: rounds, method, exactness",
        formatter_class=_Formatter,
        description=(
            "Tell what a directory, or a repository on the Hub, is: a round of a federated run, an aggregation, a\n"
            "LoRA adapter, or a plain model. No weights of a model are downloaded, and nothing is unpickled."
        ),
        epilog=(
            "examples:\n"
            "  fedex-hf inspect output/checkpoint-120\n"
            "  fedex-hf inspect team/run@round-3 --layers\n"
            "  fedex-hf inspect global --json"
        ),
    )
    parser.add_argument("where", metavar="PATH_OR_REPO[@REVISION]", help="what to look at")
    parser.add_argument("--layers", action="store_true", help="also every layer's error and deviation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Do `fedex-hf inspect`."""
    found = inspect(args.where)
    tell = {"round": tell_round, "aggregation": tell_aggregation, "adapter": tell_adapter, "model": tell_model}
    _print(_as_json(found) if args.json else "\n".join(tell[found["what"]](found, layers=args.layers)))
    return 0


# ---- Text ----


def _print(text: str) -> None:
    """Print without the control characters that a file from elsewhere may hold."""
    print("".join(each if each.isprintable() or each == "\n" else "?" for each in text))


def _as_json(value: Any) -> str:
    """Strict JSON: NaN and infinities, which it has no word for, become null."""

    def clean(each: Any) -> Any:
        if isinstance(each, Mapping):
            return {key: clean(inner) for key, inner in each.items()}
        if isinstance(each, (list, tuple)):
            return [clean(inner) for inner in each]
        return None if isinstance(each, float) and not math.isfinite(each) else each

    return json.dumps(clean(value), indent=2, allow_nan=False)


# ---- The command ----


COMMANDS = (add_aggregate, add_inspect, add_push, add_export)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="fedex-hf",
        description="Federated LoRA with exact aggregation: aggregate adapters, look at and publish results.",
        epilog="`fedex-hf COMMAND --help` explains a command, with examples.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    for command in subparsers.choices.values():
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (ValueError, OSError, RuntimeError)) and str(error)
        return _fail(str(error) if expected else f"{type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    printable = "".join(each if each.isprintable() else "?" for each in " ".join(message.split()))
    print(f"fedex-hf: error: {printable}", file=sys.stderr)
    return code


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"residual_rank\": 8}}'")
    return value


def _numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 300,100") from error


if __name__ == "__main__":
    sys.exit(main())
