"""What the runs' own certificates say of a group: is its window the larger batch, whatever the accuracy?

A certificate is a line: `proved`, `proved up to <sources>` or `not proved: <causes>`.
"""

from __future__ import annotations

import textwrap

from .analysis import Report
from .groups import Group

PROVED, NOT_PROVED = "proved", "not proved"
# Of a line in a table; the page has the whole of it.
LONGEST = 24


def has_certificates(report: Report) -> bool:
    """Whether any run in the report's groups has one."""
    return any(certificates(row.group) for row in report.rows)


def certificates(group: Group) -> list[str]:
    """The lines of the group's finished runs that have one, by seed."""
    return [job.certificate for job in group.jobs.values() if job.certificate]


def certified(group: Group) -> str:
    """The group in a few words; empty if none of its runs has a certificate.

    The line of its runs, shortened, if they are alike. Else how many are proved outright: a run without a
    certificate, and one that is proved up to something, are not.
    """
    lines = certificates(group)
    if not lines:
        return ""
    if len(lines) == len(group.jobs) and len(set(lines)) == 1:
        return textwrap.shorten(lines[0], LONGEST, placeholder=" ...").removesuffix(": ...")
    return f"{PROVED} {lines.count(PROVED)} of {len(group.jobs)}"


def refuted(group: Group) -> bool:
    """Whether a run of the group was found not to be the larger batch."""
    return any(line.startswith(NOT_PROVED) for line in certificates(group))


def distinct(report: Report) -> dict[str, list[str]]:
    """Each line that a run has, and the groups that have it with the number of their runs that do."""
    found: dict[str, list[str]] = {}
    for row in report.rows:
        lines = certificates(row.group)
        for line in dict.fromkeys(lines):
            found.setdefault(line, []).append(
                f"{row.group.label} ({lines.count(line)} of {len(row.group.jobs)})"
            )
    return found
