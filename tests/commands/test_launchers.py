"""Hydra's launchers: each composes, gives its jobs their cores, and is told what failed as the others are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from accumexp.conf import conf_dir
from accumexp.errors import UsageError
from accumexp.sweeps import job_resources
from accumexp.sweeps.job import SweepJob

from ..support.command import records, run_command
from ..support.experiments import composed
from .test_sweep import table

SMALL = ["model=mlp", "trainer.max_updates=2", "trainer.epochs=1", "tracking.system_metrics=false"]
PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
}


def hydra_of(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True).hydra


def threads(launcher: str, *words: str, batch: int | None = 4, processes: int = 1) -> int | None:
    pytest.importorskip(PLUGINS[launcher])
    words = tuple(f"{'+' if 'ray' in word else ''}hydra.launcher.{word}" for word in words)
    composed = hydra_of(f"hydra/launcher={launcher}", *words).launcher
    return job_resources.threads_of_a_rank(composed, batch, processes)


@pytest.fixture(autouse=True)
def eight_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(job_resources, "cores", lambda: 8)


# What a job's ranks get of eight cores -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_jobs", "batch", "expected"),
    [(2, 4, 4), (3, 9, 2), (8, 9, 1), (16, 99, 1), (-1, 99, 1), (-1, 4, 2), (-5, 99, 2), (2, None, 4)],
)
def test_joblibs_jobs_share_the_cores_by_its_own_counting(
    n_jobs: int, batch: int | None, expected: int
) -> None:
    assert threads("joblib", f"n_jobs={n_jobs}", batch=batch) == expected


def test_a_job_with_nobody_beside_it_keeps_torchs_own_threads() -> None:
    assert threads("joblib", "n_jobs=1") is None
    assert threads("joblib", "n_jobs=4", batch=1) is None
    assert threads("submitit_local", batch=1) is None
    assert job_resources.threads_of_a_rank(hydra_of().launcher, 9, 2) is None


def test_jobs_beside_each_other_do_not_each_take_the_free_memory() -> None:
    pytest.importorskip(PLUGINS["joblib"])
    beside = hydra_of("hydra/launcher=joblib", "hydra.launcher.n_jobs=2").launcher
    with pytest.raises(
        UsageError, match="accum.steps=auto: jobs that run at the same time .* give accum.memory_limit"
    ):
        job_resources.check_memory(composed("accum.steps=auto"), beside, 4)
    job_resources.check_memory(composed("accum.steps=auto"), hydra_of().launcher, 4)
    job_resources.check_memory(composed("accum.steps=auto", "accum.memory_limit=1GiB"), beside, 4)
    job_resources.check_memory(composed("accum.steps=4"), beside, 4)


def test_submitits_jobs_on_this_machine_all_start_at_once() -> None:
    assert threads("submitit_local", batch=4) == 2
    assert threads("submitit_local", batch=20) == 1
    assert threads("submitit_local", batch=None) == 1
    assert threads("submitit_local", "tasks_per_node=2", batch=2, processes=2) == 2
    assert threads("submitit_local", "cpus_per_task=3", batch=20) == 3
    assert threads("submitit_local", "cpus_per_task=4", batch=20, processes=2) == 2
    assert threads("submitit_local", "tasks_per_node=2", "cpus_per_task=3", processes=2) == 3


def test_a_cluster_gives_its_jobs_their_cores_itself() -> None:
    assert threads("submitit_slurm", "cpus_per_task=3", batch=20) is None


def test_rays_jobs_get_what_they_ask_for_or_a_share() -> None:
    assert threads("ray", batch=20) == 1
    assert threads("ray", batch=2) == 4
    assert threads("ray", "ray.init.num_cpus=2", batch=20) == 4
    assert threads("ray", "ray.remote.num_cpus=3", batch=20) == 3
    assert threads("ray", "ray.remote.num_cpus=0.5", batch=20) == 1
    assert threads("ray", "ray.remote.num_cpus=4", batch=20, processes=2) == 2
    assert threads("ray", "ray.init.address=auto", batch=2) == 1


def test_the_threads_that_are_asked_for_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = hydra_of("hydra/launcher=joblib", "hydra.launcher.n_jobs=4").launcher
    asked, left = composed("trainer.threads=3", "callbacks=default"), composed("callbacks=default")
    for config in (asked, left):
        job_resources.share_cores(config, launcher, 20)
        assert config.callbacks["progress"]["show"] is False
    assert (asked.trainer.threads, left.trainer.threads) == (3, 2)


# How a job in another process knows its sweep ----------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "params", "most", "expected"),
    [
        (["accum.steps=1,2,4", "seed=0,1"], {}, None, 6),
        (["accum.steps=1,2,4", "seed=0,1"], {}, 4, 4),
        (["accum.steps=1,2"], {"accum.steps": "1,2,4,8", "seed": "0,1,2"}, None, 6),
        (["seed=range(5)", "model=choice(mlp,lenet5)", "+data.augment={a: [1,2]}"], {}, None, 10),
        (["model=glob(*)"], {}, None, None),
    ],
)
def test_a_job_counts_those_handed_over_with_it(
    tmp_path: Path, task: list[str], params: dict[str, str], most: int | None, expected: int | None
) -> None:
    written = {"hydra": {"overrides": {"task": task, "hydra": ["hydra/launcher=x", "hydra.mode=MULTIRUN"]}}}
    OmegaConf.save(OmegaConf.create(written), tmp_path / "multirun.yaml")
    hydra = hydra_of(f"hydra.sweep.dir={tmp_path}", "hydra.mode=MULTIRUN", "hydra.job.num=3")
    hydra.runtime.output_dir = str(tmp_path / "3_name")
    hydra.sweeper.params, hydra.sweeper.max_batch_size = params, most
    job = SweepJob.of(hydra)
    assert job and (job.number, job.name, job.batch) == (3, "name", expected)
    assert job.command.startswith("python -m accumexp.run -m ") and "MULTIRUN" not in job.command
    assert task[0] in job.command.replace("'", "") and job.command.endswith(" hydra/launcher=x")


# Real sweeps, a job of which fails ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("joblib", ["hydra.launcher.n_jobs=2"]),
        ("ray", ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"]),
    ],
)
def test_a_real_sweep_in_other_processes_ends_as_one_in_this(
    tmp_path: Path, launcher: str, words: list[str]
) -> None:
    """submitit's is `test_the_tasks_of_a_cluster_job_are_the_ranks`."""
    pytest.importorskip(PLUGINS[launcher])
    options = ["accum.steps=0,2", *SMALL, f"hydra/launcher={launcher}", *words]
    done = run_command("run", "-m", *options, folder=tmp_path, fresh=True)
    assert done.code == 1, done
    head, failed, *how = done.stderr.splitlines()[-4:]
    assert how[0] == "go on with" and "sweep.resume=" in how[1]
    assert head == "error: 1 of 2 jobs failed"
    assert failed.endswith("accum.steps=0: at least 1") and "Traceback" not in done.stderr
    child, parent = sorted(records(tmp_path), key=lambda record: "accumexp.sweep" in record.tags)
    assert (child.status, parent.status) == ("FINISHED", "FAILED")
    assert child.tags["mlflow.parentRunId"] == parent.run_id
    for record in (child, parent):
        assert record.tags["accumexp.command"].startswith(
            "python -m accumexp.run -m accum.steps=0,2 model=mlp"
        )
    assert child.params["trainer.threads"] == str(max(1, job_resources.cores() // 2))
    assert [row[:2] for row in table(done.stdout)] == [["2", "1"]]
