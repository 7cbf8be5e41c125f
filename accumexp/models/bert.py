"""BERT for masked language modelling, from transformers, small and with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError


class Bert(nn.Module):
    """transformers' BertForMaskedLM (Devlin et al., arXiv 1810.04805) with the loss left to the window.

    transformers' own loss is a micro-batch's mean, which cannot be accumulated where token counts differ.
    Nothing is downloaded.

    Shapes: input_ids and attention_mask (n, length), 1 on tokens and 0 on padding, to logits
    (n, vocabulary, length), as torch.nn.CrossEntropyLoss takes them with targets (n, length).

    Args:
        vocabulary: number of tokens; 0 is padding.
        length: tokens in the longest sample.
        hidden, layers, heads: width, and depth, and heads of attention.
        dropout: of hidden layers and of attention; transformers' default is 0.1.
        attention: "eager" or "sdpa", which needs less memory; on GPUs its backward adds in no fixed order.

    Raises:
        UsageError: if transformers is not installed.
        ValueError: for sizes that do not fit each other.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.0,
        attention: str = "eager",
    ) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertForMaskedLM
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise UsageError("needs transformers, pip install 'accumexp[text]'") from error
        config: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": length,
            "type_vocab_size": 1,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "pad_token_id": 0,
            "attn_implementation": attention,
        }
        self.bert = BertForMaskedLM(BertConfig(**config))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # A mask (n, length) would be read on the host once a micro-batch, to see if it can be left out.
        dtype = self.bert.dtype
        hidden = (attention_mask == 0)[:, None, None, :]
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        logits = self.bert(input_ids=input_ids, attention_mask=mask).logits
        # The loss would copy them all the same, and FSDP warns of a view.
        return logits.transpose(1, 2).contiguous()
