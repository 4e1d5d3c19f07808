"""Rounds on the Hub: a real server on loopback, the unmodified clients, a process of its own for every run and load.

`hub_lab.py` has the server and the processes; what they say is compared with what the server keeps on its disk.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hub_lab import STATE, USERS, Lab, fresh_lab, state_of, wait_until, waiting


pytestmark = pytest.mark.xdist_group("lab")  # where tests and not files are shared out: one process starts it
SECRET = USERS["silo"]
PATHS = ("auto", "auto-peft", "peft", "pipeline")


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from fresh_lab(tmp_path_factory)


def task_of(family: str) -> str:
    return "SEQ_CLS" if family == "roberta" else "CAUSAL_LM"


def loads_of(settings: dict[str, Any], round: int, revision: str | None, paths: Any = PATHS, **more: Any) -> list:
    """Loads that must give the logits of a round."""
    reference = str(Path(settings["reference"]) / f"round-{round}.safetensors")
    load = {"repo": settings["arguments"]["hub_model_id"], "revision": revision, "reference": reference}
    return [load | {"path": path, "task": task_of(settings.get("family", "roberta"))} | more for path in paths]


def assert_loads(lab: Lab, loads: list[dict[str, Any]]) -> None:
    for load, result in zip(loads, lab.load(loads), strict=True):
        assert result.get("equal"), (load, result)
        assert result.get("answers", True), (load, result)


# ---- Every load path, in a process without fedex_hf ----


FAMILIES = {
    "roberta": {"plots": True, "arguments": {"eval_strategy": "epoch"}},
    "llama-tied": {"arguments": {"hub_revision": "silos/one", "hub_max_shard_size": "20KB"}},
    "gpt2": {"arguments": {"client_optimizer_state": "keep"}},  # which are pickles, and stay with the clients
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_and_revision_gives_the_logits_of_its_round(lab, family):
    given = dict(FAMILIES[family])
    arguments = {"num_rounds": 2} | given.pop("arguments", {})
    settings = lab.settings(f"load-{family}", family=family, tokenizer=True, arguments=arguments, **given)
    repo, branch = settings["arguments"]["hub_model_id"], arguments.get("hub_revision", "main")
    lab.train(settings)

    lab.assert_rounds(repo, [1, 2], branch)
    loads = loads_of(settings, 2, None if branch == "main" else branch)
    for round in (1, 2):
        loads += loads_of(settings, round, f"round-{round}")
        loads += loads_of(settings, round, lab.tags(repo)[f"round-{round}"])
    assert_loads(lab, loads)

    mixed = {"base": repo, "base_revision": "round-1"}
    wrong = [
        *loads_of(settings, 1, "round-2", ("auto",)),  # the rounds differ,
        *loads_of(settings, 2, "round-2", ("peft",), **mixed),  # so do their bases,
        *loads_of(settings, 2, "round-1", ("peft",), base=repo, base_revision="round-2"),  # and their adapters
    ]
    for load, result in zip(wrong, lab.load(wrong), strict=True):
        assert result["difference"] > 1e-4, (load, result)

    files = lab.hub.files(repo, "round-2")
    config = json.loads(lab.hub.read(repo, "round-1", "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == (repo, "round-1")
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json", "trainer_state.json", STATE} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    assert ("plots/exactness.png" in files) == (family == "roberta")
    if family == "llama-tied":
        assert "model.safetensors" not in files
        placed = json.loads(lab.hub.read(repo, "round-2", "model.safetensors.index.json"))["weight_map"]
        assert len(set(placed.values())) > 2
        assert "lm_head.weight" not in placed  # it is the embedding


def test_a_bfloat16_base_loads_right_with_both_classes_of_peft(lab):
    """`AutoModelFor*` casts the adapter to the base's dtype, which is why the docs name it."""
    base = lab.base("llama", dtype="bfloat16")
    arguments = {"num_rounds": 2, "aggregator": "ffa"}
    settings = lab.settings("bfloat16", family="llama", base=base, arguments=arguments)
    lab.train(settings)
    assert_loads(lab, loads_of(settings, 1, "round-1", ("auto-peft", "peft")))
    assert_loads(lab, loads_of(settings, 2, None, ("auto-peft", "peft")))
    (cast,) = lab.load(loads_of(settings, 2, None, ("auto",)))
    assert 0 < cast["difference"] < 0.05


# ---- The other two formats ----


def test_lora_rounds_are_small_and_load_on_the_original_base(lab):
    settings = lab.settings(
        "lora",
        family="llama-tied",
        base=lab.base("llama-tied", seed=1),
        tokenizer=True,
        lora={"r": 2, "lora_alpha": 4},
        arguments={"num_rounds": 2, "hub_round_format": "lora"},
    )
    repo, base = settings["arguments"]["hub_model_id"], {"base": settings["base"], "base_revision": None}
    lab.train(settings)

    lab.assert_rounds(repo, [1, 2])
    assert not {"model.safetensors", "config.json"} & lab.hub.files(repo).keys()
    config = json.loads(lab.hub.read(repo, "round-1", "adapter_config.json"))
    assert config["base_model_name_or_path"] == settings["base"]
    assert config["revision"] == lab.hub.refs(settings["base"])["branches"]["main"]
    for round in (1, 2):
        sha = lab.tags(repo)[f"round-{round}"]
        loads = [
            *loads_of(settings, round, f"round-{round}", ("auto-peft", "peft"), **base),
            *loads_of(settings, round, sha, ("auto-peft", "peft"), **base),
            *(loads_of(settings, 2, None, **base) if round == 2 else []),
        ]
        results = lab.load(loads)
        for load, result in zip(loads, results, strict=True):
            assert result.get("difference", 1) < 1e-5, (load, result)
            assert result["digest"] == results[0]["digest"], (load, result)
    # A rule of transformers: these two look for the adapter's revision in the base's repository as well.
    for result in lab.load(loads_of(settings, 2, "round-2", ("auto", "pipeline"))):
        assert "round-2" in result["error"]
    bare = loads_of(settings, 2, None, ("auto",)) + loads_of(settings, 1, "round-2", ("peft",), **base)
    bare[0]["repo"] = settings["base"]
    for result in lab.load(bare):
        assert result["difference"] > 1e-4  # neither the base alone nor another round

    other = lab.hub.read(lab.base("llama-tied"), "main", "model.safetensors")
    lab.commit(settings["base"], {"model.safetensors": other})  # the base moves on; the rounds stay on theirs
    moved = loads_of(settings, 2, "round-2", ("auto-peft", "peft"), **base)
    pinned, unpinned = lab.load(moved)
    assert pinned["digest"] == results[0]["digest"]
    assert unpinned["difference"] > 1e-2


def test_lora_rounds_on_a_base_without_a_head(lab):
    settings = lab.settings(
        "headless",
        base=lab.base("roberta", part="roberta"),
        base_kwargs={"num_labels": 3},
        arguments={"num_rounds": 1, "hub_round_format": "lora"},
    )
    base = {"base": settings["base"], "base_revision": None, "kwargs": {"num_labels": 3}}
    lab.train(settings)
    loads = loads_of(settings, 1, "round-1", ("auto-peft", "peft"), **base)
    loads += loads_of(settings, 1, None, ("auto", "auto-peft", "peft"), **base)
    results = lab.load(loads)
    for load, result in zip(loads, results, strict=True):
        assert result.get("difference", 1) < 1e-5, (load, result)
        assert result["digest"] == results[0]["digest"], (load, result)


def test_merged_rounds_are_plain_models(lab):
    settings = lab.settings(
        "merged", family="gpt2", tokenizer=True, arguments={"num_rounds": 2, "hub_round_format": "merged"}
    )
    repo = settings["arguments"]["hub_model_id"]
    lab.train(settings)
    assert not {"adapter_model.safetensors", "adapter_config.json"} & lab.hub.files(repo).keys()
    for round in (1, 2):
        loads = loads_of(settings, round, f"round-{round}", ("auto", "pipeline"))
        loads += loads_of(settings, round, lab.tags(repo)[f"round-{round}"], ("auto", "pipeline"))
        loads += loads_of(settings, 2, None, ("auto", "pipeline")) if round == 2 else []
        results = lab.load(loads)
        for load, result in zip(loads, results, strict=True):
            assert result.get("difference", 1) < 1e-5, (load, result)
            assert result["digest"] == results[0]["digest"], (load, result)
    (other,) = lab.load(loads_of(settings, 1, "round-2", ("auto",)))
    assert other["difference"] > 1e-4


# ---- A Hub with faults ----


def faults(seed: int) -> list[dict[str, Any]]:
    """Something goes wrong with every tenth request or so; what the client itself waits for goes wrong three times.

    The client repeats uploads and downloads by itself, after a second at least; the publisher repeats the round.
    """
    by_client, others = "^/_storage/|/info/lfs/|/resolve/", "^(?!/_storage/)(?!.*/info/lfs/)(?!.*/resolve/)"
    anything = {"path": others}
    commit, tag = {"method": "POST", "path": "/commit/"}, {"method": "POST", "path": "/tag/"}

    def status(code: int, **more: Any) -> list[dict[str, Any]]:
        """Once for sure, and now and then."""
        rule = {"fault": "status", "status": code, "match": anything} | more
        return [rule | {"after": code % 100}, rule | {"probability": 0.015}]

    rules = [
        {"fault": "cut", "match": {"method": "PUT", "path": "^/_storage/"}, "after": 3},
        {"fault": "status", "status": 503, "match": {"path": by_client}, "after": 20},
        {"fault": "cut", "when": "response", "match": {"path": "/resolve/"}, "after": 4},
        {"fault": "moved", "match": commit, "after": 2},
        {"fault": "moved", "match": commit, "probability": 0.15},
        {"fault": "cut", "when": "response", "match": commit, "probability": 0.2},  # done, and nobody was told
        {"fault": "cut", "when": "response", "match": tag, "probability": 0.2},
        {"fault": "cut", "match": commit, "probability": 0.05},
        *status(429, headers={"Retry-After": "0.02"}),
        *status(500),
        *status(503),
        {"fault": "cut", "match": anything, "probability": 0.02},
        {"fault": "slow", "seconds": 0.05, "match": anything, "probability": 0.05},
    ]
    return [rule | {"seed": 100 * seed + index} for index, rule in enumerate(rules)]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_ten_rounds_under_random_faults(lab, seed):
    rounds = list(range(1, 11))
    arguments = {"num_rounds": 10, "hub_retries": 15}
    settings = lab.settings(f"faults-{seed}", seed=10 + seed, wait=0.002, arguments=arguments)  # nothing is there yet
    lab.hub.faults(faults(seed))
    result = lab.train(settings)
    met = {(each["fault"], each["status"]) for each in lab.hub.log() if each["fault"]}
    lab.hub.faults([])

    assert met >= {("status", 429), ("status", 500), ("status", 503), ("moved", 412), ("slow", 200), ("cut", None)}
    assert len(result["rounds"]) == 10
    assert waiting(settings) == []
    lab.assert_rounds("user/" + f"faults-{seed}", rounds)
    assert_loads(lab, [load for round in rounds for load in loads_of(settings, round, f"round-{round}", ("auto",))])
    (twin,) = lab.load(loads_of(settings, 7, "round-8", ("auto",)))
    assert twin["difference"] > 1e-4


# ---- No Hub at all ----


@pytest.mark.parametrize("later", ["same process", "new process", "from checkpoints"])
def test_one_call_publishes_what_waited_while_the_hub_was_down(lab, tmp_path, later):
    """The server is dead during the whole run, and `push_to_hub()` is called when it is back."""
    name = f"down-{later.replace(' ', '-')}"
    settings = lab.settings(name, arguments={"hub_retries": 1, "save_strategy": "epoch"})
    lab.hub.kill()
    done, back = tmp_path / "done", tmp_path / "back"
    actions = ["train", {"write": str(done)}]
    if later == "same process":
        process = lab.start(settings, actions=[*actions, {"await": str(back)}, "push"])
        wait_until(done.exists, process)
    else:
        process = lab.start(settings, actions=actions)
        assert len(process.result()["rounds"]) == 3
    assert "The Hub cannot be reached now" in process.output
    assert "Rounds [1, 2, 3] are not on the Hub yet" in process.output
    assert waiting(settings) == ["round-1", "round-2", "round-3"]

    lab.hub.restart()
    if later == "same process":
        back.touch()
        process.result()
    elif later == "new process":
        assert lab.train(settings, actions=["push"], reference=str(tmp_path))["steps"] == 0
    else:
        for path in (Path(settings["output_dir"]) / ".hub").glob("*"):  # staging has failed, too
            path.rename(tmp_path / path.name)
        lab.train(settings, actions=[{"train": True}, "push"], reference=str(tmp_path))
    assert waiting(settings) == []
    lab.assert_rounds(f"user/{name}", [1, 2, 3])
    assert_loads(lab, [load for round in (1, 3) for load in loads_of(settings, round, f"round-{round}", ("auto",))])


def test_a_name_that_only_the_hub_could_complete_needs_the_hub(lab):
    settings = lab.settings("nameless", refused=True, arguments={"hub_model_id": "nameless"})
    lab.hub.kill()
    told = lab.train(settings)
    assert told["steps"] == 0
    assert told["refused"] == (
        "ValueError: The Hub cannot be reached, so `hub_model_id='nameless'` cannot be completed. Give the whole id, "
        "`user/name`; rounds then wait on the disk until the Hub is back."
    )
    lab.hub.restart()
    assert lab.train(settings, refused=False)["steps"] == 24
    lab.assert_rounds("user/nameless", [1, 2, 3])


# ---- Refused before the first step ----


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("case", ["unknown token", "no token", "expired token", "no right to write"])
def test_a_token_that_the_hub_refuses_is_refused_before_the_first_step(lab, case, is_there):
    """Whether or not the repository is there for all to see."""
    name = case.replace(" ", "-") + "-there" * is_there
    settings = lab.settings(name, refused=True)
    if is_there:
        lab.commit(f"user/{name}", {"LICENSE": b"theirs"})
    if case == "unknown token":
        settings["arguments"]["hub_token"] = "hf_unknown"
    elif case == "no token":
        settings["environment"] = {"HF_TOKEN": ""}
    elif case == "expired token":
        lab.hub.faults([{"fault": "expired_token", "times": 99}])
    else:
        settings["arguments"]["hub_token"] = SECRET  # of `silo`
    told = lab.train(settings)
    assert told["steps"] == 0
    assert re.search("401|403|token|rights", told["refused"]), told["refused"]
    assert "hf_unknown" not in told["refused"]
    assert SECRET not in told["refused"]
    lab.hub.faults([])
    settings["arguments"]["hub_token"] = USERS["user"]
    assert lab.train(settings, environment={}, refused=False, actions=[])["refused"] is None


def test_a_repository_of_another_run_is_refused_before_the_first_step(lab):
    first = lab.settings("taken", arguments={"num_rounds": 1})
    lab.train(first)
    second = lab.settings("intruder", seed=1, refused=True, arguments={"hub_model_id": "user/taken"})
    told = lab.train(second)
    assert told["steps"] == 0
    assert told["refused"].startswith("HubConflictError: `user/taken` already has the rounds [1] of another run.")
    lab.assert_rounds("user/taken", [1])

    same_folder = first | {"refused": True, "arguments": first["arguments"] | {"hub_model_id": "user/taken-2"}}
    state_of(first["output_dir"], 1).mkdir(parents=True)  # as a run that was not resumed has left it
    told = lab.train(same_folder)
    assert told["steps"] == 0
    assert "holds the rounds [1] of another run, not yet published" in told["refused"]


# ---- Other people in the repository ----


def test_a_tag_of_another_run_that_appears_while_we_train_is_reported_and_kept(lab, tmp_path):
    settings = lab.settings("race", hold={"1": str(tmp_path / "go")})
    process = lab.start(settings)
    wait_until((tmp_path / "go.reached").exists, process)
    theirs = lab.commit("user/race", {"README.md": b"another run's", STATE: b'{"digest": "another"}'})
    lab.tag("user/race", "round-1", theirs)
    (tmp_path / "go").touch()
    assert len(process.result()["rounds"]) == 3  # training is not what fails
    assert "`user/race` has a `round-1` that is not this run's" in process.output
    assert "Rounds [1, 2, 3] are not on the Hub yet" in process.output
    assert lab.tags("user/race") == {"round-1": theirs}
    assert lab.titles("user/race") == ["By hand"]
    assert waiting(settings) == ["round-1", "round-2", "round-3"]

    told = lab.train(settings, refused=True, actions=["push"], hold={})
    assert told["refused"].startswith("UnpublishedRoundsError: Round 1 could not be published in `user/race`")
    lab.hub.store.change_ref("user/race", "models", "tags", "round-1", None)  # what the message says to do
    lab.train(settings, actions=["push"], hold={})
    assert lab.titles("user/race") == ["By hand", "Round 1", "Round 2", "Round 3"]
    assert lab.tags("user/race").keys() == {"round-1", "round-2", "round-3"}


def test_a_tag_that_appears_between_our_commit_and_our_tag_is_not_taken_for_ours(lab):
    settings = lab.settings("close-race", arguments={"num_rounds": 1})
    lab.hub.faults([{"fault": "slow", "seconds": 1, "match": {"method": "POST", "path": "/tag/"}}])
    process = lab.start(settings)
    wait_until(lambda: lab.requests_at("POST /api/models/user/close-race/tag/"), process)
    theirs = lab.hub.commits("user/close-race")[-1]["id"]
    lab.hub.store.change_ref("user/close-race", "models", "tags", "round-1", theirs)
    process.result()
    assert "`user/close-race` has a `round-1` that is not this run's" in process.output
    assert lab.tags("user/close-race") == {"round-1": theirs}
    assert waiting(settings) == ["round-1"]


def test_files_of_other_people_stay_and_files_of_older_rounds_go(lab, tmp_path):
    shards = {"num_rounds": 1, "hub_max_shard_size": "20KB", "save_strategy": "epoch"}
    settings = lab.settings("mixed", family="llama", plots=True, arguments=shards)
    lab.train(settings)
    theirs = {"LICENSE": b"theirs", "onnx/model.safetensors": b"theirs", "theirs.safetensors": b"theirs"}
    lab.commit("user/mixed", theirs)
    first = set(lab.hub.files("user/mixed"))
    merged = {"num_rounds": 2, "hub_round_format": "merged", "hub_max_shard_size": None}
    lab.train(settings, arguments=settings["arguments"] | merged, actions=[{"train": True}])

    assert lab.titles("user/mixed") == ["Round 1", "By hand", "Round 2"]
    second = set(lab.hub.files("user/mixed", "round-2"))
    assert {name: lab.hub.read("user/mixed", "main", name) for name in theirs} == theirs
    gone = {name for name in first if name.startswith("model-")}
    assert len(gone) > 2
    gone |= {"model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"}
    assert first - second == gone
    assert second - first == {"model.safetensors"}
    assert not theirs.keys() & lab.hub.files("user/mixed", "round-1").keys()
    results = lab.load([*loads_of(settings, 1, "round-1", ("auto",)), *loads_of(settings, 2, None, ("auto",))])
    assert results[0]["equal"]
    assert results[1]["difference"] < 1e-5


# ---- Once, and only what was asked for ----


def test_the_strategy_end_publishes_the_last_round_only(lab):
    settings = lab.settings(
        "end", arguments={"hub_strategy": "end", "save_strategy": "epoch"}, actions=["train", "push"]
    )
    lab.train(settings)
    lab.assert_rounds("user/end", [3])
    assert_loads(lab, loads_of(settings, 3, "round-3", ("auto",)) + loads_of(settings, 3, None, ("auto",)))


def test_pushing_again_writes_nothing(lab, tmp_path):
    done, go = tmp_path / "done", tmp_path / "go"
    actions = ["train", {"write": str(done)}, {"await": str(go)}, "push", "push", {"push": {"blocking": False}}]
    settings = lab.settings("again", arguments={"save_strategy": "epoch"}, actions=actions)
    process = lab.start(settings)
    wait_until(done.exists, process)
    assert any("/commit/" in each for each in lab.writes())
    lab.hub.reset()
    go.touch()
    process.result()
    assert lab.hub.log()
    assert lab.writes() == []
    lab.assert_rounds("user/again", [1, 2, 3])
    # Another process that resumes the finished run asks whether the repository is there, and that is all.
    lab.hub.reset()
    lab.train(settings, actions=[{"train": True}, "push"])
    assert lab.writes() == ["POST /api/repos/create"]


def test_pushing_without_having_asked_for_it_publishes_the_present_round(lab):
    arguments = {"push_to_hub": False, "save_strategy": "epoch", "hub_private_repo": True}
    settings = lab.settings("late", arguments=arguments, actions=["train", "push"])
    lab.train(settings)
    lab.assert_rounds("user/late", [3])
    assert lab.hub.store.settings("user/late", "models")["private"]
    (hidden,) = lab.load(loads_of(settings, 3, None, ("auto",)))
    assert "error" in hidden
    (shown,) = lab.load(loads_of(settings, 3, None, ("auto",)), token="hf_test")
    assert shown["equal"]


def test_pushing_into_the_repository_of_another_run_is_refused(lab):
    lab.train(lab.settings("other", arguments={"num_rounds": 2}))
    for rounds in (1, 3):  # fewer than are there, and more
        late = {"push_to_hub": False, "hub_model_id": "user/other", "num_rounds": rounds}
        settings = lab.settings(f"late-{rounds}", seed=1, refused=True, arguments=late, actions=["train", "push"])
        told = lab.train(settings)
        assert told["refused"], rounds
        assert "`user/other`" in told["refused"]
        lab.assert_rounds("user/other", [1, 2])


def test_a_round_that_is_published_while_the_next_is_staged(lab, tmp_path):
    """The folder of what waits is emptied by one thread and filled by another."""
    settings = lab.settings("overlap", tokenizer=0.6)
    lab.hub.faults([{"fault": "slow", "seconds": 0.5, "match": {"method": "POST", "path": "/tag/"}, "times": 2}])
    result = lab.train(settings)
    assert "could not be staged" not in result["output"]
    lab.assert_rounds("user/overlap", [1, 2, 3])


def test_a_round_that_could_not_be_staged_is_published_before_the_next(lab, tmp_path):
    """As with a full disk that somebody clears: nothing is skipped, and the order is kept."""
    settings = lab.settings("unstaged", hold={"2": str(tmp_path / "go")}, arguments={"save_strategy": "epoch"})
    blocker = Path(settings["output_dir"]) / ".hub" / ".unfinished-round-1"
    blocker.parent.mkdir(parents=True)
    blocker.touch()  # in the place of the folder that the round is written into
    process = lab.start(settings)
    wait_until((tmp_path / "go.reached").exists, process)
    assert lab.tags("user/unstaged") == {}
    blocker.unlink()
    (tmp_path / "go").touch()
    process.result()
    assert "Round 1 could not be staged" in process.output
    lab.assert_rounds("user/unstaged", [1, 2, 3])


# ---- Killed while it publishes ----


@cache
def uninterrupted(lab: Lab, seed: int) -> tuple[str, int]:
    """The repository of a run that no test kills, and the number of its file operations below `.hub`."""
    settings = lab.settings(f"whole-{seed}", seed=seed, arguments={"save_strategy": "epoch"})
    operations = lab.train(settings)["operations"]
    lab.assert_rounds(f"user/whole-{seed}", [1, 2, 3])
    return f"user/whole-{seed}", operations


def assert_resumed_as_if_never_killed(lab: Lab, settings: dict[str, Any], seed: int = 0) -> None:
    repo = settings["arguments"]["hub_model_id"]
    lab.train(settings, actions=[{"train": True}], kill_before_operation=None)
    lab.assert_rounds(repo, [1, 2, 3])
    lab.assert_same_rounds(repo, uninterrupted(lab, seed)[0], [1, 2, 3])
    assert waiting(settings) == []


LATE = {  # in the second round: a request that the server holds back, and for how long
    "before the commit, which comes late": ("POST", "/commit/", 1, 0.9),
    "before the tag, which comes late": ("POST", "/tag/", 1, 0.9),
}
MOMENTS = {
    "before the upload": ("PUT", "^/_storage/", 5, 0.3),
    "before the commit": ("POST", "/commit/", 1, 0.3),
    "before the tag": ("POST", "/tag/", 1, 0.3),
    "after the tag": ("GET", "/refs$", 3, 0.3),
}


@pytest.mark.parametrize("moment", [*MOMENTS, *(pytest.param(moment, marks=pytest.mark.slow) for moment in LATE)])
def test_killed_while_it_waits_for_the_hub(lab, moment):
    """What the dead process had sent is carried out all the same, as it would be by the Hub."""
    method, path, after, seconds = (MOMENTS | LATE)[moment]
    name = "killed-" + moment.replace(" ", "-").replace(",", "")
    # Of what the Hub has already, from another run, nothing is uploaded.
    own = {"seed": 1} if moment == "before the upload" else {}
    settings = lab.settings(name, arguments={"save_strategy": "epoch"}, **own)
    match = {"method": method, "path": path}
    lab.hub.faults([{"fault": "slow", "seconds": seconds, "match": match, "after": after}])
    process = lab.start(settings)
    wait_until(lambda: [each for each in lab.hub.log() if each["fault"] == "slow"], process)
    time.sleep(0.1)  # until it has sent the whole request
    assert process.kill() == -9
    assert "round-2" not in lab.tags(f"user/{name}") or moment == "after the tag"
    if moment == "before the commit":
        wait_until(lambda: lab.titles(f"user/{name}") == ["Round 1", "Round 2"])
    if moment == "before the tag":
        wait_until(lambda: "round-2" in lab.tags(f"user/{name}"))
    assert_resumed_as_if_never_killed(lab, settings, **own)
    time.sleep(seconds)
    lab.assert_rounds(f"user/{name}", [1, 2, 3])  # nothing came after that


def test_a_round_that_is_trained_again_is_not_committed_again(lab):
    """Killed after the commit, and the disk has lost it: the round comes again, with other times in its log."""
    settings = lab.settings("killed-and-lost", arguments={"save_strategy": "epoch", "hub_retries": 50})
    lab.hub.faults([{"fault": "down", "match": {"method": "POST", "path": "/tag/"}, "after": 1}])
    process = lab.start(settings)
    run = Path(settings["output_dir"])
    wait_until(lambda: len(lab.requests_at("/tag/")) > 1 and (run / "checkpoint-24").exists(), process)
    assert process.kill() == -9
    for lost in (run / ".hub", run / "checkpoint-16", run / "checkpoint-24"):
        shutil.rmtree(lost)
    lab.hub.reset()
    assert lab.titles("user/killed-and-lost") == ["Round 1", "Round 2"]
    assert_resumed_as_if_never_killed(lab, settings)


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_before_a_file_operation(lab, count):
    """While it stages a round, while another is uploaded, while a published one is deleted."""
    _, operations = uninterrupted(lab, 0)
    assert operations > 50
    left = set()
    for moment in random.Random(count).sample(range(2, int(0.8 * operations)), count):
        settings = lab.settings(f"killed-{count}-{moment}", arguments={"save_strategy": "epoch"})
        assert lab.start(settings, kill_before_operation=moment).end() == -9
        hub_folder = Path(settings["output_dir"]) / ".hub"
        left |= {re.sub(r"\d+", "N", path.name) for path in hub_folder.glob("*") if hub_folder.exists()}
        assert_resumed_as_if_never_killed(lab, settings)
    assert ".unfinished-round-N" in left or count < 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again(lab, seed):
    rng = random.Random(seed)
    settings = lab.settings(f"killed-again-{seed}", arguments={"save_strategy": "epoch"}, actions=[{"train": True}])
    lab.hub.faults([{"fault": "slow", "seconds": 0.1, "probability": 0.5, "seed": seed}])
    for _ in range(4):
        process = lab.start(settings)
        time.sleep(rng.uniform(0.2, 1.0))
        assert process.kill() == -9
    lab.hub.faults([])
    assert_resumed_as_if_never_killed(lab, settings)


# ---- Tokens ----


def files_with(content: bytes, folder: Path) -> set[str]:
    """Names of all files below a folder that hold some bytes."""
    paths = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return {path.name for path in paths if path.is_file() and content in path.read_bytes()}


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_no_token_is_written_anywhere(lab, given):
    """Not even where the Hub itself repeats it in an error."""
    name = f"secret-{given}"
    environment = {"HF_TOKEN": SECRET if given == "environment" else ""}
    arguments = {"save_strategy": "epoch", "eval_strategy": "epoch", "hub_private_repo": True}
    if given == "argument":
        arguments["hub_token"] = SECRET
    folder = lab.root / name
    saves = [{"save": {"output_dir": str(folder / format), "format": format}} for format in ("full", "merged")]
    settings = lab.settings(name, "silo", arguments=arguments, environment=environment, verbosity=10)
    echo = {"fault": "status", "message": f"The token {SECRET} is not good today"}
    match = {"method": "POST", "path": "/preupload/"}
    lab.hub.faults([echo | {"status": 503, "match": match}, echo | {"status": 403, "match": match}])
    told = lab.train(settings, actions=["train", *saves, "push"])
    lab.assert_rounds(f"silo/{name}", [1, 2, 3])
    assert "The token *** is not good today" in told["output"]
    assert "Round 1 could not be published" in told["output"]

    refused = settings | {"refused": True, "output_dir": str(folder / "refused")}
    for path, actions in (("/api/repos/create", ["train"]), ("/revision/", [{"train": f"silo/{name}@round-1"}])):
        lab.hub.faults([echo | {"status": 403, "match": {"path": path}, "times": 9}])
        later = settings["arguments"] | {"push_to_hub": "create" in path, "hub_model_id": "silo/new"}
        told = lab.train(refused, arguments=later, actions=actions, home=path.strip("/").replace("/", "-"))
        assert "The token *** is not good today" in told["refused"], told["refused"]

    for place in (folder, lab.hub.store.root):
        assert files_with(SECRET.encode(), place) == set()
    found = files_with(f"silo/{name}".encode(), folder)  # the same search does find what is written
    assert found >= {"training_args.bin", "output.txt"}
    assert files_with(b"federation", lab.hub.store.root / "blobs")
