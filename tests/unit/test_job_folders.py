"""Every job of a sweep keeps its folder, whatever its number becomes."""

from __future__ import annotations

from pathlib import Path

from accumexp.sweeps.job_folders import job_folder_name, job_folders


def test_a_job_keeps_its_folder_whatever_its_number_becomes(tmp_path: Path) -> None:
    for number, seed in enumerate("0123"):
        assert (
            job_folder_name(tmp_path, 0, number, f"seed={seed}", ["a=1", f"seed={seed}"])
            == f"{number}_seed={seed}"
        )
    assert job_folder_name(tmp_path, 0, 1, "seed=1", ["a=1", "seed=1"]) == "1_seed=1"  # asked again
    # A new seed first: every job behind it has another number now, and its overrides another order.
    given = [
        job_folder_name(tmp_path, 1, n, f"seed={s}", [f"seed={s}", "a=1"]) for n, s in enumerate("90123")
    ]
    assert given == ["4_seed=9", "0_seed=0", "1_seed=1", "2_seed=2", "3_seed=3"]


def test_another_job_never_gets_the_folder_of_one_with_the_same_number(tmp_path: Path) -> None:
    for number, seed in enumerate("01"):
        job_folder_name(tmp_path, 0, number, f"seed={seed}", [f"seed={seed}"])
    assert job_folder_name(tmp_path, 0, 0, "seed=7", ["seed=7"]) == "2_seed=7"
    assert job_folder_name(tmp_path, 0, 0, "seed=0", ["seed=0"]) == "0_seed=0"


def test_new_jobs_never_share_a_number_even_where_names_are_cut_alike(tmp_path: Path) -> None:
    for number in (0, 1):
        job_folder_name(tmp_path, 0, number, "long", [f"seed={number}"])
    given = [job_folder_name(tmp_path, 1, n, "long", [f"seed={n + 10}"]) for n in range(4)]
    assert given == ["2_long", "3_long", "4_long", "5_long"]


def test_jobs_that_a_sweeper_asks_for_twice_have_a_folder_each(tmp_path: Path) -> None:
    first = [job_folder_name(tmp_path, 0, n, "lr=1", ["lr=1"]) for n in (0, 1)]
    assert first == ["0_lr=1", "1_lr=1"]
    again = [job_folder_name(tmp_path, 1, n, "lr=1", ["lr=1"]) for n in (1, 0, 2)]
    assert again == [
        "1_lr=1",
        "0_lr=1",
        "2_lr=1",
    ]


def test_a_line_cut_short_by_a_kill_costs_that_job_alone_its_place(tmp_path: Path) -> None:
    job_folder_name(tmp_path, 0, 0, "a", ["a=0"])
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"launch": 0, "num')
    assert job_folder_name(tmp_path, 0, 1, "a", ["a=1"]) == "1_a"
    assert [one.folder for one in job_folders(tmp_path)] == ["0_a", "1_a"]
