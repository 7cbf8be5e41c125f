"""The model BERT and the experiment on text: alone, in whole runs, resumed and over ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.data import ResidentBatches
from accumexp.data.text import IGNORED, VOCABULARY
from accumexp.errors import UsageError
from accumexp.training.experiment import Experiment
from accumexp.training.noise_scale import GradientNoise

from ..support.command import Done, environment, journal, only_run, record_of, run_command
from ..support.experiments import composed, trainer_of
from ..support.forked import as_main, forked
from ..support.launched import saved_weights
from ..support.text import LENGTH, SAMPLES, ragged
from ..support.trouble import trouble

SMALL = [
    *("experiment=text_bert", "model.hidden=16", "model.layers=1", "device=cpu", "data.length=32"),
    *("data.train.samples=200", "data.eval.samples=40", "data.test.samples=40", "data.batch_size=40"),
    *("accum.steps=4", "scheduler.warmup_updates=2", "tracking.system_metrics=false", "trainer.log_every=2"),
]
FP64 = ["callbacks=none", "precision=fp64", "trainer.epochs=1"]


# The model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_is_transformers_own_with_its_loss_left_out(attention: str) -> None:
    pytest.importorskip("transformers")
    from accumexp.models import Bert

    torch.manual_seed(0)
    model = Bert(VOCABULARY, LENGTH, hidden=16, attention=attention).double()
    inputs, targets = ragged()
    logits = model(**inputs)
    assert logits.shape == (SAMPLES, VOCABULARY, LENGTH)
    theirs = model.bert(**inputs, labels=targets)
    torch.testing.assert_close(logits.transpose(1, 2), theirs.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nn.CrossEntropyLoss()(logits, targets), theirs.loss, rtol=1e-12, atol=0)


def test_dropout_is_off_unless_asked_for_and_is_then_told() -> None:
    pytest.importorskip("transformers")
    from accumexp.accum import inequalities
    from accumexp.models import Bert

    assert not inequalities(Bert(20, 8, hidden=8), 8, 4)
    differences = inequalities(Bert(20, 8, hidden=8, dropout=0.1), 8, 4)
    assert {difference.kind for difference in differences} == {"Dropout"} and len(differences) == 7


class Hidden:
    """Finds no transformers, whether it is installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without_transformers(*arguments: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        del sys.modules[name]  # torchmetrics imports it
    sys.meta_path.insert(0, Hidden())
    unpatched = metadata.Distribution.from_name

    def from_name(name: str) -> metadata.Distribution:
        if name == "transformers":
            raise metadata.PackageNotFoundError(name)
        return unpatched(name)

    metadata.Distribution.from_name = from_name
    as_main("accumexp.run", list(arguments))


def test_without_transformers_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ended = forked(without_transformers, *SMALL, folder=tmp_path / "run", env=environment(), seconds=120)
    done = Done(*ended)
    assert done.error() == "model: needs transformers, pip install 'accumexp[text]'"
    assert not list((tmp_path / "run").glob("mlflow*"))


def test_only_bert_itself_imports_transformers() -> None:
    ours = "accumexp, accumexp.accum, accumexp.models, accumexp.data"
    code = f"import sys, {ours}\nsys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data=text"], "model.channels: needs data.channels"),
        (["data=text", "model=mlp"], "model.inputs: needs data.channels"),
        (["model=bert"], "model.length: needs data.length"),
    ],
)
def test_a_model_and_data_that_do_not_fit_are_named(overrides: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        composed(*overrides)


# The experiment ----------------------------------------------------------------------------------------


def test_text_bert_trains_and_its_updates_do_not_depend_on_steps() -> None:
    pytest.importorskip("transformers")
    rows = {}
    for steps in (1, 3, 8):
        trainer, memory = trainer_of(*SMALL, *FP64, "model=bert", f"accum.steps={steps}")
        trainer.fit()
        assert trainer.progress.update == 5
        rows[steps] = [memory.series(key) for key in ("train/loss", "train/accuracy", "eval/accuracy")]
    for steps in (3, 8):
        for points, expected in zip(rows[steps], rows[1], strict=True):
            assert points == [(update, pytest.approx(value, rel=1e-9)) for update, value in expected]


@pytest.mark.parametrize("noise", ["noise.NoiseScale", "sample_noise.SampleNoiseScale"])
def test_the_noise_scale_of_text_is_estimated(noise: str) -> None:
    pytest.importorskip("transformers")
    trainer, _ = trainer_of(*SMALL, *FP64, "model=bert", f"+callbacks.noise._target_=accumexp.{noise}")
    trainer.fit()
    callback = trainer.callbacks["noise"]
    assert isinstance(callback, GradientNoise) and callback.estimates >= 2


def test_the_accuracy_of_evaluation_counts_every_hidden_byte_once() -> None:
    pytest.importorskip("transformers")
    experiment = Experiment.build(composed(*SMALL, *FP64, "data.eval_batch_size=7"))
    test = experiment.splits.test
    values = experiment.evaluator(experiment.model, test)
    assert isinstance(test, ResidentBatches)
    inputs, targets = test.inputs, test.targets
    assert isinstance(inputs, dict) and isinstance(targets, Tensor)
    with torch.no_grad():
        logits = experiment.model.eval()(**inputs)
    valid = targets != IGNORED
    assert values["loss"] == pytest.approx(nn.CrossEntropyLoss()(logits, targets).item(), rel=1e-12)
    assert values["accuracy"] == pytest.approx(float((logits.argmax(1) == targets)[valid].double().mean()))


def test_law_8_a_run_on_text_goes_on_bit_for_bit_and_is_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = [*SMALL, "callbacks=ema", "trainer.epochs=2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_command("run", *run, folder=whole).code == 0
    first = run_command("run", *run, trouble("SIGTERM", 3), folder=stopped)
    assert first.code == 143, first
    again = run_command("run", f"resume={only_run(stopped)}", "trust=[tests]", folder=stopped)
    assert again.code == 0 and not again.stderr, again
    weights, expected = saved_weights(only_run(stopped)), saved_weights(only_run(whole))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    keys = ("train/loss", "train/accuracy", "eval/accuracy", "eval/ema_loss")
    rows = [
        [{key: row[key] for key in keys if key in row} for row in journal(only_run(f))]
        for f in (stopped, whole)
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 10
    record = record_of(only_run(whole))
    assert record.datasets == dict.fromkeys(("train", "eval", "test"), "pythonsources")
    assert record.points["perf/activation_mib"][0][1] > 0

    done = run_command("evaluate", f"checkpoint={only_run(whole)}", "json=true", folder=whole)
    assert done.code == 0 and not done.stderr, done
    values = json.loads(done.stdout)
    assert values["samples"] == 40 and 0 < values["loss"] < 6


@pytest.mark.slow
def test_text_bert_over_two_ranks_is_the_run_of_one(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    losses = []
    for number, accum in enumerate((["accum.steps=4"], ["accum=ddp", "accum.processes=2", "accum.steps=2"])):
        folder = tmp_path / str(number)
        small = [word for word in SMALL if not word.startswith("accum")]
        done = run_command("run", *small, *accum, "precision=fp64", "tracking=none", folder=folder)
        assert done.code == 0 and not done.stderr, done
        rows = journal(only_run(folder))
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert len(losses[0]) == 10
    for parallel_losses in losses[1:]:
        assert parallel_losses == pytest.approx(losses[0], rel=1e-9)
