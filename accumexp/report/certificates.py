"""The certificates of a sweep's runs, by group: whether a run's window is the larger batch.

A certificate is one line: `proved`, `proved up to <sources>` or `not proved: <causes>`.
"""

from __future__ import annotations

import textwrap

from .analysis import Report
from .groups import Group

PROVED, NOT_PROVED = "proved", "not proved"
MAX_LENGTH = 24  # characters of a line in a table; the page has the whole line


def has_certificates(report: Report) -> bool:
    """Whether any run in the report's groups has a certificate."""
    return any(certificates(row.group) for row in report.rows)


def certificates(group: Group) -> list[str]:
    """The certificates of the group's finished runs, by seed; runs without one are left out."""
    return [job.certificate for job in group.jobs.values() if job.certificate]


def certificate_cell(group: Group) -> str:
    """The group's certificates in at most `MAX_LENGTH` characters; empty if there are none.

    If all runs have the same line, this is that line, shortened. Otherwise it counts the runs that are
    `proved`: a run without a certificate and one that is `proved up to` something do not count.
    """
    lines = certificates(group)
    if not lines:
        return ""
    if len(lines) == len(group.jobs) and len(set(lines)) == 1:
        return textwrap.shorten(lines[0], MAX_LENGTH, placeholder=" ...").removesuffix(": ...")
    return f"{PROVED} {lines.count(PROVED)} of {len(group.jobs)}"


def refuted(group: Group) -> bool:
    """Whether any run of the group is `not proved`."""
    return any(line.startswith(NOT_PROVED) for line in certificates(group))


def distinct_certificates(report: Report) -> dict[str, list[str]]:
    """Maps each distinct line to the groups that have it, with the number of their runs that do."""
    groups: dict[str, list[str]] = {}
    for row in report.rows:
        lines = certificates(row.group)
        for line in dict.fromkeys(lines):
            count = f"{lines.count(line)} of {len(row.group.jobs)}"
            groups.setdefault(line, []).append(f"{row.group.label} ({count})")
    return groups
