"""How runs of several ranks end: stopped and resumed, killed, failed, told to stop; and what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from accumexp.training.checkpoint import find

from ..support.command import environment, journal, only_run, records, run_command
from ..support.forked import FRESH_RANKS
from ..support.launched import EXACT, SMALL, STATEFUL, ranks_alive, saved_weights, until
from ..support.reference import relative_error
from ..support.trouble import trouble


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_law_8_a_stopped_run_of_two_ranks_goes_on_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    ranks = [f"accum={strategy}", "accum.processes=2", "trainer.epochs=2"]
    whole = run_command("run", *STATEFUL, *ranks, folder=tmp_path / "whole")
    assert whole.code == 0, whole
    # One rank hears the signal, both stop after the same update.
    stopper = trouble("SIGTERM", 15, rank=1, mark=tmp_path / "mark")
    first = run_command("run", *STATEFUL, *ranks, stopper, folder=tmp_path / "parts")
    assert first.code == 143 and "go on with" in first.stdout, first
    run = only_run(tmp_path / "parts")
    (record,) = records(tmp_path / "parts")
    assert record.status == "KILLED"
    second = run_command("run", f"resume={run}", "trust=[tests]", folder=tmp_path / "parts")
    assert second.code == 0, second
    reference = only_run(tmp_path / "whole")
    weights, expected = saved_weights(run), saved_weights(reference)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    rows = [
        {k: v for k, v in row.items() if k.startswith(("train/", "eval/", "update"))} for row in journal(run)
    ]
    others = [
        {k: v for k, v in row.items() if k.startswith(("train/", "eval/", "update"))}
        for row in journal(reference)
    ]
    assert rows == others
    (record,) = records(tmp_path / "parts")
    assert record.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(3, "fsdp"), (1, "standalone")])
def test_a_sharded_checkpoint_opens_at_another_number_of_ranks(
    tmp_path: Path, sharded_and_stopped: Path, alone: Path, ranks: int, strategy: str
) -> None:
    run = shutil.copytree(sharded_and_stopped, tmp_path / "run")
    options = [
        f"accum.strategy={strategy}",
        f"accum.processes={ranks}",
        "tracking.backend=none",
        "trust=[tests]",
    ]
    done = run_command("run", f"resume={run}", *options, folder=tmp_path)
    assert done.code == 0, done
    assert relative_error(saved_weights(run), saved_weights(alone)) <= 1e-9


@pytest.fixture(scope="module")
def sharded_and_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    options = ["accum=fsdp", "accum.processes=2", "tracking=none", "accum.reduce_every_micro_batch=true"]
    options.append(trouble("SIGINT", 14, mark=folder / "mark", rank=0))
    done = run_command("run", *EXACT, *options, folder=folder)
    assert done.code == 130, done
    run = only_run(folder)
    # The evaluation command opens it in one process.
    evaluation = run_command("evaluate", f"checkpoint={run}", "trust=[tests]", folder=folder)
    assert evaluation.code == 0 and "accuracy" in evaluation.stdout, evaluation
    return run


@pytest.mark.slow
def test_a_killed_rank_ends_its_job_and_the_sweep_goes_on(tmp_path: Path) -> None:
    options = [*SMALL, "accum=ddp", "accum.processes=2", "trainer.max_updates=8", "seed=0,1"]
    began = time.monotonic()
    killer, env = trouble("SIGKILL", 5, rank=1, mark=tmp_path / "mark"), environment(**FRESH_RANKS)
    done = run_command("run", "-m", *options, killer, folder=tmp_path, env=env)
    assert done.code == 1 and time.monotonic() - began < 300
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("  job ")]
    assert "seed=0" in error and "rank 1 (process" in error and "SIGKILL" in error
    states = {record.params.get("seed", "sweep"): record.status for record in records(tmp_path)}
    assert states == {"sweep": "FAILED", "0": "FAILED", "1": "FINISHED"}


@pytest.mark.slow
def test_the_first_rank_killed_leaves_a_failed_run(tmp_path: Path) -> None:
    killer = trouble("SIGKILL", 5, rank=0, mark=tmp_path / "mark")
    line, env = [*SMALL, "accum=ddp", "accum.processes=2", killer], environment(**FRESH_RANKS)
    done = run_command("run", *line, folder=tmp_path, env=env)
    assert done.code == 1 and done.stderr.startswith("error: rank 0 (process"), done
    (record,) = records(tmp_path)
    assert record.status == "FAILED"
    assert "SIGKILL" in json.loads((only_run(tmp_path) / "summary.json").read_text())["error"]


@pytest.mark.slow
def test_a_bug_on_one_rank_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    bug = trouble("ERROR", 5, rank=1, mark=tmp_path / "mark")
    line, env = [*SMALL, "accum=ddp", "accum.processes=2", bug], environment(**FRESH_RANKS)
    done = run_command("run", *line, folder=tmp_path, env=env)
    assert done.code == 1
    assert "rank 1" in done.stderr and "ZeroDivisionError: one rank's own bug" in done.stderr, done
    (record,) = records(tmp_path)
    assert record.status == "FAILED"


STREAMED = ["data.resident=false", "data.workers=1"]


@pytest.mark.parametrize(
    ("number", "code", "options"),
    [pytest.param(signal.SIGINT, 130, [], marks=pytest.mark.slow), (signal.SIGTERM, 143, STREAMED)],
)
def test_a_signal_ends_all_ranks_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals, code: int, options: list[str]
) -> None:
    """SIGTERM reaches whole process groups: the workers that read data must not fall with it."""
    ranks = ["accum=ddp", "accum.processes=2", "trainer.epochs=5000"]
    line = [sys.executable, "-m", "accumexp.run", *SMALL, *ranks, *options]
    env = environment(ACCUMEXP_TEST=str(os.getpid()))
    with subprocess.Popen(
        line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        until(lambda: any(path.stat().st_size for path in tmp_path.glob("outputs/*/*/metrics.jsonl")))
        assert len(ranks_alive()) >= 3
        run.send_signal(number)
        asked = time.monotonic()
        out, err = run.communicate(timeout=120)
        took = time.monotonic() - asked
    assert run.returncode == code and f"stopped by {number.name}" in out, (out, err)
    assert took < 40, took  # 1 s on a quiet machine
    assert not ranks_alive()
    assert [record.status for record in records(tmp_path)] == ["KILLED"]
    assert find(only_run(tmp_path)).is_file()


@pytest.mark.slow
def test_ranks_do_not_outlive_the_command_that_started_them(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "accumexp.run",
        *SMALL,
        "accum=ddp",
        "accum.processes=2",
        "trainer.epochs=5000",
    ]
    env = environment(ACCUMEXP_TEST=str(os.getpid()))
    with subprocess.Popen(
        line, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        until(lambda: any(path.stat().st_size for path in tmp_path.glob("outputs/*/*/metrics.jsonl")))
        run.kill()
        run.wait()
        until(lambda: not ranks_alive())


def test_a_rank_that_cannot_hear_a_signal_ends_all_the_same(tmp_path: Path) -> None:
    """Its main thread computes for long without Python, as one does that waits for a rank that is gone."""
    (tmp_path / "stuck.py").write_text(
        "import time, torch\n"
        "from accumexp.environment.signals import StopSignals\n"
        "import signal, subprocess\n"
        "matrix = torch.ones(7000, 7000, dtype=torch.float64)\n"
        "with StopSignals(deadline=0.5):\n"
        # A child that ends is no reason to stop.
        "    signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "    subprocess.run(['true'])\n"
        "    time.sleep(1.0)\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        matrix @ matrix\n"
    )
    line = [sys.executable, str(tmp_path / "stuck.py")]
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True) as stuck:
        assert stuck.stdout is not None and stuck.stdout.readline() == "ready\n"
        time.sleep(0.5)
        stuck.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert stuck.wait(60) == 143
    assert time.monotonic() - asked < 8, "a product takes longer"


def test_an_error_on_all_ranks_loses_no_loss(tmp_path: Path) -> None:
    options = [*SMALL, "accum=ddp", "accum.processes=2", "tracking=none", "trainer.log_every=100"]
    done = run_command("run", *options, trouble("ERROR", 7), folder=tmp_path)
    assert done.code == 1, done
    assert [row["update"] for row in journal(only_run(tmp_path))] == list(range(1, 8))
    reference = run_command(
        "run", *SMALL, "tracking=none", "trainer.max_updates=7", folder=tmp_path / "alone"
    )
    assert reference.code == 0, reference
    losses, expected = (
        [row["train/loss"] for row in journal(only_run(folder)) if "train/loss" in row][:7]
        for folder in (tmp_path, tmp_path / "alone")
    )
    assert losses == pytest.approx(expected, rel=1e-5)
