"""An order for a certificate, carried out: the proof, what is shown and kept of it, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.schema import Backend, Config, Strategy
from ..environment.console import console, show_values
from ..environment.device import device_name, pick_device
from ..environment.ranks import RankInfo, broadcast_from_first, device_of, process_group
from ..plan.auto_steps import choose_steps
from ..proof import Certificate
from ..proof.certificate import number
from ..run.record import described, open_tracker, write_config
from ..run.spec import RunSpec
from ..tracking import Store
from ..tracking.certificates import CERTIFICATE, TAG
from .experiment import prove_experiment
from .table import show


@dataclass
class ProofSession:
    """A proof about to happen, in this process: the whole of it, or one rank's part."""

    spec: RunSpec
    rank_info: RankInfo

    def execute(self) -> bool:
        """Whether the window is proved."""
        config, rank_info = self.spec.config, self.rank_info
        if not rank_info.first:
            console.quiet = True
        with _joined(config, rank_info):
            folder = Path(broadcast_from_first(str(self.spec.folder), rank_info))
            no_store = config.tracking.backend is Backend.none or not rank_info.first
            # A store that cannot be reached is said before the work, not after it.
            store = None if no_store else Store(config.tracking)
            config, known = choose_steps(self.spec.config, rank_info, self.spec.resume_from is not None)
            self.spec = replace(self.spec, config=config)
            config = self.spec.config
            console.print(described_problem(config, rank_info), highlight=False, soft_wrap=True)
            with stages() as stage:
                certificate, experiment = prove_experiment(config, rank_info, stage)
        if rank_info.first:
            path = write(certificate, folder)
            config_path = write_config(folder, config)
            show(certificate)
            kept: dict[str, object] = {"certificate": path}
            if store is not None:
                quiet = replace(config.tracking, system_metrics=False)
                spec = replace(self.spec, config=replace(config, tracking=quiet))
                tags = {**described(experiment, []), **known, **tags_of(certificate)}
                tracker = open_tracker(spec, store, experiment, tags, "certificate", None)
                try:
                    tracker.tag(
                        {"mlflow.note.content": markdown(certificate), "mlflow.source.name": "accumexp.prove"}
                    )
                    tracker.artifact(path)
                    tracker.artifact(config_path)
                except BaseException:
                    tracker.end("FAILED")
                    raise
                tracker.end("FINISHED")
                kept.update(run=tracker.run_id, UI=tracker.address)
                if tracker.ui_command:
                    kept["serve it with"] = tracker.ui_command
            console.print()
            show_values("kept", kept)
        return certificate.proved


def certified(config: Config, rank_info: RankInfo, folder: Path) -> dict[str, str]:
    """Proves the window of a run that is about to begin; the tags that say what came of it.

    The certificate is written into `folder`. All ranks call.
    """
    with stages() as stage:
        certificate, _ = prove_experiment(config, rank_info, stage)
    if rank_info.first:
        write(certificate, folder)
    style = "green" if certificate.proved else "yellow"
    console.print(f"certificate: {certificate}", style=style, highlight=False, soft_wrap=True, markup=False)
    return tags_of(certificate)


def tags_of(certificate: Certificate) -> dict[str, str]:
    return {TAG: str(certificate)[:5000]}


def write(certificate: Certificate, folder: Path) -> Path:
    """Writes `certificate.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CERTIFICATE
    path.write_text(certificate.as_json())
    return path


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


def _joined(config: Config, rank_info: RankInfo) -> AbstractContextManager[None]:
    if config.accum.strategy is Strategy.standalone:
        return nullcontext()
    return process_group(rank_info, str(pick_device(device_of(config.device, rank_info))))
