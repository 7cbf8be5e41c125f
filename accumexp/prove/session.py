"""Makes an experiment's certificate, shows it, and keeps it in the run's folder and in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config.environment_values import hide_values, recorded
from ..config.schema import Backend, Config
from ..data.digest import dataset_records
from ..environment.console import console, print_line, show_values
from ..environment.device import device_name, pick_device
from ..environment.ranks import RankInfo, device_of
from ..plan.auto_steps import choose_steps
from ..proof import Certificate
from ..tracking import Store
from ..tracking.record import create_tracker, describing_tags, upload_certificate
from ..tracking.run_folder import CERTIFICATE_TAG, RunFolder, RunStatus
from ..training.experiment import Experiment
from ..training.run_context import run_context
from .experiment import prove_experiment
from .page import save
from .show import markdown, question, show, stages


def make_certificate(
    config: Config,
    folder: RunFolder,
    rank_info: RankInfo,
    command: str = "",
    expressions: Mapping[str, str] | None = None,
    verbose: bool = False,
) -> bool:
    """Makes a certificate, shows it, and keeps it in `folder` and MLflow. Returns whether it is proved.

    On several ranks a collective call.

    Args:
        expressions: of values from the environment, which are kept in their place.
        verbose: shows all checks, also those that passed.
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
        show(certificate, verbose)
        save(certificate, folder)
        folder.write_config(kept)
        locations: dict[str, object] = {"page": folder.certificate_page, "certificate": folder.certificate}
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
        note = markdown(certificate, folder.certificate_page.name)
        tracker.tag({"mlflow.note.content": note, "mlflow.source.name": "accumexp.prove"})
        upload_certificate(tracker, folder)
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
        save(certificate, folder)
    style = "green" if certificate.proved else "yellow"
    print_line(f"certificate: {certificate}", style, markup=False)
    return tags_of(certificate)


def tags_of(certificate: Certificate) -> dict[str, str]:
    return {CERTIFICATE_TAG: "; ".join(certificate.lines)[:5000]}


def described_problem(config: Config, rank_info: RankInfo) -> str:
    """The question that the certificate answers, and the device, in one line."""
    device = pick_device(device_of(config.device, rank_info))
    subject = {
        "model": config.model["_target_"].rpartition(".")[2],
        "steps": config.accum.steps,
        "micro_batch_size": config.accum.micro_batch_size,
        "ranks": rank_info.size,
        "samples": config.data.batch_size,
    }
    return f"{question(subject)} On {device} ({device_name(device)})"
