"""Continuing a published round: the same bytes as the run that went on, and nothing taken from a repository on trust.

Every run is a process of its own over a real server, see `hub_lab.py`. A repository that was tampered with is what an
attacker can make of it: sizes and digests in it agree with its tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kill_target
import pytest
import torch
from hub_lab import STATE, Lab, fresh_lab, waiting
from safetensors.torch import load, save

from fedex_hf import checkpoint


pytestmark = pytest.mark.xdist_group("lab")  # where tests and not files are shared out: one process starts it
KEPT = {"save_strategy": "epoch"}
LAYER = "base_model.model.roberta.encoder.layer.0.attention.self.query"


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from fresh_lab(tmp_path_factory)


# Runs whose residuals ride beside the base: family of the model, arguments of the run, dtype of what is published as
# the base, arguments of `from_pretrained`.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
BESIDE: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "float32": ("llama", {"residual_storage": "adapter"}, "float32", {}),
    "bfloat16": ("llama", {}, "bfloat16", {"dtype": "bfloat16"}),
    "nf4": ("llama", {}, "float32", {"dtype": "float32", "quantization_config": NF4}),
}


def whole(lab: Lab, family: str = "roberta") -> dict[str, Any]:
    """A run of three rounds that nothing interrupts, on a base without a head; its outcome is in `outcome.pt`."""
    return _whole(lab, family)


@cache
def _whole(lab: Lab, name: str) -> dict[str, Any]:
    family, arguments, dtype, given = BESIDE.get(name, (name, {}, "float32", {}))
    if family == "roberta":
        base, given = lab.base(family, part="roberta"), {"num_labels": 3}
    else:
        base = lab.base(family, **({} if dtype == "float32" else {"dtype": dtype}))
    settings = lab.settings(
        f"uninterrupted-{name}", family=family, base=base, base_kwargs=given, arguments=KEPT | arguments
    )
    outcome = str(lab.root / f"uninterrupted-{name}" / "outcome.pt")
    lab.train(settings, actions=["train", {"outcome": outcome}])
    lab.assert_rounds(settings["arguments"]["hub_model_id"], [1, 2, 3])
    return settings | {"outcome": outcome}


def outcome_of(file: str) -> dict[str, Any]:
    """Without the head that the trained one stands in for: it is random at every start, and never used."""
    outcome = torch.load(file, weights_only=True)
    outcome["model"] = {name: tensor for name, tensor in outcome["model"].items() if "original_module" not in name}
    return outcome


def elsewhere(lab: Lab, name: str, original: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings of a run that goes on from a published one, in another folder and on another machine."""
    arguments = {"push_to_hub": False} | changes.pop("arguments", {})
    return lab.settings(name, family=original["family"], arguments=arguments, **changes)


# ---- The same bytes ----


@pytest.mark.parametrize(
    ("name", "way", "round"),
    [
        ("roberta", "model", 1),
        ("roberta", "resume", 1),
        ("roberta", "resume", 2),
        ("gpt2", "model", 1),
        ("bfloat16", "model", 2),
        ("nf4", "model", 1),
        ("nf4", "resume", 2),
        pytest.param("bfloat16", "resume", 1, marks=pytest.mark.slow),
        pytest.param("gpt2", "resume", 2, marks=pytest.mark.slow),
        pytest.param("llama-tied", "model", 2, marks=pytest.mark.slow),
        pytest.param("llama-tied", "resume", 1, marks=pytest.mark.slow),
    ],
)
def test_a_continued_run_ends_with_the_bytes_of_the_one_that_went_on(lab, name, way, round):
    original = whole(lab, name)
    repo, outcome = original["arguments"]["hub_model_id"], str(lab.root / f"continued-{name}-{way}-{round}.pt")
    start: dict[str, Any] = {"model": repo, "revision": f"round-{round}"}
    train: Any = "train"
    if way == "resume":
        start = {key: original[key] for key in ("base", "base_kwargs") if key in original}
        train = {"train": f"{repo}@round-{round}"}
    settings = elsewhere(
        lab, f"continued-{name}-{way}-{round}", original, actions=[train, {"outcome": outcome}], **start
    )
    told = lab.train(settings)
    assert [entry["round"] for entry in told["rounds"]] == [1, 2, 3]
    assert told["steps"] == (3 - round) * 8  # it went on, and did not start anew
    kill_target.assert_same(outcome_of(outcome), outcome_of(original["outcome"]))
    beside = any(".fedex_residual." in key for key in outcome_of(outcome)["model"])
    assert beside == (name in BESIDE)


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-6), ("nf4", 1e-5)])
def test_a_round_beside_its_base_loads_with_nothing_of_ours(lab, name, tolerance):
    """Up to the rounding of activations; effective weights are compared in `test_storage_saving.py`."""
    repo = f"user/beside-{name}"
    family, arguments, _, given = BESIDE[name]
    settings = lab.settings(
        f"beside-{name}",
        family=family,
        base=lab.base(family),
        base_kwargs=given,
        arguments=arguments | {"num_rounds": 2},
    )
    lab.train(settings)
    reference = Path(settings["reference"])

    def load(path: str, revision: str | None, round: int) -> dict[str, Any]:
        file = str(reference / f"round-{round}.safetensors")
        return {"repo": repo, "revision": revision, "path": path, "task": "CAUSAL_LM", "reference": file}

    right = [
        load(path, revision, round)
        for path in ("auto", "auto-peft", "peft")
        for revision, round in ((None, 2), ("round-1", 1), (lab.tags(repo)["round-2"], 2))
    ]
    twins = [load("auto-peft", "round-1", 2), load("auto", "round-2", 1)]
    told = lab.load(right + twins)
    assert [each.get("error") for each in told] == [None] * len(told)
    assert max(each["difference"] for each in told[: len(right)]) < tolerance
    assert min(each["difference"] for each in told[len(right) :]) > 1e-3


def test_a_commit_and_main_can_be_continued_too(lab):
    original = whole(lab)
    repo, four = original["arguments"]["hub_model_id"], {"num_rounds": 4}
    outcomes = []
    for name, revision in (("from-main", None), ("from-tag", "round-3"), ("from-sha", lab.tags(repo)["round-3"])):
        outcomes.append(str(lab.root / f"{name}.pt"))
        settings = elsewhere(lab, name, original, model=repo, revision=revision, arguments=four)
        assert lab.train(settings, actions=["train", {"outcome": outcomes[-1]}])["steps"] == 8
    first = outcome_of(outcomes[0])
    assert first["round"] == 4
    for other in outcomes[1:]:
        kill_target.assert_same(outcome_of(other), first)
    with pytest.raises(AssertionError):  # what the comparisons above must be able to say
        kill_target.assert_same(first, outcome_of(original["outcome"]))


@pytest.mark.parametrize("format", ["lora", pytest.param("merged", marks=pytest.mark.slow)])
def test_rounds_of_every_format_can_be_continued(lab, format):
    original = whole(lab)
    arguments = {"num_rounds": 1, "hub_round_format": format}
    first = lab.settings(
        f"continued-{format}", base=original["base"], base_kwargs={"num_labels": 3}, arguments=arguments
    )
    lab.train(first)
    outcome = str(lab.root / f"continued-{format}.pt")
    settings = elsewhere(lab, f"from-{format}", original, model=f"user/continued-{format}", revision="round-1")
    lab.train(settings, actions=["train", {"outcome": outcome}])
    found, expected = outcome_of(outcome), outcome_of(original["outcome"])
    kill_target.assert_same(
        {key: found[key] for key in ("state", "ledger", "model")},
        {key: expected[key] for key in ("state", "ledger", "model")},
    )


def test_a_continued_run_publishes_into_the_same_or_another_repository(lab):
    """The rounds that both have are the same bytes, so the same repository needs no commit."""
    original = whole(lab)
    repo = original["arguments"]["hub_model_id"]
    before = lab.hub.commits(repo)
    same = elsewhere(
        lab,
        "into-same",
        original,
        model=repo,
        revision="round-1",
        arguments={"push_to_hub": True, "hub_model_id": repo},
    )
    lab.train(same)
    assert lab.hub.commits(repo) == before
    assert waiting(same) == []

    other = elsewhere(lab, "into-other", original, model=repo, revision="round-1", arguments={"push_to_hub": True})
    lab.train(other)
    lab.assert_rounds("user/into-other", [1, 2, 3])
    lab.assert_same_rounds("user/into-other", repo, [1, 2, 3])
    assert json.loads(lab.hub.read("user/into-other", "round-2", "federation/base.json"))["name"] == original["base"]

    diverging = elsewhere(
        lab,
        "into-same-with-other-rounds",
        original,
        model=repo,
        revision="round-1",
        arguments={"push_to_hub": True, "hub_model_id": repo, "learning_rate": 1e-2},
    )
    told = lab.train(diverging)
    assert f"`{repo}` has a `round-2` that is not this run's" in told["output"]
    assert lab.hub.commits(repo) == before
    assert waiting(diverging) == ["round-2", "round-3"]


def test_the_base_may_move_on(lab):
    """A round names the commit of its base."""
    base = lab.base("gpt2", seed=5)
    first = lab.settings("moving", family="gpt2", base=base, arguments={"num_rounds": 1})
    lab.train(first)
    named = json.loads(lab.hub.read("user/moving", "round-1", "federation/base.json"))
    assert named["revision"] == lab.hub.refs(base)["branches"]["main"]
    other = lab.hub.read(lab.base("gpt2"), "main", "model.safetensors")
    lab.commit(base, {"model.safetensors": other})
    settings = elsewhere(lab, "moved", first, model="user/moving", revision="round-1")
    assert lab.train(settings)["steps"] == 16
    resumed = elsewhere(lab, "moved-2", first, base=base, actions=[{"train": "user/moving@round-1"}], refused=True)
    told = lab.train(resumed)  # with the base as it is now
    assert told["steps"] == 0
    assert "base weights (sha256)" in told["refused"]


# ---- Refused ----


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other base weights": ({"base": None, "seed": 1}, "base weights (sha256)"),
    "other rank": ({"lora": {"r": 8}}, "'A': [4, 32]"),
    "other scaling": ({"lora": {"lora_alpha": 4}}, "'scaling': 2.0"),
    "other layers": ({"lora": {"target_modules": ["key", "value"]}}, "self.query` is {"),
    "other method": ({"arguments": {"aggregator": "fedit"}}, "`name` is fedex there and fedit here"),
    "optimizer states": (
        {"arguments": {"client_optimizer_state": "keep"}},
        "has no optimizer states of clients: they are never published",
    ),
    "no such round": ({"actions": [{"train": "REPO@round-7"}]}, "is no run that can be continued"),
    "no such repository": ({"actions": [{"train": "user/nobody@round-1"}]}, "is no run that can be continued"),
    "no rounds": ({"actions": [{"train": "BASE"}]}, "is no run that can be continued"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_round_of_another_run_is_refused(lab, case):
    changes, message = REFUSED[case]
    original = whole(lab)
    repo = original["arguments"]["hub_model_id"]
    changes = json.loads(json.dumps({"actions": [{"train": "REPO@round-1"}]} | changes).replace("REPO", repo))
    changes = json.loads(json.dumps(changes).replace("BASE", original["base"]))
    base = {"base": original["base"], "base_kwargs": {"num_labels": 3}}
    settings = elsewhere(lab, f"refused {case}", original, refused=True, **(base | changes))
    if settings["base"] is None:
        del settings["base"]
    told = lab.train(settings)
    assert told["steps"] == 0
    assert told["refused"], told["output"]
    assert message in told["refused"], told["refused"]


def test_a_run_without_a_named_base_cannot_bring_its_model(lab):
    first = lab.settings("unnamed", arguments={"num_rounds": 1})
    lab.train(first)
    told = lab.train(
        lab.settings("from-unnamed", model="user/unnamed", refused=True, arguments={"push_to_hub": False})
    )
    assert told["refused"].startswith("UnloadableRoundError: The run in ")
    assert "there is no base to load" in told["refused"]
    resumed = lab.settings("resumed-unnamed", arguments={"push_to_hub": False}, actions=[{"train": "user/unnamed"}])
    assert lab.train(resumed)["steps"] == 16


# ---- Repositories of others ----


def tampered(lab: Lab, name: str, change: Callable[[dict[str, bytes]], None]) -> str:
    """A copy of the published first round, with something changed and all sizes and digests made to agree."""
    repo = whole(lab)["arguments"]["hub_model_id"]
    folder = lab.download(repo, "round-1", lab.root / f"tampered-{name}")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change(files)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    meta = json.loads(files[STATE])
    sizes = {path: len(files[path]) for path in meta["files"] if path in files}
    digest = checkpoint._digest(folder / "federation", meta["round"])
    files[STATE] = json.dumps(meta | {"files": sizes, "digest": digest}).encode()
    lab.commit(f"user/tampered-{name}", files)
    return f"user/tampered-{name}"


def with_tensors(file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        tensors = load(files[file])
        change(tensors)
        files[file] = save(tensors)

    return apply


ADAPTER, LEDGER = "federation/state.safetensors", "federation/ledger.safetensors"
A, B = f"A/{LAYER}", f"B/{LAYER}"


def set_nan(key: str, value: float = float("nan")) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[key].view(-1)[3:4].fill_(value)


def lie_about_the_rank(files: dict[str, bytes]) -> None:
    """Config and fingerprint say 8; the tensors have 4."""
    for name in ("federation/lora_config.json", STATE):
        text = files[name].decode()
        files[name] = text.replace('"r": 4', '"r": 8').replace('"lora_alpha": 8', '"lora_alpha": 16').encode()
    meta = json.loads(files[STATE])
    for layer in meta["fingerprint"]["LoRA layers"].values():
        layer["A"][0] = layer["B"][1] = 8
    files[STATE] = json.dumps(meta).encode()


TAMPERED: dict[str, tuple[Callable[[dict[str, bytes]], None], tuple[str, ...]]] = {
    "shape": (
        with_tensors(ADAPTER, lambda tensors: tensors.update({B: tensors[B][:-1].clone()})),
        (f"(31, 4) torch.float32 as `{B}`", "the model has (32, 4)"),
    ),
    "dtype": (
        with_tensors(ADAPTER, lambda tensors: tensors.update({A: tensors[A].half()})),
        (f"(4, 32) torch.float16 as `{A}`", "the model has (4, 32) torch.float32"),
    ),
    "missing": (with_tensors(ADAPTER, lambda tensors: tensors.pop(A)), (f"holds nothing as `{A}`",)),
    "unexpected": (
        with_tensors(ADAPTER, lambda tensors: tensors.update({"B/evil": torch.ones(2, 2)})),
        ("(2, 2) torch.float32 as `B/evil`", "the model has nothing"),
    ),
    "nan": (with_tensors(ADAPTER, set_nan(B)), (f"NaN or Inf in `{B}`",)),
    "head": (
        with_tensors(
            ADAPTER, set_nan("tensors/base_model.model.classifier.modules_to_save.default.dense.weight", float("inf"))
        ),
        ("NaN or Inf in `tensors/base_model.model.classifier.modules_to_save.default.dense.weight`",),
    ),
    "ledger-shape": (
        with_tensors(LEDGER, lambda tensors: tensors.update({A: tensors[A][:, :-1].clone()})),
        (f"as `{A}`", "the model has (8, 32)"),
    ),
    "ledger-half": (with_tensors(LEDGER, lambda tensors: tensors.pop(B)), (f"holds nothing as `{B}`",)),
    "ledger-nan": (with_tensors(LEDGER, set_nan(A)), (f"NaN or Inf in `{A}`",)),
    "ledger-unexpected": (
        with_tensors(LEDGER, lambda tensors: tensors.update({"matrices/evil": torch.ones(2, 2)})),
        ("(2, 2) torch.float32 as `matrices/evil`", "the model has nothing"),
    ),
    "rank": (lie_about_the_rank, (f"(4, 32) torch.float32 as `{A}`", "the model has (8, 32)")),
    "class": (
        lambda files: files.update({"federation/base.json": b'{"name": "user/x", "class": "Trainer"}'}),
        ("`Trainer` is no model class",),
    ),
    "not-json": (
        lambda files: files.update({"federation/lora_config.json": b"[]"}),
        ("lora_config.json` holds a list",),
    ),
    "no-base": (lambda files: files.pop("federation/base.json"), ("`base.json` of the round",)),
    "no-log": (lambda files: files.update({"trainer_state.json": b"[]"}), ("is no run that can be continued",)),
    "strange-log": (
        lambda files: files.update({"trainer_state.json": b'{"rounds": 3}'}),
        ("is no run that can be continued", "rounds"),
    ),
    "outside": (
        lambda files: files.update({STATE: files[STATE].replace(b'"files": {', b'"files": {"../../x": 1,')}),
        ("is damaged", "`../../x`"),
    ),
    "peft-type": (
        lambda files: files.update({"federation/lora_config.json": b'{"peft_type": "PICKLE"}'}),
        ("`lora_config.json` of the round in", "is no configuration", "PICKLE"),
    ),
    "model-config": (
        lambda files: files.update({"federation/model_config.json": b'{"num_labels": "many"}'}),
        ("`model_config.json`", "is no configuration"),
    ),
    "certificate": (
        lambda files: files.update({"federation/exactness.json": b'{"layer": {}}'}),
        ("`exactness.json` of the round in", "'change'"),
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_repository_that_was_tampered_with_is_refused(lab, case):
    change, messages = TAMPERED[case]
    repo = tampered(lab, case, change)
    if case == "outside":  # the sizes that `tampered` writes are those of files that are there
        meta = json.loads(lab.hub.read(repo, "main", STATE))
        lab.commit(repo, {STATE: json.dumps(meta | {"files": meta["files"] | {"../../x": 1}}).encode()})
        messages = ("lists the file `../../x`, which is not inside it",)
    settings = elsewhere(lab, f"from-{case}", whole(lab), model=repo, refused=True)
    told = lab.train(settings)
    assert told["steps"] == 0
    assert told["refused"], told["output"]
    for message in messages:
        assert message in told["refused"], told["refused"]


def test_tensors_that_are_not_those_of_the_digest_are_refused(lab):
    repo = tampered(lab, "digest", lambda files: None)
    content = load(lab.hub.read(repo, "main", ADAPTER))
    content[A] += 1e-3
    lab.commit(repo, {ADAPTER: save(content)})
    told = lab.train(elsewhere(lab, "from-digest", whole(lab), model=repo, refused=True))
    assert "is damaged: its tensors are not those that were written" in told["refused"]
    # The twin: untouched, the copy is as good as the original.
    lab.commit(repo, {ADAPTER: lab.hub.read(repo, lab.hub.commits(repo)[1]["id"], ADAPTER)})
    assert lab.train(elsewhere(lab, "from-copy", whole(lab), model=repo))["steps"] == 16


@pytest.mark.parametrize("bad", ["federation/../../escaped.json", "/escaped.json", "federation/..\\\\escaped.json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(lab, bad):
    name = f"escape-{abs(hash(bad)) % 1000}"
    repo = tampered(lab, name, lambda files: None)
    lab.hub.faults([{"fault": "allow_bad_names"}])
    lab.commit(repo, {bad: b"{}"})
    assert bad in lab.hub.files(repo)
    lab.hub.reset()
    told = lab.train(elsewhere(lab, f"from-{name}", whole(lab), model=repo, refused=True))
    assert told["refused"].startswith(f"UnsafeRepositoryError: `{repo}` names a file {bad!r}")
    assert not lab.requests_at("/resolve/")  # nothing of it was fetched
    assert not [name for _, _, names in os.walk(lab.root) for name in names if "escaped" in name]


def test_pickles_are_never_downloaded(lab):
    """Neither those that a round might bring nor those of a base."""
    pickles = dict.fromkeys(("training_args.bin", "rng_state.pth", "pytorch_model.bin"), b"not even a pickle")
    pickles |= {"federation/clients/0.pt": b"no", "federation/evil.pkl": b"no", "federation/state.pt": b"no"}
    repo = tampered(lab, "pickles", lambda files: files.update(pickles))
    lab.hub.reset()
    settings = elsewhere(lab, "from-pickles", whole(lab), model=repo)
    assert lab.train(settings)["steps"] == 16
    asked = {each["path"].split("/resolve/")[1].partition("/")[2] for each in lab.requests_at("/resolve/")}
    assert STATE in asked
    assert not asked & pickles.keys()
    home = Path(settings["folder"]) / "machine" / "home"
    assert list(home.rglob("state.json"))
    assert not [path for path in home.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_pickles_that_somebody_else_has_downloaded_are_not_read(lab):
    """A snapshot of the whole repository lies in the cache, in the very folder that the round is read from."""
    pickles = {"federation/clients/0.pt": b"not a pickle, and reading it would be an error"}
    repo = tampered(lab, "cached", lambda files: files.update(pickles))
    settings = elsewhere(lab, "from-cached", whole(lab), model=repo)
    lab.train(settings, snapshot=repo)
    home = Path(settings["folder"]) / "machine" / "home"
    assert list(home.rglob("0.pt"))
    assert lab.train(settings)["steps"] == 16


def test_a_base_of_pickles_is_refused(lab):
    """`use_safetensors` for the base that a repository names."""
    name = "pickled-base"
    lab.commit(f"user/{name}", {"config.json": lab.hub.read(whole(lab)["base"], "main", "config.json")})
    lab.commit(f"user/{name}", {"pytorch_model.bin": b"cos\nsystem\n(S'touch escaped'\ntR."})
    origin = json.dumps({"name": f"user/{name}", "class": "RobertaForSequenceClassification", "dtype": "float32"})
    repo = tampered(lab, name, lambda files: files.update({"federation/base.json": origin.encode()}))
    told = lab.train(elsewhere(lab, f"from-{name}", whole(lab), model=repo, refused=True))
    assert f"The base `user/{name}`" in told["refused"]
    assert "cannot be loaded" in told["refused"]
    assert not lab.requests_at("pytorch_model.bin")
