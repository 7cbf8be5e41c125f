"""A certificate of an experiment: proved, shown, and kept in the run's folder and in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..config.schema import Backend, Config
from ..data.digest import dataset_records
from ..environment.console import console, show_values
from ..environment.device import device_name, pick_device
from ..environment.ranks import RankInfo, device_of
from ..plan.auto_steps import choose_steps
from ..proof import Certificate
from ..proof.certificate import number
from ..tracking import Store
from ..tracking.folder import CERTIFICATE_TAG, RunFolder, RunStatus
from ..tracking.record import create_tracker, describing_tags
from ..training.experiment import Experiment
from ..training.run_context import run_context
from .experiment import prove_experiment
from .spec import ProofSpec
from .table import show


class ProofSession:
    """A certificate to be made in this process, or one rank's part of it."""

    def __init__(self, spec: ProofSpec, rank_info: RankInfo) -> None:
        self.spec = spec
        self.rank_info = rank_info

    def execute(self) -> bool:
        """Makes, shows and keeps the certificate. Returns whether the window is proved."""
        config, rank_info = self.spec.config, self.rank_info
        with run_context(config, self.spec.folder, rank_info) as folder:
            no_store = config.tracking.backend is Backend.none or not rank_info.first
            # A store that cannot be reached is reported before the work, not after it.
            store = None if no_store else Store(config.tracking)
            config, tags = choose_steps(config, rank_info)
            console.print(described_problem(config, rank_info), highlight=False, soft_wrap=True)
            with stages() as stage:
                certificate, experiment = prove_experiment(config, rank_info, stage)
        if rank_info.first:
            write(certificate, folder)
            folder.write_config(config)
            show(certificate)
            kept: dict[str, object] = {"certificate": folder.certificate}
            if store is not None:
                kept.update(self._record(certificate, experiment, folder, store, tags))
            console.print()
            show_values("kept", kept)
        return certificate.proved

    def _record(
        self,
        certificate: Certificate,
        experiment: Experiment,
        folder: RunFolder,
        store: Store,
        tags: dict[str, str],
    ) -> dict[str, object]:
        """Records the certificate as a run in MLflow. Returns where it is found."""
        config = experiment.config
        tracker = create_tracker(
            replace(config, tracking=replace(config.tracking, system_metrics=False)),
            folder,
            store,
            name="certificate",
            command=self.spec.command,
            tags={**describing_tags(experiment.device, []), **tags, **tags_of(certificate)},
            datasets=dataset_records(config.data, experiment.splits),
        )
        status = RunStatus.FAILED
        try:
            tracker.tag(
                {"mlflow.note.content": markdown(certificate), "mlflow.source.name": "accumexp.prove"}
            )
            tracker.artifact(folder.certificate)
            tracker.artifact(folder.config)
            status = RunStatus.FINISHED
        finally:
            tracker.end(status)
        return tracker.links()


def certified(config: Config, rank_info: RankInfo, folder: RunFolder) -> dict[str, str]:
    """Proves the window of a run that is about to begin. Returns the tag of the verdict.

    The certificate is written into `folder`. All ranks call it.
    """
    with stages() as stage:
        certificate, _ = prove_experiment(config, rank_info, stage)
    if rank_info.first:
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
    """One line of what is to be proved, and on what."""
    device = pick_device(device_of(config.device, rank_info))
    window = f"{config.accum.steps} micro-batches of {config.accum.micro_batch_size}"
    if rank_info.size > 1:
        window += f" on each of {rank_info.size} ranks"
    name = config.model["_target_"].rpartition(".")[2]
    return (
        f"Is {name}'s window of {window} the batch of {config.data.batch_size}? "
        f"On {device} ({device_name(device)})"
    )


def markdown(certificate: Certificate) -> str:
    """The certificate as MLflow's page of the run shows it."""
    lines = [f"**{certificate}**", "", "| check | found | at most | |", "|---|---|---|---|"]
    for check in certificate.checks:
        mark = "ok" if check.passed else "**differs**"
        lines.append(f"| {check.name} | {number(check.figure)} | {number(check.bound)} | {mark} |")
    for cause in certificate.causes:
        lines += ["", f"**{cause.line}**", "", f"Shown: {cause.shown}. To do: {cause.advice}."]
    return "\n".join(lines)


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is under way; elsewhere nothing."""
    if not console.is_terminal or console.quiet:
        yield lambda stage: None
        return
    with console.status("proving") as status:
        yield lambda stage: status.update(f"proving: {stage}")
