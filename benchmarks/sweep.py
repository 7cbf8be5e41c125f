"""Times twenty runs as whole commands: a sweep of accumexp, and the same runs in Lightning.

python -m benchmarks.sweep --repeat 3 --json sweep.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from accumexp.config.schema import Config
from accumexp.environment.cores import cores
from accumexp.tracking.json_file import read_json

from .measure import (
    at_least_1,
    check_names,
    console,
    environment,
    finish,
    in_turns,
    numbers,
    output_options,
    say,
    shown,
    table_of,
    with_medians,
    words,
)

PACKAGES = ("lightning", "mlflow", "hydra-core")
REFERENCE = "lightning"
BATCH = 128
ROOT = Path(__file__).resolve().parent.parent


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """The commands, by name."""
    steps, seeds = (",".join(map(str, values)) for values in (options.steps, range(options.seeds)))
    run = [sys.executable, "-m", "accumexp.run", "-m", f"accum.steps={steps}"]
    run += [f"trainer.epochs={options.epochs}", f"data.batch_size={BATCH}", "device=cpu"]
    parallel = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={options.jobs}"]
    peer = [sys.executable, "-m", "benchmarks.lightning_runs", f"--steps={steps}"]
    peer += [f"--seeds={options.seeds}", f"--epochs={options.epochs}", f"--batch={BATCH}"]
    return {
        "lightning": peer,
        "accumexp": [*run, f"seed={seeds}"],
        "accumexp joblib": [*run, f"seed={seeds}", *parallel],
        "accumexp replicas": [*run, f"replicas={options.seeds}"],
    }


def why_not(name: str) -> str | None:
    """Why a command cannot be measured here, or None."""
    if name == "lightning" and find_spec("lightning") is None:
        return "lightning is not installed: pip install 'accumexp[bench]'"
    if name == "accumexp replicas" and "replicas" not in Config.__dataclass_fields__:
        return "this accumexp has no key replicas"
    return None


def timed(name: str, command: list[str]) -> tuple[float, dict[str, list[float]]]:
    """Seconds of a command from its start to its exit, and the runs' test accuracies by accum.steps.

    Raises:
        SystemExit: with the end of its output, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        start = perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
        )
        seconds = perf_counter() - start
        if done.returncode:
            raise SystemExit(f"error: {name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return seconds, accuracies(Path(folder))


def accuracies(folder: Path) -> dict[str, list[float]]:
    """Test accuracies of the runs below `folder`, by accum.steps, from their `summary.json`."""
    values: dict[str, list[float]] = {}
    for path in sorted(folder.rglob("summary.json")):
        end = read_json(path)
        overrides = dict(override.split("=", 1) for override in end.get("overrides", []))
        if end.get("replicas"):  # the mean of a job of replicas, each of which has its own
            continue
        if "accuracy" in (final := end.get("final") or {}):
            values.setdefault(overrides.get("accum.steps", "?"), []).append(final["accuracy"])
    return dict(sorted(values.items()))


def show(report: dict[str, Any]) -> list[Table]:
    table = table_of(
        f"{report['settings']['runs']} runs, whole commands",
        "command,median\ns,ratio,quartiles,runs,test accuracy (%)\nby accum.steps",
        left="command,test accuracy (%)\nby accum.steps",
    )
    for name, row in report["commands"].items():
        accuracy = ", ".join(
            f"{steps}: {100 * statistics.mean(values):.1f}" for steps, values in row["accuracy"].items()
        )
        spread = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        runs = str(sum(map(len, row["accuracy"].values())))
        table.add_row(name, f"{row['median_s']:.1f}", f"{row['ratio']:.3f}", spread, runs, accuracy)
    return [table]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    names = ["lightning", "accumexp", "accumexp joblib", "accumexp replicas"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--steps", type=numbers, default="1,2,4,8", help="accum.steps; %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="how many; %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="of 11 updates; %(default)s")
    parser.add_argument(
        "--jobs", type=int, default=cores(), help="at once with joblib; the cores: %(default)s"
    )
    parser.add_argument("--repeat", type=int, default=3, help="%(default)s")
    parser.add_argument("--only", type=words, default=",".join(names), help="commands; %(default)s")
    output_options(parser)
    options = parser.parse_args(given)
    check_names(parser, "--only", options.only, names)
    at_least_1(parser, (*options.steps, options.seeds, options.epochs, options.jobs, options.repeat))
    if uneven := [steps for steps in options.steps if BATCH % steps]:
        parser.error(f"--steps: {shown(uneven)} do not divide the {BATCH} samples of an update")
    return options


def report_of(
    options: argparse.Namespace,
    timed: Callable[[str, list[str]], tuple[float, dict[str, list[float]]]] = timed,
) -> dict[str, Any]:
    every = commands(options)
    skipped = {name: reason for name in options.only if (reason := why_not(name))}
    for name, reason in skipped.items():
        say(f"{name} skipped: {reason}")
    names = [name for name in options.only if name not in skipped]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    accuracy: dict[str, dict[str, list[float]]] = {}

    def take(name: str, _: int) -> None:
        spent, accuracy[name] = timed(name, every[name])
        seconds[name].append(spent)

    in_turns(names, track(range(options.repeat), "training", console=console, transient=True), take)
    reference = REFERENCE if REFERENCE in names else names[0]
    rows = with_medians(seconds, reference)
    for name, row in rows.items():
        row |= {"accuracy": accuracy[name], "command": " ".join(every[name][1:])}
    runs = len(options.steps) * options.seeds
    settings = {"runs": runs, "steps": options.steps, "seeds": options.seeds, "epochs": options.epochs}
    settings |= {"batch": BATCH, "jobs": options.jobs, "repeat": options.repeat, "reference": reference}
    here = environment(torch.device("cpu"), *PACKAGES)
    return {"environment": here, "settings": settings, "commands": rows, "skipped": skipped}


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if all(why_not(name) for name in options.only):
        raise SystemExit("error: none of these can be measured here")
    report = report_of(options)
    finish(report, show(report), options.json)


if __name__ == "__main__":
    main()
