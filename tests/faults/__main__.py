"""Injects faults into real runs, and prints what came of them: `python -m tests.faults [part ...]`."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .concurrency import in_one_store, on_one_run
from .cost import COST_TITLES, cost
from .disks import full_disks
from .hostile import hostile_checkpoints
from .kills import Kill, Outcome, random_kills, reference, tried
from .outages import LONG, TITLES, outages

console = Console(width=140)


def kills(folder: Path, count: int, seed: int) -> bool:
    """`count` kills of one process."""
    return _kills(folder, count, seed, ranks=False)


def rank_kills(folder: Path, count: int, seed: int) -> bool:
    """A tenth as many kills of two ranks, whose processes start as users' do."""
    return _kills(folder, max(1, count // 10), seed, ranks=True)


def _kills(folder: Path, count: int, seed: int, ranks: bool) -> bool:
    outcomes: list[Outcome] = []
    never_stopped, seconds = reference(folder / "reference", ranks)
    trials: list[Kill] = list(random_kills(count, seed, seconds, ranks))
    for index, kill in enumerate(track(trials, "kills", console=console, transient=True)):
        trial = folder / f"kill-{index}"
        outcome = tried(trial, kill, never_stopped)
        outcomes.append(outcome)
        if outcome.good:
            shutil.rmtree(trial)
        else:
            console.print(escape(f"{trial}: {outcome}"), style="red")
    table = Table(
        "killed", "tried", "before the end", "resumed", "same bits", "doubled", "partial", "still RUNNING"
    )
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.kill.kind].append(outcome)
    for kind, of_kind in [*sorted(kinds.items()), ("all", outcomes)]:
        resumed = [one for one in of_kind if one.resumed]
        counts = (
            len(of_kind),
            sum(one.reached for one in of_kind),
            len(resumed),
            sum(not one.different for one in resumed),
            sum(bool(one.doubled) for one in of_kind),
            sum(bool(one.partial) for one in of_kind),
            sum(one.running for one in of_kind),
        )
        table.add_row(kind, *map(str, counts))
    console.print(table)
    return all(outcome.good for outcome in outcomes)


def server(folder: Path, count: int, seed: int) -> bool:
    """A server that fails for good, for 20 seconds, and when the run gets SIGTERM; the cost of an update."""
    modes = ("refuse", "500", "hang", "lose")
    table = Table(*TITLES)
    results = [
        *outages(folder / "for_good", modes, [LONG], updates=2000),
        *outages(folder / "short", modes, [20.0], updates=4000),
        *outages(folder / "stopped", modes, [LONG], updates=100000, stop_after=8.0),
    ]
    for outage in results:
        table.add_row(*outage.row())
    console.print(table)
    table = Table(*COST_TITLES)
    for mode in modes:
        table.add_row(*cost(folder / "cost" / mode, mode, updates=4000).row())
    console.print(table)
    return not any(outage.lost or outage.doubled for outage in results)


def disk(folder: Path, count: int, seed: int) -> bool:
    """Disks that are full after some checkpoints."""
    table = Table("disk", "exit code", "error", "same bits after a resume with room")
    disks = full_disks(folder, [2.0, 3.0, 4.0])
    for full in disks:
        error = next((line for line in full.lines if line.startswith("error: ")), "")
        table.add_row(f"{full.mebibytes} MiB", str(full.code), escape(error), str(full.same))
    console.print(table)
    return all(full.good for full in disks)


def concurrency(folder: Path, count: int, seed: int) -> bool:
    """Several processes on one run, in one folder and in one store."""
    answers = [*on_one_run(folder / "run"), in_one_store(folder / "store", 8)]
    table = Table("tried", "as it should", "last line")
    for answer in answers:
        table.add_row(answer.what, str(answer.good), escape(answer.last_line))
    console.print(table)
    return all(answer.good for answer in answers)


def hostile(folder: Path, count: int, seed: int) -> bool:
    """Hostile and damaged checkpoints, by both commands that read one."""
    commands, most, wrong = hostile_checkpoints(folder)
    table = Table("commands", "most memory above the start's", "code run, tracebacks, or more than a line")
    table.add_row(str(commands), f"{most:.2f} GiB", escape("\n".join(wrong) or "none"))
    console.print(table)
    return not wrong


PARTS: dict[str, Callable[[Path, int, int], bool]] = {
    "kills": kills,
    "rank_kills": rank_kills,
    "server": server,
    "disk": disk,
    "concurrency": concurrency,
    "hostile": hostile,
}


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all by default")
    parser.add_argument("--kills", type=int, default=200, help="kills of one process (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    good = True
    for part in options.parts or PARTS:
        begin = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix=f"faults-{part}-"))
        good = PARTS[part](folder, options.kills, options.seed) and good
        console.print(f"{part}: {time.monotonic() - begin:.0f} s, seed {options.seed}", highlight=False)
        if good:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            console.print(f"what failed is in {folder}", highlight=False)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
