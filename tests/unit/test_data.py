"""The batches: who comes when, whichever way they are fed, and what augmentation does to them."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from accumexp.data import Batch, Batches, Digits, ResidentBatches, ShiftAndFlip, StreamedBatches, build_splits
from accumexp.data.splits import Placement, Splits
from accumexp.data.transforms import keyed_uniforms
from accumexp.errors import UsageError

from ..support.experiments import composed, write_images

CPU = Placement(torch.device("cpu"), torch.float32)


def splits_of(*overrides: str, seed: int = 0) -> Splits:
    return build_splits(composed(*overrides).data, seed, CPU)


def inputs_of(batch: Batch) -> Tensor:
    assert isinstance(batch.inputs, Tensor)
    return batch.inputs


def assert_same_batches(actual: Batches, expected: Batches, epoch: int = 0) -> None:
    pairs = list(zip(actual.epoch(epoch), expected.epoch(epoch), strict=True))
    assert len(pairs) == len(expected)
    for one, other in pairs:
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(inputs_of(one), inputs_of(other))
        assert isinstance(one.targets, Tensor) and isinstance(other.targets, Tensor)
        assert torch.equal(one.targets, other.targets) and one.targets.dtype == other.targets.dtype


def test_an_epoch_has_every_sample_once_in_an_order_of_seed_and_epoch() -> None:
    train = splits_of().train
    orders = {
        (seed, epoch): torch.cat([batch.indices for batch in splits_of(seed=seed).train.epoch(epoch)])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    for order in orders.values():
        assert torch.equal(order.sort().values, train.indices)
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
    again = torch.cat([batch.indices for batch in splits_of().train.epoch(1)])
    assert torch.equal(again, orders[0, 1])


def test_the_order_does_not_depend_on_steps_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    orders = []
    for overrides in (["accum.steps=1"], ["accum.steps=8"], ["data.resident=false", "data.workers=0"]):
        train = splits_of("data.batch_size=100", *overrides).train
        orders.append(torch.cat([batch.indices for batch in train.epoch(3)]))
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("resident", ["true", "false"])
def test_an_epoch_can_be_entered_at_any_update(resident: str) -> None:
    train = splits_of(f"data.resident={resident}", "data.workers=0").train
    whole = list(train.epoch(2))
    for start in (0, 1, 7, len(whole)):
        rest = list(train.epoch(2, start))
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a.indices, b.indices) for a, b in zip(rest, whole[start:], strict=True))


def test_law_3_the_last_batch_is_kept_unless_the_config_drops_it() -> None:
    sizes = [len(batch.indices) for batch in splits_of("data.batch_size=100").train.epoch(0)]
    assert sizes == [100] * 12 + [93]
    dropped = splits_of("data.batch_size=100", "data.drop_last=true").train
    assert [len(batch.indices) for batch in dropped.epoch(0)] == [100] * 12 == [100] * len(dropped)


def test_splits_share_no_sample_and_do_not_depend_on_the_seed() -> None:
    first, second = splits_of(seed=0), splits_of(seed=1)
    assert torch.equal(first.eval.indices, second.eval.indices)
    both = torch.cat([first.train.indices, first.eval.indices])
    assert torch.equal(both.sort().values, torch.arange(1437))
    assert first.test.samples == 360
    other = splits_of("data.split_seed=1").eval.indices
    assert not torch.equal(other, first.eval.indices)
    unheld = splits_of("data.eval_fraction=0")
    assert unheld.train.samples == 1437 and not unheld.has_eval and first.has_eval


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_the_resident_ones(workers: int) -> None:
    resident = splits_of()
    streamed = splits_of("data.resident=false", f"data.workers={workers}")
    assert isinstance(resident.train, ResidentBatches) and isinstance(streamed.train, StreamedBatches)
    assert_same_batches(streamed.train, resident.train, epoch=1)
    assert_same_batches(streamed.test, resident.test)


def write_mnist(root: Path, train: int = 300, test: int = 70) -> None:
    """Random images in MNIST's own format (LeCun, 1998), where torchvision looks for them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    source = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        pixels = source.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = source.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


@pytest.mark.slow
def test_mnist_is_read_whole_as_it_is_read_sample_by_sample(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    where = ["data=mnist", f"data.root={tmp_path}"]
    resident, streamed = splits_of(*where), splits_of(*where, "data.resident=false", "data.workers=0")
    assert isinstance(resident.train, ResidentBatches)
    one, other = next(resident.train.epoch(0)), next(streamed.train.epoch(0))
    assert inputs_of(one).shape == (128, 1, 32, 32)
    torch.testing.assert_close(inputs_of(one), inputs_of(other))
    assert torch.equal(one.indices, other.indices)


def test_a_folder_of_images_is_streamed_and_can_be_made_resident(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 6, "test": 3})
    where = ["data=image_folder", f"data.root={tmp_path}", "data.image_size=24", "data.workers=0"]
    config = composed(*where)
    assert config.data.num_classes == 2
    streamed = build_splits(config.data, 0, CPU)
    assert isinstance(streamed.train, StreamedBatches)
    assert {batch.indices.numel() for batch in streamed.test.epoch(0)} == {6}
    resident = splits_of(*where, "data.resident=true", "data.augment=null")
    assert_same_batches(splits_of(*where, "data.augment=null").train, resident.train)
    with pytest.raises(UsageError, match=r"data.resident=true: data.augment works sample by sample"):
        splits_of(*where, "data.resident=true")


class Noisy(Dataset[Any]):
    """Samples that are nothing but draws from the three global generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))]), index % 2


def test_draws_of_a_users_data_set_are_keyed_by_seed_epoch_and_sample() -> None:
    noisy = ["data.train._target_=tests.unit.test_data.Noisy", "~data.train.train", "~data.train.image_size"]

    def samples(epoch: int, *overrides: str, seed: int = 0) -> dict[int, tuple[float, ...]]:
        train = splits_of(*noisy, *overrides, seed=seed).train
        rows = [(batch.indices, inputs_of(batch)) for batch in train.epoch(epoch)]
        return {
            int(i): tuple(x.tolist())
            for indices, inputs in rows
            for i, x in zip(indices, inputs, strict=True)
        }

    first = samples(0, "data.workers=0", "data.batch_size=10")
    assert first == samples(0, "data.workers=2", "data.batch_size=7")
    assert len(set(first.values())) == len(first) == 36
    assert not set(first.values()) & set(samples(1, "data.workers=0").values())
    assert not set(first.values()) & set(samples(0, "data.workers=0", seed=1).values())


def test_augmentation_is_keyed_by_sample_and_epoch_not_by_the_split() -> None:
    augment = ["+data.augment._target_=accumexp.data.ShiftAndFlip"]

    def augmented(epoch: int, *overrides: str) -> dict[int, Tensor]:
        train = splits_of(*augment, *overrides).train
        return {int(i): x for b in train.epoch(epoch) for i, x in zip(b.indices, inputs_of(b), strict=True)}

    large, small = augmented(0, "data.batch_size=500"), augmented(0, "data.batch_size=7")
    assert all(torch.equal(large[index], small[index]) for index in large)
    streamed = augmented(0, "data.resident=false", "data.workers=0")
    assert all(torch.equal(large[index], streamed[index]) for index in large)
    later = augmented(1)
    assert sum(torch.equal(large[index], later[index]) for index in large) < 0.1 * len(large)
    plain = next(splits_of(*augment).eval.epoch(0))
    assert torch.equal(inputs_of(plain), inputs_of(next(splits_of().eval.epoch(0))))


def test_shift_and_flip_by_hand() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    augment = ShiftAndFlip(shift=1)
    still = torch.tensor([[0.5, 0.5, 0.0]])
    assert torch.equal(augment(image, still), image)
    flipped = torch.tensor([[0.5, 0.5, 0.9]])
    assert torch.equal(augment(image, flipped), image.flip(3))
    down_right = torch.tensor([[0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 3, 4]]).view(1, 1, 3, 3)
    assert torch.equal(augment(image, down_right), expected)


def test_keyed_uniforms_are_uniform_and_unrelated() -> None:
    draws = keyed_uniforms(torch.arange(20_000), 3, seed=7)
    assert draws.shape == (20_000, 3) and 0 <= float(draws.min()) and float(draws.max()) < 1
    # Means of 20,000 uniforms: 0.5 with a standard error of 0.002; correlations about 0.007.
    assert torch.allclose(draws.mean(0), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(draws.var(0), torch.tensor(1 / 12), atol=0.003)
    assert torch.allclose(torch.corrcoef(draws.T), torch.eye(3), atol=0.04)
    neighbours = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))
    assert abs(float(neighbours[0, 1])) < 0.04
    assert torch.equal(draws[[5, 3]], keyed_uniforms(torch.tensor([5, 3]), 3, seed=7))
    assert not torch.equal(draws, keyed_uniforms(torch.arange(20_000), 3, seed=8))


def test_the_digits_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    read = Digits(train=True, image_size=8)
    bunch: Any = load_digits()
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # and where its file lies elsewhere
    asked = Digits(train=True, image_size=8)
    for tensor, expected in zip(read.tensors, asked.tensors, strict=True):
        assert torch.equal(tensor, expected)
    everything = torch.cat([read.tensors[1], Digits(train=False).tensors[1]])
    assert torch.equal(everything.bincount(), torch.from_numpy(bunch.target).bincount())


def test_digits_are_normalised_images_with_labels() -> None:
    train, test = Digits(train=True), Digits(train=False, image_size=8)
    images, labels = train.tensors
    assert images.shape == (1437, 1, 32, 32) and images.dtype is torch.float32
    assert abs(float(images.mean())) < 0.05 and abs(float(images.std()) - 1) < 0.2
    assert test.tensors[0].shape == (360, 1, 8, 8)
    assert sorted(set(labels.tolist())) == list(range(10)) and labels.dtype is torch.int64


class Stream(torch.utils.data.IterableDataset[Any]):
    pass


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data=image_folder", "data.root=/nowhere"], "data.root=/nowhere"),
        (
            [
                "data.train._target_=tests.unit.test_data.Stream",
                "~data.train.train",
                "~data.train.image_size",
            ],
            "data.train",
        ),
        (["data.batch_size=5000", "data.drop_last=true"], "data.batch_size=5000: only 1293"),
        (["data.train._target_=sklearn.nothing"], "data.train._target_=sklearn.nothing"),
        (["data.eval_fraction=1"], "data.eval_fraction=1"),
    ],
)
def test_data_that_cannot_be_used_is_named(overrides: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        splits_of(*overrides)
