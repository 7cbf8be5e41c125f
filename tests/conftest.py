"""What every test starts from: one thread a process, so that parallel tests do not fight over cores.

`HYPOTHESIS_PROFILE=nightly` draws many more examples than the default profile, and others every time.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .support.command import only_run, run_command
from .support.forked import share_server
from .support.global_state import global_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "tx", None):  # this process starts the workers, and runs no test itself
        share_server()
        return
    import torch
    from hypothesis import HealthCheck, settings

    torch.set_num_threads(1)
    unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("push", derandomize=True, **unhurried)
    settings.register_profile("nightly", max_examples=2000, print_blob=True, **unhurried)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "push"))


def pytest_xdist_auto_num_workers() -> int:
    """Two workers a core for `-n auto`: half of the time a test waits for processes that it has started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * cores


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report what is left of them at the end


@pytest.fixture(scope="module", autouse=True)
def imports_are_kept() -> None:
    """Garbage collections, which the code under test asks for too, skip what was imported before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that changes what later tests of the process see fails itself, not one of those."""
    import torch

    before, deterministic = global_state(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)  # a run sets it for its process, by its settings
    left = {name: (before[name], value) for name, value in global_state().items() if value != before[name]}
    assert not left, f"the test leaves {left}"


@pytest.fixture
def imports_are_kept_again() -> None:
    """The same after a test that has planned, which ends with `gc.unfreeze`."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@pytest.fixture
def generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The larger batch in one process."""
    from .support.launched import EXACT

    folder = tmp_path_factory.mktemp("alone")
    done = run_command("run", *EXACT, "accum.steps=1", folder=folder)
    assert done.code == 0, done
    return only_run(folder)
