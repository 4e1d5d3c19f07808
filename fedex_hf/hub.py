"""Room 7b: rounds on the Hub. Staged on the disk first, then published in order, in the background, once each.

A round is staged as the complete content of its commit, under its final name only when it is whole:

    <output_dir>/.hub/round-3/            what the commit `Round 3` will hold; deleted once the tag `round-3` is there
    <output_dir>/.hub/repository.json     where the rounds go

Publishing a round is two calls, a commit on the parent that was looked at and a tag on that commit. Both leave a
trace that the next attempt looks for first, so a process may die anywhere: a round is neither lost nor doubled.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from fedex_hf import checkpoint as ckpt
from fedex_hf.hub_files import matches, without_tokens


logger = logging.get_logger(__name__)

QUEUE = ".hub"
_TARGET = "repository.json"
_ROUND = re.compile(r"^round-([1-9]\d*)$")
_STATE_FILE = f"{ckpt.FOLDER}/state.json"
# Files that a round owns: what an older round left of them and this one does not have is deleted in its commit.
_OWNED = (
    "README.md",
    "adapter_model.safetensors",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "trainer_state.json",
    f"{ckpt.FOLDER}/*",
    "plots/*",
)
_HEALS_BY_ITSELF = (408, 409, 412, 425, 429)  # and 5xx; 409 and 412: the branch has moved, so look again
_LONGEST_WAIT = 60.0  # seconds


class HubConflictError(ValueError):
    """The repository holds rounds of another run; the message says what to do."""


class UnpublishedRoundsError(RuntimeError):
    """Rounds wait to be published; nothing of them is lost."""


def tag_of(round: int) -> str:
    """The tag of a round.

    Example:
        >>> tag_of(3)
        'round-3'
    """
    return f"round-{round}"


@dataclass(frozen=True)
class StagedRound:
    """A round that waits on the disk.

    Args:
        round: Server round, counted from 1.
        path: Folder with the content of its commit.
    """

    round: int
    path: Path

    @property
    def digest(self) -> str:
        """What identifies the round's tensors, here and on the Hub."""
        return str(json.loads((self.path / _STATE_FILE).read_text())["digest"])


class RoundQueue:
    """The rounds that wait, as folders below `<output_dir>/.hub`.

    Args:
        output_dir: The run's folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self.directory = output_dir / QUEUE
        self._lock = threading.RLock()  # one thread fills the folder while another empties it

    @property
    def target(self) -> dict[str, Any]:
        """Repository and branch that the rounds wait for, as `{"repo_id": ..., "branch": ...}`; empty if unknown."""
        file = self.directory / _TARGET
        return json.loads(file.read_text()) if file.is_file() else {}

    @target.setter
    def target(self, value: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / _TARGET).write_text(json.dumps(value))

    def waiting(self) -> list[StagedRound]:
        """Whole rounds, oldest first."""
        found = list(self.directory.iterdir()) if self.directory.is_dir() else []
        matches = [(match, path) for path in found if (match := _ROUND.match(path.name))]
        return sorted((StagedRound(int(match[1]), path) for match, path in matches), key=lambda each: each.round)

    @contextmanager
    def stage(self, round: int, target: dict[str, Any]) -> Iterator[Path]:
        """Yield a folder to write a round into; it counts once the block is left without an error."""
        with self._lock:
            ckpt.remove_unfinished(self.directory)
            self.target = target
            with ckpt.atomic_directory(self.directory / tag_of(round)) as folder:
                yield folder

    def remove(self, staged: StagedRound) -> None:
        """Delete a round that is published."""
        with self._lock:
            ckpt.discard(staged.path)
            if not self.waiting():
                shutil.rmtree(self.directory, ignore_errors=True)


class RoundPublisher:
    """Publishes the staged rounds of one run into one repository, oldest first.

    Args:
        repo_id: `"user/name"`.
        queue: The rounds that wait.
        token: Token with write permission; `None` takes the one that is logged in.
        private: Whether the repository is made private when it is created; `None` leaves it to the Hub.
        branch: Branch that gets the commits, created if needed; `None` is `main`.
        retries: Further attempts at a round after one that failed for a reason that may pass.
        wait: Seconds before the first of them; doubled each time, unless the Hub says how long.
    """

    def __init__(
        self,
        repo_id: str,
        queue: RoundQueue,
        *,
        token: str | None = None,
        private: bool | None = None,
        branch: str | None = None,
        retries: int = 5,
        wait: float = 1.0,
    ) -> None:
        self.repo_id = repo_id
        self.queue = queue
        self.branch = branch or "main"
        self.retries = retries
        self.wait = wait
        self.last_commit: Any = None
        self._private = private
        self._token = token
        self._api = HfApi(token=token)
        self._prepared = False
        self._asked = self._busy = False
        self._changed = threading.Condition()  # guards the two
        self._publishing = threading.Lock()
        self._thread: threading.Thread | None = None

    # ---- What the trainer calls ----

    def prepare(self) -> None:
        """Create repository and branch where they are missing, and learn the repository's full name.

        Raises:
            Exception: Whatever the Hub answers.
        """
        try:
            self.repo_id = self._api.create_repo(self.repo_id, private=self._private, exist_ok=True).repo_id
            self._api.auth_check(self.repo_id, write=True)  # which a repository that exists says nothing about
            if self.branch != "main":
                self._api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        except Exception as error:
            error.args = tuple(without_tokens(each, self._token) for each in error.args)
            raise
        self._prepared = True

    def published(self) -> list[int]:
        """Rounds that have their tag in the repository, ascending.

        Raises:
            Exception: Whatever the Hub answers.
        """
        return sorted(self._tags())

    def log_of(self, round: int) -> list[dict[str, Any]]:
        """The `log_history` that was published with a round; empty if the tag holds none.

        Raises:
            Exception: Whatever the Hub answers.
        """
        try:
            file = self._api.hf_hub_download(self.repo_id, TRAINER_STATE_NAME, revision=tag_of(round))
        except RemoteEntryNotFoundError:
            return []
        return list(json.loads(Path(file).read_text()).get("log_history", []))

    def submit(self) -> None:
        """Publish in the background whatever waits; returns at once and raises nothing."""
        with self._changed:
            self._asked = True
            self._changed.notify_all()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="fedex_hf-hub", daemon=True)
            self._thread.start()

    def is_done(self) -> bool:
        """Whether nothing is under way in the background; rounds may wait all the same, after a failure."""
        with self._changed:
            return not (self._asked or self._busy)

    def join(self, timeout: float | None = None) -> None:
        """Wait until nothing is under way in the background."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._asked or self._busy), timeout)

    def publish(self, on_round: Callable[[StagedRound], None] | None = None) -> None:
        """Publish whatever waits, now.

        Raises:
            UnpublishedRoundsError: If a round cannot be published; it and those after it keep waiting.
        """
        with self._publishing:
            for staged in self.queue.waiting():
                self._publish_with_retries(staged)
                if on_round is not None:
                    on_round(staged)

    # ---- One round ----

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked)
                self._asked, self._busy = False, True
            try:
                self.publish()
            except Exception as error:  # training must not end because of it
                logger.warning(str(error) if isinstance(error, UnpublishedRoundsError) else self.scrubbed(error))
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _publish_with_retries(self, staged: StagedRound) -> None:
        for attempt in range(self.retries + 1):
            try:
                self._publish(staged)
            except Exception as error:
                if attempt == self.retries or not may_pass(error):
                    raise UnpublishedRoundsError(self._told(staged, error, attempt + 1)) from None
                seconds = _retry_after(error) or self.wait * 2**attempt
                logger.info(f"Round {staged.round}: {self.scrubbed(error)} Next attempt in {seconds:.0f} s.")
                time.sleep(min(seconds, _LONGEST_WAIT))
            else:
                return

    def _publish(self, staged: StagedRound) -> None:
        if not self._prepared:
            self.prepare()
        tag = tag_of(staged.round)
        if staged.round in self._tags():
            if self._digest_at(tag) != staged.digest:
                raise HubConflictError(
                    f"`{self.repo_id}` has a `{tag}` that is not this run's. Choose another `hub_model_id`, or delete "
                    "the tag on the Hub."
                )
        else:
            commit = self._commit(staged)
            # A tag that has appeared meanwhile is a 409: the next attempt looks whose it is.
            self._api.create_tag(self.repo_id, tag=tag, revision=commit)
        self.queue.remove(staged)
        logger.info(f"Round {staged.round} is on the Hub: {self.repo_id}, tag `{tag}`.")

    def _commit(self, staged: StagedRound) -> str:
        """The commit that holds the round: the branch's head if an earlier attempt made it, a new one otherwise."""
        head = str(self._api.model_info(self.repo_id, revision=self.branch).sha)
        if self._digest_at(head) == staged.digest:
            return head
        files = sorted(path for path in staged.path.rglob("*") if path.is_file())
        names = {path.relative_to(staged.path).as_posix(): path for path in files}
        present = self._api.list_repo_files(self.repo_id, revision=head)
        stale = [name for name in present if name not in names and is_owned(name)]
        self.last_commit = self._api.create_commit(
            self.repo_id,
            operations=[
                *(CommitOperationAdd(name, str(path)) for name, path in names.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"Round {staged.round}",
            revision=self.branch,
            parent_commit=head,
        )
        return str(self.last_commit.oid)

    def _tags(self) -> set[int]:
        tags = self._api.list_repo_refs(self.repo_id).tags
        return {int(match[1]) for tag in tags if (match := _ROUND.match(tag.name))}

    def _digest_at(self, revision: str) -> str | None:
        """Digest of the round that a revision holds, `None` where it holds none."""
        try:
            file = self._api.hf_hub_download(self.repo_id, _STATE_FILE, revision=revision)
        # Not a parent of the two: a Hub that cannot be reached raises that as well.
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            return None
        return json.loads(Path(file).read_text()).get("digest")

    def scrubbed(self, error: object) -> str:
        """An error in one line, with no token in it."""
        return " ".join(without_tokens(f"{type(error).__name__}: {error}", self._token).split())

    def _told(self, staged: StagedRound, error: Exception, attempts: int) -> str:
        waiting = [each.round for each in self.queue.waiting()]
        return (
            f"Round {staged.round} could not be published in `{self.repo_id}` ({attempts} attempts): "
            f"{self.scrubbed(error)} Rounds {waiting} wait in `{self.queue.directory}`; `trainer.push_to_hub()` or "
            f"`fedex-hf push` publishes them later."
        )


def is_owned(name: str) -> bool:
    """Whether a file of the repository belongs to the rounds, as opposed to one that a person added.

    Example:
        >>> is_owned("model-00001-of-00002.safetensors"), is_owned("LICENSE"), is_owned("onnx/model.safetensors")
        (True, False, False)
    """
    return matches(name, _OWNED)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later without anybody doing something."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 500
        return status >= 500 or status in _HEALS_BY_ITSELF
    # The client's own network errors, and those of the HTTP library below it (httpx, whose name differs by version).
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(
        names & {"TransportError", "RequestException", "LocalEntryNotFoundError"}
    )


def _retry_after(error: BaseException) -> float | None:
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After") if response is not None else None
    return float(value) if value is not None and value.replace(".", "", 1).isdigit() else None
