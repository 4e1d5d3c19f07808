"""`fedex-hf push` and `fedex-hf export`: finished rounds and saved models on their way out."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


# ---- push ----


def add_push(subparsers: Any) -> None:
    """Describe `fedex-hf push`."""
    parser = subparsers.add_parser(
        "push",
        help="publish rounds that wait, or a saved model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Publish on the Hub.\n\n"
            "With the folder of a run (its `output_dir`): all rounds that wait there, in order, each as one commit\n"
            "with its tag, in the repository that they were made for. What is there already is not sent again.\n"
            "With a folder that `save_model`, `fedex-hf aggregate` or `fedex-hf export` wrote: that model as one\n"
            "commit in --repo, with --tag if given. Only safetensors, JSON, tokenizer, card and plots are sent.\n\n"
            "You need a token with write permission (`hf auth login`, or HF_TOKEN)."
        ),
        epilog=("examples:\n  fedex-hf push run\n  fedex-hf push global --repo team/global --tag round-4 --private"),
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a run, or of a saved model")
    parser.add_argument("--repo", metavar="USER/NAME", help="repository; created if needed")
    parser.add_argument("--tag", help="tag of a saved model's commit, such as round-4")
    parser.add_argument("--branch", help="branch of the commits, created if needed (default: main)")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--retries", type=int, default=5, help="further attempts at a round (default: 5)")
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    """Do `fedex-hf push`; returns the exit code."""
    from fedex_hf.hub import RoundQueue

    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` is no folder.")
    queue = RoundQueue(folder)
    return _push_rounds(args, queue) if queue.waiting() else _push_folder(args, folder)


def _push_rounds(args: argparse.Namespace, queue: Any) -> int:
    from tqdm.auto import tqdm

    from fedex_hf.hub import RoundPublisher

    target = queue.target
    if args.tag is not None:
        raise ValueError("`--tag` is for a saved model: rounds have their own tags.")
    if args.repo is not None and target.get("repo_id") not in (None, args.repo):
        raise ValueError(
            f"`--repo {args.repo}`, but the rounds in `{queue.directory}` name `{target['repo_id']}` as their base. "
            "Leave `--repo` out."
        )
    repo_id = args.repo or target.get("repo_id")
    if repo_id is None:
        raise ValueError(f"`{queue.directory}` does not say where its rounds go. Name it with `--repo`.")
    publisher = RoundPublisher(
        repo_id,
        queue,
        private=args.private,
        branch=args.branch or target.get("branch"),
        retries=args.retries,
    )
    rounds = [staged.round for staged in queue.waiting()]
    with tqdm(total=len(rounds), desc="Publishing rounds", unit="round") as bar:
        publisher.publish(on_round=lambda staged: bar.update())
    print(f"Published in {publisher.repo_id}: {', '.join(f'round-{round}' for round in rounds)}")
    return 0


def _push_folder(args: argparse.Namespace, folder: Path) -> int:
    from fedex_hf.exporting import publish_folder

    if args.repo is None:
        raise ValueError(f"No rounds wait in `{folder}`. To publish the model in it, name a repository with `--repo`.")
    done = publish_folder(folder, args.repo, tag=args.tag, branch=args.branch, private=args.private)
    tagged = f", tag {done.tag}" if done.tag is not None else ""
    print(f"Published {len(done.files)} files in {done.repo_id}: commit {done.commit[:8]}{tagged}")
    return 0


# ---- export ----


def add_export(subparsers: Any) -> None:
    """Describe `fedex-hf export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a round in another format",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write a round as a model that plain `from_pretrained` loads.\n\n"
            "ROUND is a `checkpoint-N` folder of a run, or a published round: user/run@round-3. The run's original\n"
            "base is loaded by the name that the round has noted.\n\n"
            "formats:\n"
            "  full     base with the residuals in it, and adapter\n"
            "  lora     one plain LoRA on the original base\n"
            "  merged   one plain model\n\n"
            "With --dtype, the share of the update that survives the cast is measured and printed."
        ),
        epilog=(
            "examples:\n"
            "  fedex-hf export run/checkpoint-120 --format merged --output model\n"
            "  fedex-hf export team/run@round-3 --format lora --dtype bfloat16 --output small"
        ),
    )
    parser.add_argument("round", metavar="ROUND", help="checkpoint folder, or repository with @round-N")
    parser.add_argument("--format", choices=("full", "lora", "merged"), required=True, help="what to write")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast what is written")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file, such as 5GB")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Do `fedex-hf export`; returns the exit code."""
    from fedex_hf.exporting import export_round

    saved = export_round(args.round, args.output, args.format, dtype=args.dtype, max_shard_size=args.max_shard_size)
    if args.json:
        print(json.dumps(asdict(saved), indent=2))
        return 0
    print(f"Wrote {args.output}: format {saved.format}, {saved.dtype}")
    if saved.cast_survival is not None:
        print(f"{100 * saved.cast_survival:.2f} % of the update survives the cast")
    return 0
