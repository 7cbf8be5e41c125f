"""trl's SFTTrainer, which trains causal language models: it trains on tokens in every setting.

Without a model in the setting it trains a Llama. Sequences are tokenised beforehand, with the prompt's
labels ignored. The optimizer is the trainer's default, AdamW. `label_smoothing` and `own_loss` use
arguments (`label_smoothing_factor`, `compute_loss_func`) that trl deprecates. Left out: `classes`, which it
cannot train.
"""

# The package is not installed where types are checked, and this module has its name.
# pyright: reportMissingImports=false, reportCallIssue=false
from __future__ import annotations

from dataclasses import replace
from tempfile import TemporaryDirectory

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ..models import CAUSAL, model_of
from ..samples import VOCABULARY, samples_of
from ..settings import Setting, Watch, general_but, new_accelerate, optimizer_of, quiet
from .transformers import ReportLoss, arguments_of, own_loss_of

PACKAGE = "trl"
SETTINGS = (*general_but("classes"), "causal_lm")


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    model_name = setting.model if setting.model in CAUSAL else "llama"
    setting = replace(setting, task="tokens", model=model_name)
    model = watch(model_of(setting, setting.dtype(watch)))
    samples = samples_of(setting, setting.dtype(watch))
    with TemporaryDirectory() as folder, quiet(), new_accelerate():
        arguments = arguments_of(setting, steps, micro) | {"remove_unused_columns": True}
        trainer = SFTTrainer(
            model,  # type: ignore[arg-type]
            SFTConfig(folder, **arguments),
            train_dataset=Dataset.from_list(
                [{"input_ids": s["inputs"].tolist(), "labels": s["labels"].tolist()} for s in samples]
            ),
            processing_class=tokenizer(),
            compute_loss_func=own_loss_of(setting),
            optimizers=(optimizer_of(setting, model) if setting.groups else None, None),
            callbacks=[ReportLoss(watch)],
        )
        trainer.train()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the vocabulary, which the trainer asks for its special tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"word{k}": k for k in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
