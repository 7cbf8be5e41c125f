"""What a report says that it has established, and what not; and what a reader can do with its page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from accumexp.report.headline import headline, prove_command
from accumexp.report.hover import MAX_AREAS, WIDTH
from accumexp.report.jobs import from_folder
from accumexp.report.page import config_differences, page
from accumexp.report.pictures import draw
from accumexp.report.tables import terminal_tables, terms_table
from accumexp.report.wording import three_digits
from accumexp.run.sweep_trust import needed_trust
from accumexp.sweeps.job_folders import Launch, begin_launch, job_folder_name
from accumexp.tracking.run_folder import RunFolder, RunStatus, Summary

from ..support.past_sweeps import Values, job, over_steps, reported, sweep


def noisy(steps: int, seed: int) -> float:
    return 0.9 + 0.01 * seed + 0.002 * ((seed * 7 + steps) % 3 - 1)


def same(steps: int, update: int) -> float:
    return 2.0 / update * (1 + 1e-8 * steps)


def other(steps: int, update: int) -> float:
    return 2.0 / update * (1 + (0.01 if steps == 4 and update > 1 else 0.0))


def test_the_headline_parts_the_training_from_what_too_few_seeds_cannot_show() -> None:
    summary = headline(reported(over_steps(noisy, steps=(1, 4), seeds=3, loss=same)))
    (training,) = summary.established
    assert training == (
        "Same training: the losses of accum.steps=4 agree with accum.steps=1 to rounding up to update 30."
    )
    accuracy, update = summary.open
    assert re.fullmatch(
        r"Test accuracy: 3 seeds cannot show that accum.steps=4 is within 0.5 points of accum.steps=1; about "
        r"\d+ would, if there is no difference.",
        accuracy,
    )
    assert update.startswith("Same update: not proved")
    assert summary.command == "python -m accumexp.prove accum.steps=4 seed=0"


@pytest.mark.parametrize(
    ("loss", "accuracy", "established"),
    [
        (other, noisy, "accum.steps=4 is another training: its loss leaves the reference's at update 2"),
        (same, lambda steps, seed: 0.9 + 0.001 * seed, "Test accuracy: accum.steps=4 within 0.5 points of"),
        (
            same,
            lambda steps, seed: 0.9 + 0.1 * (steps == 4) + 0.001 * ((seed * steps) % 3),
            "Test accuracy: accum.steps=4 is higher by",
        ),
    ],
)
def test_what_is_shown_is_established(loss: Values, accuracy: Values, established: str) -> None:
    summary = headline(reported(over_steps(accuracy, steps=(1, 4), seeds=10, loss=loss)))
    assert any(sentence.startswith(established) for sentence in summary.established)


def test_certificates_replace_the_prompt_for_one() -> None:
    lines = {1: "proved", 4: "not proved: wrong denominator"}
    jobs = [
        job(f"accum.steps={k}", f"seed={s}", final={"accuracy": 0.9}, tags={"accumexp.certificate": lines[k]})
        for k in (1, 4)
        for s in range(3)
    ]
    summary = headline(reported(sweep(*jobs)))
    assert "Same update: the windows of 3 of 6 runs are certified." in summary.established
    assert "Not proved: 3 of 6 runs have a certificate that says so." in summary.established
    assert summary.command == "" and not any("update" in sentence for sentence in summary.open[1:])
    half = headline(reported(sweep(*jobs[:-1], replace(jobs[-1], tags={}))))
    assert half.command.startswith("python -m accumexp.prove accum.steps=4")


def test_printed_commands_keep_the_files_that_the_sweep_was_composed_from(tmp_path: Path) -> None:
    command = "python -m accumexp.run -m --config-dir conf experiment=tanks accum.steps=2,4"
    files = [f"--config-dir={tmp_path / 'conf'}"]
    overrides = ["experiment=tanks", "+model.act=[a,b]", "accum.steps=4", "trainer.epochs=1"]
    launch = Launch(command, overrides, ["hydra.searchpath=[pkg://mine]"], files)
    folder = RunFolder(
        tmp_path / job_folder_name(tmp_path, begin_launch(tmp_path, launch), 0, "a", overrides)
    )
    folder.path.mkdir()
    folder.config.write_text("accum: {steps: 4}\n")
    folder.write_summary(Summary(RunStatus.FINISHED, overrides=overrides, seed=0, final={"accuracy": 0.9}))
    assert prove_command(reported(from_folder(tmp_path))) == (
        f"python -m accumexp.prove {files[0]} 'hydra.searchpath=[pkg://mine]' experiment=tanks "
        "'+model.act=[a,b]' accum.steps=4"
    )
    assert needed_trust(tmp_path) == f" {files[0]} trust=true"  # of the search path


def test_only_the_settings_that_differ_are_listed() -> None:
    jobs = [
        job(
            f"accum.steps={k}",
            "seed=0",
            final={"accuracy": 0.9},
            **{"accum.micro_batch_size": 128 // k, "optimizer.momentum": 0.9, "tracking.uri": k},
        )
        for k in (1, 4)
    ]
    report = reported(sweep(*jobs))
    assert config_differences([row.group for row in report.rows]) == {
        "accum.micro_batch_size": {"128": ["accum.steps=1"], "32": ["accum.steps=4"]}
    }


def test_pictures_have_values_where_they_show_them(tmp_path: Path) -> None:
    report = reported(over_steps(noisy, steps=(1, 4), seeds=3, loss=same))
    pictures = draw(report, tmp_path)
    height, width = imread(pictures["accuracy"].path).shape[:2]
    assert pictures["accuracy"].height / WIDTH == pytest.approx(height / width, abs=0.01)
    for picture in pictures.values():
        for area in picture.areas:
            assert -10 <= area.x and area.x + area.width <= WIDTH + 10
            assert -10 <= area.y and area.y + area.height <= picture.height + 10
    texts = [area.text for area in pictures["accuracy"].areas]
    assert "accum.steps=4, seed 2: 91.8" in texts and any("undecided" in text for text in texts)
    (first, *others) = [area for area in pictures["loss"].areas if area.text.startswith("update")]
    assert first.text.startswith("update 1\naccum.steps=1: 2\naccum.steps=4: 2")
    assert 29 <= len(others) <= 2 * MAX_AREAS
    html = page(report, pictures)
    assert html.count("<title>") == 1 + sum(len(picture.areas) for picture in pictures.values())


def test_the_circle_of_a_run_is_under_the_pointer_that_asks_for_it(tmp_path: Path) -> None:
    report = reported(over_steps(noisy, steps=(1, 4), seeds=3))
    picture = draw(report, tmp_path)["accuracy"]
    pixels = imread(picture.path)[..., :3].mean(axis=2)
    scale = pixels.shape[1] / WIDTH
    points = [area for area in picture.areas if ", seed" in area.text]
    assert len(points) == 6
    for area in points:
        rows = slice(round(area.y * scale), round((area.y + area.height) * scale))
        columns = slice(round(area.x * scale), round((area.x + area.width) * scale))
        assert pixels[rows, columns].min() < 0.6  # the circle's edge is grey, the ground white


def test_costs_have_three_digits() -> None:
    shown = [three_digits(value) for value in (0.01234, 3.886, 78.91, 280.78, 25_553.0, 0.0, 999.9)]
    assert shown == ["0.0123", "3.89", "78.9", "281", "25,600", "0", "1,000"]


def test_the_terms_of_a_loss_are_a_table_of_their_own() -> None:
    def final(steps: int, seed: int) -> dict[str, float]:
        return {
            "accuracy": 0.9,
            "loss": 0.3,
            "loss/balance": 0.1 * steps,
            "loss/cross_entropy": 0.2 + 0.1 * seed,
        }

    jobs = [job(f"accum.steps={k}", f"seed={s}", final=final(k, s)) for k in (1, 4) for s in (0, 1)]
    report = reported(sweep(*jobs))
    terms = terms_table(report)
    assert terms is not None
    assert terms.columns == ["accum.steps", "test loss balance", "test loss cross_entropy"]
    assert terms.rows == [["1", "0.1000", "0.2500"], ["4", "0.4000", "0.2500"]]
    assert len(terminal_tables(report)) == 3 and "Terms of the loss" in page(report, {})
    plain = reported(over_steps(noisy, steps=(1, 4), seeds=2))
    assert terms_table(plain) is None and "Terms of the loss" not in page(plain, {})
