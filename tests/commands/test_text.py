"""Text: samples of unequal numbers of bytes to guess, and the window that is still the larger batch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accumexp.accum import Window, data_parallel, map_tensors, rank_share, split, split_sizes, window_loss
from accumexp.config.instantiate import build
from accumexp.data import Batch, Batches, InMemory, Placement, PythonSources, ResidentBatches, build_splits
from accumexp.data.raw import raw_tensors
from accumexp.data.samples import Layout
from accumexp.data.text import FIRST_BYTE, IGNORED, MASK, PAD, VOCABULARY, masked, source_files
from accumexp.errors import UsageError
from accumexp.training.evaluation import WindowMetrics
from accumexp.training.experiment import Experiment
from accumexp.training.metrics import Accuracy, Metrics
from accumexp.training.noise_scale import GradientNoise

from ..support.command import Done, environment, journal, only_run, record_of, run_command
from ..support.experiments import composed, trainer_of
from ..support.forked import as_main, forked
from ..support.launched import saved_weights
from ..support.ranks import on_ranks
from ..support.reference import gradients, larger_batch_gradient, relative_error
from ..support.trouble import trouble

SAMPLES = 23  # a prime: nothing divides it
LENGTH = 32
STEPS = [1, 2, 3, 5, 7]
SMALL = [
    *("experiment=text_bert", "model.hidden=16", "model.layers=1", "device=cpu", "data.length=32"),
    *("data.train.samples=200", "data.eval.samples=40", "data.test.samples=40", "data.batch_size=40"),
    *("accum.steps=4", "scheduler.warmup_updates=2", "tracking.system_metrics=false", "trainer.log_every=2"),
]
FP64 = ["callbacks=none", "precision=fp64", "trainer.epochs=1"]


# The corpus --------------------------------------------------------------------------------------------


def corpus(split: str = "train", samples: int = 300, **options: Any) -> PythonSources:
    return PythonSources(split, samples, **options)


def parts_of(text: InMemory) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and targets of the whole data set."""
    assert isinstance(text.inputs, dict) and isinstance(text.targets, Tensor)
    return text.inputs["input_ids"], text.inputs["attention_mask"], text.targets


def original(text: InMemory) -> Tensor:
    """The tokens before any was hidden, (samples, length)."""
    ids, _, targets = parts_of(text)
    return torch.where(targets == IGNORED, ids, targets)


def write_sources(folder: Path, files: int = 10) -> Path:
    (folder / "inner").mkdir(parents=True)
    for number in range(files):
        where = folder / "inner" if number % 2 else folder
        (where / f"m{number:02d}.py").write_text(f"value_{number:02d} = {number}  # a line\n\n" * 30)
    return folder


def test_samples_are_runs_of_lines_of_the_librarys_files_in_their_order() -> None:
    texts = [bytes((row[row != PAD] - FIRST_BYTE).tolist()) for row in original(corpus())]
    where = begin = 0
    files = [path.read_bytes() for path in source_files(None, "train")[:20]]
    for text in texts:
        while (position := files[where].find(text, begin)) < 0:
            where, begin = where + 1, 0
        begin = position + len(text)
        # Whole lines, but for one that is longer than a sample.
        assert text.endswith(b"\n") or len(text) == 64 or begin == len(files[where])
        assert b"\n\n" not in text
    lengths = {len(text) for text in texts}
    assert min(lengths) >= 16 and max(lengths) <= 64 and len(lengths) > 20


def test_the_corpus_is_the_same_twice_and_more_samples_begin_with_the_fewer() -> None:
    for one, other in zip(parts_of(corpus()), parts_of(corpus()), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(parts_of(corpus(samples=50)), parts_of(corpus()), strict=True):
        assert torch.equal(one, other[:50])
    other = corpus(mask_seed=1)
    assert torch.equal(original(other), original(corpus()))
    assert not torch.equal(parts_of(other)[2], parts_of(corpus())[2])


def test_only_the_files_that_are_needed_are_read(tmp_path: Path) -> None:
    folder = write_sources(tmp_path / "few", files=20)
    (folder / "z_unreadable.py").symlink_to(tmp_path / "nowhere")  # sorted last: number 20, for training
    assert len(PythonSources("train", 30, folder=str(folder))) == 30
    with pytest.raises(FileNotFoundError):
        PythonSources("train", 10_000, folder=str(folder))


def test_splits_share_no_file_and_leave_none_out(tmp_path: Path) -> None:
    for folder in (None, str(write_sources(tmp_path / "own", files=25))):
        chosen = {split: set(source_files(folder, split)) for split in ("train", "eval", "test")}
        assert not chosen["train"] & chosen["eval"] and not chosen["test"] & chosen["eval"]
        assert not chosen["train"] & chosen["test"]
        if folder:
            assert len(set.union(*chosen.values())) == 25
    for path in source_files(None, "train"):
        assert not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.parts[-4:-1]), path
    assert len({path.parent for path in source_files(None, "test")}) > 5  # packages, too


def test_masking_is_devlins_by_sample_and_leaves_none_without_a_byte_to_guess() -> None:
    text = corpus(samples=6000)
    ids, mask, targets = parts_of(text)
    tokens, guessed = original(text), targets != IGNORED
    assert torch.equal(mask, (tokens != PAD).long()) and not bool(guessed[mask == 0].any())
    count, expected = guessed.sum(1), (0.15 * mask.sum(1)).round().clamp(min=1)
    assert torch.equal(count, expected.long()) and int(count.min()) >= 1 and len(count.unique()) > 5
    # Of about 45,000 bytes; four standard errors of a share p are 4 sqrt(p (1 - p) / n).
    hidden, n = ids[guessed], int(guessed.sum())
    by_mask = float((hidden == MASK).double().mean())
    kept = float((hidden == tokens[guessed]).double().mean())
    assert abs(by_mask - 0.8) < 4 * (0.16 / n) ** 0.5
    assert abs(kept - 0.1 - 0.1 / 256) < 4 * (0.09 / n) ** 0.5
    assert int(hidden[hidden != MASK].min()) >= FIRST_BYTE and int(ids.max()) < VOCABULARY
    # A byte's place in its sample tells nothing of its chance.
    thirds = [guessed[:, at : at + 5].double().mean() for at in (0, 5, 10)]
    assert max(thirds) - min(thirds) < 0.015
    alone = masked(tokens[:7], 5)
    assert all(torch.equal(a, b[:7]) for a, b in zip(alone, masked(tokens, 5), strict=True))


def test_a_sample_of_one_byte_is_guessed() -> None:
    _, targets = masked(torch.tensor([[90, PAD, PAD]]), seed=0)
    assert targets.tolist() == [[90, IGNORED, IGNORED]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": "dev"}, r"data\.train\.split=dev: one of train, eval, test"),
        ({"min_length": 65}, r"data\.train\.min_length=65 of length=64"),
        ({"samples": 0}, r"data\.train\.samples=0: at least 1"),
        ({"folder": "/nowhere"}, "^data.train: folder=/nowhere: no .py files .* train split"),
        ({"samples": 10**9}, r"^data.train: samples=1000000000: the standard library has only \d+ of 16 to"),
    ],
)
def test_a_corpus_that_cannot_be_is_named(options: dict[str, Any], named: str) -> None:
    node = {"_target_": "accumexp.data.PythonSources", "split": "train", "samples": 20, **options}
    with pytest.raises(UsageError, match=named):
        build(node, "data.train")


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match="give data.train.folder="):
        corpus()


# The batches -------------------------------------------------------------------------------------------


def batches_of(*overrides: str) -> Batches:
    config = composed("data=text", "model=bert", "data.train.samples=300", *overrides)
    return build_splits(config.data, 0, Placement(torch.device("cpu"), torch.float32)).train


def tensors_of(batch: Batch) -> list[Tensor]:
    assert isinstance(batch.inputs, dict) and isinstance(batch.targets, Tensor)
    return [batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.targets, batch.indices]


def test_batches_of_text_depend_on_neither_steps_nor_workers_nor_residence() -> None:
    expected = batches_of()
    assert isinstance(expected, ResidentBatches)
    others = [["accum.steps=8"], *(["data.resident=false", f"data.workers={n}"] for n in (0, 2))]
    for overrides in others:
        for one, other in zip(expected.epoch(1), batches_of(*overrides).epoch(1), strict=True):
            assert all(map(torch.equal, tensors_of(one), tensors_of(other)))


class Reversed(InMemory):
    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return super().__getitem__(len(self) - 1 - index)


def test_nested_tensors_are_taken_whole_unless_a_class_of_ones_own_adds_to_them() -> None:
    ones = InMemory({"a": torch.ones(4, 2), "b": (torch.zeros(4),)}, torch.arange(4))
    inputs, target = ones[2]
    assert inputs["a"].shape == (2,) and target == 2 and len(ones) == 4
    assert raw_tensors(ones, Layout()) == (ones.inputs, ones.targets)
    assert raw_tensors(Reversed(ones.inputs, ones.targets), Layout()) is None
    with pytest.raises(ValueError, match="share their first dimension"):
        InMemory({"a": torch.ones(4), "b": torch.ones(3)}, torch.arange(4))


# Accuracy ----------------------------------------------------------------------------------------------


def test_accuracy_is_torchmetrics_own_and_counts_no_ignored_item(generator: torch.Generator) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    for shape in ((50,), (50, 9), (50, 3, 4)):
        outputs = torch.randn(shape[0], 7, *shape[1:], generator=generator)
        targets = torch.randint(0, 7, shape, generator=generator)
        targets[torch.rand(shape, generator=generator) < 0.6] = IGNORED
        for ignored in (IGNORED, 2):
            labels = targets.where(targets >= 0, ignored)
            ours = Accuracy(ignored)
            theirs = MulticlassAccuracy(7, average="micro", ignore_index=ignored, validate_args=False)
            for part in (slice(0, 20), slice(20, 50)):
                ours.update(outputs[part], labels[part])
                theirs.update(outputs[part], labels[part])
            assert float(ours.compute()) == float(theirs.compute()) > 0
    nothing = Accuracy()
    nothing.update(outputs, torch.full_like(targets, IGNORED))
    assert float(nothing.compute()) == 0


@pytest.mark.parametrize("kept", [0, 2**16])
def test_a_windows_accuracy_is_that_of_its_bytes_not_the_mean_of_means(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bytes of one micro-batch are right, the one of the other is wrong: 3 of 4, not 1 of 2."""
    monkeypatch.setattr(WindowMetrics, "LARGEST", kept)
    metrics = WindowMetrics(Metrics({"accuracy": Accuracy()}))
    outputs = torch.zeros(1, 2, 3)
    outputs[:, 1] = 1.0
    metrics.observe(outputs, torch.tensor([[1, 1, 1]]))
    metrics.observe(outputs, torch.tensor([[0, IGNORED, IGNORED]]))
    assert metrics.values() == {"accuracy": 0.75}


# The window --------------------------------------------------------------------------------------------


def small_bert() -> nn.Module:
    pytest.importorskip("transformers")
    from accumexp.models import Bert

    torch.manual_seed(2)
    return Bert(VOCABULARY, LENGTH, hidden=16).double()


def ragged() -> tuple[dict[str, Tensor], Tensor]:
    """Samples of 1 to 5 bytes to guess, and two of none, in no micro-batches of equal numbers of them."""
    ids, mask, targets = (t.clone() for t in parts_of(corpus(samples=SAMPLES, length=LENGTH, min_length=4)))
    targets[5:7] = IGNORED
    counts = (targets != IGNORED).sum(1)
    assert len(counts.unique()) >= 4 and int(counts.min()) == 0
    assert all(len({int(c.sum()) for c in counts.split(split_sizes(SAMPLES, n))}) > 1 for n in STEPS[1:])
    return {"input_ids": ids, "attention_mask": mask}, targets


def without_key_biases(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases of keys: they add the same to all of a query's scores, and have the gradient 0."""
    whole = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    for name, value in gradient.items():
        assert not name.endswith("key.bias") or float(value.norm()) <= 1e-12 * whole
    return {name: value for name, value in gradient.items() if not name.endswith("key.bias")}


def larger_batch() -> dict[str, Tensor]:
    return without_key_biases(larger_batch_gradient(small_bert(), nn.CrossEntropyLoss(), *ragged()))


@pytest.mark.parametrize("steps", [*STEPS, SAMPLES])
def test_law_1_a_window_of_ragged_text_is_the_larger_batch(steps: int) -> None:
    model, (inputs, targets) = small_bert(), ragged()
    result = Window(model, nn.CrossEntropyLoss(), steps).backward(inputs, targets)
    assert relative_error(without_key_biases(gradients(model)), larger_batch()) <= 1e-12
    expected = nn.CrossEntropyLoss()(model(**inputs), targets).item()
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    assert int(result.weight) == int((targets != IGNORED).sum()), "law 2: the window's own valid tokens"


def test_law_2_a_mean_of_means_is_another_gradient() -> None:
    """What the test above would say of the bug that it is there for."""
    inputs, targets = ragged()
    keep = (targets != IGNORED).any(1)  # the mean of no item is nan
    inputs, targets = {name: t[keep] for name, t in inputs.items()}, targets[keep]
    expected = without_key_biases(larger_batch_gradient(small_bert(), nn.CrossEntropyLoss(), inputs, targets))
    model, sizes = small_bert(), split_sizes(len(targets), 5)
    cut: Any = split(inputs, sizes)
    for inputs_k, targets_k in zip(cut, targets.split(sizes), strict=True):
        (nn.CrossEntropyLoss()(model(**inputs_k), targets_k) / 5).backward()
    assert relative_error(without_key_biases(gradients(model)), expected) > 1e-2


def test_padding_and_a_sample_without_a_byte_to_guess_weigh_nothing() -> None:
    inputs, targets = ragged()
    loss, model = window_loss(nn.CrossEntropyLoss()), small_bert()
    assert float(loss.weight(targets[5:6])) == 0
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 77)}
    for model_inputs in (inputs, other):
        model.zero_grad()
        Window(model, nn.CrossEntropyLoss(), 5).backward(model_inputs, targets)
        assert relative_error(without_key_biases(gradients(model)), larger_batch()) <= 1e-12
    model.zero_grad()
    nothing = Window(model, nn.CrossEntropyLoss(), 1).backward(
        {name: t[5:6] for name, t in inputs.items()}, targets[5:6]
    )
    assert float(nothing.loss) == 0 and all(not g.any() for g in gradients(model).values())


def on_a_rank() -> dict[int, tuple[dict[str, Tensor], float, float]]:
    """For every number of steps: this rank's gradient, loss and weight."""
    results = {}
    for steps in STEPS:
        model, (inputs, targets) = data_parallel(small_bert()), ragged()
        shares = rank_share(SAMPLES, steps, dist.get_rank(), dist.get_world_size())
        rows = [row for share in shares for row in share]
        window = Window(model, nn.CrossEntropyLoss(), steps)
        result = window.backward(map_tensors(lambda t, rows=rows: t[rows], inputs), targets[rows])
        gradient = {name: g.clone() for name, g in gradients(window.model).items()}
        results[steps] = (gradient, float(result.loss), float(result.weight))
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_law_2_the_tokens_of_all_ranks_are_counted(tmp_path: Path, world: int) -> None:
    expected, (inputs, targets) = larger_batch(), ragged()
    loss = nn.CrossEntropyLoss()(small_bert()(**inputs), targets).item()
    for by_steps in on_ranks(world, tmp_path, on_a_rank):
        for steps, (gradient, value, weight) in by_steps.items():
            assert relative_error(without_key_biases(gradient), expected) <= 1e-12, steps
            assert value == pytest.approx(loss, rel=1e-12)
            assert weight == int((targets != IGNORED).sum())


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


class NoReads(TorchDispatchMode):
    """Fails where the host would read a tensor's values, and wait for a device to have them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [True, False])
def test_law_9_a_window_of_text_never_reads_a_value(padded: bool) -> None:
    model, (inputs, targets) = small_bert(), ragged()
    if not padded:
        inputs["attention_mask"].fill_(1)
    observe: Any = Accuracy().update
    with NoReads():
        Window(model, nn.CrossEntropyLoss(), 3).backward(inputs, targets, observe=observe)


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
