"""`fedex-hf` in processes of its own that start at once, and the environment of processes that need no tracing.

    with command_line(environment, tmp_path / "server") as run:
        done = run("inspect", "adapters/north", folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")

Each is forked from one process that has imported the package and nothing of the command itself, see `forks.py`.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import forks


ROOT = Path(__file__).resolve().parents[1]


def untraced(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without what makes coverage trace a process, which doubles its time: for one that only repeats others' lines."""
    return {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def command_line(environment: Mapping[str, str], folder: Path) -> Iterator[Callable[..., CompletedProcess[str]]]:
    """Gives a function that runs `fedex-hf`: words of the command line, and the `folder` to run it in."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with forks.started(Path(__file__), {**environment, "PYTHONPATH": path}, folder) as server:

        def run(*words: str | Path, folder: Path) -> CompletedProcess[str]:
            told = [str(word) for word in words]
            code = server.start(folder, words=told).end()
            out, err = ((folder / name).read_text() for name in ("stdout.txt", "stderr.txt"))
            return CompletedProcess(told, code, out, err)

        yield run


def as_main(job: dict[str, Any]) -> None:
    """What `python -m fedex_hf.cli` does, up to the exit status; this process ends with it."""
    for stream, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["fedex-hf", *job["words"]]
    try:
        runpy.run_module("fedex_hf.cli", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code or 0)


if __name__ == "__main__":
    from fedex_hf import *  # noqa: F403  what jobs need, imported once

    assert "fedex_hf.cli" not in sys.modules
    forks.serve(as_main)
