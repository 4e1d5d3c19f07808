"""Memory and time of aggregating adapters layer by layer, beside loading everything at once.

    python benchmarks/aggregate.py
    python benchmarks/aggregate.py --adapters 2 --repeats 1 --model tiny
    python benchmarks/aggregate.py --output docs/benchmarks

Adapters on all linear layers of a causal language model lie in directories; what is wanted is the next adapter and the
base with the residual of FedEx-LoRA in it, in a directory of its own. Two ways to it, each run a process of its own:

- at once: the base by `from_pretrained`, all adapters in memory, every layer's residual as a dense matrix, added to
  the base, `save_pretrained`
- layer by layer: `fedex_hf.aggregate_adapters`, which also reads everything back and certifies it

Memory is the peak of resident memory (Linux: `VmHWM`, reset before the work), also as what the work added to the
libraries that were loaded before. It is taken in runs of its own, in which glibc is told to give every block over
64 kB back when it is freed (`MALLOC_MMAP_THRESHOLD_=65536`), so that resident memory follows what is held; that costs
time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import describe_machine, markdown_table, publish, run_in_child, start
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fedex_hf import AdaptedModel, ClientUpdate, FedExAggregator
from fedex_hf.adapter_aggregation import aggregate_adapters
from fedex_hf.updates import LowRankDelta


MB = 1e6
Figures = dict[str, dict[str, list[dict[str, float]]]]  # what is measured -> way -> a run's figures

# The shape of SmolLM2-135M, and one that is made in a moment.
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
    },
}


@dataclass
class BenchmarkArguments:
    """What to measure."""

    adapters: list[int] = field(default_factory=lambda: [2, 8], metadata={"help": "Adapters, one comparison each."})
    rank: int = field(default=16, metadata={"help": "LoRA rank."})
    model: str = field(default="SmolLM2-135M", metadata={"help": "Shape of the base.", "choices": list(SHAPES)})
    repeats: int = field(default=3, metadata={"help": "Processes per way; medians are reported."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as aggregate.md."}
    )
    child: str | None = field(
        default=None,
        metadata={
            "help": "Internal: be one run and print its figures as JSON.",
            "choices": ["", "at once", "layer by layer"],
        },
    )
    folder: str | None = field(default=None, metadata={"help": "Internal: where base and adapters lie."})


# ---- The two ways ----


def at_once(base: Path, adapters: Sequence[Path], output: Path) -> None:
    """The obvious script: everything in memory."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], is_trainable=True)
    adapted = AdaptedModel(model, changes_base=True)
    states = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    updates = [
        ClientUpdate(
            client_id=str(number),
            round=1,
            num_examples=1,
            adapters={
                name: LowRankDelta(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], site.scaling)
                for name, site in adapted.sites.items()
            },
        )
        for number, state in enumerate(states)
    ]
    update = FedExAggregator().aggregate(updates, [1.0] * len(updates))
    residuals = {name: adapted.sites[name].dense(residual).float() for name, residual in update.residuals.items()}
    adapted.write(update)
    with torch.no_grad():
        for name, residual in residuals.items():
            adapted.sites[name].base_weight.add_(residual)
    model.save_pretrained(str(output))
    model.unload().save_pretrained(output)


def layer_by_layer(base: Path, adapters: Sequence[Path], output: Path) -> None:
    """What this benchmark is about."""
    report = aggregate_adapters(adapters, base, output, progress=False)
    if report.exactness.aggregation_error > 1e-5:
        raise RuntimeError(f"The result is not exact: {report.exactness.aggregation_error:.1e}.")


# What is measured in which environment.
RUNS: dict[str, dict[str, str]] = {"memory": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "time": {}}
WAYS: dict[str, Callable[[Path, Sequence[Path], Path], None]] = {
    "at once": at_once,
    "layer by layer": layer_by_layer,
}


def run_child(args: BenchmarkArguments) -> dict[str, float]:
    """One run; returns its peak and what was resident before, in bytes, and its times, in seconds."""
    folder = Path(str(args.folder))
    adapters = [folder / f"adapter-{number}" for number in range(args.adapters[0])]
    torch.linalg.svd(torch.eye(2, dtype=torch.float64))  # load the linear algebra before anything is counted
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    began, began_processor = time.perf_counter(), time.process_time()
    WAYS[str(args.child)](folder / "base", adapters, folder / "output")
    seconds, processor = time.perf_counter() - began, time.process_time() - began_processor
    return {"peak": _status("VmHWM"), "before": before, "seconds": seconds, "processor": processor}


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# ---- The comparison ----


def build(args: BenchmarkArguments, folder: Path) -> dict[str, int]:
    """Write the base and the adapters; returns their sizes in bytes and the base's number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[args.model], max_position_embeddings=2048, tie_word_embeddings=True)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    parameters = base.num_parameters()
    base.save_pretrained(folder / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora)
    for number in range(max(args.adapters)):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02 if "lora_A" in name else 0.002)
        model.save_pretrained(str(folder / f"adapter-{number}"))
    sizes = {name: sum(path.stat().st_size for path in (folder / name).iterdir()) for name in ("base", "adapter-0")}
    return {"parameters": parameters, "base": sizes["base"], "adapter": sizes["adapter-0"]}


def run(
    args: BenchmarkArguments, way: str, adapters: int, folder: Path, environment: dict[str, str]
) -> dict[str, float]:
    """One run in a process of its own."""
    flags = {"--child": way, "--adapters": adapters, "--folder": folder, "--threads": args.threads}
    figures = run_in_child(
        __file__, flags, {"HF_HUB_OFFLINE": "1"} | environment, f"The way `{way}` with {adapters} adapters"
    )
    shutil.rmtree(folder / "output", ignore_errors=True)
    print(f"{adapters} adapters, {way}: done", flush=True)
    return figures


def compare(args: BenchmarkArguments, adapters: int, folder: Path) -> Figures:
    """Every repeat's figures, by what is measured and by way; the ways take turns."""
    runs: Figures = {what: {way: [] for way in WAYS} for what in RUNS}
    for _ in range(args.repeats):
        for what, environment in RUNS.items():
            for way, found in runs[what].items():
                found.append(run(args, way, adapters, folder, environment))
    return runs


# ---- The report ----


NOTES = """\
Medians over {repeats} processes per way and quantity, which take turns. 1 MB = 1,000,000 bytes. *Added* is the peak
of resident memory less what was resident when the work began, which is Python with torch, transformers and PEFT
({before:.0f} MB); *peak* is the whole. Pages of a file that is mapped count as resident while they are in use. *Layer
by layer* includes reading the result back and certifying it, which *at once* does not do, and forcing the files onto
the disk. *Time* is wall-clock time, *processor time* that of the process alone; a ratio under 1 means that layer by
layer takes less."""


def report(
    found: dict[int, dict[str, list[dict[str, float]]]], sizes: dict[str, int], args: BenchmarkArguments
) -> str:
    """The whole page, in Markdown."""
    figures: list[tuple[str, str, Callable[[dict[str, float]], float], str]] = [
        ("added memory", "memory", lambda each: (each["peak"] - each["before"]) / MB, "MB"),
        ("peak memory", "memory", lambda each: each["peak"] / MB, "MB"),
        ("time", "time", lambda each: each["seconds"], "s"),
        ("processor time", "time", lambda each: each["processor"], "s"),
    ]
    rows, every = [], []
    for adapters, runs in found.items():
        for name, what, figure, unit in figures:
            values = {way: [figure(each) for each in runs[what][way]] for way in WAYS}
            slow, fast = (median(values[way]) for way in WAYS)
            label = f"{adapters} adapters: {name}"
            rows.append([label, f"{slow:.1f} {unit}", f"{fast:.1f} {unit}", f"{fast / slow:.2f}"])
            every += [f"- {label}, {way}: {_listed(values[way])} {unit}" for way in WAYS]
    before = median(each["before"] / MB for runs in found.values() for each in runs["memory"]["layer by layer"])
    sections = [
        "# Aggregating adapters layer by layer",
        "`aggregate_adapters` beside loading everything at once; what is written is the next adapter and the updated "
        "base.",
        f"- base: Llama-type model in the shape of {args.model}, {sizes['parameters'] / 1e6:.4g}M parameters with "
        f"random weights, {sizes['base'] / MB:.1f} MB in float32\n- adapters: LoRA of rank {args.rank} on all linear "
        f"layers, {sizes['adapter'] / MB:.1f} MB each",
        describe_machine(),
        markdown_table(("", *WAYS, "ratio"), rows),
        NOTES.format(repeats=args.repeats, before=before),
        "Every run:",
        "\n".join(every),
    ]
    return "\n\n".join(sections) + "\n"


def answer(found: dict[int, Figures]) -> str:
    """What was found, in a line."""
    told = []
    for adapters, runs in found.items():
        peaks, times = (
            [median(each[key] for each in runs[what][way]) for way in WAYS]
            for what, key in (("memory", "peak"), ("time", "processor"))
        )
        told.append(
            f"{adapters} adapters layer by layer: {peaks[1] / peaks[0]:.2f} of the peak memory and "
            f"{times[1] / times[0]:.2f} of the processor time of all at once"
        )
    return "; ".join(told)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    if args.child:
        print(json.dumps(run_child(args)))
        return
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("Peaks are taken from Linux's /proc, which this system does not have.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = build(args, folder)
        found = {adapters: compare(args, adapters, folder) for adapters in args.adapters}
    publish(report(found, sizes, args), args.output, __file__, answer(found))


if __name__ == "__main__":
    main()
