"""Which settings of a run can be changed when it is resumed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from ..config.instantiate import with_present_targets
from ..config.loading import flatten, from_hydra, to_plain
from ..config.no_effect import no_effect
from ..config.schema import Backend, Config
from ..config.trust import inert
from ..errors import UsageError
from ..tracking.run_folder import RunFolder

# Which samples are held out of the training set for evaluation.
HELD_OUT = ("data.eval_fraction", "data.split_seed")
NEW_RUN = "begin a new run with it"
# Settings that a run keeps for its whole life, and why.
KEPT = {
    "seed": f"its weights and the order of its samples follow from seed={{before}}; {NEW_RUN}",
    "optimizer._target_": f"the checkpoint holds the state of {{before}}; {NEW_RUN}",
    "optimizer.amsgrad": f"needs state that the checkpoint does not hold; {NEW_RUN}",
    "optimizer.centered": f"needs state that the checkpoint does not hold; {NEW_RUN}",
    "optimizer.initial_accumulator_value": f"is where the first update began; {NEW_RUN}",
    "tracking.experiment": f"its record is in the experiment {{before}}, where it stays; {NEW_RUN}",
}
# Settings from which the samples of an epoch and their order follow.
SAMPLES = (
    *("data.batch_size", "data.drop_last", "data.eval_fraction", "data.split_seed"),
    *("data.train.", "data.eval.", "data.sampler.", "data.samples"),
)


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value before, value after)} of the settings that differ, None where there is none."""
    old, new = dict(flatten(before)), dict(flatten(after))
    keys = [*new, *(key for key in old if key not in new)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def check_changes(before: Config, after: Config, progress: Mapping[str, int], recorded: bool) -> None:
    """Refuses a change that a resumed run could not make true.

    Args:
        progress: the checkpoint's `Progress`, as a dict.
        recorded: whether the run has a record in a tracker.

    Raises:
        UsageError: naming the key, the reason, and how to get what was asked for.
    """
    changed = changes(before, after)
    without = no_effect(after)
    for key, (old, new) in changed.items():
        if key in without:
            raise UsageError(f"{key}={new}: has no effect with {without[key]}, leave it out")
        if key in KEPT:
            raise UsageError(f"{key}={new}: {KEPT[key].format(before=old)}")
        if progress["epoch_update"] and key.startswith(SAMPLES):
            raise UsageError(
                f"{key}={new}: the run stopped inside epoch {progress['epoch'] + 1} and would train on some "
                f"of its samples twice or not at all; resume it unchanged to the epoch's end first "
                f"(trainer.epochs={progress['epoch'] + 1}), or {NEW_RUN}"
            )
    for key in HELD_OUT:
        if key in changed:
            raise UsageError(
                f"{key}={changed[key][1]}: would evaluate on samples that it trained on; {NEW_RUN}"
            )
    _check_optimizer_state(before, after)
    if after.tracking.backend is not Backend.none and not recorded and "tracking.backend" in changed:
        name = after.tracking.backend.name
        raise UsageError(f"tracking.backend={name}: the run has no record; {NEW_RUN}")
    loop, updates, epoch = after.trainer, progress["update"], progress["epoch"]
    if loop.max_updates is not None and loop.max_updates < updates:
        raise UsageError(f"trainer.max_updates={loop.max_updates}: the run has made {updates} updates")
    if loop.epochs < epoch or loop.epochs == epoch and progress["epoch_update"]:
        raise UsageError(f"trainer.epochs={loop.epochs}: the run is in epoch {epoch + 1} already")


# Settings that an earlier launch of a job may have had otherwise: those of the machine, of its tracker, proof
# and report, and those that the run itself chooses.
OF_A_LAUNCH = (
    *("accum.steps", "accum.micro_batch_size", "accum.processes", "accum.memory_limit", "data.workers"),
    *("device", "tracking.", "report.", "prove", "proof.", "resume", "trainer.threads", "trainer.progress"),
    *("callbacks.progress.", "callbacks.monitor.", "seed", "replicas", "trust"),
)


class ChangedJob(UsageError):
    """A sweep's job is composed to another configuration than the run in its folder, which stays as it is."""


def check_same_job(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Refuses to take a sweep's job up again that is now composed to another configuration, as recorded.

    Raises:
        ChangedJob: naming the first key that differs.
    """
    written = folder.read_config()
    if written is None:
        return
    before = from_hydra(inert(with_present_targets(to_plain(OmegaConf.to_container(written, resolve=False)))))
    for key, (old, new) in changes(before, from_hydra(inert(config))).items():
        # An earlier version did not write every setting: one that was absent and is empty is no change.
        if not key.startswith(OF_A_LAUNCH) and not (old is None and not new):
            raise ChangedJob(
                f"{key}={new}: the run in {folder.path} was composed with {old}; take the files it was "
                "composed from, or begin a new sweep"
            )


def _check_optimizer_state(before: Config, after: Config) -> None:
    """Refuses settings of the optimizer or its groups that need another state than the checkpoint holds."""
    old, new = before.optimizer, after.optimizer
    _check_momentum("optimizer", old, new, str(new["_target_"]))
    groups = [node.get("groups") or [] for node in (old, new)]
    if groups[0] == groups[1]:
        return
    kinds = [[(entry.get("params"), entry.get("_target_")) for entry in entries] for entries in groups]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"optimizer.groups={groups[1]}: the checkpoint holds the state of other groups; {NEW_RUN}"
        )
    for number, (entry, other) in enumerate(zip(*groups, strict=True)):
        key = f"optimizer.groups.{number}"
        _check_momentum(key, {**old, **entry}, {**new, **other}, str(other.get("_target_", new["_target_"])))
        for name in ("amsgrad", "centered", "initial_accumulator_value"):
            if entry.get(name) != other.get(name):
                raise UsageError(f"{key}.{name}={other.get(name)}: {KEPT[f'optimizer.{name}']}")


def _check_momentum(key: str, old: Mapping[str, Any], new: Mapping[str, Any], target: str) -> None:
    """Refuses the first momentum of an optimizer that makes its buffers in its first step."""
    if not old.get("momentum") and new.get("momentum") and not target.endswith(".SGD"):
        raise UsageError(f"{key}.momentum={new['momentum']}: {KEPT['optimizer.centered']}")
