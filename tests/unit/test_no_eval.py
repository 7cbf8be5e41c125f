"""The best model is chosen on the test split only where `monitor=test/...` asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from accumexp.errors import UsageError
from accumexp.training.callbacks import RunState

from ..support.command import run_command
from ..support.experiments import trainer_of

NO_EVAL = ("data.eval_fraction=0", "data.batch_size=512", "trainer.epochs=2", "trainer.progress=false")
PLATEAU = "scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"


@pytest.mark.parametrize(
    ("monitor", "evaluated", "best"),
    [("eval/accuracy", [], False), ("test/accuracy", ["test"], True), ("test/loss", ["test"], True)],
)
def test_without_an_eval_split_nothing_is_the_best_unless_test_is_asked_for(
    monitor: str, evaluated: list[str], best: bool, tmp_path: Path
) -> None:
    trainer, memory = trainer_of(*NO_EVAL, "callbacks=default", f"monitor={monitor}")
    assert trainer.evaluated_splits == evaluated
    for callback in trainer.callbacks.values():
        callback.run_opened(trainer, RunState(tmp_path, {}, lambda: None))
    trainer.fit()
    assert (tmp_path / "checkpoints" / "best.pt").exists() is best
    assert not memory.series("eval/loss")
    assert [update for update, _ in memory.series("test/loss")] == ([3, 6] if best else [])


def test_with_an_eval_split_test_is_evaluated_besides_where_it_is_monitored() -> None:
    assert trainer_of("callbacks=default")[0].evaluated_splits == ["eval"]
    assert trainer_of("callbacks=default", "monitor=test/loss")[0].evaluated_splits == ["eval", "test"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["callbacks=early_stopping"], "callbacks.early_stopping.monitor=eval/accuracy"),
        ([PLATEAU], "monitor=eval/accuracy"),
    ],
)
def test_what_waits_for_an_eval_split_is_refused_without_one(overrides: list[str], key: str) -> None:
    with pytest.raises(UsageError, match=f"^{key}: there is no eval split.*monitor=test/accuracy"):
        trainer_of(*NO_EVAL, *overrides)
    trainer, _ = trainer_of(*NO_EVAL, *overrides, "monitor=test/accuracy")
    trainer.fit()


def test_early_stopping_on_test_is_not_moved_by_the_final_evaluation() -> None:
    trainer, _ = trainer_of(
        *NO_EVAL, "callbacks=early_stopping", "callbacks.early_stopping.patience=1", "monitor=test/accuracy"
    )
    trainer.fit()
    trainer.evaluate("test")
    assert trainer.stop_reason is None


def test_the_summary_says_which_model_it_is(tmp_path: Path) -> None:
    arguments = ("model=mlp", "device=cpu", "tracking=none", *NO_EVAL, "hydra.run.dir=run")
    done = run_command("run", *arguments, folder=tmp_path)
    assert done.code == 0, done
    assert "data.eval_fraction=0: no eval split: the last checkpoint is the model" in done.stdout
    assert "update-00000006.pt (no eval split: the last is the model)" in done.stdout
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()
    error = run_command("evaluate", "checkpoint=run", "split=eval", folder=tmp_path).error()
    assert error.startswith("split=eval: data.eval_fraction=0 holds no samples out")
