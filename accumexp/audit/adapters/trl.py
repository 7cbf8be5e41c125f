"""trl's SFTTrainer, which trains causal language models: settings of classes are left out.

Without a model in the setting it trains a Llama. Sequences are tokenised beforehand, with the prompt's
labels ignored. The optimizer is the trainer's default, AdamW. Left out: `own_loss`, whose argument
`compute_loss_func` is deprecated.
"""

from __future__ import annotations

from dataclasses import replace
from tempfile import TemporaryDirectory

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ..models import model_of
from ..samples import VOCABULARY, samples_of
from ..settings import Setting, Watch, optimizer_of, quiet
from .transformers import ReportLoss, arguments_of

PACKAGE = "trl"
SETTINGS = (
    "tokens",
    "causal_lm",
)


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    if setting.model == "mlp":
        setting = replace(setting, model="llama")
    model = watch(model_of(setting, setting.dtype(watch)))
    samples = samples_of(setting, setting.dtype(watch))
    with TemporaryDirectory() as folder, quiet():
        arguments = arguments_of(setting, steps, micro)
        trainer = SFTTrainer(
            model,  # type: ignore[arg-type]
            SFTConfig(folder, **{**arguments, "remove_unused_columns": True}),
            train_dataset=Dataset.from_list(
                [{"input_ids": s["inputs"].tolist(), "labels": s["labels"].tolist()} for s in samples]
            ),
            processing_class=tokenizer(),
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
