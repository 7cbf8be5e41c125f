"""The real command line in folders of its own, and what it leaves on the disk and in MLflow.

`run_command` is `python -m accumexp.<command>`, forked from a process that has imported the libraries: they
take most of a command's time. `fresh` ones start from nothing, as a user's do. `run_many` runs a list of
commands, each to its exit code and in its own folder, in one process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accumexp

from .forked import as_main, forked

PACKAGE_PARENT = Path(accumexp.__file__).resolve().parents[1]
HANGS_AFTER = 300  # seconds


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    def error(self) -> str:
        """All that a command said of bad input: one line on stderr, here without its `error: `."""
        lines = self.stderr.splitlines()
        assert self.code == 2, self
        assert len(lines) == 1 and lines[0].startswith("error: "), self
        assert not self.stdout, self
        return lines[0].removeprefix("error: ")


@dataclass(frozen=True)
class Case:
    """A command line of `run_many`, started in `folder`."""

    command: str
    arguments: list[str]
    folder: str


@dataclass(frozen=True)
class Record:
    """What MLflow holds of a run."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    points: dict[str, list[tuple[int, float]]]  # (step, value) in the order of the steps
    artifacts: list[str]
    datasets: dict[str, str]  # name by context


def environment(*modules: Path, **changes: str) -> dict[str, str]:
    """This process's environment without what would change a command, with folders of own `modules`."""
    prefixes = ("HYDRA_", "MLFLOW_", "PYTHONWARNINGS", "PYTEST_")
    result = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    result["PYTHONPATH"] = os.pathsep.join(map(str, [*modules, PACKAGE_PARENT]))
    # Tests share few cores, and nothing here is large enough for a second thread.
    result["OMP_NUM_THREADS"] = "1"
    # No test may depend on a download: every connection but to this machine is refused.
    for proxy in ("http_proxy", "https_proxy"):
        result[proxy] = result[proxy.upper()] = "http://127.0.0.1:9"
    result["no_proxy"] = result["NO_PROXY"] = "127.0.0.1,localhost"
    return {**result, **changes}


def run_command(
    command: str,
    *arguments: str,
    folder: Path,
    env: dict[str, str] | None = None,
    flags: Sequence[str] = (),
    fresh: bool = False,
) -> Done:
    """`python <flags> -m accumexp.<command> <arguments>` in `folder`; `flags` need a `fresh` process."""
    folder.mkdir(parents=True, exist_ok=True)
    module, env = f"accumexp.{command}", environment() if env is None else env
    if fresh or flags:
        return _ended([sys.executable, *flags, "-m", module, *arguments], folder, env)
    return Done(*forked(as_main, module, list(arguments), folder=folder, env=env, seconds=HANGS_AFTER))


def run_many(cases: Sequence[Case], scratch: Path) -> list[Done]:
    """All `cases` one after the other in one process; `scratch` is a folder for its own files."""
    scratch.mkdir(parents=True, exist_ok=True)
    asked, answered = scratch / "cases.json", scratch / "results.json"
    asked.write_text(json.dumps([asdict(case) for case in cases]))
    done = Done(*forked(_run_all, asked, answered, folder=scratch, env=environment(), seconds=HANGS_AFTER))
    assert done.code == 0 and not done.stderr, done
    return [Done(**result) for result in json.loads(answered.read_text())]


def _ended(line: list[str], folder: Path, env: dict[str, str]) -> Done:
    done = subprocess.run(
        line, cwd=folder, env=env, capture_output=True, text=True, timeout=HANGS_AFTER, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def _run_all(asked: Path, answered: Path) -> None:
    ended = [_run_here(Case(**case)) for case in json.loads(asked.read_text())]
    answered.write_text(json.dumps([asdict(one) for one in ended]))


def _run_here(case: Case) -> Done:
    """Runs `case` in this process."""
    Path(case.folder).mkdir(parents=True, exist_ok=True)
    os.chdir(case.folder)
    stdout, stderr = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            as_main(f"accumexp.{case.command}", case.arguments)
        except SystemExit as end:
            code = end.code
    return Done(code, stdout.getvalue(), stderr.getvalue())


def only_run(folder: Path) -> Path:
    """The folder of the only run that was started in `folder`."""
    runs = sorted(folder.glob("outputs/*/*"))
    assert len(runs) == 1, runs
    return runs[0]


def only_sweep(folder: Path) -> Path:
    """The folder of the only sweep that was started in `folder`."""
    sweeps = sorted(folder.glob("multirun/*/*"))
    assert len(sweeps) == 1, sweeps
    return sweeps[0]


def journal(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def left_behind(folder: Path) -> list[str]:
    """All files below `folder`, and the folders of runs and sweeps even if they are empty."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    opened = [*folder.glob("outputs/*/*"), *folder.glob("multirun/*/*")]
    return sorted(str(path.relative_to(folder)) for path in {*files, *opened})


def records(folder: Path) -> list[Record]:
    """The runs in the store that commands in `folder` write to, oldest first."""
    with _store(folder) as store:
        experiments = [experiment.experiment_id for experiment in store.search_experiments()]
        runs = store.search_runs(experiments)
        return [_record(store, run) for run in sorted(runs, key=lambda run: run.info.start_time)]


def record_of(run: Path) -> Record:
    """What MLflow holds of the run in folder `run`, whose store is in a folder above it."""
    store = next(parent for parent in run.parents if (parent / "mlflow.db").is_file())
    matching = [record for record in records(store) if record.tags.get("accumexp.folder") == str(run)]
    assert len(matching) == 1, matching
    return matching[0]


def ranked_models(folder: Path, record: Record) -> list[tuple[str, dict[str, float]]]:
    """Name and metrics of the run's logged models, the highest `eval/accuracy` first."""
    with _store(folder) as store:
        models = store.search_logged_models(
            [record.experiment_id],
            filter_string=f"source_run_id = '{record.run_id}'",
            order_by=[{"field_name": "metrics.eval/accuracy", "ascending": False}],
        )
        return [(m.name, {metric.key: metric.value for metric in m.metrics or []}) for m in models]


@contextlib.contextmanager
def _store(folder: Path) -> Any:
    database = folder / "mlflow.db"
    assert database.is_file(), sorted(folder.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own
        from mlflow import MlflowClient

        yield MlflowClient(f"sqlite:///{database}")


def _record(store: Any, run: Any) -> Record:
    history = {key: store.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    files = [
        str(path.relative_to(root))
        for root in [Path(run.info.artifact_uri.removeprefix("file://"))]
        for path in sorted(root.rglob("*"))
        if path.is_file()
    ]
    return Record(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name,
        status=run.info.status,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        points={key: sorted((p.step, p.value) for p in points) for key, points in history.items()},
        artifacts=files,
        datasets={
            tag.value: used.dataset.name
            for used in run.inputs.dataset_inputs
            for tag in used.tags
            if tag.key == "mlflow.data.context"
        },
    )
