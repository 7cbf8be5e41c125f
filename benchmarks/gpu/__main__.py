"""Runs the GPU tests and the GPU benchmarks on one GPU, in at most eight minutes and without a network.

python -m benchmarks.gpu --out gpu
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Imports neither torch nor another part of accumexp: `--help` answers at once, and every part runs in a
# process of its own, so that a crash, a hang or a broken CUDA context does not stop the others.
ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12
NEEDS = """\
needs these packages, and the repository's checkout as it is (it need not be installed):
  every part            torch, torchvision, torchmetrics, hydra-core, omegaconf, numpy, psutil, filelock,
                        rich, and scikit-learn, whose digits are read from its files
  replicas, accuracy    also scipy and matplotlib: each is a sweep, which ends in a report
  tests                 also pytest
All runs have tracking=none. Not needed: mlflow, transformers, accelerate, lightning, hypothesis,
hydra-joblib-launcher.

exit code: 0 if all parts are ok, 1 if one failed or ran out of time, 2 without a GPU or for wrong usage
"""
# Prints one line of JSON. A device is used, not only counted.
PROBE = """
import json, sys, torch
name = None
if sys.argv[1] == "cpu":
    name = "cpu"
elif torch.cuda.is_available():
    torch.zeros(1, device="cuda").item()
    name = torch.cuda.get_device_name(0)
print(json.dumps({"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}))
"""


@dataclass(frozen=True)
class Part:
    """A part, and its share of the time: in seconds, if all parts run in 470."""

    title: str
    share: float


PARTS = {
    "tests": Part("the tests with the mark gpu", 140),
    "window": Part("an update beside the hand-written loop, without and with CUDA graphs", 95),
    "replicas": Part("16 seeds trained together beside 16 single runs", 70),
    "memory": Part("peak memory of one update in 8 micro-batches beside 1", 35),
    "accuracy": Part("accuracy in bf16 and loss-scaled fp16 beside fp32", 50),
    "certificates": Part("certificates of LeNet-5 in fp32, bf16 and loss-scaled fp16", 80),
}


def limit_of(name: str, following: Sequence[str], left: float) -> float:
    """Seconds for part `name` of the `left` ones; time that a part does not use goes to the `following`."""
    shares = sum(PARTS[part].share for part in (name, *following))
    return left * PARTS[name].share / shares


def run_limited(command: Sequence[str], folder: Path, log: Path, limit: float) -> int | None:
    """Exit code of `command`, started in `folder`, its output in `log`; None if the time limit ended it.

    It runs in a new session, which is killed as a whole, because a part starts further processes.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_part(name: str, command: Sequence[str], log: Path, limit: float) -> dict[str, Any]:
    """Runs a part to its end or to its time limit.

    Returns:
        `status` (ok, failed or timeout), `seconds`, `limit_s`, the `figures` and `lines` that the part had
        written until then and, unless it is ok, the `last_lines` of its output.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"accumexp-gpu-{name}-"))
    start = time.monotonic()
    try:
        code = run_limited([*command, "--folder", str(folder)], folder, log, limit)
        measured = read_report(folder / "part.json")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status = "timeout" if code is None else "failed" if code else "ok"
    row: dict[str, Any] = {"status": status, "code": code, "limit_s": round(limit, 1)}
    row |= {"seconds": round(time.monotonic() - start, 1)} | measured
    if status != "ok":
        row["last_lines"] = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return row


def read_report(path: Path) -> dict[str, Any]:
    """What a part has written, or nothing if it was ended before it wrote anything."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {"figures": {}, "lines": []}


def probe(device: str, seconds: float = 120) -> dict[str, Any]:
    """Name of the device, None without one, and versions.

    Raises:
        SystemExit: with 2 and one line if torch cannot be imported or used.
    """
    command = [sys.executable, "-c", PROBE, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        wrong_usage(f"torch did not answer in {seconds:.0f} s")
    if done.returncode:
        wrong_usage((done.stderr.strip() or f"torch ended with {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def wrong_usage(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def show(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # a pipe or a file has no width
    title = f"{report['device']}, torch {report['torch']}, {report['seconds']:.0f} s"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("part", "status", "s", "result"):
        table.add_column(heading, justify="right" if heading == "s" else "left", no_wrap=heading != "result")
    for name, row in report["parts"].items():
        lines = [*row["lines"], *row.get("last_lines", [])[-1:]]
        table.add_row(name, row["status"], f"{row['seconds']:.0f}", "\n".join(lines), end_section=True)
    console.print(table, markup=False, highlight=False)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<14}{part.title}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=f"parts:\n{listed}\n\n{NEEDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=list(PARTS),
        metavar="NAME",
        help="one part, repeatable; without it all",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="gpu.json and logs; %(default)s"
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="MNIST in torchvision's layout, for the part accuracy; without it digits",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together; %(default)s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="%(default)s")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: does every part work?")
    chosen = parser.parse_args(given)
    if not chosen.minutes > 0:
        parser.error("--minutes: above 0")
    if chosen.device == "cpu" and chosen.part and "tests" in chosen.part:
        parser.error("--part tests: needs a GPU")
    if chosen.part is None:
        chosen.part = [name for name in PARTS if name != "tests" or chosen.device == "cuda"]
    chosen.part = list(dict.fromkeys(chosen.part))
    return chosen


def main(given: list[str] | None = None) -> None:
    start = time.monotonic()
    chosen = arguments(given)
    versions = probe(chosen.device)
    if versions["device"] is None:
        wrong_usage(
            "no GPU (torch.cuda.is_available() is false); --device cpu --quick runs the parts on a CPU"
        )
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**versions, "python": sys.version.split()[0], "quick": chosen.quick}
    report |= {"minutes": chosen.minutes, "seconds": 0.0, "parts": {}}
    options = ["--device", chosen.device, *["--quick"] * chosen.quick]
    if chosen.data_root:
        options += ["--data-root", str(chosen.data_root.absolute())]
    for number, name in enumerate(chosen.part, 1):
        left = max(1.0, 60 * chosen.minutes - (time.monotonic() - start))
        limit = limit_of(name, chosen.part[number:], left)
        print(f"{name}: {PARTS[name].title}, at most {limit:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu.part", name, *options]
        report["parts"][name] = run_part(name, command, out.absolute() / f"{name}.log", limit)
        report["seconds"] = round(time.monotonic() - start, 1)
        whole = out / "gpu.json.part"
        whole.write_text(json.dumps(report, indent=2) + "\n")
        whole.replace(out / "gpu.json")
    show(report)
    if any(row["status"] != "ok" for row in report["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
