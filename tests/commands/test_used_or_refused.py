"""Law 12: what a user gives is used, or refused by name, and the record says what happened."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..support.command import Done, environment, only_run, run_command
from ..support.stores import make_empty

SMALL = ("model=mlp", "device=cpu", "data.batch_size=512", "trainer.log_every=1", "trainer.progress=false")
UNTRACKED = (*SMALL, "tracking=none")
UPDATES = 3  # in an epoch of 1,293 samples


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["final"]


# A resumed run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs under a cosine schedule, and one that stopped inside its second epoch."""
    base = tmp_path_factory.mktemp("stopped")
    run_command("run", *UNTRACKED, "scheduler=cosine", "trainer.epochs=2", "hydra.run.dir=epoch", folder=base)
    run_command("run", *UNTRACKED, "trainer.max_updates=4", "hydra.run.dir=inside", folder=base)
    return base


@pytest.fixture
def resume(stopped: Path, tmp_path: Path) -> Callable[..., tuple[Done, Path]]:
    """Resumes a copy of one of the `stopped` runs with overrides."""

    def call(which: str, *overrides: str) -> tuple[Done, Path]:
        folder = tmp_path / which
        shutil.copytree(stopped / which, folder)
        return run_command("run", f"resume={folder}", *overrides, folder=tmp_path), folder

    return call


def test_law_12_a_rate_given_at_resume_is_that_of_a_schedule_with_it(
    resume: Callable[..., tuple[Done, Path]],
) -> None:
    done, folder = resume("epoch", "optimizer.lr=0.001", "optimizer.momentum=0.5", "trainer.epochs=4")
    assert done.code == 0, done
    total = 4 * UPDATES
    rates = {row["update"]: row["train/lr"] for row in rows(folder) if "train/lr" in row}
    for update in range(2 * UPDATES + 1, total + 1):
        expected = 0.001 * (1 + math.cos(math.pi * (update - 1) / (total - 1))) / 2
        assert rates[update] == pytest.approx(expected, abs=1e-12)
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["lr"] == 0.001


def test_law_12_a_batch_size_given_at_an_epochs_end_trains_on_every_sample_once(
    resume: Callable[..., tuple[Done, Path]],
) -> None:
    done, folder = resume("epoch", "data.batch_size=256", "trainer.epochs=3")
    assert done.code == 0, done
    assert final(folder)["samples"] == 3 * 1293
    assert final(folder)["updates"] == 2 * UPDATES + 6
    assert final(folder)["epochs"] == 3


def test_law_12_what_follows_from_a_given_key_follows_it(
    resume: Callable[..., tuple[Done, Path]],
) -> None:
    done, folder = resume("epoch", "monitor=eval/loss", "mode=min", "trainer.epochs=3")
    assert done.code == 0, done
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["callbacks"]["checkpoint"]["monitor"] == "eval/loss"
    assert written["callbacks"]["checkpoint"]["mode"] == "min"


def test_law_12_a_run_of_one_process_goes_on_in_two(resume: Callable[..., tuple[Done, Path]]) -> None:
    done, folder = resume("epoch", "accum.strategy=ddp", "accum.processes=2", "trainer.epochs=3")
    assert done.code == 0, done
    assert "on each of 2 ranks" in done.stdout
    assert yaml.safe_load((folder / "config.yaml").read_text())["accum"]["processes"] == 2
    assert final(folder)["updates"] == 3 * UPDATES


@pytest.mark.parametrize(
    ("which", "overrides", "says"),
    [
        ("inside", ["data.batch_size=256"], "data.batch_size=256: the run stopped inside epoch 2"),
        ("inside", ["data.split_seed=5"], "data.split_seed=5: the run stopped inside epoch 2"),
        ("epoch", ["seed=5", "trainer.epochs=3"], "seed=5: its weights and the order"),
        ("epoch", ["optimizer._target_=torch.optim.Adagrad"], "optimizer._target_=torch.optim.Adagrad: the"),
        ("epoch", ["hydra.run.dir=elsewhere"], "hydra.run.dir=elsewhere: a resumed run goes on in its own"),
        ("epoch", ["trainer.epochs=1"], "trainer.epochs=1: the run is in epoch 3 already"),
        ("inside", ["trainer.max_updates=2"], "trainer.max_updates=2: the run has made 4 updates"),
        ("epoch", ["tracking.backend=mlflow", "trainer.epochs=3"], "tracking.backend=mlflow: the run has no"),
        ("epoch", ["data.split_seed=5", "trainer.epochs=3"], "data.split_seed=5: would evaluate on samples"),
        (
            "epoch",
            ["optimizer.groups=[{params: '*.bias'}]", "trainer.epochs=3"],
            "the checkpoint holds the state of other groups",
        ),
        (
            "epoch",
            ["accum.init_scale=4", "trainer.epochs=3"],
            "accum.init_scale=4.0: has no effect with accum.l",
        ),
        (
            "epoch",
            ["scheduler=constant", "trainer.epochs=3"],
            "scheduler=constant: only values of the run's own",
        ),
    ],
)
def test_law_12_what_a_resumed_run_cannot_use_is_refused_by_name(
    which: str, overrides: list[str], says: str, resume: Callable[..., tuple[Done, Path]], stopped: Path
) -> None:
    done, folder = resume(which, *overrides)
    assert says in done.error()
    assert (folder / "config.yaml").read_text() == (stopped / which / "config.yaml").read_text()


def test_law_12_a_moved_project_goes_on_in_its_moved_record(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    old, new = tmp_path / "old", tmp_path / "new"
    run_command("run", *SMALL, "trainer.epochs=1", "tracking.system_metrics=false", folder=old)
    old.rename(new)
    run, store = only_run(new), f"sqlite:///{new / 'mlflow.db'}"
    done = run_command("run", f"resume={run}", "trainer.epochs=2", f"tracking.uri={store}", folder=new)
    assert done.code == 0, done
    client = MlflowClient(store)
    (recorded,) = client.search_runs(["1"])
    points = client.get_metric_history(recorded.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(1, 2 * UPDATES + 1))


# Where a run is recorded -------------------------------------------------------------------------------


def test_law_12_mlflows_environment_counts_where_the_configuration_is_silent(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    make_empty(tmp_path).rename(tmp_path / "other.db")
    parent_of = MlflowClient(f"sqlite:///{tmp_path / 'other.db'}")
    experiment = parent_of.create_experiment("mine", artifact_location=(tmp_path / "artifacts").as_uri())
    parent = parent_of.create_run(experiment).info.run_id
    env = environment(
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'other.db'}",
        MLFLOW_EXPERIMENT_NAME="mine",
        MLFLOW_RUN_ID=parent,
    )
    quick = (*SMALL, "trainer.epochs=1", "tracking.system_metrics=false")
    done = run_command("run", *quick, folder=tmp_path, env=env)
    assert done.code == 0, done
    assert "MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID" in " ".join(done.stdout.split())
    assert not (tmp_path / "mlflow.db").exists()
    runs = parent_of.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [run.info.status for run in runs] == ["FINISHED"]
    done = run_command("run", *quick, "tracking.experiment=theirs", folder=tmp_path, env=env)
    assert done.code == 0, done
    assert parent_of.get_experiment_by_name("theirs") is not None
    missing = {**env, "MLFLOW_RUN_ID": "0" * 32}
    assert "MLFLOW_RUN_ID=000" in run_command("run", *quick, folder=tmp_path, env=missing).error()
    missing = {**env, "MLFLOW_EXPERIMENT_NAME": "", "MLFLOW_EXPERIMENT_ID": "77"}
    assert (
        "MLFLOW_EXPERIMENT_ID=77: no such" in run_command("run", *quick, folder=tmp_path, env=missing).error()
    )


def test_law_12_a_job_in_its_own_folder_is_recorded_where_the_command_was_run(tmp_path: Path) -> None:
    quick = (*SMALL, "trainer.epochs=1", "tracking.system_metrics=false", "hydra.job.chdir=true")
    done = run_command("run", "-m", *quick, "seed=0,1", "report.write=false", folder=tmp_path)
    assert done.code == 0, done
    assert [path.parent for path in tmp_path.rglob("mlflow.db")] == [tmp_path]
    assert len(list(tmp_path.glob("multirun/*/*/[01]_*/summary.json"))) == 2
    done = run_command("run", *quick, "data=mnist", "data.root=pictures", folder=tmp_path)
    assert f"data.root={tmp_path / 'pictures'}" in done.stderr


def test_law_12_a_folder_holds_one_run(tmp_path: Path) -> None:
    quick = (*UNTRACKED, "trainer.epochs=1", "hydra.run.dir=out")
    assert run_command("run", *quick, folder=tmp_path).code == 0
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    done = run_command("run", *quick, "optimizer.lr=0.3", folder=tmp_path)
    assert "hydra.run.dir=" in done.error() and "holds a run already" in done.error()
    assert "holds a run already" in run_command("prove", *quick, folder=tmp_path).error()
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


# A sweep -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's own configuration, and a sweep over two seeds of it in folders that they name."""
    base = tmp_path_factory.mktemp("sweep")
    (base / "own").mkdir()
    _write_own(base, 0.02)
    arguments = ["-m", "--config-dir", "own", "--config-name", "mine", *UNTRACKED, "trainer.epochs=1"]
    done = run_command(
        "run",
        *[*arguments, "seed=0,1", "report.write=false", "hydra.sweep.dir=s", "hydra.sweep.subdir=of-${seed}"],
        folder=base,
    )
    assert done.code == 0, done
    return base


def _write_own(base: Path, rate: float) -> None:
    lines = ["defaults:", "  - config", "  - _self_", "optimizer:", f"  lr: {rate}"]
    (base / "own" / "mine.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def copied(sweep: Path, tmp_path: Path) -> Path:
    shutil.copytree(sweep, tmp_path / "copy")
    # The flags hold the absolute path of the folder that the sweep was composed from.
    launches = tmp_path / "copy" / "s" / "launches.json"
    launches.write_text(launches.read_text().replace(str(sweep), str(tmp_path / "copy")))
    return tmp_path / "copy"


def test_law_12_a_sweep_goes_on_from_the_files_it_was_composed_from(copied: Path) -> None:
    shutil.rmtree(copied / "s" / "of-1")
    done = run_command("run", "-m", "sweep.resume=s", "trust=true", "report.write=false", folder=copied)
    assert done.code == 0, done
    for seed in (0, 1):
        written = yaml.safe_load((copied / "s" / f"of-{seed}" / "config.yaml").read_text())
        assert (written["optimizer"]["lr"], written["seed"]) == (0.02, seed)


def test_law_12_a_sweep_whose_files_have_changed_is_not_mixed(copied: Path) -> None:
    _write_own(copied, 0.5)
    before = (copied / "s" / "of-0" / "summary.json").read_bytes()
    done = run_command("run", "-m", "sweep.resume=s", "trust=true", "report.write=false", folder=copied)
    assert done.code == 2
    assert "optimizer.lr=0.5: the run in" in done.stderr
    assert (copied / "s" / "of-0" / "summary.json").read_bytes() == before


def test_law_12_other_files_than_a_sweeps_are_refused(copied: Path) -> None:
    done = run_command("run", "-m", "sweep.resume=s", "--config-name", "config", folder=copied)
    assert done.code == 2
    assert "its jobs are composed from" in done.stderr


def test_law_12_two_jobs_in_one_folder_are_refused(tmp_path: Path) -> None:
    arguments = [*UNTRACKED, "trainer.epochs=1", "seed=0,1", "hydra.sweep.subdir=same"]
    done = run_command("run", "-m", *arguments, folder=tmp_path)
    assert done.code == 2
    assert "hydra.sweep.subdir=same: is the folder of the job" in done.stderr


def test_law_12_long_and_non_latin_overrides_name_folders_within_the_limit_of_bytes(tmp_path: Path) -> None:
    arguments = [*UNTRACKED, "trainer.epochs=1", f"+tracking.tags.x='{'日本語' * 60}','b'"]
    done = run_command("run", "-m", *arguments, "report.write=false", folder=tmp_path)
    assert done.code == 0, done
    assert len(list(tmp_path.glob("multirun/*/*/[01]_*/summary.json"))) == 2


# Labels that the loss ignores ---------------------------------------------------------------------------

IGNORED = """
import torch
from torch.utils.data import TensorDataset

def ignored(count):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    labels = inputs.argmax(1) % 3
    labels[::4] = 255
    return TensorDataset(inputs, labels)
"""


@pytest.mark.parametrize("resident", ["true", "false"])
def test_law_12_accuracy_leaves_out_what_the_loss_leaves_out(resident: str, tmp_path: Path) -> None:
    from accumexp.training.trained_model import load_model

    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "labels.py").write_text(IGNORED)
    (tmp_path / "c" / "data").mkdir(parents=True)
    lines = ["train: {_target_: labels.ignored, count: 64}", "test: {_target_: labels.ignored, count: 20}"]
    (tmp_path / "c" / "data" / "labels.yaml").write_text("\n".join([*lines, "num_classes: 3"]) + "\n")
    arguments = ["--config-dir", "c", "data=labels", "+loss.ignore_index=255", f"data.resident={resident}"]
    arguments += ["model=mlp", "model.inputs=4", "data.workers=0", "data.batch_size=16", "trainer.epochs=2"]
    arguments += ["tracking=none", "device=cpu", "hydra.run.dir=r", "callbacks.checkpoint.keep_last=1"]
    done = run_command("run", *arguments, folder=tmp_path, env=environment(tmp_path / "modules"))
    assert done.code == 0, done
    scope: dict[str, Any] = {}
    exec(IGNORED, scope)
    inputs, labels = scope["ignored"](20).tensors
    valid = labels != 255
    right = (load_model(tmp_path / "r", best=False, trust=["labels"])(inputs).argmax(1) == labels)[valid]
    assert final(tmp_path / "r")["accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-6)


# Numbers out of range ----------------------------------------------------------------------------------


def test_law_12_what_torch_accepts_of_nonsense_is_warned_of(tmp_path: Path) -> None:
    done = run_command("run", *UNTRACKED, "trainer.max_updates=1", "optimizer.momentum=1.5", folder=tmp_path)
    assert done.code == 0, done
    assert "warning: optimizer.momentum=1.5: usual is below 1" in done.stdout


# Names and values that a callback logs -----------------------------------------------------------------

ODD = """
import torch
from accumexp.callbacks import Callback

class OddNames(Callback):
    def measured(self, trainer, values):
        values["train/acc@5"] = torch.tensor(0.5)

class NoNumber(Callback):
    def measured(self, trainer, values):
        values["train/words"] = "many"

class Fails(Callback):
    def update_end(self, trainer):
        if trainer.progress.update == 2:
            raise RuntimeError("of the user's own")
"""


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "odd.py").write_text(ODD)
    return environment(tmp_path / "modules")


def test_law_12_an_odd_name_is_recorded_under_a_legal_one(odd: dict[str, str], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (tmp_path / "c" / "metrics").mkdir(parents=True)
    metric = "{_target_: torchmetrics.classification.MulticlassF1Score, num_classes: 10}"
    (tmp_path / "c" / "metrics" / "odd.yaml").write_text(f'"f1(macro)": {metric}\n')
    quick = (
        *SMALL,
        "trainer.epochs=1",
        "tracking.system_metrics=false",
        "+callbacks.odd._target_=odd.OddNames",
    )
    searchpath = f"hydra.searchpath=[file://{tmp_path / 'c'}]"
    done = run_command(
        "run", *quick, searchpath, "metrics=odd", "monitor=eval/loss", "mode=min", folder=tmp_path, env=odd
    )
    assert done.code == 0, done
    (run,) = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert {"train/acc_5", "train/loss", "eval/f1_macro_", "final/f1_macro_"} <= run.data.metrics.keys()
    assert rows(only_run(tmp_path))[0]["train/acc@5"] == 0.5


def test_law_12_what_is_no_number_is_named(odd: dict[str, str], tmp_path: Path) -> None:
    done = run_command("run", *UNTRACKED, "+callbacks.odd._target_=odd.NoNumber", folder=tmp_path, env=odd)
    assert done.code == 1
    assert "train/words: a callback logs numbers, not a str" in done.stderr


def test_law_12_losses_since_the_last_read_are_recorded_however_a_run_ends(
    odd: dict[str, str], tmp_path: Path
) -> None:
    arguments = [*UNTRACKED, "trainer.log_every=50", "+callbacks.odd._target_=odd.Fails"]
    done = run_command("run", *arguments, folder=tmp_path, env=odd)
    assert done.code == 1
    assert [row["update"] for row in rows(only_run(tmp_path)) if "train/loss" in row] == [1, 2]
