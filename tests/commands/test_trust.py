"""What a user's own runs need to go on: packages by `trust=`, values from the environment given again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from accumexp.training.checkpoint import find, load

from ..support.command import environment, records, run_command

USER_MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, token=None):
        super().__init__()
        if token is not None and token != "s3cret-word":
            raise ValueError(f"token={token}: is wrong")
        self.layer = nn.Linear(1024, 10)
    def forward(self, inputs):
        return self.layer(inputs.flatten(1))
"""
SMALL = ["model=mlp", "device=cpu", "trainer.progress=false", "trainer.max_updates=3", "data.resident=true"]
NET = ["~model.hidden", "~model.inputs", "~model.dropout", "~model.num_classes", "model._target_=own_net.Net"]
TOKEN = "+model.token=${oc.env:OWN_TOKEN}"
SECRET = "s3cret-word"


@pytest.fixture
def user_env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "own_net.py").write_text(USER_MODULE)
    return environment(tmp_path, OWN_TOKEN=SECRET)


def test_a_run_of_a_users_package_goes_on_once_it_is_trusted(
    tmp_path: Path, user_env: dict[str, str]
) -> None:
    done = run_command("run", *SMALL, *NET, "tracking=none", "hydra.run.dir=r", folder=tmp_path, env=user_env)
    assert done.code == 0, done
    more = ["resume=r", "trainer.max_updates=5"]
    line = run_command("run", *more, folder=tmp_path, env=user_env).error()
    assert line.startswith("model._target_=own_net.Net: checkpoint ") and line.endswith("trust=[own_net]")
    line = run_command("evaluate", "checkpoint=r", folder=tmp_path, env=user_env).error()
    assert line.endswith("trust=[own_net]")
    for trust in ("trust=[own_net]", "trust=own_net", "trust=true"):
        done = run_command("evaluate", "checkpoint=r", trust, folder=tmp_path, env=user_env)
        assert done.code == 0, done
    # What the user names is the user's own.
    done = run_command(
        "evaluate", "checkpoint=r", "model._target_=own_net.Net", folder=tmp_path, env=user_env
    )
    assert done.code == 0, done
    done = run_command("run", *more, "trust=[own_net]", folder=tmp_path, env=user_env)
    assert done.code == 0, done
    assert load(find(tmp_path / "r"))["progress"]["update"] == 5


@pytest.mark.parametrize(("trust", "says"), [("[a b!]", "no package"), ("[1x]", "no package")])
def test_trust_takes_packages(trust: str, says: str, tmp_path: Path) -> None:
    line = run_command("evaluate", "checkpoint=r", f"trust={trust}", folder=tmp_path).error()
    assert line.startswith("trust=") and says in line


def test_trust_is_of_a_file(tmp_path: Path) -> None:
    line = run_command("run", *SMALL, "trust=[own_net]", "tracking=none", folder=tmp_path).error()
    assert line.startswith("trust=") and "leave it out" in line


def test_no_record_holds_a_value_from_the_environment(tmp_path: Path, user_env: dict[str, str]) -> None:
    arguments = [*SMALL, *NET, TOKEN, "hydra.run.dir=r", "tracking.system_metrics=false"]
    done = run_command("run", *arguments, folder=tmp_path, env=user_env)
    assert done.code == 0, done
    written = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert written["model"]["token"] == "${oc.env:OWN_TOKEN}"
    assert load(find(tmp_path / "r"))["config"]["model"]["token"] == "${oc.env:OWN_TOKEN}"
    (record,) = records(tmp_path)
    assert record.params["model.token"] == "${oc.env:OWN_TOKEN}"
    assert holding(tmp_path) == []
    assert SECRET not in done.stdout + done.stderr

    # A checkpoint may not read the environment: the user gives the value again, or trusts it.
    more = ["resume=r", "trainer.max_updates=5", "trust=[own_net]"]
    line = run_command("run", *more, folder=tmp_path, env=user_env).error()
    assert line.startswith("model.token=${oc.env:OWN_TOKEN}: reads the environment")
    assert "give ++model.token='${oc.env:OWN_TOKEN}' or trust=true" in line
    done = run_command("run", *more, "++model.token='${oc.env:OWN_TOKEN}'", folder=tmp_path, env=user_env)
    assert done.code == 0, done
    (record,) = records(tmp_path)
    assert record.tags["accumexp.resumed.3"] == "trainer.max_updates=5"
    done = run_command(
        "run", "resume=r", "trainer.max_updates=7", "trust=true", folder=tmp_path, env=user_env
    )
    assert done.code == 0, done
    assert load(find(tmp_path / "r"))["config"]["model"]["token"] == "${oc.env:OWN_TOKEN}"
    assert holding(tmp_path) == []


def test_no_message_or_sweep_holds_one(tmp_path: Path, user_env: dict[str, str]) -> None:
    wrong = {**user_env, "OWN_TOKEN": "another-word"}
    arguments = ["-m", *SMALL, *NET, TOKEN, "seed=0,1", "hydra.sweep.dir=s", "tracking.system_metrics=false"]
    done = run_command("run", *arguments, folder=tmp_path, env=wrong)
    assert done.code == 1, done
    assert "token=${oc.env:OWN_TOKEN}: is wrong" in done.stderr
    assert "another-word" not in done.stdout + done.stderr
    assert holding(tmp_path, "another-word") == []
    assert "trust=true" in done.stderr  # to go on with what reads the environment
    line = run_command("run", "-m", "sweep.resume=s", folder=tmp_path, env=user_env).error()
    assert line.startswith("sweep.resume=s: ") and line.endswith("trust=true if the sweep is your own")
    done = run_command("run", "-m", "sweep.resume=s", "trust=true", folder=tmp_path, env=user_env)
    assert done.code == 0, done
    assert holding(tmp_path) == []
    summary = json.loads(next((tmp_path / "s").glob("0_*/summary.json")).read_text())
    assert any("OWN_TOKEN" in override for override in summary["overrides"])


def holding(folder: Path, secret: str = SECRET) -> list[str]:
    """The files below `folder`, by name or content, that hold the secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    leaks = [path for path in files if secret in str(path) or secret.encode() in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in leaks]


def test_no_credential_is_sent_to_a_server_that_a_checkpoint_names(tmp_path: Path) -> None:
    from accumexp.training.checkpoint import save

    done = run_command("run", *SMALL, "tracking=none", "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 0, done
    path = find(tmp_path / "r")
    run = {"uri": "http://127.0.0.1:9", "experiment_id": "0", "run_id": "0"}
    content = load(path)
    content["config"]["tracking"]["backend"] = "mlflow"
    save(path, {**content, "run": run})
    more = ["resume=r", "trainer.max_updates=5"]
    line = run_command("run", *more, folder=tmp_path, env=environment(MLFLOW_TRACKING_TOKEN="x")).error()
    assert (
        line.startswith("tracking.uri=http://127.0.0.1:9: ") and "MLFLOW_TRACKING_TOKEN would be sent" in line
    )
    line = run_command("run", *more, folder=tmp_path).error()
    assert "no server answers" in line


def test_a_sweeps_files_run_no_code(tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    sweep.mkdir()
    (sweep / "multirun.yaml").write_text("hydra: {overrides: {task: [], hydra: []}}\n")
    (sweep / "jobs.jsonl").write_text(
        '{"launch": 0, "number": 0, "overrides": [], "folder": "0_a", "time": 0}\n'
    )

    def line(task: list[str], hydra: list[str] = [], files: list[str] = []) -> str:  # noqa: B006
        launch = {"command": "x", "task": task, "hydra": hydra, "files": files}
        (sweep / "launches.json").write_text(json.dumps({"0": launch}))
        return run_command("run", "-m", "sweep.resume=s", folder=tmp_path).error()

    evil = "{_target_: os.system, command: touch canary}"
    assert "may run code" in line([], [f"+hydra.callbacks.evil={evil}"])
    assert "may run code" in line([], ["hydra.job.env_set.LD_PRELOAD=evil.so"])
    assert "may run code" in line([], ["hydra.launcher.setup=[touch canary]"])
    assert "may name any code" in line([], [], ["--config-dir=/tmp/evil"])
    assert "os.system" in line([f"+callbacks.evil={evil}"])
    assert "os.system" in line(["model._target_=os.system"])
    assert "may read the environment" in line(["data.root=${oc.env:HOME}"])
    assert line(["+callbacks.mine={_target_: own_net.Net}"]).endswith("trust=[own_net]")
    assert not (tmp_path / "canary").exists()
