"""`accumexp.run.run` in a script: twice in one process, from overrides and from `hydra.compose`."""

from __future__ import annotations

import json
from pathlib import Path

from ..support.command import environment
from ..support.forked import forked

SETTINGS = ["tracking=none", "model=mlp", "device=cpu", "trainer.max_updates=3", "trainer.progress=false"]


def script(answer: Path) -> None:
    import torch
    from hydra import compose, initialize_config_module

    from accumexp.errors import UsageError
    from accumexp.run import run

    first = run(SETTINGS)
    assert first.metrics["updates"] == 3
    assert first.monitored is not None and first.run_id is None
    model = first.load_model(best=False)
    assert not model.training
    longer = run([f"resume={first.folder}", "trainer.max_updates=5"])
    assert longer.folder == first.folder
    assert longer.metrics["updates"] == 5
    with initialize_config_module("accumexp.conf", version_base="1.3"):
        composed = run(compose("config", overrides=SETTINGS), folder="own")
    assert composed.folder == Path("own").absolute()
    whole = model.state_dict()
    assert all(
        torch.equal(value, whole[name]) for name, value in composed.load_model(False).state_dict().items()
    )
    refused = []
    for bad in (["accum.stepss=3"], ["-m", "seed=0,1"], ["replicas=3"], ["resume=nowhere"], "accum.steps=4"):
        try:
            run(bad)
        except UsageError as error:
            refused.append(str(error))
    try:
        run(SETTINGS, folder="own")
    except UsageError as error:
        refused.append(str(error))
    answer.write_text(json.dumps(refused))


def test_run_in_a_script_returns_a_typed_result(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    done = forked(script, answer, folder=tmp_path, env=environment(), seconds=120)
    assert done[0] == 0, done
    says = (
        "accum.stepss: no such key",
        "-m: is of the command",
        "replicas=3",
        "resume=nowhere",
        "accum.steps=4",
    )
    refused = json.loads(answer.read_text())
    assert [line.startswith(part) for line, part in zip(refused, says, strict=False)] == [True] * 5
    assert "holds a run already" in refused[5]


def inside_of_another(answer: Path) -> None:
    """A notebook that has initialized Hydra itself, and gives what `run` does not take."""
    from hydra import compose, initialize_config_module

    from accumexp.errors import UsageError
    from accumexp.run import run

    kept = Path("kept")
    kept.mkdir()
    with initialize_config_module("accumexp.conf", version_base="1.3"):
        result = run([*SETTINGS, "optimizer.lr=0.01"])
        again = compose("config", overrides=[*SETTINGS, f"resume='{result.folder}'", "trainer.max_updates=5"])
        whole = compose("config", overrides=[*SETTINGS, "seed=4"], return_hydra_config=True)
    refused = []
    for bad, folder in ((again, None), (3, None), (["loss._target_=torch.nn.NoSuchLoss"], kept)):
        try:
            run(bad, folder=folder)  # type: ignore[arg-type]
        except UsageError as error:
            refused.append(str(error))
    assert kept.is_dir(), "a folder of the user's is not removed"
    run(whole, folder=kept)
    answer.write_text(json.dumps(refused))


def test_run_leaves_the_callers_hydra_and_folder_alone(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    done = forked(inside_of_another, answer, folder=tmp_path, env=environment(), seconds=120)
    assert done[0] == 0, done
    composed, number, loss = json.loads(answer.read_text())
    assert composed.startswith("resume=") and "give run() a list" in composed
    assert number == "run() takes a list of overrides or a configuration of hydra.compose, not a int"
    assert loss.startswith("loss._target_=torch.nn.NoSuchLoss")
