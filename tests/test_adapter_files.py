"""Reading adapters of others: what is accepted, what is refused by which name, and that no pickle is ever opened."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hub import Hub, run_python, running_hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fedex_hf.adapter_files import AdapterFile
from fedex_hf.adapter_sources import AdapterNotFoundError, resolve_adapter, resolve_base, split_spec
from fedex_hf.tensor_files import AdapterFormatError, TensorFile, weight_files


QUERY = "base_model.model.roberta.encoder.layer.0.attention.self.query"
HEAD = "base_model.model.classifier.out_proj.weight"
AUTO = {
    "roberta": AutoModelForSequenceClassification,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
}
TARGETS = {"roberta": ["query", "value"], "llama": "all-linear", "gpt2": ["c_attn", "c_proj"]}


@dataclass
class Team:
    """A base model on the disk, and adapters that its members have trained on it."""

    kind: str
    base: Path
    adapters: list[Path] = field(default_factory=list)

    @property
    def auto(self) -> Any:
        """The class that loads it."""
        return AUTO[self.kind]

    def states(self) -> list[dict[str, torch.Tensor]]:
        """What the members' files hold."""
        return [load_file(path / "adapter_model.safetensors") for path in self.adapters]


def write_team(
    folder: Path, kind: str = "roberta", members: int = 3, base: PreTrainedModel | None = None, **lora: Any
) -> Team:
    """Write a base model and adapters with random factors, all trained tensors different from member to member.

    Args:
        folder: Where to.
        kind: Which of the models of `tiny`.
        members: Number of adapters.
        base: Instead of that model.
        lora: Arguments of `LoraConfig`; by default rank 4, scaling 2.
    """
    model = getattr(tiny, kind)() if base is None else base
    model.save_pretrained(folder / "base")
    team = Team(kind, folder / "base")
    task = "SEQ_CLS" if kind == "roberta" else "CAUSAL_LM"
    config = {"task_type": task, "r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind]} | lora
    for member in range(members):
        adapted = get_peft_model(team.auto.from_pretrained(team.base, **labels(kind)), LoraConfig(**config))
        generator = torch.Generator().manual_seed(100 + member)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        team.adapters.append(folder / f"member-{member}")
        adapted.save_pretrained(str(team.adapters[-1]), save_embedding_layers=False)
    return team


def labels(kind: str) -> dict[str, int]:
    """What `from_pretrained` needs to be told where the base knows nothing of the task."""
    return {"num_labels": tiny.LABELS} if kind == "roberta" else {}


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "boom"))


def edit_config(directory: Path, **changes: Any) -> None:
    """Change fields of an adapter's configuration."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors of an adapter."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_team(tmp_path_factory.mktemp("pristine"), members=1).adapters[0]


@pytest.fixture
def adapter(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoiled."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for path in pristine.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


# ---- What is accepted ----


def test_a_good_adapter_is_read_lazily_and_right(adapter: Path) -> None:
    file = AdapterFile.open(adapter)
    expected = load_file(adapter / "adapter_model.safetensors")
    assert file.tensors.bytes_read == 0
    assert file.layers == {key.removesuffix(".lora_A.weight"): 4 for key in expected if ".lora_A." in key}
    delta = file.factors(QUERY, scaling=2.0)
    assert torch.equal(delta.A, expected[f"{QUERY}.lora_A.weight"])
    assert torch.equal(delta.B, expected[f"{QUERY}.lora_B.weight"])
    assert file.tensors.bytes_read == delta.nbytes == 2 * 4 * 32 * 4
    file.check_finite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_dtypes_are_kept(adapter: Path, dtype: torch.dtype) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({key: each.to(dtype) for key, each in tensors.items()}))
    delta = AdapterFile.open(adapter).factors(QUERY, 1.0)
    assert delta.A.dtype == delta.B.dtype == dtype
    assert torch.equal(delta.B, load_file(adapter / "adapter_model.safetensors")[f"{QUERY}.lora_B.weight"])


def test_ranks_of_a_pattern_are_understood_as_peft_does(tmp_path: Path) -> None:
    team = write_team(tmp_path, "llama", 1, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3})
    layers = AdapterFile.open(team.adapters[0]).layers
    assert layers["base_model.model.model.layers.0.self_attn.q_proj"] == 2
    assert layers["base_model.model.model.layers.1.mlp.up_proj"] == 3
    assert layers["base_model.model.model.layers.0.mlp.up_proj"] == 4


def test_a_field_that_a_newer_peft_has_and_leaves_off_is_no_obstacle(adapter: Path) -> None:
    edit_config(adapter, use_something_new=False, something_config=None, peft_version="99.0")
    AdapterFile.open(adapter)


def test_a_tensor_is_overwritten_in_place(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    before, size = load_file(path), path.stat().st_size
    file = TensorFile(path)
    new = torch.full((32, 4), 7.0)
    file.overwrite(f"{QUERY}.lora_B.weight", new)
    after = load_file(path)
    assert torch.equal(after.pop(f"{QUERY}.lora_B.weight"), new)
    assert path.stat().st_size == size
    assert tiny.same_bytes(after, {key: before[key] for key in after})
    with pytest.raises(ValueError, match=r"lora_B\.weight.*shape \(4, 32\)"):
        file.overwrite(f"{QUERY}.lora_B.weight", new.T.contiguous())


# ---- What is refused, and the name it is refused by ----


def _set(key: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: value})


A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(A), rf"lacks `{QUERY}\.lora_A\.weight`"),
        (lambda tensors: tensors.pop(B), rf"lacks `{QUERY}\.lora_B\.weight`"),
        (_set(A, torch.zeros(3, 32)), rf"`{QUERY}\.lora_A\.weight` is F32 of shape \(3, 32\)"),
        (_set(A, torch.zeros(4, 32, 1)), rf"`{QUERY}\.lora_A\.weight` is F32 of shape \(4, 32, 1\)"),
        (_set(B, torch.zeros(32, 4).half()), rf"`{QUERY}\.lora_B\.weight` is F16"),
        (_set(B, torch.zeros(32, 4, dtype=torch.int64)), rf"`{QUERY}\.lora_B\.weight`.* dtype I64"),
        (_set(HEAD, torch.zeros(3, 32, dtype=torch.int8)), rf"`{HEAD}`.* dtype I8"),
        (_set(f"{QUERY}.lora_magnitude_vector", torch.zeros(32)), rf"`{QUERY}\.lora_magnitude_vector`.* neither"),
        (_set("base_model.model.x.lora_embedding_A", torch.zeros(4, 9)), r"`base_model\.model\.x\.lora_embedding_A`"),
        (_set("base_model.model.roberta.pooler.weight", torch.zeros(2)), r"`base_model\.model\.roberta\.pooler"),
        (_set("classifier.dense.weight", torch.zeros(2)), r"`classifier\.dense\.weight`.* neither"),
        (lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora" in key], "holds no LoRA factors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_their_key(adapter: Path, change: Any, told: str) -> None:
    edit_tensors(adapter, change)
    with pytest.raises(AdapterFormatError, match=told):
        AdapterFile.open(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [B, HEAD])
def test_nan_and_infinity_are_refused_by_the_key(adapter: Path, key: str, value: float) -> None:
    edit_tensors(adapter, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    file = AdapterFile.open(adapter)  # the header is fine
    with pytest.raises(AdapterFormatError, match=f"`{key}`.* NaN or Inf"):
        file.check_finite()
    with pytest.raises(AdapterFormatError, match=f"`{key}`"):
        file.tensors.read(key)


def test_large_finite_numbers_are_not_taken_for_infinity(adapter: Path) -> None:
    huge = torch.full((32, 4), torch.finfo(torch.float64).max, dtype=torch.float64)
    edit_tensors(adapter, lambda tensors: tensors.update({A: tensors[A].double(), B: huge}))
    AdapterFile.open(adapter).factors(QUERY, 1.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 8}, rf"`{QUERY}\.lora_A\.weight`.* has rank 4, and `adapter_config\.json` states 8"),
        ({"rank_pattern": {"layer.0.attention.self.query": 2}}, rf"`{QUERY}\.lora_A\.weight`.* states 2"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"peft_type": None}, "type None"),
        ({"use_dora": True}, "`use_dora` is True"),
        ({"use_qalora": True}, "`use_qalora` is True"),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens`"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication`"),
        ({"target_parameters": ["mlp.weight"]}, "`target_parameters`"),
        ({"megatron_config": {"a": 1}}, "`megatron_config`"),
        ({"invented_later": {"a": 1}}, "`invented_later`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'"),
        ({"r": 0}, "`r` is 0"),
        ({"r": "4"}, "`r` is '4'"),
        ({"r": True}, "`r` is True"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` is inf"),
        ({"rank_pattern": [1]}, r"`rank_pattern` is \[1\]"),
        ({"alpha_pattern": {"query": -1}}, r"`alpha_pattern\['query'\]` is -1"),
        ({"base_model_name_or_path": 3}, "`base_model_name_or_path` is 3"),
        ({"modules_to_save": "classifier"}, "`modules_to_save` is 'classifier'"),
        ({"target_modules": [1]}, r"`target_modules` is \[1\]"),
        ({"rank_pattern": {"(": 4}}, r"`rank_pattern\['\('\]` is no pattern"),
        ({"layers_pattern": "layer"}, "PEFT does not take"),
    ],
)
def test_configurations_that_are_not_plain_lora_are_refused_by_the_field(
    adapter: Path, changes: dict[str, Any], told: str
) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(AdapterFormatError, match=told):
        AdapterFile.open(adapter)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(adapter: Path, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        AdapterFile.open(adapter)


@pytest.mark.parametrize("spoil", ["empty", "cut", "longer", "garbage", "offsets", "pickle"])
def test_a_damaged_safetensors_file_is_refused(adapter: Path, tmp_path: Path, spoil: str) -> None:
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    changed = {
        "empty": b"",
        "cut": content[:-8],
        "longer": content + b"12345678",
        "garbage": b"\xff" * 64,
        "offsets": content.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'),
        "pickle": pickle.dumps(Bomb(tmp_path / "boom")),
    }[spoil]
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors.* not a valid safetensors file"):
        AdapterFile.open(adapter)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterFormatError, match=f"has no `{name}`"):
        AdapterFile.open(adapter)


def test_a_pickled_adapter_is_refused_by_name_and_never_opened(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(AdapterFormatError, match=r"`adapter_model\.bin`, a pickle.*save_pretrained"):
        AdapterFile.open(adapter)
    assert not (tmp_path / "boom").exists()
    with (adapter / "adapter_model.bin").open("rb") as file:  # the bomb is real
        pickle.load(file)
    assert (tmp_path / "boom").read_text() == "boom"


# ---- Bases ----


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "x.bin", "", 3]
)
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layer.weight": name}}))
    with pytest.raises(AdapterFormatError, match=r"`layer\.weight` lies in"):
        weight_files(tmp_path)


def test_a_base_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(AdapterFormatError, match=r"`model\.safetensors`.*Pickled weights are never read"):
        weight_files(tmp_path)
    assert not (tmp_path / "boom").exists()


# ---- Directories and repositories ----


def test_a_directory_wins_over_a_repository_of_its_name(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter.parent)
    assert resolve_adapter("adapter") == Path("adapter")
    assert resolve_base(adapter) == adapter
    assert split_spec("user/name@refs/pr/3") == ("user/name", "refs/pr/3")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (Path("nowhere"), "`nowhere` is not a directory"),
        ("./nowhere/at/all", "`./nowhere/at/all` is neither a local directory nor a repository"),
        ("user/none@v1", "`user/none` at the revision `v1`.* offline"),
    ],
)
def test_what_is_not_there_is_named(spec: Any, told: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=told) as caught:
        resolve_adapter(spec, token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def put(hub: Hub, repo: str, folder: Path, tag: str | None = None, private: bool = False) -> str:
    """Publish a folder as one commit of a repository, straight into the server's store; returns the commit."""
    if hub.store.settings(repo) is None:
        hub.store.create(repo, "models", private, "user")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): hub.store.put_blob(path.read_bytes()) for path in paths}
    commit = hub.store.add_commit(repo, "models", "main", files, "files", "", "user", root=False)
    if tag is not None:
        hub.store.change_ref(repo, "models", "tags", tag, commit)
    return commit


IN_A_CLIENT = """
import json, sys
from pathlib import Path
from fedex_hf.adapter_sources import resolve_adapter, resolve_base
from fedex_hf.adapter_aggregation import aggregate_adapters
from fedex_hf.cli import inspect

def names(path):
    return sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())

def error(spec, token=None):
    try:
        resolve_adapter(spec, token)
    except Exception as error:
        return [type(error).__name__, str(error), error.__suppress_context__]

out = Path(sys.argv[1])
found = {
    "tagged": [str(resolve_adapter("user/north@round-1")), names(resolve_adapter("user/north@round-1"))],
    "latest": str(resolve_adapter("user/north")),
    "base, no weights": names(resolve_base("user/base", weights=False)),
    "base": names(resolve_base("user/base")),
    "no repository": error("user/none@v1"),
    "no revision": error("user/north@none"),
    "wrong token": error("user/closed", "hf_wrong_secret"),
    "broken token": error("user/north@unseen", "hf_secret\\nX"),
    "shards elsewhere": None,
}
try:
    resolve_base("user/evil")
except Exception as error:
    found["shards elsewhere"] = [type(error).__name__, str(error)]
report = aggregate_adapters(["user/north@round-1", "user/south"], "user/base", out, format="lora", progress=False)
found["report"] = report.to_json()
found["config"] = json.loads((out / "adapter_config.json").read_text())
found["adapter"] = inspect("user/north@round-1")
found["model"] = inspect("user/base")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_the_hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that talks to a Hub finds; repositories also hold pickles and code."""
    folder = tmp_path_factory.mktemp("hub")
    team = write_team(folder / "team", members=2)
    boom = folder / "boom"
    team.auto.from_pretrained(team.base).save_pretrained(team.base, max_shard_size="60kB")
    (team.base / "model.safetensors").unlink()
    for path in [team.base, *team.adapters]:
        for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "vocab.pkl"):
            (path / name).write_bytes(pickle.dumps(Bomb(boom)))
        (path / "modeling.py").write_text(f"open({str(boom)!r}, 'w')")
        (path / "sub").mkdir()
        (path / "sub" / "model.safetensors").write_bytes(b"not to be fetched")
    (team.base / "consolidated.safetensors").write_bytes(b"not to be fetched")
    (folder / "evil").mkdir()
    (folder / "evil" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a.weight": "../../x.safetensors"}}'
    )
    with running_hub(folder / "server") as hub:
        commits = {
            "round-1": put(hub, "user/north", team.adapters[0], "round-1"),
            "latest": put(hub, "user/north", team.adapters[1]),
            "base": put(hub, "user/base", team.base),
            "south": put(hub, "user/south", team.adapters[1]),
        }
        put(hub, "user/evil", folder / "evil")
        put(hub, "user/closed", team.adapters[0], private=True)
        done = run_python(IN_A_CLIENT, hub.environment(folder / "home"), str(folder / "out"))
    assert not boom.exists()
    return json.loads(done.stdout.splitlines()[-1]) | {"commits": commits, "team": team}


def test_only_the_two_files_of_an_adapter_are_fetched_at_the_revision(on_the_hub: dict[str, Any]) -> None:
    where, names = on_the_hub["tagged"]
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert where.endswith(on_the_hub["commits"]["round-1"])
    assert on_the_hub["latest"].endswith(on_the_hub["commits"]["latest"])


def test_of_a_base_only_what_loaders_need_is_fetched(on_the_hub: dict[str, Any]) -> None:
    index = json.loads((on_the_hub["team"].base / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert on_the_hub["base, no weights"] == ["config.json"]
    assert set(on_the_hub["base"]) == {"config.json", "model.safetensors.index.json", *shards}
    kind, told = on_the_hub["shards elsewhere"]
    assert kind == "AdapterFormatError"
    assert "`a.weight` lies in '../../x.safetensors'" in told


def test_errors_name_repository_and_revision_and_hold_no_token(on_the_hub: dict[str, Any]) -> None:
    expected = {
        "no repository": ["`user/none`", "`v1`", "no such repository"],
        "no revision": ["`user/north`", "`none`", "no such branch, tag or commit"],
        "wrong token": ["`user/closed`", "`main`"],
        "broken token": ["`user/north`", "`unseen`"],
    }
    for name, parts in expected.items():
        kind, told, hides_its_cause = on_the_hub[name]
        assert kind == "AdapterNotFoundError"
        assert hides_its_cause
        assert all(part in told for part in parts), (name, told)
        assert "secret" not in told


def test_repositories_are_aggregated_and_pinned_to_their_commits(on_the_hub: dict[str, Any]) -> None:
    commits, report = on_the_hub["commits"], on_the_hub["report"]
    assert report["adapters"] == ["user/north@round-1", "user/south"]
    assert report["commits"] == [commits["round-1"], commits["south"]]
    assert report["base_commit"] == commits["base"]
    assert on_the_hub["config"]["base_model_name_or_path"] == "user/base"
    assert on_the_hub["config"]["revision"] == commits["base"]
    assert report["exactness"]["aggregation_error"] < 1e-6 < 1e-2 < report["exactness"]["fedit_deviation"]


def test_repositories_are_inspected(on_the_hub: dict[str, Any]) -> None:
    adapter, model = on_the_hub["adapter"], on_the_hub["model"]
    assert (adapter["what"], adapter["problem"], adapter["rounds_on_hub"]) == ("adapter", None, [1])
    assert adapter["commit"] == on_the_hub["commits"]["round-1"]
    assert (model["what"], model["architectures"]) == ("model", ["RobertaForSequenceClassification"])
