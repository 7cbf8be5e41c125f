"""Bad input from the command line: one line that names the key, and nothing left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.command import Case, Done, environment, left_behind, run_command, run_many


@dataclass(frozen=True)
class Bad:
    """A bad command line, and what its one line must say."""

    arguments: list[str]
    says: list[str]
    command: str = "run"


BAD = {
    "unknown key": Bad(["trainer.epoch=2"], ["trainer.epoch:", "did you mean trainer.epochs?"]),
    "unknown key with +": Bad(["+accum.stpes=2"], ["accum.stpes:", "did you mean accum.steps?"]),
    "unknown key of a class": Bad(
        ["optimizer.lrr=2"], ["optimizer.lrr:", "did you mean optimizer.lr? (++optimizer.lrr=... adds it)"]
    ),
    "unknown group": Bad(["modle=mlp"], ["modle:", "no such key"]),
    "unknown top-level key with +": Bad(["+sede=2"], ["sede:", "did you mean seed?"]),
    "unknown choice": Bad(["model=lenet6"], ["model=lenet6", "lenet5, mlp, resnet18"]),
    "unknown experiment": Bad(
        ["experiment=none"], ["experiment=none", "batch_size_question, contrastive, equal_batch"]
    ),
    "wrong type": Bad(["trainer.epochs=many"], ["trainer.epochs=many", "Integer"]),
    "fraction for a count": Bad(["accum.steps=1.5"], ["accum.steps=1.5", "a whole number, or auto"]),
    "unknown enum member": Bad(["precision=fp8"], ["precision=fp8", "fp32, bf16"]),
    "null where a value is needed": Bad(["seed=null"], ["seed=null"]),
    "no steps": Bad(["accum.steps=0"], ["accum.steps=0", "at least 1"]),
    "negative batch": Bad(["data.batch_size=-1"], ["data.batch_size=-1", "at least 1"]),
    "batch that cannot be split": Bad(
        ["data.batch_size=4", "accum.steps=8"],
        ["accum.steps=8", "data.batch_size=4", "at most accum.steps=4"],
    ),
    "three sizes that disagree": Bad(
        ["data.batch_size=128", "accum.steps=4", "accum.micro_batch_size=16"],
        ["accum.micro_batch_size=16", "data.batch_size=128", "accum.steps=4", "which give 32"],
    ),
    "no checkpoint to resume": Bad(["resume=nowhere"], ["resume=nowhere", "no such file or folder"]),
    "resume of a sweep": Bad(["-m", "resume=nowhere"], ["resume", "-m"]),
    "data that cannot be downloaded": Bad(
        ["data=mnist", "data.root=nowhere"], ["data.root=nowhere", "data.train", "connection"]
    ),
    "folder of images that is not there": Bad(
        ["data=image_folder", "data.root=nowhere"], ["data.root=nowhere", "data.train", "nowhere/train"]
    ),
    "no folder for the store": Bad(
        ["tracking.uri=sqlite:////nowhere/mlflow.db"], ["tracking.uri=", "/nowhere"]
    ),
    "bad target": Bad(["model._target_=torch.nn.Nothing"], ["model._target_=torch.nn.Nothing"]),
    "target of no package": Bad(["optimizer._target_=nowhere.Adam"], ["optimizer._target_=nowhere.Adam"]),
    "target that refuses its arguments": Bad(
        ["+loss.smooth=1"], ["loss (torch.nn.CrossEntropyLoss)", "smooth"]
    ),
    "unknown monitor": Bad(["monitor=eval/f1"], ["monitor=eval/f1", "eval/accuracy, eval/loss"]),
    "unknown device": Bad(["device=abacus"], ["device=abacus", "auto, cpu, cuda"]),
    "values of a sweep without -m": Bad(["accum.steps=1,2"], ["accum.steps=1,2", "--multirun"]),
    "typo in a sweep": Bad(["-m", "accum.stps=1,2"], ["accum.stps:", "did you mean accum.steps?"]),
    "no checkpoint to evaluate": Bad(
        ["checkpoint=nowhere"], ["checkpoint nowhere", "no such file or folder"], "evaluate"
    ),
    "no checkpoint named": Bad([], ["checkpoint", "give checkpoint="], "evaluate"),
    "no key": Bad(["outputs"], ["outputs", "key=value"], "evaluate"),
    "unknown split": Bad(["checkpoint=x", "split=train"], ["split=train", "test or eval"], "evaluate"),
}


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Done, Path]]:
    """The end of every command line of `BAD`, and the folder it was started in."""
    base = tmp_path_factory.mktemp("bad")
    folders = [base / str(number) for number in range(len(BAD))]
    cases = [Case(bad.command, bad.arguments, str(f)) for bad, f in zip(BAD.values(), folders, strict=True)]
    done = run_many(cases, base / "scratch")
    return dict(zip(BAD, zip(done, folders, strict=True), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line_that_names_the_key_and_leaves_nothing(
    name: str, bad_input: dict[str, tuple[Done, Path]]
) -> None:
    done, folder = bad_input[name]
    message = done.error()
    for part in BAD[name].says:
        assert part in message
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        pytest.param(
            "tracking.uri=http://127.0.0.1:9",
            "tracking.uri=http://127.0.0.1:9: no server answers",
            marks=pytest.mark.slow,
        ),
        ("trainer.epoch=2", "trainer.epoch: no such key, did you mean trainer.epochs?"),
    ],
)
def test_bad_input_ends_a_process_of_its_own_in_one_line(argument: str, says: str, tmp_path: Path) -> None:
    done = run_command("run", argument, folder=tmp_path, fresh=True)
    assert says in done.error()
    assert left_behind(tmp_path) == []


def test_hydra_full_error_adds_the_traceback(tmp_path: Path) -> None:
    env = environment(HYDRA_FULL_ERROR="1")
    done = run_command("run", "accum.steps=0", folder=tmp_path, env=env, fresh=True)
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: accum.steps=0: at least 1"


def test_bad_input_to_a_resume_deletes_no_files_of_the_user(tmp_path: Path) -> None:
    kept = [tmp_path / "mine" / name for name in ("thesis.txt", "models/foreign.pt", "plain/model.pt")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a checkpoint")
    cases = [
        Case("run", [f"resume={kept[1]}"], str(tmp_path / "a")),
        Case("run", [f"resume={kept[2].parent}"], str(tmp_path / "b")),
        Case("run", ["resume=foreign.pt"], str(kept[1].parent)),
    ]
    for done in run_many(cases, tmp_path / "scratch"):
        assert "checkpoint" in done.error()
        assert [path.read_text() for path in kept if path.exists()] == ["not a checkpoint"] * 3
