"""Certifies every wrong loop and prints which check caught it: `python -m tests.mutants [updates]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from accumexp.proof import Certificate, certify

from . import wrong_loops, wrong_precision
from .wrong_loops import Loop

UPDATES = 12
LOOPS: list[Loop] = [*wrong_loops.LOOPS, *wrong_precision.LOOPS]


def certified(loop: Loop, updates: int = UPDATES) -> Certificate:
    setting = loop.setting
    options = {"updates": updates, **setting.options}
    return certify(loop.make(), setting.model(), setting.loss(), setting.batch(), setting.steps, **options)


def wrong(loop: Loop, found: Certificate, updates: int = UPDATES) -> str:
    """What the proof did not say of `loop` as it should have; "" if it did."""
    if not loop.caught_by:
        return "" if found.verdict == "proved" else f"a right loop is {found}"
    if found.proved:
        return "not caught"
    expected = loop.caught_by.format(updates=f"{updates} updates")
    failed = [check.name for check in found.failed]
    if not any(name.startswith(expected) for name in failed):
        return f"{expected!r} did not fail, but {failed} did"
    return "" if loop.says in str(found) else f"{loop.says!r} is not in {str(found)!r}"


def table(loops: Sequence[Loop], found: Sequence[Certificate], updates: int = UPDATES) -> str:
    lines = []
    mutants = caught = rights = proved = 0
    for loop, certificate in zip(loops, found, strict=True):
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


def main(updates: int) -> int:
    begun = time.perf_counter()
    found = [certified(loop, updates) for loop in LOOPS]
    print(table(LOOPS, found, updates))
    print(f"{updates} updates each, {time.perf_counter() - begun:.0f} s")
    return int(any(wrong(loop, one, updates) for loop, one in zip(LOOPS, found, strict=True)))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
