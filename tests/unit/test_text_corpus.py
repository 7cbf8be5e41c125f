"""The data of text: which lines of which files are its samples, what is hidden of them, and its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accumexp.config.instantiate import build
from accumexp.data import Batch, Batches, InMemory, Placement, PythonSources, ResidentBatches, build_splits
from accumexp.data.raw import raw_tensors
from accumexp.data.samples import Layout
from accumexp.data.text import FIRST_BYTE, IGNORED, MASK, PAD, VOCABULARY, masked, source_files
from accumexp.errors import UsageError

from ..support.experiments import composed
from ..support.text import corpus, parts_of

# The corpus --------------------------------------------------------------------------------------------


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
