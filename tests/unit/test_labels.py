"""Targets that a loss does not take are named by sample, before update 1 or at their batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from accumexp.accum.loss import WeightedSamples
from accumexp.data.labels import ClassIndices, LabelCheck, Probabilities
from accumexp.errors import UsageError
from accumexp.training.experiment import Experiment
from accumexp.training.losses import Regression
from accumexp.training.preflight import check_experiment, target_check, try_example

from ..support.experiments import composed

HERE = __name__
SMALL = ("device=cpu", "model=mlp", "data.batch_size=20", "data.num_classes=100", "model.num_classes=10")


def labelled(at: int | None, label: float, dtype: str) -> tuple[Tensor, Tensor]:
    labels = (torch.arange(60) % 10).to(getattr(torch, dtype))
    if at is not None:
        labels[at] = label
    return torch.rand(60, 1, 32, 32), labels


class InMemory(TensorDataset):
    def __init__(self, at: int | None = None, label: float = 12, dtype: str = "int64", **_: Any) -> None:
        super().__init__(*labelled(at, label, dtype))


class Read(Dataset[Any]):
    def __init__(self, at: int | None = None, label: float = 12, dtype: str = "int64", **_: Any) -> None:
        self.inputs, self.labels = labelled(at, label, dtype)

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


class Both(InMemory):
    """Of two labels each, numbers."""

    def __init__(self, at: int = 17, label: float = 0.5, **_: Any) -> None:
        images, _labels = labelled(None, 0, "int64")
        targets = torch.full((60, 10), 0.5)
        targets[at, 3] = label
        TensorDataset.__init__(self, images, targets)


def experiment(kind: type, split: str = "train", *overrides: str, **arguments: Any) -> Experiment:
    sets = [f"data.{name}._target_={HERE}.{kind.__name__}" for name in ("train", "test")]
    given = [f"+data.{split}.{name}={value}" for name, value in arguments.items()]
    return Experiment.build(composed(*SMALL, *sets, *given, *overrides))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", [12, -1])
def test_a_label_out_of_range_is_named_before_update_1(split: str, label: int) -> None:
    wrong = f"^data.{split}: sample 17 has the label {label}, the model has 10 classes"
    if label < 0:  # in no model's range
        wrong = rf"^data.num_classes=100: the labels go from -1 up to 9.*\(sample 17 of data.{split} has -1\)"
    with pytest.raises(UsageError, match=wrong):
        check_experiment(experiment(InMemory, split, at=17, label=label))


@pytest.mark.parametrize("workers", [0, 1])
def test_of_a_streamed_data_set_it_is_named_at_its_batch(workers: int) -> None:
    built = experiment(Read, "train", "data.resident=false", f"data.workers={workers}", at=17)
    check_experiment(built)
    with pytest.raises(UsageError, match="^data.train: sample 17 has the label 12, the model has 10 classes"):
        for _ in built.splits.train.epoch(0):
            pass


@pytest.mark.parametrize(("dtype", "shown"), [("float32", "0.0 of float32"), ("int32", "0 of int32")])
def test_labels_of_another_dtype_are_named(dtype: str, shown: str) -> None:
    line = f"^data.train: sample 0 has the label {shown}; loss=CrossEntropyLoss takes class indices, int64"
    with pytest.raises(UsageError, match=line):
        check_experiment(experiment(InMemory, dtype=dtype))


@pytest.mark.parametrize("label", ["1.5", "-0.5", "nan"])
def test_a_binary_cross_entropy_takes_numbers_from_0_to_1(label: str) -> None:
    loss = ("loss._target_=torch.nn.BCEWithLogitsLoss", "metrics=none", "monitor=eval/loss")
    with pytest.raises(UsageError, match=f"^data.train: sample 17 has the target {label}, loss=BCEWith"):
        check_experiment(experiment(Both, "train", *loss, label=label))
    check_experiment(experiment(Both, "train", *loss, label=1))


def test_another_data_set_in_evaluate_is_checked_too() -> None:
    built = experiment(InMemory, "test", at=17)
    with pytest.raises(UsageError, match="^data.test: sample 17 has the label 12"):
        try_example(built, "test")


def test_what_a_loss_is_known_to_demand() -> None:
    outputs = torch.zeros(4, 5, 7)
    assert target_check(nn.CrossEntropyLoss(ignore_index=3), outputs) == ClassIndices(
        5, 3, 2, "CrossEntropyLoss"
    )
    assert target_check(WeightedSamples(nn.NLLLoss()), outputs) == ClassIndices(5, -100, 2, "NLLLoss")
    assert target_check(nn.BCELoss(), outputs) == Probabilities("BCELoss")
    assert target_check(Regression(nn.MSELoss()), outputs) is None
    assert target_check(lambda outputs, targets: outputs.sum(), outputs) is None


def test_probabilities_and_ignored_labels_are_no_indices_out_of_range() -> None:
    check = ClassIndices(5, -100, 1, "CrossEntropyLoss")
    check(torch.tensor([0, 4, -100]), "data.train")
    check(torch.full((3, 5), 0.2), "data.train")
    with pytest.raises(UsageError, match="sample 9 has the label 5"):
        check(torch.tensor([0, 5]), "data.train", [7, 9])
    Probabilities("BCELoss")(torch.tensor([0.0, 1.0]), "data.train")
    with pytest.raises(UsageError, match="nan"):
        Probabilities("BCELoss")(torch.tensor([math.nan]), "data.train")


def test_far_more_classes_than_the_data_has_are_a_slip() -> None:
    labels = torch.arange(10)
    with pytest.raises(UsageError, match="data.num_classes=1000000: the labels of data.train go up to 9"):
        LabelCheck(1_000_000, -100)(labels, "data.train")
    LabelCheck(1_000_000, -100)(labels, "data.train", list(range(10)))  # a batch alone does not tell
    LabelCheck(10_000, -100)(labels, "data.train")
