"""Makes an experiment's certificate, shows it, and keeps it in the run's folder and in MLflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..config.environment_values import hide_values, recorded
from ..config.schema import Backend, Config
from ..data.digest import dataset_records
from ..environment.console import console, show_values
from ..environment.device import device_name, pick_device
from ..environment.ranks import RankInfo, device_of
from ..errors import markdown_text
from ..plan.auto_steps import choose_steps
from ..proof import Certificate
from ..proof.certificate import number
from ..tracking import Store
from ..tracking.folder import CERTIFICATE_TAG, RunFolder, RunStatus
from ..tracking.record import create_tracker, describing_tags
from ..training.experiment import Experiment
from ..training.run_context import run_context
from .experiment import prove_experiment

STYLES = {"proved": "green", "proved up to": "yellow", "not proved": "red"}


def make_certificate(
    config: Config,
    folder: RunFolder,
    rank_info: RankInfo,
    command: str = "",
    expressions: Mapping[str, str] | None = None,
) -> bool:
    """Makes a certificate, shows it, and keeps it in `folder` and MLflow. Returns whether it is proved.

    On several ranks a collective call.

    Args:
        expressions: of values from the environment, which are kept in their place.
    """
    expressions = expressions or {}
    hide_values(config, expressions)
    with run_context(config, folder, rank_info) as folder:
        no_store = config.tracking.backend is Backend.none or not rank_info.first
        # A store that cannot be reached is reported before the work, not after it.
        store = None if no_store else Store(config.tracking)
        config, tags = choose_steps(config, rank_info)
        console.print(described_problem(config, rank_info), highlight=False, soft_wrap=True)
        with stages() as stage:
            certificate, experiment = prove_experiment(config, rank_info, stage)
    if rank_info.first:
        kept = recorded(config, expressions)
        certificate = replace(certificate, config=recorded(certificate.config, expressions))
        write(certificate, folder)
        folder.write_config(kept)
        show(certificate)
        locations: dict[str, object] = {"certificate": folder.certificate}
        if store is not None:
            locations.update(_record(certificate, experiment, folder, store, command, tags, kept))
        console.print()
        show_values("kept", locations)
    return certificate.proved


def _record(
    certificate: Certificate,
    experiment: Experiment,
    folder: RunFolder,
    store: Store,
    command: str,
    tags: dict[str, str],
    kept: Mapping[str, Any],
) -> dict[str, object]:
    """Records the certificate as a run in MLflow. Returns its links."""
    config = experiment.config
    tracker = create_tracker(
        replace(config, tracking=replace(config.tracking, system_metrics=False)),
        folder,
        store,
        name="certificate",
        command=command,
        tags={**describing_tags(experiment.device, []), **tags, **tags_of(certificate)},
        datasets=dataset_records(kept["data"], experiment.splits),
        recorded=kept,
    )
    status = RunStatus.FAILED
    try:
        tracker.tag({"mlflow.note.content": markdown(certificate), "mlflow.source.name": "accumexp.prove"})
        tracker.artifact(folder.certificate)
        tracker.artifact(folder.config)
        status = RunStatus.FINISHED
    finally:
        tracker.end(status)
    return tracker.links()


def certified(
    config: Config, rank_info: RankInfo, folder: RunFolder, expressions: Mapping[str, str]
) -> dict[str, str]:
    """Proves the window of a run that is about to begin. Returns the tag of the verdict.

    The certificate is written into `folder`, with the `expressions` of values from the environment. All ranks
    call it.
    """
    with stages() as stage:
        certificate, _ = prove_experiment(config, rank_info, stage)
    if rank_info.first:
        certificate = replace(certificate, config=recorded(certificate.config, expressions))
        write(certificate, folder)
    style = "green" if certificate.proved else "yellow"
    console.print(f"certificate: {certificate}", style=style, highlight=False, soft_wrap=True, markup=False)
    return tags_of(certificate)


def tags_of(certificate: Certificate) -> dict[str, str]:
    return {CERTIFICATE_TAG: str(certificate)[:5000]}


def write(certificate: Certificate, folder: RunFolder) -> None:
    """Writes `certificate.json`."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.certificate.write_text(certificate.as_json())


def described_problem(config: Config, rank_info: RankInfo) -> str:
    """The question that the certificate answers, and the device, in one line."""
    device = pick_device(device_of(config.device, rank_info))
    window = f"{config.accum.steps} micro-batches of {config.accum.micro_batch_size}"
    if rank_info.size > 1:
        window += f" on each of {rank_info.size} ranks"
    name = config.model["_target_"].rpartition(".")[2]
    return (
        f"Is {name}'s window of {window} the batch of {config.data.batch_size}? "
        f"On {device} ({device_name(device)})"
    )


def show(certificate: Certificate) -> None:
    """Prints the checks, the causes, and the verdict last."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 1), collapse_padding=True)
    table.add_column("check", overflow="fold")
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    for check in certificate.checks:
        mark = "[green]ok[/]" if check.passed else "[bold red]differs[/]"
        mark = mark if check.decided else "[dim]-[/]"
        table.add_row(check.name, number(check.figure), number(check.bound), mark, escape(check.detail))
    console.print(table)
    for cause in certificate.causes:
        console.print()
        console.print(escape(cause.line), style="bold", highlight=False, soft_wrap=True)
        effect = f"the update's gradient is off by {number(cause.effect)} of its norm"
        effect = "" if math.isnan(cause.effect) else effect
        for label, text in (("effect", effect), ("shown", cause.shown), ("to do", cause.advice)):
            if text:
                console.print(f"  {label:<7} {escape(text)}", highlight=False, soft_wrap=True)
    console.print()
    style = STYLES[certificate.verdict]
    console.print(escape(str(certificate)), style=f"bold {style}", highlight=False, soft_wrap=True)


def markdown(certificate: Certificate) -> str:
    """The certificate as MLflow's page of the run shows it."""
    lines = [
        f"**{markdown_text(str(certificate))}**",
        "",
        "| check | found | at most | |",
        "|---|---|---|---|",
    ]
    for check in certificate.checks:
        mark = "ok" if check.passed else "**differs**"
        lines.append(
            f"| {markdown_text(check.name)} | {number(check.figure)} | {number(check.bound)} | {mark} |"
        )
    for cause in certificate.causes:
        shown = markdown_text(f"Shown: {cause.shown}. To do: {cause.advice}.")
        lines += ["", f"**{markdown_text(cause.line)}**", "", shown]
    return "\n".join(lines)


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A function that shows the current stage on a terminal; elsewhere it has no effect."""
    if not console.is_terminal or console.quiet:
        yield lambda stage: None
        return
    with console.status("proving") as status:
        yield lambda stage: status.update(f"proving: {stage}")
