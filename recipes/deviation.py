"""How far averaging the LoRA factors is from averaging the models: Figures 2 and 3 of FedEx-LoRA, as data and plots.

    python recipes/deviation.py --config recipes/configs/deviation_minilm.yaml --output_dir deviation-output
    python recipes/deviation.py --results glue-output/results.json --output_dir deviation-of-glue

The first trains FedIT on GLUE tasks with several numbers of local epochs; the second takes the runs of an earlier
comparison, which keeps every layer's deviation too. Both write deviation.csv (a row per run, round and layer),
deviation.md (query against value, few against many local epochs) and the plots.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import glue
from accelerate import PartialState
from transformers import HfArgumentParser

from fedex_hf.comparison import RecipeError, read_results, refusing
from fedex_hf.comparison.deviation import deviation_rows, kinds_table, write_rows
from fedex_hf.comparison.figures import write_figures


@dataclass
class DeviationArguments:
    """Runs that are there already. Without `--results` all flags are those of recipes/glue.py."""

    results: str = field(metadata={"help": "results.json of a comparison."})
    output_dir: str = field(metadata={"help": "Folder of the table and the plots."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train if there are no results yet, then write data, table and plots."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--results" in argv:
        parser = HfArgumentParser(DeviationArguments, description=__doc__.split("\n\n")[0])
        (args,) = parser.parse_args_into_dataclasses(argv)
        results, output_dir = Path(args.results), Path(args.output_dir)
    else:
        output_dir = Path(str(glue.main(argv, aggregators=["fedit"])))
        results = output_dir / "results.json"
    if PartialState().is_main_process:
        with refusing():
            report(results, output_dir)


def report(path: Path, output_dir: Path) -> None:
    """Write deviation.csv, deviation.md and the plots of the runs in a `results.json`."""
    if not path.is_file():
        raise RecipeError(f"`--results {path}`: there is no such file. Name the results.json of a comparison.")
    results = read_results(path)
    rows = deviation_rows(results)
    if not rows:
        raise RecipeError(f"`{path}` holds no layers. Run the comparison with this version of fedex_hf.")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(rows, output_dir / "deviation.csv")
    table = kinds_table(rows)
    (output_dir / "deviation.md").write_text(f"{table}\n", encoding="utf-8")
    written = write_figures(results, output_dir)
    print(f"\n{table}\n\nWritten into {output_dir}: deviation.csv, {', '.join(each.name for each in written)}.")


if __name__ == "__main__":
    main()
