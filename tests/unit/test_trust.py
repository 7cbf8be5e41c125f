"""What the configuration of a checkpoint may name and resolve, and what is recorded of the environment."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from accumexp.config.environment_values import environment_values, recorded
from accumexp.config.trust import Trust, check_targets, impure, inert
from accumexp.errors import UsageError, markdown_text
from accumexp.training.known_targets import refusal_of_targets

TRUSTED_TARGETS = [
    ("model", "accumexp.models.MLP"),
    ("model", "accumexp.models.resnet18"),
    ("model", "torchvision.models.resnet18"),
    ("model", "torch.nn.Linear"),
    ("loss", "torch.nn.CrossEntropyLoss"),
    ("loss", "accumexp.losses.Sum"),
    ("loss", "accumexp.losses.info_nce"),
    ("loss", "accumexp.losses.Regression"),  # its former path
    ("data.augment", "accumexp.data.TwoViews"),
    ("callbacks.probe", "accumexp.training.linear_probe.LinearProbe"),
    ("loss", "torch.nn.functional.cross_entropy"),
    ("optimizer", "torch.optim.AdamW"),
    ("optimizer.groups.0", "torch.optim.SGD"),
    ("scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"),
    ("scheduler", "accumexp.optim.cosine"),  # moved
    ("metrics.f1", "torchmetrics.classification.MulticlassF1Score"),
    ("callbacks.early", "accumexp.callbacks.EarlyStopping"),
    ("data.train", "torchvision.datasets.MNIST"),
    ("data.test", "accumexp.data.Digits"),
    ("data.transform", "torchvision.transforms.v2.Compose"),
    ("data.transform.transforms.0", "torchvision.transforms.v2.ToImage"),
    ("data.collate", "accumexp.data.pad"),
    ("data.sampler", "torch.utils.data.WeightedRandomSampler"),
]
UNKNOWN = [
    ("model", "torch.optim.AdamW"),
    ("model", "torch.nn.init.normal_"),
    ("model", "torch.nn.functional.relu"),
    ("model", "torch.hub.load"),
    ("model", "torch.nn.modules.module.os.system"),
    ("model", "torchvision.models.resnet.load_state_dict_from_url"),
    ("model", "accumexp.training.trained_model.load_model"),
    ("loss", "torch.nn.functional.handle_torch_function"),
    ("optimizer", "torch.nn.Linear"),
    ("scheduler", "accumexp.training.schedules.require"),
    ("metrics.bert", "torchmetrics.text.BERTScore"),
    ("callbacks.mine", "torch.nn.Linear"),
    ("data.train", "torchvision.datasets.LSUN"),
    ("data.train", "torchvision.datasets.utils.download_url"),
    ("data.collate", "os.system"),
    ("model", "transformers.AutoModel"),
    ("model", "eval"),
    ("model", "torch.nn..Linear"),
]


def check(key: str, target: Any, trust: Trust = Trust(), given: tuple[str, ...] = ()) -> None:  # noqa: B008
    plain: dict[str, Any] = {"_target_": target}
    for name in reversed(key.split(".")):
        plain = {name: plain}
    check_targets(plain, "checkpoint x", given, trust, refusal_of_targets(plain))


@pytest.mark.parametrize(("key", "target"), TRUSTED_TARGETS)
def test_what_the_project_knows_needs_no_trust(key: str, target: str) -> None:
    check(key, target)


@pytest.mark.parametrize(("key", "target"), UNKNOWN)
def test_everything_else_is_refused_unless_it_is_given_or_trusted(key: str, target: str) -> None:
    with pytest.raises(UsageError, match="^" + key) as refusal:
        check(key, target)
    assert len(str(refusal.value).splitlines()) == 1 and "trust=" in str(refusal.value)
    check(key, target, Trust(everything=True))
    check(key, target, Trust(targets=frozenset([target])))
    check(key, target, given=(key,))
    with pytest.raises(UsageError):
        check(key, target, Trust(packages=frozenset(["another"])), given=("another",))


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ("tests.support.trouble.Trouble", 'add trust=[more,tests] (in Python trust=["more", "tests"])'),
        ("os.kill", "add trust=true (in Python trust=True), which lets it run any code"),
    ],
)
def test_a_function_says_what_to_add_in_pythons_form_too(target: str, remedy: str) -> None:
    with pytest.raises(UsageError) as refusal:
        check("callbacks.mine", target, replace(Trust.given(["more"]), in_python=True))
    assert str(refusal.value).endswith(remedy)


def test_a_trusted_package_gives_what_it_defines_and_not_what_it_imports() -> None:
    trust = Trust.given("[tests]")
    check("callbacks.mine", "tests.support.trouble.Trouble", trust)
    for target in ("tests.support.trouble.os.kill", "tests.support.hostile.pickle.loads"):
        with pytest.raises(UsageError, match="it is of "):
            check("model", target, trust)
    with pytest.raises(UsageError, match="takes a Module"):
        check("model", "tests.support.trouble.Trouble", trust)


@pytest.mark.parametrize(
    ("text", "is_impure"),
    [
        ("${data.root}/train", False),
        ("${product:${data.channels},2}", False),
        ("${..size}", False),
        ("plain", False),
        ("${oc.env:HOME}", True),
        ("\\${oc.env:HOME}", True),
        ("${ oc.env : HOME}", True),
        ("${product:${oc.env:HOME},2}", True),
        ("${${data.root}:HOME}", True),
        ("${folders:/}", True),
        ("${place:.,0,0,a,[]}", True),
        ("${oc.decode:'{a: 1}'}", True),
        ("${hydra:runtime.cwd}", True),
    ],
)
def test_pure_interpolations_read_keys_and_compute(text: str, is_impure: bool) -> None:
    assert impure(text) == is_impure
    if is_impure and not text.startswith("\\"):
        assert OmegaConf.to_container(OmegaConf.create({"a": inert(text)}), resolve=True) == {"a": text}


def test_values_from_the_environment_are_recorded_as_their_expressions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCUMEXP_TEST_WORD", "s3cret-word")
    monkeypatch.setenv("ACCUMEXP_TEST_NUMBER", "7")
    word = "${oc.env:ACCUMEXP_TEST_WORD}"
    cfg = OmegaConf.create(
        {
            "data": {"root": word, "train": {"token": word, "root": "${data.root}/x", "more": [word, 1]}},
            "model": {"url": "https://x/${data.train.token}", "near": "${.url}", "plain": "text"},
            "seed": "${oc.decode:${oc.env:ACCUMEXP_TEST_NUMBER}}",
        }
    )
    expressions = environment_values(cfg)
    assert recorded(OmegaConf.to_container(cfg, resolve=True), expressions) == {
        "data": {
            "root": "s3cret-word",
            "train": {"token": word, "root": "s3cret-word/x", "more": [word, 1]},
        },
        "model": {"url": "https://x/${data.train.token}", "near": "${.url}", "plain": "text"},
        "seed": 7,
    }


def test_markdown_shows_a_text_as_it_is() -> None:
    assert markdown_text("a_b*c\n<script> [x](y) `d`") == r"a\_b\*c \<script\> \[x\]\(y\) \`d\`"


def test_the_metadata_of_shards_runs_no_code(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from accumexp.training.shard_reader import METADATA, Reader, SafeLoadPlanner

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "canary",)

    model = torch.nn.Linear(3, 2)
    folder = tmp_path / "update-00000001.shards"
    state = {"model": model.state_dict(), "rate": 0.5}
    with pytest.warns(UserWarning, match="single process"):
        dcp.state_dict_saver.save(state, checkpoint_id=folder)
    read: dict[str, Any] = {"model": torch.nn.Linear(3, 2).state_dict(), "rate": 0.0}
    with pytest.warns(UserWarning, match="single process"):
        dcp.state_dict_loader.load(read, storage_reader=Reader(folder), planner=SafeLoadPlanner())
    assert read["rate"] == 0.5 and torch.equal(read["model"]["weight"], model.weight)

    data = io.BytesIO()
    pickle.dump(Runs(), data)
    (folder / METADATA).write_bytes(data.getvalue())
    from torch.distributed.checkpoint.api import CheckpointException

    with pytest.raises(CheckpointException, match="no part of it"), pytest.warns(UserWarning):
        dcp.state_dict_loader.load(read, storage_reader=Reader(folder), planner=SafeLoadPlanner())
    assert not (tmp_path / "canary").exists()
