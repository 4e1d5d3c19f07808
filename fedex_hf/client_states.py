"""Room 7a: what clients keep between their rounds, on the disk instead of in memory.

    client_state_dir/
        run-x3k9/             one folder per trainer that is alive, deleted with it
            lock              held by its process; a folder whose lock is free was left behind by a killed one
            0.pt  1.pt ...    the state of one client after one of its rounds; written once, never changed

A file lives as long as an object of this process refers to it. Checkpoints do not rely on these files: they hold hard
links to them, or copies where the file system has no links, so neither deletes what the other needs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves behind stays
    fcntl = None  # type: ignore[assignment]

State = Mapping[str, Any]
_PREFIX, _LOCK = "run-", "lock"
_living: weakref.WeakValueDictionary[str, StateFolder] = weakref.WeakValueDictionary()


class ClientStateError(ValueError):
    """The state of a client cannot be read or written; the message names the file."""


class StateFolder:
    """A trainer's own folder below `client_state_dir`, deleted when nothing refers to it any more.

    Args:
        directory: The `client_state_dir`, created if it is not there. Folders that killed processes have left in it
            are deleted.

    Raises:
        ClientStateError: If it cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            _remove_leftovers(Path(directory))
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory)).absolute()
            lock = _locked(self.path)
        except OSError as error:
            raise ClientStateError(
                f"`client_state_dir={os.fspath(directory)!r}` cannot be used: {error}. Give a folder that can be "
                "written to, or leave it out to keep the states in memory."
            ) from error
        self._pid = os.getpid()
        self._numbers = itertools.count()
        _living[str(self.path)] = self
        weakref.finalize(self, _delete_folder, self.path, lock, self._pid)

    def write(self, state: State) -> StateFile:
        """Write the state of a client, on the CPU, into a new file."""
        file = self._new_file()
        torch.save(state, file.path)
        return file

    def take_in(self, path: Path) -> StateFile:
        """Take in a file of a checkpoint: by a hard link, or a copy."""
        file = self._new_file()
        file.is_durable = link_or_copy(path, file.path)
        return file

    def delete(self, name: str) -> None:
        """Delete a file that nothing refers to any more."""
        if os.getpid() == self._pid:  # a fork has the objects of its parent, and its files belong to that
            with contextlib.suppress(OSError):
                (self.path / name).unlink()

    def _new_file(self) -> StateFile:
        return StateFile(self, f"{next(self._numbers)}.pt")


class StateFile:
    """The state of one client after one of its rounds; the file is deleted with the last reference to this object.

    Slots and no path: every full garbage collection, one per fit, looks at all that a client's state is made of.

    Args:
        folder: Where it lies.
        name: The file.

    Attributes:
        is_durable: Whether it is known to have reached the disk.
    """

    __slots__ = ("_folder", "is_durable", "name")

    def __init__(self, folder: StateFolder, name: str) -> None:
        self._folder = folder
        self.name = name
        self.is_durable = False

    def __del__(self) -> None:
        self._folder.delete(self.name)

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder.path / self.name

    def __copy__(self) -> StateFile:
        return self

    def __deepcopy__(self, memo: Any) -> StateFile:
        return self

    def load(self) -> dict[str, Any]:
        """The state, in memory of its own; see `read_state`."""
        return read_state(self.path)

    def put_into(self, target: Path) -> bool:
        """Let a checkpoint have the file under a name of its own; returns whether it has reached the disk.

        Raises:
            ClientStateError: If the file is not there any more.
        """
        try:
            if not self.is_durable:
                fsync(self.path)
                self.is_durable = True
            return link_or_copy(self.path, target)
        except FileNotFoundError as error:
            raise ClientStateError(_missing(self.path)) from error


class StatesOnDisk(Mapping[str, State]):
    """Client -> its state, which is read from its file whenever it is asked for.

    Args:
        folder: Where new states are written.
        files: Client -> its file.
    """

    def __init__(self, folder: StateFolder, files: Mapping[str, StateFile] | None = None) -> None:
        self.folder = folder
        self.files = dict(files or {})

    def __getitem__(self, client_id: str) -> State:
        return self.files[client_id].load()

    def __contains__(self, client_id: object) -> bool:
        return client_id in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __or__(self, new: Mapping[str, State | StateFile]) -> StatesOnDisk:
        """These states with those of a round; what is in memory is written."""
        written = {
            client_id: state if isinstance(state, StateFile) else self.folder.write(state)
            for client_id, state in new.items()
        }
        return StatesOnDisk(self.folder, self.files | written)


def write_states(folder: Path, states: Mapping[str, State], places: Mapping[str, int]) -> set[Path]:
    """Write the clients' states into a checkpoint.

    Args:
        folder: Where a client's state becomes `<place>.pt`.
        states: Client -> its state.
        places: Client -> its place in the federation.

    Returns:
        The files among them that have reached the disk.
    """
    durable = set()
    on_disk = states.files if isinstance(states, StatesOnDisk) else {}
    for client_id in states:
        path = folder / f"{places[client_id]}.pt"
        if client_id not in on_disk:
            torch.save(states[client_id], path)
        elif on_disk[client_id].put_into(path):
            durable.add(path)
    return durable


def read_states(folder: Path, clients: list[str], into: StateFolder | None) -> Mapping[str, State]:
    """Read back what `write_states` has written.

    Args:
        folder: Of the checkpoint.
        clients: The federation's clients in their order.
        into: Where the files are linked or copied to; `None` reads them all into memory.

    Raises:
        ClientStateError: If one is damaged.
    """
    paths = {clients[int(path.stem)]: path for path in sorted(folder.glob("*.pt"), key=lambda path: int(path.stem))}
    if into is None:
        return {client_id: read_state(path) for client_id, path in paths.items()}
    return StatesOnDisk(into, {client_id: into.take_in(path) for client_id, path in paths.items()})


def read_state(path: Path) -> dict[str, Any]:
    """A client's state, in memory of its own.

    Raises:
        ClientStateError: If the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            # torch writes checksums into the archive and does not look at them.
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of `{damaged}` is wrong")
            file.seek(0)
            return torch.load(file, weights_only=True)
    except FileNotFoundError as error:
        raise ClientStateError(_missing(path)) from error
    except Exception as error:  # whatever a damaged archive makes its readers raise
        raise ClientStateError(
            f"`{path}`, the state of a client, is damaged ({type(error).__name__}: {error}). Resume from a checkpoint "
            "that is whole."
        ) from error


def link_or_copy(source: Path, target: Path) -> bool:
    """Give a file a second name, or copy it where that cannot be; returns whether it is a link."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, one without links, or too many of them
        shutil.copyfile(source, target)
        return False
    return True


def fsync(path: Path) -> None:
    """Return once a file or folder has reached the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders; there a rename is durable by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _missing(path: Path) -> str:
    return (
        f"`{path}`, the state of a client, is not there any more: nothing else may delete what lies in "
        "`client_state_dir` while a run is alive. Resume from the newest checkpoint, which has files of its own."
    )


def _locked(folder: Path) -> int | None:
    """Take the lock of a new folder, under another name until it is held; returns its descriptor."""
    if fcntl is None:
        return None
    unfinished = folder / f"{_LOCK}.unfinished"
    descriptor = os.open(unfinished, os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    unfinished.rename(folder / _LOCK)
    return descriptor


def _remove_leftovers(directory: Path) -> None:
    if fcntl is None:
        return
    for folder in directory.glob(f"{_PREFIX}*"):
        if str(folder.absolute()) in _living or not (folder / _LOCK).is_file():
            continue
        with contextlib.suppress(OSError), (folder / _LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its process is alive
            shutil.rmtree(folder, ignore_errors=True)


def _delete_folder(path: Path, lock: int | None, pid: int) -> None:
    if os.getpid() != pid:
        return
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)
