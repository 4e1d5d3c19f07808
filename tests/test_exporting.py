"""`fedex-hf export` and `fedex-hf push`, as a person runs them, against the Hub of the tests."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import forks
import programs
import pytest
import tiny
import torch
from hub import Hub, run_python, running_hub
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedex_hf import FederatedTrainer
from fedex_hf.cli import main
from fedex_hf.exporting import publish_folder


TARGET = Path(__file__).with_name("hub_target.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[FederatedTrainer, Path]:
    """Two rounds from a base in a folder, with their checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    tiny.roberta().save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    trainer = tiny.federation(folder / "out", model=base, save_strategy="epoch")
    trainer.train()
    trainer.model.eval()
    return trainer, folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    with running_hub(tmp_path_factory.mktemp("server") / "hub") as hub:
        yield hub


@pytest.fixture(scope="module")
def at_hub(hub, tmp_path_factory) -> Iterator[Callable[..., CompletedProcess[str]]]:
    """Runs `fedex-hf` in a process that knows the Hub."""
    with programs.command_line(hub.environment(forks.HOME), tmp_path_factory.mktemp("processes")) as run:
        yield run


def command_line(*args: str | Path) -> CompletedProcess[str]:
    """Run `fedex-hf` right here."""
    words = [str(arg) for arg in args]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return CompletedProcess(words, code, out.getvalue(), err.getvalue())


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    inputs = torch.tensor(tiny.classification_data(8, seed=5)["input_ids"][:])
    with torch.no_grad():
        return model.eval()(inputs).logits


# ---- export ----


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
def test_a_checkpoint_is_exported_in_every_format(run, tmp_path, format):
    trainer, folder = run
    done = command_line("export", folder / "out/checkpoint-16", "--format", format, "--output", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    cls = AutoModelForSequenceClassification if format == "merged" else AutoPeftModelForSequenceClassification
    loaded, expected = logits_of(cls.from_pretrained(tmp_path / "model")), logits_of(trainer.model)
    assert torch.equal(loaded, expected) if format == "full" else torch.allclose(loaded, expected, atol=1e-6)
    # An earlier round is another model: the comparison can fail.
    command_line("export", folder / "out/checkpoint-8", "--format", format, "--output", tmp_path / "earlier")
    assert not torch.allclose(logits_of(cls.from_pretrained(tmp_path / "earlier")), expected, atol=1e-6)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "FedEx-LoRA" in card
    assert "client-0" not in card


def test_what_a_cast_loses_is_told(run, tmp_path):
    _, folder = run
    source, flags = folder / "out/checkpoint-16", ("--format", "lora", "--dtype", "bfloat16", "--json")
    done = command_line("export", source, *flags, "--output", tmp_path / "model")
    told = json.loads(done.stdout)
    assert told["format"] == "lora"
    assert told["dtype"] == "bfloat16"
    assert 0.99 < told["cast_survival"] < 1.0
    factors = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in factors.items() if "lora_" in name} == {torch.bfloat16}


def test_nothing_is_written_over_something(run, tmp_path):
    _, folder = run
    (tmp_path / "mine.txt").write_text("mine")
    done = command_line("export", folder / "out/checkpoint-8", "--format", "full", "--output", tmp_path)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_no_round_is_refused(tmp_path):
    done = command_line("export", tmp_path, "--format", "full", "--output", tmp_path / "model")
    assert done.returncode == 1
    assert "is not a round checkpoint" in done.stderr
    assert not (tmp_path / "model").exists()


# ---- push ----


def test_a_saved_model_is_published_with_its_tag(run, hub, at_hub, tmp_path):
    trainer, _ = run
    trainer.save_model(str(tmp_path / "model"))
    done = at_hub("push", tmp_path / "model", "--repo", "user/saved", "--tag", "v1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(hub.refs("user/saved")["tags"]) == {"v1"}
    assert len(hub.commits("user/saved")) == 2  # with the one that made the repository
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in hub.files("user/saved", "v1"))
    config = json.loads(hub.read("user/saved", "v1", "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("user/saved", "v1")
    torch.save(logits_of(trainer.model), tmp_path / "expected.pt")
    code = """
import sys, torch, test_exporting as here
for cls in (here.AutoModelForSequenceClassification, here.AutoPeftModelForSequenceClassification):
    model = cls.from_pretrained("user/saved", revision="v1")
    assert torch.equal(here.logits_of(model), torch.load(sys.argv[1])), cls
"""
    run_python(code, hub.environment(tmp_path / "reader", token=None), str(tmp_path / "expected.pt"))


def test_rounds_that_wait_are_published_later(hub, at_hub, tmp_path):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "arguments": {"push_to_hub": True, "hub_model_id": "user/waited", "hub_retries": 0},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    environment = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    run_python(TARGET, environment, str(tmp_path / "settings.json"))
    assert sorted(path.name for path in (tmp_path / "out/.hub").glob("round-*")) == ["round-1", "round-2"]
    done = at_hub("push", tmp_path / "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [commit["title"] for commit in hub.commits("user/waited")][:2] == ["Round 2", "Round 1"]
    assert set(hub.refs("user/waited")["tags"]) == {"round-1", "round-2"}
    assert not (tmp_path / "out/.hub").exists()
    again = at_hub("push", tmp_path / "out", folder=tmp_path)
    assert again.returncode == 1
    assert "No rounds wait" in again.stderr


def test_push_refuses_what_it_cannot_do(at_hub, tmp_path):
    for args, message in {
        (str(tmp_path / "nowhere"),): "is no folder",
        (str(tmp_path), "--repo", "user/empty"): "no `.safetensors` file",
        (str(tmp_path),): "name a repository with `--repo`",
    }.items():
        done = at_hub("push", *args, folder=tmp_path)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr


def test_a_folder_without_a_model_makes_no_repository(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"no `\.safetensors` file"):
        publish_folder(tmp_path, "user/none")
