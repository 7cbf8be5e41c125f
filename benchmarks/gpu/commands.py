"""The parts that are commands: the tests, `accumexp.run` and `accumexp.prove`, read by what they leave."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .session import Session

ROOT = Path(__file__).resolve().parents[2]
# The mark on a test, in a list of marks, or on a module.
MARK = re.compile(r"^\s*(@|pytestmark = \[?)?pytest\.mark\.gpu\b", re.MULTILINE)
# A test's line in the output of `pytest -v`.
OUTCOME = re.compile(r"^(tests/.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
RUN, PROVE = ("-m", "accumexp.run"), ("-m", "accumexp.prove")
# The precisions that are compared, with the overrides that choose them.
PRECISIONS = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "fp16": ["accum=loss_scaled", "precision=fp16"],
}
OUTPUT = "output.txt"
POINTS = 2.0  # of accuracy: 7 of the 360 test samples of digits


@dataclass(frozen=True)
class Done:
    """A command that has ended, in `folder`."""

    folder: Path
    code: int
    seconds: float
    output: str

    @property
    def last_line(self) -> str:
        return (self.output.strip() or "no output").splitlines()[-1]


def run_commands(session: Session, commands: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Done]]:
    """Runs Python with each list of arguments, all at the same time, each in a new folder.

    Yields name and result of each as soon as it has ended, and passes its output on.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    start = time.monotonic()
    for name, command in commands.items():
        folder = session.folder / name
        folder.mkdir()
        with (folder / OUTPUT).open("w") as output:
            processes[name] = subprocess.Popen(
                [sys.executable, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT
            )
    while processes:
        ended = [name for name, process in processes.items() if process.poll() is not None]
        for name in ended:
            seconds, folder = time.monotonic() - start, session.folder / name
            output = (folder / OUTPUT).read_text(errors="replace")
            print(f"--- {name}: {' '.join(commands[name])}\n{output}", flush=True)
            yield name, Done(folder, processes.pop(name).returncode, seconds, output)
        time.sleep(0.01)


def tests(session: Session) -> None:
    """The tests with the mark gpu, counted as they end."""
    folder = ROOT / "tests"
    files = sorted(path for path in folder.rglob("test_*.py") if MARK.search(path.read_text()))
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    command += [str(path.relative_to(ROOT)) for path in files]
    outcomes: dict[str, str] = {}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := OUTCOME.match(line):
                name, outcome = match.groups()
                # A test whose teardown fails has a second line.
                if outcomes.get(name) not in ("FAILED", "ERROR"):
                    outcomes[name] = outcome
                session.lines = [count(outcomes)]
                session.add("outcomes", outcomes)
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    session.lines += [f"{outcomes[name].lower()}: {name.rpartition('::')[2]}" for name in failed]
    session.add("failed", failed)
    if process.returncode:
        session.fail(f"pytest ended with {process.returncode}")
    elif "PASSED" not in outcomes.values():
        session.fail("no test passed")


def count(outcomes: Mapping[str, str]) -> str:
    return ", ".join(f"{number} {outcome.lower()}" for outcome, number in Counter(outcomes.values()).items())


def replicas(session: Session) -> None:
    """The time of `replicas=16`, and of a sweep of the same 16 seeds one after the other in one process."""
    number, updates = (2, 2) if session.quick else (16, 110)
    given = ["model=lenet5", "data=digits", "accum.steps=4", f"trainer.max_updates={updates}"]
    given += ["trainer.eval_every=1000", "trainer.log_every=10", "callbacks=none", "report.write=false"]
    given += ["tracking=none", f"device={session.device}"]
    seeds = ",".join(map(str, range(number)))
    commands = {"together": [*RUN, f"replicas={number}"], "alone": [*RUN, "-m", f"seed={seeds}"]}
    figures: dict[str, Any] = {"runs": number, "updates": updates}
    for command in commands:  # one after the other: they are timed
        ((name, done),) = run_commands(session, {command: [*commands[command], *given]})
        if done.code:
            session.fail(f"{name}: exit code {done.code}: {done.last_line}")
            return
        ends = finished(done.folder)
        if len(ends) != number:
            session.fail(f"{name}: {len(ends)} of {number} runs finished")
            return
        # All replicas have the time of their common loop.
        seconds = [end["final"]["seconds"] for end in ends]
        figures[name] = {
            "command_s": done.seconds,
            "training_s": statistics.median(seconds) * (1 if name == "together" else number),
            "update_ms": statistics.median(update_times(done.folder)),
            "accuracy": statistics.fmean(end["final"]["accuracy"] for end in ends),
        }
        session.add("replicas", figures)
    joint, single = figures["together"], figures["alone"]
    figures["update_ratio"] = joint["update_ms"] / (number * single["update_ms"])
    figures["training_ratio"] = joint["training_s"] / single["training_s"]
    figures["command_ratio"] = joint["command_s"] / single["command_s"]
    session.add(
        "replicas",
        figures,
        f"{number} updates together {joint['update_ms']:.2f} ms, one alone {single['update_ms']:.2f} ms: "
        f"{figures['update_ratio']:.3f} of {number} single ones",
        f"whole training {figures['training_ratio']:.3f}, whole commands {figures['command_ratio']:.3f} "
        f"({joint['command_s']:.1f} s and {single['command_s']:.1f} s)",
    )


def finished(folder: Path) -> list[dict[str, Any]]:
    """The summaries of the finished runs below `folder`; not that of a job of replicas, which has a list."""
    ends = [json.loads(path.read_text()) for path in sorted(folder.rglob("summary.json"))]
    return [end for end in ends if end["status"] == "FINISHED" and not end.get("replicas")]


def update_times(folder: Path) -> list[float]:
    """`perf/update_ms` of every published update of the runs below `folder`, but each run's first.

    The first one holds what a process does once: kernels are loaded and chosen.
    """
    times: list[float] = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        times_of = [row["perf/update_ms"] for row in rows if "perf/update_ms" in row]
        times += times_of[1:] or times_of
    return times


def accuracy(session: Session) -> None:
    """Test accuracy of the tutorial's LeNet-5 in low precision, beside fp32; the same seeds for all."""
    mnist = has_mnist(session.data_root)
    data = ["data=mnist", f"data.root={session.data_root}"] if mnist else ["data=digits"]
    seeds, epochs = (1, 1) if session.quick else (1, 5) if mnist else (3, 30)
    given = ["experiment=tutorial_lenet", *data, f"trainer.epochs={epochs}", "callbacks=none"]
    given += ["tracking=none", "report.write=false", f"device={session.device}"]
    given += ["trainer.max_updates=2"] * session.quick
    chosen = "seed=" + ",".join(map(str, range(seeds)))
    commands = {name: [*RUN, "-m", chosen, *given, *options] for name, options in PRECISIONS.items()}
    figures: dict[str, Any] = {"data": "mnist" if mnist else "digits", "seeds": seeds, "epochs": epochs}
    for name, done in run_commands(session, commands):
        reached = [end["final"]["accuracy"] for end in finished(done.folder)]
        if done.code or len(reached) != seeds:
            session.fail(f"{name}: exit code {done.code}: {done.last_line}")
            continue
        figures[name] = reached
        session.add("accuracy", figures)
    if "fp32" not in figures:
        return
    reference = statistics.fmean(figures["fp32"])
    session.add("accuracy", figures, f"{figures['data']}, fp32: {100 * reference:.2f} %")
    for name in ("bf16", "fp16"):
        if name in figures:
            points = 100 * (statistics.fmean(figures[name]) - reference)
            figures[f"{name}_points"] = points
            session.add("accuracy", figures, f"{name}: {points:+.2f} points")
            if abs(points) > POINTS and not session.quick:
                session.fail(f"{name}: {points:+.2f} points from fp32, more than {POINTS}")


def has_mnist(root: Path | None) -> bool:
    """Whether torchvision finds MNIST in `root`, without a download."""
    folder = root / "MNIST" / "raw" if root else None
    return folder is not None and (folder / "train-images-idx3-ubyte").is_file()


def certificates(session: Session) -> None:
    """The certificate of LeNet-5's window of 4 micro-batches, in every precision: each must be `proved`."""
    given = ["model=lenet5", "data=digits", "accum.steps=4", "tracking=none", f"device={session.device}"]
    given += ["proof.updates=3"] * session.quick
    commands = {name: [*PROVE, *given, *options] for name, options in PRECISIONS.items()}
    for name, done in run_commands(session, commands):
        paths = list(done.folder.rglob("certificate.json"))
        if not paths:
            session.fail(f"{name}: exit code {done.code}: {done.last_line}")
            continue
        certificate = json.loads(paths[0].read_text())
        checks = certificate["checks"]
        failed = [check for check in checks if not check["passed"]]
        figures = {"verdict": certificate["verdict"], "summary": certificate["summary"]}
        figures |= {"checks": len(checks), "failed": failed, "seconds": done.seconds}
        session.add(name, figures, f"{name}: {certificate['summary']} ({len(checks)} checks)")
        if certificate["verdict"] != "proved":
            session.fail(f"{name}: {certificate['summary']}")
