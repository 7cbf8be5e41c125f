"""What the commands import: nothing slow for their help, and nothing that a run does not use."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.command import left_behind, run_command


@pytest.mark.parametrize("command", ["run", "evaluate", "report", "prove"])
def test_help_imports_none_of_the_slow_packages(command: str, tmp_path: Path) -> None:
    done = run_command(command, "--help", folder=tmp_path, flags=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.code == 0
    assert f"python -m accumexp.{command}" in done.stdout
    assert "accumexp" in imported
    assert imported.isdisjoint(
        {"torch", "torchvision", "torchmetrics", "mlflow", "sklearn", "scipy", "matplotlib"}
    )
    assert left_behind(tmp_path) == []


def test_a_run_imports_no_package_that_it_does_not_use(tmp_path: Path) -> None:
    quick = ("device=cpu", "tracking=none", "trainer.max_updates=1")
    done = run_command("run", *quick, folder=tmp_path, flags=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.code == 0 and "torch" in imported
    assert imported.isdisjoint({"torchvision", "torchmetrics", "transformers", "mlflow", "matplotlib"})
