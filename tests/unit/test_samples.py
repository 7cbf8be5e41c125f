"""Samples as people have them: what of a sample is input, target and weight, and what cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Sampler

from accumexp.accum import Window
from accumexp.accum.loss import WeightedSamples
from accumexp.config.schema import DataConfig
from accumexp.data import Batches, Placement, Splits, StreamedBatches, build_splits, pad
from accumexp.data.samples import check_inputs
from accumexp.errors import UsageError
from accumexp.training.experiment import Experiment

from ..support.experiments import composed
from ..support.reference import (
    classification,
    gradients,
    larger_batch_gradient,
    relative_error,
    small_model,
)

HERE = "tests.unit.test_samples"
CPU = Placement(torch.device("cpu"), torch.float64)


class Point(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass
class Row:
    image: Tensor
    label: Tensor


class Made(Dataset[Any]):
    """40 samples of 6 numbers, as `kind` says."""

    def __init__(self, kind: str = "pair", n: int = 40) -> None:
        self.kind = kind
        self.x, _ = classification(n)
        self.y = self.x[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        x, y = self.x[i], self.y[i]
        return {
            "pair": (x, y),
            "dict": {"image": x, "label": y},
            "named": Point(x, y),
            "dataclass": Row(x, y),
            "triple": (x, y, torch.tensor(1.0 + i % 4)),
            "text": {"image": x, "label": y, "name": f"sample {i}"},
            "ragged": {"image": x[: 3 + i % 4], "label": y},
            "beyond": (x, y + 7),
            "void": (x, torch.tensor(255) if i % 3 == 0 else y),
        }[self.kind]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image)


class Stream(IterableDataset[Any]):
    """The pairs of `Made`, with noise drawn from torch's global generator."""

    def __init__(self, n: int = 40, noise: float = 0.0) -> None:
        self.made, self.noise = Made(n=n), noise

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self.made)):
            x, y = self.made[i]
            yield x + self.noise * torch.randn(6), y


class Drawn(Sampler[int]):
    """Positions from torch's global generator; counts its epochs, which must not matter."""

    def __init__(self, data_source: Any, beyond: int = 0) -> None:
        self.samples, self.beyond, self.epochs = len(data_source), beyond, 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        yield from torch.randint(0, self.samples, (20,)).tolist()
        yield self.samples - 1 + self.beyond + self.epochs - 1


def joined(samples: list[Any]) -> Any:
    """A collate without parameters: a plain function of the samples."""
    return {k: torch.stack([sample[k] for sample in samples]) for k in ("image", "label")}


def data_of(kind: str = "pair", **keys: Any) -> DataConfig:
    made = {"_target_": f"{HERE}.Made", "kind": kind}
    given = {"train": made, "test": made, "num_classes": 3, "batch_size": 8, "workers": 0, **keys}
    return DataConfig(**given)


def splits_of(kind: str = "pair", seed: int = 0, **keys: Any) -> Splits:
    return build_splits(data_of(kind, **keys), seed, CPU, ignored=-100)


def read(batches: Batches, epoch: int = 0, start: int = 0) -> list[tuple[Any, Any]]:
    return [(batch.inputs, batch.targets) for batch in batches.epoch(epoch, start)]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("dict", {"target": "label"}),
        ("named", {"target": "label"}),
        ("dataclass", {"target": "label"}),
        ("text", {"target": "label", "inputs": ["image"]}),
        ("triple", {"target": 1, "inputs": [0]}),
    ],
)
def test_every_kind_of_sample_gives_the_batches_of_pairs(
    kind: str, keys: dict[str, Any], resident: bool
) -> None:
    expected = read(splits_of("pair", resident=resident).train, 1)
    batches = read(splits_of(kind, resident=resident, **keys).train, 1)
    for one, other in zip(batches, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        ("dict", {}, "data.target=null: the samples of data.train have image, label"),
        ("dict", {"target": "lable"}, "data.target=lable: .* they have image, label"),
        ("text", {"target": "label"}, "data.train: of a sample name is a str"),
        ("triple", {"weight": 5}, "data.weight=5: .* positions 0 to 2"),
        ("ragged", {"target": "label"}, "data.train: .*accumexp.data.pad"),
        ("beyond", {}, "data.num_classes=3: the labels go from . up to 9"),
        ("pair", {"samples": 10}, "data.samples=10: is the length of a stream"),
        ("pair", {"collate": {"_target_": "builtins.len"}}, "data.collate: a sample is a pair"),
        ("pair", {"sampler": {"_target_": f"{HERE}.Drawn", "beyond": 1}}, "data.sampler: .* position 36,"),
        ("pair", {"test": {"_target_": f"{HERE}.Made", "n": 0}}, "data.test: has no samples"),
    ],
)
@pytest.mark.parametrize("resident", [True, False])
def test_a_sample_that_cannot_be_used_is_named(
    kind: str, keys: dict[str, Any], named: str, resident: bool
) -> None:
    if "collate" in keys and resident:
        named = "data.resident=true: data.collate"
    with pytest.raises(UsageError, match=named):
        for batch in splits_of(kind, resident=resident, **keys).train.epoch(0):
            assert batch.samples


def test_an_error_in_a_worker_is_its_one_line() -> None:
    train = splits_of(resident=False, workers=1).train
    assert isinstance(train, StreamedBatches)
    dataset: Any = train._loader.dataset
    dataset.dataset.x = dataset.dataset.x[:20]
    with pytest.raises(UsageError, match=r"^data.train: sample \d+ cannot be read: IndexError: [^\n]*$"):
        read(train)


def test_inputs_that_the_model_does_not_take_are_named_before_update_1() -> None:
    model = {"_target_": f"{HERE}.Net"}
    config = replace(composed("device=cpu", "accum.steps=1"), data=data_of("triple"), model=model)
    with pytest.raises(
        UsageError, match="data.inputs: the samples give 2 by position, and Net.forward takes"
    ):
        Experiment.build(config)


def test_a_single_input_is_not_counted_by_its_samples() -> None:
    with pytest.raises(UsageError, match="samples give one input, and Bilinear.forward takes input1"):
        check_inputs(torch.nn.Bilinear(2, 2, 1), torch.zeros(4, 2))


@pytest.mark.parametrize("resident", [True, False])
def test_labels_that_the_loss_ignores_are_accepted(resident: bool) -> None:
    config = data_of("void", resident=resident)
    assert len(read(build_splits(config, 0, CPU, ignored=255).train)) == 5
    with pytest.raises(UsageError, match="data.num_classes=3: the labels go from . up to 255"):
        read(build_splits(config, 0, CPU, ignored=-100).train)


def test_pad_fills_inputs_targets_and_a_mask() -> None:
    rows = [{"x": torch.arange(1, n + 1), "y": torch.arange(n)} for n in (2, 3)]
    made = pad(value=9, mask="mask", target="y")(rows)
    assert made["x"].tolist() == [[1, 2, 9], [1, 2, 3]]
    assert made["y"].tolist() == [[0, 1, -100], [0, 1, 2]]
    assert made["mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    x, y, w = pad()([(torch.ones(n), torch.ones(n).long(), 1.0) for n in (1, 2)])
    assert x.tolist() == [[1, 0], [1, 1]] and w.tolist() == [1, 1] and y.shape == (2, 2)
    weighted = pad(weight=2)([(torch.ones(n), torch.ones(n).long(), 1.0) for n in (1, 2)])
    assert weighted[1].tolist() == [[1, -100], [1, 1]]


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("case", ["classes", "probabilities", "tokens", "class weights", "mse"])
def test_law_2_the_windows_loss_is_the_weighted_mean_of_its_samples(case: str, steps: int) -> None:
    inputs, labels = classification(23)
    given = torch.rand(23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given[4] = 0.0
    targets: Tensor = labels
    criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=0.1)
    model = small_model()
    each = nn.functional.cross_entropy
    if case == "tokens":
        model = nn.Sequential(small_model(20), nn.Unflatten(1, (5, 4)))
        targets = torch.randint(0, 5, (23, 4), generator=torch.Generator().manual_seed(2))
        targets[torch.rand(23, 4, generator=torch.Generator().manual_seed(3)) < 0.4] = -100
        criterion = nn.CrossEntropyLoss()
    elif case == "class weights":
        criterion = nn.CrossEntropyLoss(torch.linspace(0.5, 3, 5, dtype=torch.float64))
    elif case == "probabilities":
        targets = torch.softmax(inputs[:, :5], 1)
    elif case == "mse":
        targets, criterion = inputs[:, :5].cos(), nn.MSELoss()

    def larger(outputs: Tensor, _: Any) -> Tensor:
        if case == "mse":
            return (((outputs - targets) ** 2).mean(1) * given).sum() / given.sum()
        if case == "tokens":
            losses = each(outputs, targets, reduction="none")
            return (losses * given[:, None]).sum() / ((targets != -100) * given[:, None]).sum()
        if case == "class weights":
            losses = each(outputs, targets, weight=criterion.weight, reduction="none")  # type: ignore[arg-type]
            return (losses * given).sum() / (criterion.weight[targets] * given).sum()  # type: ignore[index]
        losses = each(outputs, targets, label_smoothing=0.1, reduction="none")
        return (losses * given).sum() / given.sum()

    expected = larger_batch_gradient(model, larger, inputs, None)
    Window(model, WeightedSamples(criterion), steps).backward(inputs, (targets, given))
    assert relative_error(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("sizes", [[23], [8, 8, 7], [1, 20, 2]])
@pytest.mark.parametrize("weighted", [False, True])
def test_law_1_a_list_of_micro_batches_gives_the_larger_batchs_gradient(
    sizes: list[int], weighted: bool
) -> None:
    inputs, targets = classification(23)
    weight = torch.linspace(0.5, 3, 5, dtype=torch.float64) if weighted else None
    model, criterion = small_model(), nn.CrossEntropyLoss(weight)
    expected = larger_batch_gradient(model, criterion, inputs, targets)
    parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    result = Window(model, criterion, 4).backward(parts)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert result.steps == len(sizes) and result.samples == 23
    assert torch.allclose(result.loss, criterion(model(inputs), targets), rtol=1e-12)


def test_a_list_that_is_no_window_is_refused() -> None:
    window = Window(small_model(), nn.CrossEntropyLoss(), 2)
    inputs, targets = classification(4)
    cases: list[Any] = [([], {}), ([inputs], {}), (inputs, {}), ([(inputs, targets)], {"samples": 3})]
    for given, options in cases:
        with pytest.raises(ValueError, match="backward: "):
            window.backward(given, **options)


def test_a_loss_that_cannot_be_weighted_is_refused() -> None:
    for criterion in (nn.CrossEntropyLoss(reduction="sum"), lambda outputs, targets: outputs.mean()):
        with pytest.raises(ValueError, match="no loss for each sample"):
            WeightedSamples(criterion)


def stream_of(**keys: Any) -> DataConfig:
    return data_of(train={"_target_": f"{HERE}.Stream", "noise": 0.1}, **keys)


@pytest.mark.parametrize("workers", [0, 1])
def test_law_8_a_stream_is_entered_at_any_update_and_keeps_its_order(workers: int) -> None:
    config = stream_of(workers=workers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train = build_splits(config, 3, CPU).train
    whole = read(train, 1)
    assert len(whole) == len(train) == 5 and train.samples == 36
    rest = read(build_splits(config, 3, CPU).train, 1, 3)
    for (inputs, targets), (others, labels) in zip(whole[3:], rest, strict=True):
        assert torch.equal(inputs, others) and torch.equal(targets, labels)
    assert not torch.equal(whole[0][0], read(train, 0)[0][0])  # other noise in each epoch
    assert torch.equal(torch.get_rng_state(), before)
    expected = Made().y[train.indices]
    assert torch.equal(torch.cat([targets for _, targets in whole]), expected)


def test_a_stream_that_ends_early_is_named(caplog: pytest.LogCaptureFixture) -> None:
    config = stream_of(samples=50)
    with pytest.raises(UsageError, match="data.train: the stream ended after 40 samples, 50 were declared"):
        read(build_splits(config, 0, CPU).train)
    config = stream_of(samples=30, eval_fraction=0.0)
    assert sum(len(targets) for _, targets in read(build_splits(config, 0, CPU).train)) == 30
    assert "goes on after 30 samples" in caplog.text


def test_law_8_the_order_of_a_sampler_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, first: int | None = None) -> list[int]:
        train = splits_of(seed=seed, sampler={"_target_": f"{HERE}.Drawn"}).train
        if first is not None:
            train.order(first)
        return train.order(epoch).tolist()

    assert order(0, 1) == order(0, 1, first=0) and len(order(0, 1)) == 21
    assert order(0, 1) != order(0, 0) and order(0, 1) != order(1, 1)
