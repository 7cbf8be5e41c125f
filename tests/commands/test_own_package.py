"""A text classification set from a package outside the repository: trained, proved, swept, resumed.

Sentences of unequal lengths, samples as dicts, an own collate and sampler, parameter groups by name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from accumexp.training.checkpoint import load

from ..support.command import environment, run_command

CLASSES = """
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

class Sentences(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
        self.words = [torch.randint(1, 30, (length,), generator=generator) for length in lengths]
    def __len__(self):
        return len(self.words)
    def __getitem__(self, index):
        words = self.words[index]
        return {"tokens": words, "label": int(words[0] % 3), "note": f"sentence {index}"}

def pad(samples):
    tokens = nn.utils.rnn.pad_sequence([one["tokens"] for one in samples], batch_first=True)
    labels = torch.tensor([one["label"] for one in samples])
    return {"tokens": tokens, "mask": (tokens != 0).double(), "label": labels}

class ByLength(Sampler):
    "Shuffled, the short sentences twice as often."
    def __init__(self, data_source, generator):
        self.data_source, self.generator = data_source, generator
    def __len__(self):
        return len(self.data_source)
    def __iter__(self):
        weights = torch.tensor([1.0 + (len(self.data_source[k]["tokens"]) < 6) for k in range(len(self))])
        return iter(torch.multinomial(weights, len(self), True, generator=self.generator).tolist())

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(30, 8), nn.LayerNorm(8), nn.Linear(8, 3)
    def forward(self, tokens, mask):
        mean = (self.embedding(tokens) * mask[..., None].to(self.head.weight)).sum(1)
        return self.head(self.norm(mean / mask.sum(1, keepdim=True).to(mean)))
"""
# All that the user writes beside the classes.
FILES = {
    "data/sentences.yaml": """
train: {_target_: sentences.Sentences, count: 90, seed: 0}
test: {_target_: sentences.Sentences, count: 30, seed: 1}
target: label
inputs: [tokens, mask]
collate: {_target_: sentences.pad}
sampler: {_target_: sentences.ByLength}
num_classes: 3
batch_size: 16
workers: 0
""",
    "model/sentences.yaml": """
_target_: sentences.Classifier
""",
    "experiment/sentences.yaml": """
# @package _global_
defaults:
  - override /data: sentences
  - override /model: sentences
optimizer:
  weight_decay: 0.01
  groups:
    - {params: ["*.bias", "norm.*"], weight_decay: 0.0, name: plain}
    - {params: "head.*", lr: 0.2, name: head}
trainer: {epochs: 4, progress: false}
""",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("project")
    for name, text in {
        **{f"conf/{name}": text for name, text in FILES.items()},
        "sentences.py": CLASSES,
    }.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    assert sum(len(text.strip().splitlines()) for text in FILES.values()) <= 30
    return base


def command(project: Path, *overrides: str, name: str = "run", flags: tuple[str, ...] = ()) -> str:
    chosen = ["--config-dir", "conf", "experiment=sentences", "tracking=none", "device=cpu"]
    env = environment(project)
    done = run_command(name, *flags, *chosen, *overrides, folder=project, env=env)
    assert done.code == 0, done
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(sorted((folder / "checkpoints").glob("update-*.pt"))[-1])["model"]


def test_it_is_trained_and_resumed_to_the_bit(project: Path) -> None:
    command(project, "accum.steps=4", "hydra.run.dir=whole")
    command(project, "accum.steps=4", "hydra.run.dir=half", "trainer.max_updates=13")
    env = environment(project)
    done = run_command(
        "run", "resume=half", "trust=[sentences]", "trainer.max_updates=null", folder=project, env=env
    )
    assert done.code == 0, done
    whole, half = weights(project / "whole"), weights(project / "half")
    assert whole.keys() == half.keys()
    assert all(torch.equal(value, half[name]) for name, value in whole.items())
    assert '"train/lr/head": 0.2' in (project / "whole" / "metrics.jsonl").read_text()


def test_it_is_proved(project: Path) -> None:
    output = command(project, "accum.steps=4", "proof.updates=12", name="prove")
    assert "\nproved" in output


def test_it_is_swept(project: Path) -> None:
    command(project, "accum.steps=1,4", "seed=0,1", "hydra.sweep.dir=sweep", "precision=fp64", flags=("-m",))
    jobs = sorted(path for path in (project / "sweep").iterdir() if path.is_dir() and path.name[0].isdigit())
    assert len(jobs) == 4
    one, _, accumulated, _ = (weights(job) for job in jobs)
    error = max(float((one[name] - accumulated[name]).abs().max()) for name in one)
    assert error <= 1e-12
    shutil.rmtree(project / "sweep")
