"""Certifies every wrong loop and prints which check caught it: `python -m tests.proof.mutants [updates]`."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import track

from accumexp.proof import Certificate, certify

from ..support.ranks import on_ranks
from . import wrong_loops, wrong_precision, wrong_ranks, wrong_terms
from .wrong_loops import Loop

UPDATES = 12
LOOPS: list[Loop] = [*wrong_loops.LOOPS, *wrong_precision.LOOPS, *wrong_terms.LOOPS]


def certified(loop: Loop, updates: int = UPDATES) -> Certificate:
    setting = loop.setting
    options = {"updates": updates, **setting.options}
    return certify(loop.make(), setting.model(), setting.loss(), setting.batch(), setting.steps, **options)


def wrong(loop: Loop, certificate: Certificate, updates: int = UPDATES) -> str:
    """What `certificate` lacks of the verdict that `loop` should get; "" for nothing."""
    if not loop.caught_by:
        return "" if certificate.verdict == "proved" else f"a right loop is {certificate}"
    if certificate.proved:
        return "not caught"
    expected = loop.caught_by.format(updates=f"{updates} updates")
    failed = [check.name for check in certificate.failed]
    if not any(name.startswith(expected) for name in failed):
        return f"{expected!r} did not fail, but {failed} did"
    return "" if loop.says in str(certificate) else f"{loop.says!r} is not in {str(certificate)!r}"


def table(loops: Sequence[Loop], certificates: Sequence[Certificate], updates: int = UPDATES) -> str:
    lines = []
    mutants = caught = rights = proved = 0
    for loop, certificate in zip(loops, certificates, strict=True):
        trouble = wrong(loop, certificate, updates)
        if loop.caught_by:
            mutants += 1
            caught += not certificate.proved
        else:
            rights += 1
            proved += certificate.verdict == "proved"
        failed = "; ".join(check.name for check in certificate.failed)
        lines.append(f"{'!!' if trouble else 'ok'}  {loop.name}\n      {certificate}")
        if failed:
            lines.append(f"      failed: {failed}")
        if trouble:
            lines.append(f"      {trouble}")
    return "\n".join([*lines, f"caught {caught}/{mutants}, right loops proved {proved}/{rights}"])


def of_ranks(updates: int = UPDATES) -> list[Certificate]:
    """The certificates of the loops that need several ranks, called on every rank alike."""
    return [certified(loop, updates) for loop in wrong_ranks.LOOPS]


def main(updates: int) -> int:
    torch.set_num_threads(1)
    # torch warns of some of the bugs itself.
    warnings.simplefilter("ignore")
    begun = time.perf_counter()
    shown = track(LOOPS, "certifying", console=Console(stderr=True), transient=True)
    certificates = [certified(loop, updates) for loop in shown]
    with TemporaryDirectory() as folder:
        certificates += on_ranks(2, Path(folder), of_ranks, updates, seconds=3600)[0]
    loops = [*LOOPS, *wrong_ranks.LOOPS]
    print(table(loops, certificates, updates))
    print(f"{updates} updates each, {time.perf_counter() - begun:.0f} s")
    return int(any(wrong(loop, one, updates) for loop, one in zip(loops, certificates, strict=True)))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
