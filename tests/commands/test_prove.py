"""`python -m accumexp.prove` and `prove=true`: what is proved, what is not and why, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..support.command import PACKAGE_PARENT, environment, journal, only_run, record_of, records, run_command

QUICK = ["device=cpu", "model=mlp", "model.hidden=[16]", "data.image_size=8", "proof.updates=40"]
BARE = [*QUICK, "tracking=none"]

USER_MODULE = '''
import torch
from torch import nn

class Normed(nn.Module):
    """A BatchNorm after a layer, or another coupling of samples where asked for."""

    def __init__(self, num_classes=10, centred=False, **of_another_model):
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.norm = nn.Identity() if centred else nn.BatchNorm1d(16)
        self.centre = Centre() if centred else nn.Identity()
        self.last = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.last(torch.tanh(self.centre(self.norm(self.first(images.flatten(1))))))

class Centre(nn.Module):
    def forward(self, values):
        return values - values.mean(0)

class InfoNCE(nn.Module):
    """Every sample against all others of its batch: those of its class are close."""

    def forward(self, outputs, labels):
        unit = torch.nn.functional.normalize(outputs, dim=1)
        close = unit @ unit.T
        alike = labels[:, None] == labels[None, :]
        return -(close.log_softmax(1) * alike).sum(1).div(alike.sum(1)).mean()
'''


def certificate(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("outputs/*/*/certificate.json")
    return json.loads(path.read_text())


def failed(result: dict[str, Any]) -> set[str]:
    return {check["name"] for check in result["checks"] if not check["passed"]}


@pytest.fixture
def user_env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "own.py").write_text(USER_MODULE)
    return environment(tmp_path)


def test_a_right_window_is_proved_and_the_certificate_is_kept(tmp_path: Path) -> None:
    done = run_command("prove", *QUICK, "accum.steps=4", folder=tmp_path)
    assert done.code == 0, done
    assert "\nproved\n" in done.stdout and "accum.steps" not in done.stderr
    result = certificate(tmp_path)
    assert result["verdict"] == result["summary"] == "proved"
    assert result["subject"]["steps"] == 4 and result["subject"]["samples"] == 128
    assert result["config"]["accum"]["steps"] == 4
    assert {"torch", "device", "git_sha", "versions"} <= result["environment"].keys()
    names = {check["name"] for check in result["checks"]}
    assert {
        "gradient, fp64",
        "gradient, fp32",
        "gradient, ragged last window",
        "gradient, weighted items",
    } <= names
    assert {"parameters, 40 updates", "learning rate, 40 updates", "logged loss, 40 updates"} <= names
    assert {"samples of an epoch", "resume from the middle", "saved activations"} <= names
    assert all(check["why"] for check in result["checks"])
    (run,) = records(tmp_path)
    assert run.status == "FINISHED"
    assert run.tags["accumexp.certificate"] == "proved"
    assert run.tags["accumexp.command"].startswith("python -m accumexp.prove device=cpu")
    assert "| gradient, fp64 |" in run.tags["mlflow.note.content"]
    assert run.params["accum.steps"] == "4"
    assert {"certificate.json", "certificate.html", "config.yaml"} <= set(run.artifacts)


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "accum.steps=3",
            "data.batch_size=100",
            "optimizer=adamw",
            "scheduler=cosine",
            "trainer.clip_norm=0.5",
        ],
        ["accum=loss_scaled", "accum.steps=4"],
        ["accum=ddp", "accum.processes=2", "accum.steps=2", "proof.updates=36"],
        ["accum.steps=16", "param_precision=bf16", "accum.fp32_buffers=true"],
        ["accum.steps=1", "loss=mse", "precision=fp64"],
    ],
    ids=["clipped", "loss_scaled", "ddp", "bf16_buffers", "one_step"],
)
def test_right_windows_are_proved(tmp_path: Path, overrides: list[str]) -> None:
    done = run_command("prove", *BARE, *overrides, folder=tmp_path)
    assert done.code == 0, done.stdout
    result = certificate(tmp_path)
    names = {check["name"] for check in result["checks"]}
    assert result["summary"] == "proved"
    if "accum=ddp" in overrides:
        assert {"ranks agree", "gradient reductions a window"} <= names
    if "accum=loss_scaled" in overrides:
        assert {
            "overflow in each micro-batch",
            "loss scale after an overflow",
            "loss scale by update",
        } <= names
    if "trainer.clip_norm=0.5" in overrides:
        assert "gradient, clipped" in names


def test_dropout_is_named_and_the_rest_proved_with_its_masks_fixed(tmp_path: Path) -> None:
    done = run_command(
        "prove", *BARE, "model.hidden=[32,16]", "model.dropout=0.4", "accum.steps=4", folder=tmp_path
    )
    assert done.code == 0, done.stdout
    result = certificate(tmp_path)
    assert result["verdict"] == "proved up to"
    assert result["summary"] == "proved up to dropout draws (layers.3 (Dropout), layers.6 (Dropout))"
    (cause,) = result["causes"]
    assert cause["effect"] > 0.01 and "same draws" in cause["shown"] and cause["excused"]
    assert not failed(result)


def test_law_10_batch_statistics_are_never_certified(tmp_path: Path, user_env: dict[str, str]) -> None:
    done = run_command(
        "prove", *BARE, "model._target_=own.Normed", "accum.steps=4", folder=tmp_path, env=user_env
    )
    assert done.code == 1, done.stdout
    result = certificate(tmp_path)
    assert result["verdict"] == "not proved"
    assert "norm (BatchNorm1d): statistics over 32 of 128 samples" in result["summary"]
    assert {"gradient, fp64", "buffers"} <= failed(result)
    by_source = {cause["source"]: cause for cause in result["causes"]}
    assert by_source["batch statistics"]["effect"] > 1e-3
    assert "momentum 0.026 instead of 0.1" in by_source["buffers"]["advice"]
    assert "differs" in done.stdout and "in eval mode" in done.stdout


def test_law_10_a_coupling_in_a_module_of_ones_own_is_found_by_experiment(
    tmp_path: Path, user_env: dict[str, str]
) -> None:
    model = ["model._target_=own.Normed", "+model.centred=true"]
    done = run_command("prove", *BARE, *model, "accum.steps=2", folder=tmp_path, env=user_env)
    assert done.code == 1
    assert "centre (Centre): statistics over 64 of 128 samples" in certificate(tmp_path)["summary"]


def test_law_10_a_loss_that_couples_samples_is_not_certified(
    tmp_path: Path, user_env: dict[str, str]
) -> None:
    done = run_command(
        "prove", *BARE, "loss._target_=own.InfoNCE", "accum.steps=4", folder=tmp_path, env=user_env
    )
    assert done.code == 1
    result = certificate(tmp_path)
    assert "loss (InfoNCE): couples samples" in result["summary"]
    (cause,) = result["causes"]
    assert cause["source"] == "coupling loss" and cause["effect"] > 1e-3
    done = run_command("prove", *BARE, "loss._target_=own.InfoNCE", folder=tmp_path / "one", env=user_env)
    assert done.code == 0, "one micro-batch is the larger batch"


def test_the_tutorials_sum_of_means_is_told_by_its_factor(tmp_path: Path) -> None:
    done = run_command("prove", *BARE, "accum.steps=4", "accum.reduction=sum", folder=tmp_path)
    assert done.code == 1
    result = certificate(tmp_path)
    assert (
        "the gradient is 4 times the larger batch's: the sum of 4 micro-batches' means" in result["summary"]
    )
    assert "accum.reduction=mean" in result["causes"][0]["advice"]


def test_bf16_sums_are_told_from_sums_in_fp32(tmp_path: Path) -> None:
    done = run_command("prove", *BARE, "param_precision=bf16", "accum.steps=32", folder=tmp_path)
    assert done.code == 1
    result = certificate(tmp_path)
    assert "addition, bf16" in failed(result)
    assert "32 gradients are added in bfloat16" in result["summary"]
    assert "accum.fp32_buffers=true" in result["causes"][0]["advice"]


@pytest.mark.parametrize(
    ("name", "checks", "words"),
    [
        ("HalfRate", {"learning rate, 40 updates"}, "the learning rate is 0.5 times the schedule's"),
        ("TripledInFp32", {"gradient, 7 updates, fp32"}, "3 times the larger batch's, in fp32"),
        ("MeanOfMeans", {"gradient, 40 updates", "logged loss, 40 updates"}, "micro-batches count alike"),
    ],
)
def test_a_callback_that_changes_the_run_is_seen(
    tmp_path: Path, name: str, checks: set[str], words: str
) -> None:
    callback = f"+callbacks.wrong={{_target_: tests.support.wrong_windows.{name}}}"
    env = environment(PACKAGE_PARENT)
    done = run_command("prove", *BARE, "accum.steps=4", callback, folder=tmp_path, env=env)
    assert done.code == 1
    result = certificate(tmp_path)
    assert checks <= failed(result)
    assert words in result["summary"]


def test_a_run_with_prove_trains_the_same_bits_and_carries_its_certificate(tmp_path: Path) -> None:
    options = [*QUICK, "trainer.epochs=1", "accum.steps=2", "tracking.system_metrics=false"]
    losses = []
    for prove in ("true", "false"):
        folder = tmp_path / prove
        done = run_command("run", *options, f"prove={prove}", folder=folder)
        assert done.code == 0, done
        assert ("certificate: proved" in done.stdout) == (prove == "true")
        losses.append([row.get("train/loss") for row in journal(only_run(folder))])
        summary = json.loads((only_run(folder) / "summary.json").read_text())
        assert summary["tags"].get("accumexp.certificate") == ("proved" if prove == "true" else None)
    assert losses[0] == losses[1]
    record = record_of(only_run(tmp_path / "true"))
    assert record.tags["accumexp.certificate"] == "proved"
    assert {"certificate.json", "certificate.html"} <= set(record.artifacts)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-m", "accum.steps=1,2"], "--multirun"),
        (["resume=outputs"], "resume=outputs"),
        (["proof.updates=0"], "proof.updates=0"),
        (["proof.update=3"], "proof.update"),
        (["accum.steps=0"], "accum.steps=0"),
        (["accum.steps=4000"], "accum.steps=4000"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], named: str) -> None:
    done = run_command("prove", *arguments, folder=tmp_path)
    assert named in done.error()
    assert not list(tmp_path.glob("**/mlflow.db"))
