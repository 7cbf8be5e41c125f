"""The embedded text: sources that come with every Python, as bytes, for masked language modelling."""

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
# Of ten files in a row, eight are trained on.
FILES_OF = {"train": range(8), "eval": (8,), "test": (9,)}
# Installed beside the library, left out by some distributions of Python, or written when it was built.
LEFT_OUT = {
    *("__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib-dynload", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo", "venv"),
}
BUILT = ("_sysconfigdata", "sitecustomize", "usercustomize")


class PythonSources(InMemory):
    """Paragraphs of Python files as bytes, some of which a model is to guess.

    A sample is a run of whole lines of one file, up to a blank line or to `length` bytes; runs below
    `min_length` bytes are left out, and what a line has beyond `length` bytes too. Files come in the order
    of their paths, and no more are read than `samples` need. Of ten files eight are for training and one each
    for eval and test, so splits share none. For one version of Python the samples are always the same.

    Tokens are PAD (0), MASK (1) and the bytes, 2 to 257. Masking is that of Devlin et al. (arXiv
    1810.04805, section 3.1): of a sample's n bytes max(1, round(0.15 n)) are to be guessed; of these 80 %
    are replaced by MASK, 10 % by a random byte, and 10 % stay. As there it is drawn once: a function of
    `mask_seed`, the split and the sample's index, alike in every epoch, batch, worker and rank, and for
    every seed of a run. Every sample has a byte to guess, so none has weight 0.

    Samples: inputs {"input_ids", "attention_mask"}, both (length,) int64, the mask 1 on bytes and 0 on
    padding; targets (length,) int64, the byte's token where it is to be guessed and -100 elsewhere.

    Args:
        split: "train", "eval" or "test".
        samples: how many.
        length: tokens in a sample, padding included.
        min_length: bytes in the shortest sample.
        folder: whose .py files are read, below it too; null for the standard library's.

    Raises:
        UsageError: if there are no sources, or not enough of them.
        ValueError: for an unknown split, or lengths that do not fit each other.
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
            where = folder or "the standard library"
            have = f"{len(chunks)} of {min_length} to {length} bytes for the {split} split"
            raise UsageError(f"samples={samples}: {where} has only {have}")
        tokens = torch.full((samples, length), PAD)
        for row, chunk in zip(tokens, chunks, strict=True):
            row[: len(chunk)] = torch.frombuffer(chunk, dtype=torch.uint8).long() + FIRST_BYTE
        input_ids, targets = masked(tokens, derive_seed("mask", mask_seed, split))
        super().__init__({"input_ids": input_ids, "attention_mask": (tokens != PAD).long()}, targets)


def source_files(folder: str | None, split: str) -> list[Path]:
    """The split's share of the .py files below `folder`, or of the standard library's, sorted by path.

    Raises:
        UsageError: if there is none.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for parent, folders, names in os.walk(root):
        if folder is None:
            folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
            names = [name for name in names if not name.startswith(BUILT)]
        own = Path(parent).relative_to(root)
        found += [(own / name).as_posix() for name in names if name.endswith(".py")]
    chosen = [root / name for k, name in enumerate(sorted(found)) if k % 10 in FILES_OF[split]]
    if not chosen:
        right = (
            "give a folder of at least 10 .py files"
            if folder
            else "take a Python that comes with its library's sources, or give data.train.folder=<sources>"
        )
        raise UsageError(f"folder={root}: no .py files there for the {split} split; {right}")
    return chosen


def _chunks(files: list[Path], length: int, min_length: int) -> Iterator[bytearray]:
    """The samples' bytes, `min_length` to `length` each, file by file."""
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
    """`tokens` (n, length) with some bytes hidden, and the targets (n, length): those bytes, -100 elsewhere.

    The draws of a row are a function of `seed` and the row's number.
    """
    samples, length = tokens.shape
    draws = keyed_uniforms(torch.arange(samples), 3 * length, seed).view(samples, 3, length)
    order, action, byte = draws.unbind(1)
    real = tokens != PAD
    count = (MASKED_SHARE * real.sum(1, keepdim=True)).round().long().clamp(min=1)
    # The bytes of the `count` lowest draws; ties go to the first, so that there are never more.
    place = order.masked_fill(~real, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    guessed = place < count
    other = torch.where(action < 0.9, FIRST_BYTE + (256 * byte).long(), tokens)
    shown = torch.where(action < 0.8, MASK, other)
    return torch.where(guessed, shown, tokens), torch.where(guessed, tokens, IGNORED)
