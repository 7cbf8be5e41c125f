"""The report as one HTML page: pictures embedded, nothing loaded, no script."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from .analysis import Report
from .tables import cost_table, result_table
from .trajectory import EARLY_UPDATES, JUMP_FACTOR
from .wording import conclusion, noise_conclusion, reason


def page(report: Report, pictures: Mapping[str, Path]) -> str:
    """Renders the page with the PNG files that `pictures.draw` wrote, by their names."""
    environment = Environment(
        loader=PackageLoader("accumexp", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    config = report.config
    return environment.get_template("page.html.j2").render(
        report=report,
        verdict=report.verdict.value if report.verdict else "undecided",
        facts=_facts(report),
        conclusion=conclusion(report),
        results=result_table(report),
        costs=cost_table(report),
        certificates=_certificates(report),
        reasons={comparison.group.label: reason(comparison, report) for comparison in report.comparisons},
        noise_conclusion=noise_conclusion(report),
        pictures={name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()},
        level=f"{config.confidence:.0%}",
        error=f"{1 - config.confidence:.0%}",
        power=f"{config.power:.0%}",
        margin=report.margin_text,
        early_updates=EARLY_UPDATES,
        jump_factor=f"{JUMP_FACTOR:g}",
    )


def _certificates(report: Report) -> dict[str, list[str]]:
    """Maps each distinct certificate to the groups that have it, with the number of their runs that do."""
    groups: dict[str, list[str]] = {}
    for group in (row.group for row in report.rows):
        for line, count in Counter(group.certificates).items():
            groups.setdefault(line, []).append(f"{group.label} ({count} of {len(group.jobs)})")
    return groups


def _facts(report: Report) -> list[str]:
    """The jobs, their time, device and versions, for the line below the title."""
    sweep = report.sweep
    finished = f"{len(sweep.finished)} of {len(sweep.jobs)} jobs finished"
    if sweep.status == "RUNNING":
        finished += ", the sweep is still running"
    tags = next((job.tags for job in sweep.finished if job.tags), {})
    facts = [
        finished,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(sweep.started)) if sweep.started else "",
        f"{sweep.seconds:,.0f} s from first to last" if sweep.seconds else "",
        tags.get("accumexp.device", ""),
        f"torch {tags['accumexp.torch']}" if "accumexp.torch" in tags else "",
        f"code {tags['accumexp.git_sha'][:10]}" if "accumexp.git_sha" in tags else "",
        f"accumexp {__version__}",
    ]
    return [fact for fact in facts if fact]
