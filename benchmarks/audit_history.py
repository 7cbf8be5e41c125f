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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """One fault, the last release that has it and the first that does not."""

    name: str
    issue: str
    package: str
    before: str
    after: str
    case: str  # a case of audit_history_fits.py and its options
    also: tuple[str, ...] = ()  # what both releases need beside what pip finds for them


FAULTS = (
    Fault(
        "mean of means",
        "huggingface/transformers#34191",
        "transformers",
        "4.45.2",
        "4.46.1",
        "causal samples=96",
    ),
    Fault(
        "not divided",
        "huggingface/transformers#35207",
        "transformers",
        "4.47.1",
        "4.48.0",
        "classes samples=96",
    ),
)


@dataclass
class Verdict:
    """What is said of a release: equal, different, or nothing where it could not be judged."""

    release: str
    equal: bool | None
    says: str
    details: dict[str, Any] = field(default_factory=dict)


def make_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """Returns the interpreter of an environment that holds `requirements`, made anew unless it is there."""
    home = folder / "-".join(requirements).replace("==", "-")
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    venv.create(home, clear=True)
    packages = home / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "this_interpreter.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "-c", str(constraints)]
    subprocess.run([*pip, *requirements], check=True)
    (home / "complete").touch()
    return python


def judge(python: Path, fault: Fault, release: str, truth: bool) -> Verdict:
    """Runs the fault's case in an environment."""
    command = [str(python), "-W", "ignore", "-m", "benchmarks.audit_history_fits", *fault.case.split()]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(python.parents[1])}
    done = subprocess.run(
        [*command, *(["--truth"] if truth else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return Verdict(release, None, last, {"stderr": done.stderr[-4000:]})
    answer = json.loads(lines[-1].removeprefix("ANSWER "))
    return Verdict(release, answer["equal"], answer["says"], answer)


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
            for release in (fault.before, fault.after):
                requirements = (f"{fault.package}=={release}", *fault.also)
                python = make_environment(given.folder or Path(temporary), requirements)
                verdict = judge(python, fault, release, given.truth)
                rows.append({"fault": asdict(fault), "verdict": asdict(verdict)})
                word = {True: "equal", False: "different", None: "not judged"}[verdict.equal]
                print(f"{fault.name:20} {fault.package:13} {release:8} {word:10} {verdict.says}", flush=True)
    if given.write is not None:
        given.write.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
