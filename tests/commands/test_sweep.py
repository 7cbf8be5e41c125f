"""Sweeps from the command line: one parent, a child a job, a table, and what is left when some fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from accumexp.conf import conf_dir
from accumexp.errors import UsageError
from accumexp.sweeps.sweep import sweep_runs

from ..support.command import (
    Done,
    Record,
    journal,
    left_behind,
    only_sweep,
    records,
    run_command,
)
from ..support.experiments import composed
from ..support.trouble import trouble

SMALL = ["model=mlp", "trainer.epochs=2", "tracking.system_metrics=false"]


@dataclass(frozen=True)
class Swept:
    """A sweep that has ended: its process, its folder and what MLflow holds of it."""

    done: Done
    folder: Path
    parent: Record
    children: list[Record]


def swept(base: Path, *arguments: str) -> Swept:
    """`python -m accumexp.run -m <arguments>` in `base`."""
    done = run_command("run", "-m", *arguments, folder=base)
    folder, runs = only_sweep(base), records(base)
    parents = [record for record in runs if "mlflow.parentRunId" not in record.tags]
    assert len(parents) == 1, parents
    return Swept(done, folder, parents[0], [record for record in runs if record not in parents])


def table(stdout: str) -> list[list[str]]:
    """The rows of the sweep's table, from its rule to the empty line after it, as words."""
    lines = stdout.splitlines()
    rule = next(n for n, line in enumerate(lines) if line.strip() and set(line.strip()) <= set("─ "))
    end = next(n for n in range(rule + 1, len(lines)) if not lines[n].strip())
    return [line.split() for line in lines[rule + 1 : end]]


# A sweep of which some jobs fail -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def partly_failed(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    return swept(tmp_path_factory.mktemp("sweep"), "accum.steps=1,0,4", "seed=0,1", *SMALL)


def test_a_sweep_with_failed_jobs_names_them_last_and_exits_with_1(partly_failed: Swept) -> None:
    done = partly_failed.done
    assert done.code == 1, done
    head, *jobs, how, command = done.stderr.splitlines()[-5:]
    assert head == "error: 2 of 6 jobs failed"
    assert how == "go on with"
    assert command == f"  python -m accumexp.run -m sweep.resume={partly_failed.folder}"
    for seed, line in enumerate(jobs):
        assert line.startswith("  job ") and f"accum.steps=0 seed={seed}" in line
        assert line.endswith(": accum.steps=0: at least 1")
    assert "Traceback" not in done.stderr + done.stdout


def test_the_other_jobs_of_a_sweep_finish_as_children_of_a_failed_parent(partly_failed: Swept) -> None:
    parent, children = partly_failed.parent, partly_failed.children
    assert parent.status == "FAILED"
    assert [child.status for child in children] == ["FINISHED"] * 4
    assert {child.tags["mlflow.parentRunId"] for child in children} == {parent.run_id}
    ran = sorted((child.params["accum.steps"], child.params["seed"]) for child in children)
    assert ran == [("1", "0"), ("1", "1"), ("4", "0"), ("4", "1")]
    assert {child.params["data.batch_size"] for child in children} == {"128"}
    assert parent.tags["accumexp.command"].startswith("python -m accumexp.run -m accum.steps=1,0,4 seed=0,1")
    assert parent.tags["accumexp.folder"] == str(partly_failed.folder)


def test_runs_of_a_sweep_are_named_after_what_varies(partly_failed: Swept) -> None:
    names = sorted(record.name for record in partly_failed.children)
    assert names == [f"accum.steps={steps},seed={seed}" for steps in (1, 4) for seed in (0, 1)]


def test_a_sweep_ends_in_a_table_by_what_varied_and_the_parents_address(partly_failed: Swept) -> None:
    stdout, children = partly_failed.done.stdout, partly_failed.children
    rows = table(stdout)
    assert [row[:2] for row in rows] == [["1", "2"], ["4", "2"]]  # accum.steps, seeds
    for row in rows:
        members = [child for child in children if child.params["accum.steps"] == row[0]]
        accuracies = [child.points["final/accuracy"][0][1] for child in members]
        assert float(row[2]) == pytest.approx(100 * sum(accuracies) / 2, abs=1e-2)
    addresses = [line for line in stdout.splitlines() if line.startswith("UI ")]
    assert len(addresses) == 1 and partly_failed.parent.run_id in addresses[0]
    assert str(partly_failed.folder) in stdout


def test_each_job_tells_in_its_folder_how_it_ended(partly_failed: Swept) -> None:
    jobs = sweep_runs(partly_failed.folder)
    assert [job.folder.name.partition("_")[0] for job in jobs] == ["0", "1", "2", "3", "4", "5"]
    assert [job.status for job in jobs] == ["FINISHED"] * 2 + ["FAILED"] * 2 + ["FINISHED"] * 2
    assert {child.run_id for child in partly_failed.children} == {
        job.run_id for job in jobs if job.status == "FINISHED"
    }


# Other sweeps ------------------------------------------------------------------------------------------


def test_a_typo_in_a_sweep_leaves_no_parent_and_no_folder(tmp_path: Path) -> None:
    done = run_command("run", "-m", "accum.stps=1,2", folder=tmp_path)
    assert done.error() == "accum.stps: no such key, did you mean accum.steps?"
    assert left_behind(tmp_path) == []


def test_sigterm_kills_the_job_and_the_parent_and_starts_no_other(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "accum.steps=1,2,4", "seed=0", trouble("SIGTERM", 1, steps=2), *SMALL)
    assert sweep.done.code == 143, sweep.done
    assert sweep.parent.status == "KILLED"
    ended = {child.params["accum.steps"]: child.status for child in sweep.children}
    assert ended == {"1": "FINISHED", "2": "KILLED"}
    assert [row[0] for row in table(sweep.done.stdout)] == ["1"]
    how = ["go on with", f"  python -m accumexp.run -m sweep.resume={sweep.folder} trust=[tests]"]
    assert sweep.done.stdout.splitlines()[-2:] == how
    assert "Traceback" not in sweep.done.stderr


def test_equal_batch_sweeps_steps_and_seeds_over_one_batch() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", ["experiment=equal_batch"], return_hydra_config=True)
    params = {key: str(value).split(",") for key, value in cfg.hydra.sweeper.params.items()}
    assert params["accum.steps"] == ["1", "2", "4", "8"]
    assert math.prod(map(len, params.values())) == 20
    assert cfg.data.batch_size == 128


def test_equal_batch_gives_the_larger_batchs_result_whatever_the_steps(tmp_path: Path) -> None:
    done = run_command(
        "run",
        *("-m", "experiment=equal_batch", "model=mlp", "trainer.epochs=1", "tracking=none"),
        *("accum.steps=1,8", "seed=0,1"),
        folder=tmp_path,
    )
    assert done.code == 0, done
    jobs = sweep_runs(only_sweep(tmp_path))
    assert len(jobs) == 4
    losses = {
        (steps, seed): job.final["loss"]
        for job in jobs
        for steps in (1, 8)
        for seed in (0, 1)
        if {f"accum.steps={steps}", f"seed={seed}"} <= set(job.overrides)
    }
    assert losses.keys() == {(1, 0), (1, 1), (8, 0), (8, 1)}
    for seed in (0, 1):
        assert losses[8, seed] == pytest.approx(losses[1, seed], rel=1e-4)
    assert losses[1, 0] != pytest.approx(losses[1, 1], rel=1e-4)
    assert [row[:2] for row in table(done.stdout)] == [["1", "2"], ["8", "2"]]
    assert not (tmp_path / "mlflow.db").exists()


QUESTION = "experiment=batch_size_question"


def test_batch_size_question_sees_as_many_samples_at_a_rate_that_follows_the_batch() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", [QUESTION], return_hydra_config=True)
    params = {key: str(value).split(",") for key, value in cfg.hydra.sweeper.params.items()}
    assert math.prod(map(len, params.values())) == 25
    configs = {size: composed(QUESTION, f"data.batch_size={size}") for size in params["data.batch_size"]}
    steps = {size: config.accum.steps for size, config in configs.items()}
    assert steps == {"32": 1, "64": 2, "128": 4, "256": 8, "512": 16}
    for size, config in configs.items():
        assert config.trainer.epochs == 30 and config.trainer.max_updates is None
        assert config.optimizer["lr"] == pytest.approx(0.025 * math.sqrt(int(size) / 128))


def test_a_rate_that_follows_the_batch_needs_a_known_rule_and_a_batch() -> None:
    by = 'optimizer.lr="${scaled_rate:0.05,128,${data.batch_size},%s}"'
    GlobalHydra.instance().clear()
    assert composed("data.batch_size=512", by % "linear").optimizer["lr"] == pytest.approx(0.2)
    with pytest.raises(UsageError, match="^optimizer.lr: .*cubic: no rule .* known are linear, sqrt$"):
        composed("data.batch_size=512", by % "cubic")
    with pytest.raises(UsageError, match="^optimizer.lr: .* give data.batch_size="):
        composed(QUESTION, "data.batch_size=null")


def test_batch_size_question_has_a_noise_scale_without_accumulation_too(tmp_path: Path) -> None:
    done = run_command(
        "run",
        *("-m", QUESTION, "model=mlp", "trainer.epochs=1", "tracking=none"),
        *("data.batch_size=32,64", "seed=0"),
        folder=tmp_path,
    )
    assert done.code == 0, done
    for folder in (path.parent for path in only_sweep(tmp_path).glob("*/metrics.jsonl")):
        points = [row["train/noise_scale"] for row in journal(folder) if "train/noise_scale" in row]
        assert len(points) >= 2 and min(points) > 0
    assert {job.final["samples"] for job in sweep_runs(only_sweep(tmp_path))} == {1293}
