"""The report as one HTML page: pictures embedded, nothing loaded, all of it there without scripts."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from .analysis import Report
from .groups import Group
from .headline import headline
from .hover import WIDTH, Picture
from .tables import cost_table, result_table, terms_table
from .trajectory import EARLY_UPDATES, JUMP_FACTOR
from .wording import conclusion, noise_conclusion, reason

SHA = "accumexp.git_sha"


def page(report: Report, pictures: Mapping[str, Picture]) -> str:
    """Renders the page with what `pictures.draw` drew, by name."""
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
        headline=headline(report),
        results=result_table(report),
        costs=cost_table(report),
        terms=terms_table(report),
        certificates=_certificates(report),
        reasons={comparison.group.label: reason(comparison, report) for comparison in report.comparisons},
        noise_conclusion=noise_conclusion(report),
        pictures=pictures,
        images={name: _base64(picture) for name, picture in pictures.items()},
        picture_width=WIDTH,
        differences=config_differences([row.group for row in report.rows]),
        links=_links(report),
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
    tags = [job.tags for job in sweep.finished if job.tags]
    facts = [
        finished,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(sweep.started)) if sweep.started else "",
        f"{sweep.seconds:,.0f} s from first to last" if sweep.seconds else "",
        _all_of(tags, "accumexp.device"),
        _all_of(tags, "accumexp.python", "Python "),
        _all_of(tags, "accumexp.torch", "torch "),
        _all_of(tags, "accumexp.packages"),
        _all_of([{**one, SHA: one.get(SHA, "")[:10]} for one in tags], SHA, "code "),
        f"report by accumexp {__version__}",
    ]
    return [fact for fact in facts if fact]


def _all_of(tags: Iterable[Mapping[str, str]], key: str, prefix: str = "") -> str:
    """The distinct values of a tag; runs that were not made by the same versions show it."""
    values = dict.fromkeys(one[key] for one in tags if one.get(key))
    return prefix + " and ".join(values) if values else ""


def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.path.read_bytes()).decode()


def config_differences(groups: list[Group]) -> dict[str, dict[str, list[str]]]:
    """The settings that are not equal in all groups: key to value to the groups' labels.

    The settings that name the groups are left out, and the seed and where runs are kept.
    """
    params = [group.first.params for group in groups]
    differences: dict[str, dict[str, list[str]]] = {}
    for key in sorted({key for one in params for key in one}):
        if key == "seed" or key.startswith("tracking.") or any(key in group.values for group in groups):
            continue
        values: dict[str, list[str]] = {}
        for group, one in zip(groups, params, strict=True):
            values.setdefault(one.get(key, "not set"), []).append(group.label)
        if len(values) > 1:
            differences[key] = values
    return differences


def _links(report: Report) -> dict[str, list[tuple[str, str]]]:
    """The pages of the runs in MLflow, by group: text and address; empty without a store."""
    store = report.sweep.store
    if store is None:
        return {}
    links = {}
    if report.sweep.run_id:
        parent = report.sweep.run_id
        links["The sweep"] = [
            ("verdict", store.run_address(parent)),
            ("runs", store.sweep_address(parent)),
            ("curves", store.charts_address(parent)),
        ]
    for row in report.rows:
        links[row.group.label] = [
            (f"seed {seed}", store.run_address(job.run_id))
            for seed, job in row.group.jobs.items()
            if job.run_id
        ]
    return links
