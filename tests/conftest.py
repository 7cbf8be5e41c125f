"""What every test starts from: one thread a process, so that parallel tests do not fight over cores.

`HYPOTHESIS_PROFILE=nightly` draws many more examples than the default profile, and others every time.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from .support.command import only_run, run_command
from .support.launched import EXACT

os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
torch.set_num_threads(1)

unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("push", derandomize=True, **unhurried)
settings.register_profile("nightly", max_examples=2000, print_blob=True, **unhurried)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "push"))


def pytest_xdist_auto_num_workers() -> int:
    """Two workers a core for `-n auto`: half of the time a test waits for processes that it has started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * cores


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The larger batch in one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = run_command("run", *EXACT, "accum.steps=1", folder=folder)
    assert done.code == 0, done
    return only_run(folder)
