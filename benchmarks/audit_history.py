"""Faults that were mended upstream: does the audit say no of the release before, and yes of the one after?

    python -m benchmarks.audit_history [fault ...] [--folder DIR] [--truth] [--write history.json]

Makes a virtual environment for each release, which sees the packages of this interpreter (for torch) behind
its own, and installs the release there. `--truth` asks plain PyTorch instead of the audit, see `tests/audit`.
Not run in CI.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """One fault, the last release that has it and the first that does not."""

    name: str
    number: int  # of the issue or pull request
    package: str
    before: str
    after: str
    case: str  # a case of audit_history_fits.py and its options
    also: tuple[str, ...] = ()  # what both releases need beside what pip finds for them


TRANSFORMERS, TRL = "transformers", "trl"
ISSUES = {
    TRANSFORMERS: "huggingface/transformers#",
    TRL: "huggingface/trl#",
    "accelerate": "huggingface/accelerate#",
}
# transformers 4.46.0 and 4.52.0 are not on the registry. 4.47.0 has tokens-added, so that over-epoch-ends is
# first right in 4.47.1.
FAULTS = (
    Fault("mean-of-means", 34191, TRANSFORMERS, "4.45.2", "4.46.1", "causal samples=96"),
    Fault(
        "over-epoch-ends", 33673, TRANSFORMERS, "4.46.3", "4.47.1", "causal samples=88 ragged=false updates=6"
    ),
    Fault("tokens-added", 35121, TRANSFORMERS, "4.47.0", "4.47.1", "causal samples=96"),
    Fault("classes-added", 35438, TRANSFORMERS, "4.47.1", "4.48.0", "classes samples=96"),
    Fault("means-added", 35651, TRANSFORMERS, "4.48.0", "4.48.1", "causal samples=96"),
    Fault("stops-early", 37923, TRANSFORMERS, "4.51.3", "4.52.1", "causal samples=88 ragged=false"),
    Fault("last-window", 39659, TRANSFORMERS, "4.54.1", "4.55.0", "classes samples=88"),
    Fault("preferences", 2615, TRL, "0.13.0", "0.14.0", "preferences samples=96", ("transformers==4.48.1",)),
    Fault(
        "evaluation", 1562, "accelerate", "0.20.2", "0.20.3", "evaluated samples=96", ("setuptools==80.9.0",)
    ),
)


def make_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """Returns the interpreter of an environment that holds `requirements`, made anew unless it is there."""
    home = folder / "-".join(requirements).replace("==", "-")
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    venv.create(home, clear=True)
    packages = home / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "this_interpreter.pth").write_text(str(Path(str(torch.__file__)).parents[1]) + "\n")
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "-c", str(constraints)]
    subprocess.run([*pip, *requirements], check=True)
    (home / "complete").touch()
    return python


def judge(python: Path, fault: Fault, truth: bool) -> dict[str, Any]:
    """Runs the fault's case in an environment; "equal" is None where it could not be judged."""
    command = [str(python), "-W", "ignore", "-m", "benchmarks.audit_history_fits", *fault.case.split()]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(python.parents[1])}
    command += ["--truth"] if truth else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if lines:
        return json.loads(lines[-1].removeprefix("ANSWER "))
    last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    return {"equal": None, "says": last, "stderr": done.stderr[-4000:]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_history", description=__doc__)
    parser.add_argument("faults", nargs="*", help="names, all by default")
    parser.add_argument("--folder", type=Path, help="of the environments; a temporary one by default")
    parser.add_argument("--truth", action="store_true", help="ask plain PyTorch and not the audit")
    parser.add_argument("--write", type=Path, help="a JSON file")
    given = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for fault in FAULTS:
            if given.faults and fault.name not in given.faults:
                continue
            row: dict[str, Any] = {"fault": asdict(fault), "issue": f"{ISSUES[fault.package]}{fault.number}"}
            for when, release in (("before", fault.before), ("after", fault.after)):
                requirements = (f"{fault.package}=={release}", *fault.also)
                python = make_environment(given.folder or Path(temporary), requirements)
                verdict = row[when] = judge(python, fault, given.truth)
                word = {True: "equal", False: "different", None: "not judged"}[verdict["equal"]]
                says = " ".join(verdict["says"].split())
                print(f"{fault.name:20} {row['issue']:32} {release:7} {word:10} {says}", flush=True)
            row["caught"] = row["before"]["equal"] is False and row["after"]["equal"] is True
            rows.append(row)
    caught = sum(row["caught"] for row in rows)
    print(f"{caught} of {len(rows)} faults are found before and gone after")
    if given.write is not None:
        given.write.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if caught == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
