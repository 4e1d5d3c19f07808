"""Settings of the test run: no network, one thread, quiet."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator


# Read at import by huggingface_hub and torch, so set before any of them is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: the last bits depend on the thread count
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging


collect_garbage = gc.collect  # the real one, for tests that count what is alive
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


# Files whose few tests take long: processes that share the files out begin with these, so that none is left alone.
LONG = (
    "test_kill_resume",
    "test_quickstart",
    "test_deviation",
    "test_comparison",
    "test_exporting",
    "test_recipes_glue",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG, -files[item.path]))  # stable: files stay whole


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Where pytest-xdist starts the process, coverage has started twice: pytest-cov 7.1 pauses one for `no_cover`."""
    tracer = sys.gettrace()
    if item.get_closest_marker("no_cover"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_full_collections() -> Iterator[None]:
    """`Trainer.train()` begins with one, 0.2 s over torch's own objects; the automatic ones stay.

    For the whole session, since fixtures of modules train too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *args: 0)
        yield
