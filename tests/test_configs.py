"""Every file of recipes/configs is understood by its recipe, and the paper's settings are the paper's."""

from __future__ import annotations

from pathlib import Path

import arithmetic
import commonsense
import deviation
import e2e_nlg
import glue
import pytest

from fedex_hf.comparison.arguments import read_config


CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))
RECIPES = {"glue": glue, "deviation": deviation, "e2e": e2e_nlg, "arithmetic": arithmetic, "commonsense": commonsense}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# arXiv 2410.09432, Tables 1 to 3 and 5, and the hyperparameter tables of its appendix.
PAPER = {
    "glue_roberta_base": {
        "lora_r": 4,
        "lora_alpha": 8,
        "num_rounds": 50,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
    },
    "glue_roberta_large": {"lora_r": 4, "lora_alpha": 8, "num_rounds": 15, "num_train_epochs": 3},
    "e2e_gpt2": {"lora_r": 4, "lora_alpha": 32, "num_rounds": 6, "num_train_epochs": 3, "num_beams": 10},
    "arithmetic_mistral": {"lora_r": 32, "lora_alpha": 16, "num_rounds": 1, "lora_target_modules": ALL_LINEAR},
    "arithmetic_gemma2": {"max_train_examples": 10000, "learning_rate": 5e-4, "lr_scheduler_type": "cosine"},
    "commonsense_llama": {"lora_r": 32, "max_seq_length": 256, "gradient_accumulation_steps": 24},
}


def main_of(config: Path):
    return RECIPES[config.stem.partition("_")[0]].main


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_file_passes_all_checks_of_its_arguments(config, tmp_path):
    """The next thing a recipe looks at is the model: getting there means that every argument was accepted."""
    flags = ["--model_name_or_path", str(tmp_path / "nothing"), "--output_dir", str(tmp_path), "--use_cpu", "True"]
    with pytest.raises(SystemExit, match=r"`--model_name_or_path .*nothing` is neither a local folder"):
        main_of(config)(["--config", str(config), *flags])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_twin_with_an_unknown_argument_is_refused(config, tmp_path):
    wrong = tmp_path / config.name
    wrong.write_text(config.read_text() + "\nlora_rank: 4\n")
    with pytest.raises(SystemExit, match="sets `lora_rank`, which this recipe does not know"):
        main_of(config)(["--config", str(wrong), "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    config = read_config(str(CONFIGS[0].with_name(f"{name}.yaml")))
    assert {key: config[key] for key in PAPER[name]} == PAPER[name]
    assert config["num_clients"] == 3
    assert config["client_weighting"] == "uniform"
    lines = [line for line in CONFIGS[0].with_name(f"{name}.yaml").read_text().splitlines() if ": " in line]
    told = [line for line in lines if line.startswith(tuple(f"{key}:" for key in PAPER[name])) and "#" in line]
    assert len(told) == len(PAPER[name])  # each value says where it is from


def test_every_family_has_a_small_setting_and_the_papers():
    families = {path.stem.partition("_")[0] for path in CONFIGS}
    assert families == RECIPES.keys()
    for family in ("glue", "e2e", "arithmetic", "commonsense"):
        names = [path.stem for path in CONFIGS if path.stem.startswith(family)]
        assert any(name.endswith(("minilm", "smollm2")) for name in names)
        assert any(name in PAPER for name in names)
