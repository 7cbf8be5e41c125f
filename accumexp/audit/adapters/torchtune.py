"""torchtune's recipe `full_finetune_single_device`, as `tune run` starts it, on a small Llama 2.

It trains a causal language model: on tokens in every setting. Left out: `classes`, which it cannot train;
`own_loss` and `groups`, for which it has no option; `two_ranks`, which are another recipe; `bf16`, as its
weights are bf16 then. torchtune 0.6.1 imports with torchao up to 0.13. Its recipe leaves out an epoch's
last micro-batch if it is smaller.
"""

# The package is not installed where types are checked, and this module has its name.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from dataclasses import asdict, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..samples import PADDING, VOCABULARY, samples_of
from ..settings import LEARNING_RATE, Setting, Watch, general_but, quiet, schedule_of

PACKAGE = "torchtune"
SETTINGS = (*general_but("classes", "own_loss", "groups", "two_ranks", "bf16"), "causal_lm")


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    setting = replace(setting, task="tokens", model="llama")
    with TemporaryDirectory() as folder, quiet():
        config = OmegaConf.create(config_of(setting, steps, micro, folder))
        torch.manual_seed(setting.seed)
        model = torchtune.config.instantiate(config.model).to(watch.dtype)
        Path(folder, "input").mkdir()
        torch.save(model.state_dict(), Path(folder, "input", "model.pt"))
        recipe = watched_recipe(watch)(config)
        recipe.setup(config)
        recipe.train()
        recipe.cleanup()


def watched_recipe(watch: Watch) -> Any:
    """The recipe's class, which `watch`es the model that it builds."""
    path = Path(torchtune.__file__).parent.parent / "recipes" / "full_finetune_single_device.py"
    spec = spec_from_file_location("full_finetune_single_device", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    class Watched(module.FullFinetuneRecipeSingleDevice):
        def _setup_model(self, *arguments: Any, **keywords: Any) -> nn.Module:
            return watch(super()._setup_model(*arguments, **keywords))

    return Watched


def config_of(setting: Setting, steps: int, micro: int, folder: str) -> dict[str, Any]:
    here = __name__
    return {
        "model": {
            "_component_": "torchtune.models.llama2.llama2",
            "vocab_size": VOCABULARY,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 2,
            "embed_dim": 16,
            "max_seq_len": 32,
            "attn_dropout": setting.dropout,
        },
        "tokenizer": {"_component_": f"{here}.tokenizer"},
        "dataset": {"_component_": f"{here}.dataset", "setting": asdict(setting)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpoint_dir": f"{folder}/input",
            "checkpoint_files": ["model.pt"],
            "output_dir": f"{folder}/output",
            "model_type": "LLAMA2",
        },
        "optimizer": {"_component_": "torch.optim.SGD", "lr": LEARNING_RATE, "momentum": 0.9},
        "lr_scheduler": {"_component_": f"{here}.schedule", "setting": asdict(setting)},
        "loss": {"_component_": "torch.nn.CrossEntropyLoss", "label_smoothing": setting.label_smoothing},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": folder},
        "batch_size": micro,
        "gradient_accumulation_steps": steps,
        "clip_grad_norm": setting.clip_norm,
        "epochs": setting.epochs,
        "max_steps_per_epoch": None,
        "shuffle": False,
        "seed": setting.seed,
        "device": "cpu",
        "dtype": "fp64",
        "compile": False,
        "optimizer_in_bwd": False,
        "resume_from_checkpoint": False,
        "output_dir": folder,
    }


def tokenizer() -> SimpleNamespace:
    return SimpleNamespace(pad_id=PADDING)


def dataset(tokenizer: Any, setting: dict[str, Any]) -> list[dict[str, list[int]]]:
    samples = samples_of(Setting(**setting), torch.float64)
    return [{"tokens": s["inputs"].tolist(), "labels": s["labels"].tolist()} for s in samples]


def schedule(
    optimizer: torch.optim.Optimizer, setting: dict[str, Any], num_training_steps: int, last_epoch: int
) -> LambdaLR:
    return schedule_of(Setting(**setting), optimizer)
