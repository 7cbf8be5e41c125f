"""The embedded text: the sources of Python's standard library, for masked language modelling of bytes."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..environment.random_state import derive_seed
from ..errors import UsageError
from .in_memory import InMemory
from .transforms import keyed_uniforms

PAD, MASK = 0, 1
FIRST_BYTE = 2  # the token of byte b is b + FIRST_BYTE
VOCABULARY = FIRST_BYTE + 256
IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index

MASKED_SHARE = 0.15
# The position of a split's files among ten consecutive ones.
FILES_OF = {"train": range(8), "eval": (8,), "test": (9,)}
# Third-party folders, and parts that not every Python distribution has.
LEFT_OUT = {
    *("__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib-dynload", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo", "venv"),
}
BUILT = ("_sysconfigdata", "sitecustomize", "usercustomize")


class PythonSources(InMemory):
    """Paragraphs of Python files as bytes, some of which are masked for the model to predict.

    A sample is a series of whole lines of one file, up to a blank line or `length` bytes. Samples below
    `min_length` bytes are left out, and lines are truncated to `length` bytes. Files are read in the order of
    their paths. Of ten files eight are for train and one each for eval and test. The samples depend only on
    the version of Python.

    Tokens are PAD (0), MASK (1) and the bytes, 2 to 257. Masking follows Devlin et al. (arXiv 1810.04805,
    section 3.1): of a sample's n bytes max(1, round(0.15 n)) are predicted; of these 80 % are replaced by
    MASK, 10 % by a random byte, and 10 % are unchanged. It is a function of `mask_seed`, the split and the
    sample's index, the same in every epoch and for every seed of a run.

    Samples: inputs {"input_ids", "attention_mask"}, both (length,) int64, the mask 1 on bytes and 0 on
    padding; targets (length,) int64, the byte's token where it is predicted and -100 elsewhere.

    Args:
        split: "train", "eval" or "test".
        samples: number of samples.
        length: tokens in a sample, padding included.
        min_length: bytes in the shortest sample.
        mask_seed: seed of the masking.
        folder: read the .py files in and below this folder; None for the standard library's.

    Raises:
        UsageError: if there are no sources, or fewer than `samples`.
        ValueError: for an unknown split, or unless 1 <= min_length <= length and 1 <= samples.
    """

    def __init__(
        self,
        split: str,
        samples: int,
        length: int = 64,
        min_length: int = 16,
        mask_seed: int = 0,
        folder: str | None = None,
    ) -> None:
        if split not in FILES_OF:
            raise ValueError(f"split={split}: one of {', '.join(FILES_OF)}")
        if not 1 <= min_length <= length:
            raise ValueError(f"min_length={min_length} of length={length}: from 1 to length")
        if samples < 1:
            raise ValueError(f"samples={samples}: at least 1")
        chunks = list(islice(_chunks(source_files(folder, split), length, min_length), samples))
        if len(chunks) < samples:
            available = f"{len(chunks)} of {min_length} to {length} bytes for the {split} split"
            raise UsageError(f"samples={samples}: {folder or 'the standard library'} has only {available}")
        tokens = torch.full((samples, length), PAD)
        for row, chunk in zip(tokens, chunks, strict=True):
            row[: len(chunk)] = torch.frombuffer(chunk, dtype=torch.uint8).long() + FIRST_BYTE
        input_ids, targets = masked(tokens, derive_seed("mask", mask_seed, split))
        super().__init__({"input_ids": input_ids, "attention_mask": (tokens != PAD).long()}, targets)


def source_files(folder: str | None, split: str) -> list[Path]:
    """The split's .py files below `folder`, or of the standard library, sorted by path.

    Raises:
        UsageError: if there is none.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    paths: list[str] = []
    for parent, folders, names in os.walk(root):
        if folder is None:
            folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
            names = [name for name in names if not name.startswith(BUILT)]
        relative = Path(parent).relative_to(root)
        paths += [(relative / name).as_posix() for name in names if name.endswith(".py")]
    files = [root / path for k, path in enumerate(sorted(paths)) if k % 10 in FILES_OF[split]]
    if not files:
        remedy = "take a Python that comes with its library's sources, or give data.train.folder=<sources>"
        if folder:
            remedy = "give a folder of at least 10 .py files"
        raise UsageError(f"folder={root}: no .py files there for the {split} split; {remedy}")
    return files


def _chunks(files: list[Path], length: int, min_length: int) -> Iterator[bytearray]:
    """The samples' bytes, `min_length` to `length` of them each, file by file."""
    for path in files:
        run = bytearray()
        for line in [*path.read_bytes().splitlines(keepends=True), b""]:
            if not line.strip() or len(run) + len(line) > length:
                if len(run) >= min_length:
                    yield run
                run = bytearray()
            if line.strip():
                run += line[:length]


def masked(tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Masks bytes of `tokens` (n, length), with draws that depend on `seed` and the row's number.

    Returns:
        The masked tokens, and the targets: the predicted bytes' tokens, -100 elsewhere; both (n, length).
    """
    samples, length = tokens.shape
    draws = keyed_uniforms(torch.arange(samples), 3 * length, seed).view(samples, 3, length)
    order, action, byte = draws.unbind(1)
    real = tokens != PAD
    count = (MASKED_SHARE * real.sum(1, keepdim=True)).round().long().clamp(min=1)
    # The bytes of the `count` lowest draws; a stable sort, so that ties do not make more of them.
    rank = order.masked_fill(~real, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    predicted = rank < count
    other = torch.where(action < 0.9, FIRST_BYTE + (256 * byte).long(), tokens)
    replaced = torch.where(action < 0.8, MASK, other)
    return torch.where(predicted, replaced, tokens), torch.where(predicted, tokens, IGNORED)
