"""The first signal asks the loop to end; the second, or one before the loop, ends the process."""

from __future__ import annotations

import signal

import pytest

from accumexp.environment.signals import StopSignals, exit_code_of

from ..support.experiments import trainer_of


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_and_the_second_does_not(number: signal.Signals, code: int) -> None:
    trainer, _ = trainer_of("trainer.max_updates=50")
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.trainer = trainer
        signals._handle(number, None)
        assert exit_code_of(number) == code
        trainer.fit()
        assert trainer.stop_reason == number.name and trainer.stop_code == number
        assert trainer.progress.update == 0, "a stop before the first update trains nothing"
        with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
            signals._handle(number, None)
    assert isinstance(ended.value, KeyboardInterrupt) or ended.value.code == code
    assert signal.getsignal(number) == before


def test_a_signal_before_the_loop_ends_the_process_with_its_code() -> None:
    with pytest.raises(KeyboardInterrupt):
        StopSignals()._handle(signal.SIGINT, None)
    with pytest.raises(SystemExit) as ended:
        StopSignals()._handle(signal.SIGTERM, None)
    assert ended.value.code == 143
