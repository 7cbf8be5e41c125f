"""What a run records at its end is recorded once, however often it is killed in it or stopped before."""

from __future__ import annotations

import signal
from pathlib import Path

from ..support.command import ranked_models, records, run_command
from ..support.trouble import trouble
from ..support.upload import KilledInUpload

SMALL = ("model=mlp", "device=cpu", "data.batch_size=512", "trainer.epochs=4", "hydra.run.dir=run")
QUIET = ("tracking.system_metrics=false", "trainer.progress=false")


def test_an_upload_that_is_killed_everywhere_records_all_once(tmp_path: Path) -> None:
    target = f"+callbacks.kill._target_={KilledInUpload.__module__}.KilledInUpload"
    kill = (target, f"+callbacks.kill.mark={tmp_path / 'mark'}")
    codes = [run_command("run", *SMALL, *QUIET, *kill, folder=tmp_path).code]
    codes += [run_command("run", "resume=run", "trust=[tests]", folder=tmp_path).code for _ in range(3)]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    (record,) = records(tmp_path)
    assert record.status == "FINISHED"
    finals = {key: points for key, points in record.points.items() if key.startswith("final/")}
    assert finals.keys() >= {"final/loss", "final/accuracy", "final/updates"}
    assert {len(points) for points in finals.values()} == {1}
    models = ranked_models(tmp_path, record)
    assert sorted(name for name, _ in models) == ["update-12", "update-9"]
    assert all(metrics.keys() == {"eval/loss", "eval/accuracy"} for _, metrics in models)


def test_a_run_that_was_stopped_twice_has_the_logged_models_of_one_that_was_not(tmp_path: Path) -> None:
    stops = trouble("SIGTERM", 4).replace("callbacks.trouble", "callbacks.first")
    stops = [stops, trouble("SIGTERM", 7).replace("callbacks.trouble", "callbacks.second")]
    assert run_command("run", *SMALL, *QUIET, *stops, folder=tmp_path).code == 143
    assert run_command("run", "resume=run", "trust=[tests]", folder=tmp_path).code == 143
    assert run_command("run", "resume=run", "trust=[tests]", folder=tmp_path).code == 0
    (record,) = records(tmp_path)
    names = sorted(name for name, _ in ranked_models(tmp_path, record))
    assert names == ["update-12", "update-9"]
