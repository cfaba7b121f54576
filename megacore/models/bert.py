"""BERT for pretraining (Devlin et al. 2019): encoder, MLM head with the tied word table, pooler and NSP head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.nn.block import Block
from megacore.nn.embedding import Embeddings
from megacore.nn.norm import LayerNorm
from megacore.parallel.collectives import copy_to_tensor_parallel
from megacore.parallel.dropout import DropoutKeys
from megacore.parallel.grid import ParallelGrid
from megacore.parallel.vocabulary import token_cross_entropy
from megacore.params import Declare, ParamSpec, Role, declared, read, write


@dataclass(frozen=True)
class BertInput:
    """A micro-batch on the model's device.

    Args:
        input_ids: [batch, seq] int64, padded.
        token_type_ids: [batch, seq] int64.
        lengths: [batch] int64, the tokens of each sample that are not padding.
        masked_positions: [masked] int64, indices into batch × seq where the MLM head is applied.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: Tensor
    masked_positions: Tensor


class BertLogits(NamedTuple):
    """MLM logits [masked, vocab/tp] of the masked positions, and NSP logits [batch, 2]."""

    mlm: Tensor
    nsp: Tensor


class BertSums(NamedTuple):
    """Sums over a micro-batch: losses (with gradient) and numbers of right predictions."""

    mlm_loss: Tensor
    nsp_loss: Tensor
    mlm_correct: Tensor
    nsp_correct: Tensor


class MLMHead(nn.Module):
    """Dense, GELU, norm, then the word table and a bias per token; logits are split over the vocabulary."""

    def __init__(self, config: ModelConfig, declare: Declare, grid: ParallelGrid) -> None:
        super().__init__()
        self.transform_weight = declare(write("transform"), read("hidden"), initial="normal")
        self.transform_bias = declare(write("transform"), initial="zeros")
        self.norm = LayerNorm(declare, "transform", config.layer_norm_eps, Role.READ)
        self.bias = declare(write("vocab"), initial="zeros")
        self._grid = grid

    def forward(self, x: Tensor, word_table: Tensor) -> Tensor:
        """x: [masked, hidden], word_table: [vocab/tp, hidden] -> [masked, vocab/tp]."""
        x = self.norm(F.gelu(F.linear(x, self.transform_weight, self.transform_bias)))
        return F.linear(copy_to_tensor_parallel(x, self._grid), word_table, self.bias)


class NSPHead(nn.Module):
    """Pooler over the first token (dense, tanh) and the classifier: 0 = is the next segment, 1 = is not."""

    def __init__(self, declare: Declare) -> None:
        super().__init__()
        self.pooler_weight = declare(write("pooled"), read("hidden"), initial="normal")
        self.pooler_bias = declare(write("pooled"), initial="zeros")
        self.weight = declare(write("nsp_classes"), read("pooled"), initial="normal")
        self.bias = declare(write("nsp_classes"), initial="zeros")

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, hidden], the first token of each sample -> [batch, 2]."""
        return F.linear(torch.tanh(F.linear(x, self.pooler_weight, self.pooler_bias)), self.weight, self.bias)


class Bert(nn.Module):
    """The model of one tensor-parallel rank."""

    def __init__(self, config: ModelConfig, declare: Declare, grid: ParallelGrid) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, declare, grid)
        self.layers = nn.ModuleList(
            Block(config, declare, grid, f"layers.{number}") for number in range(config.num_hidden_layers)
        )
        self.mlm_head = MLMHead(config, declare, grid)
        self.nsp_head = NSPHead(declare)
        self._grid = grid

    def forward(self, batch: BertInput, dropout: DropoutKeys | None = None) -> BertLogits:
        """Compute the logits of a micro-batch; ``dropout=None`` is evaluation."""
        seq = batch.input_ids.shape[1]
        mask = torch.arange(seq, device=batch.lengths.device) < batch.lengths.unsqueeze(1)
        mask = mask[:, None, None, :]
        x = self.embeddings(batch.input_ids, batch.token_type_ids, dropout)
        for layer in self.layers:
            x = layer(x, mask, dropout)
        masked = x.reshape(-1, x.shape[-1])[batch.masked_positions]
        return BertLogits(self.mlm_head(masked, self.embeddings.word), self.nsp_head(x[:, 0]))

    def sums(self, logits: BertLogits, masked_labels: Tensor, next_sentence_labels: Tensor) -> BertSums:
        """Sum losses and hits. masked_labels: [masked], next_sentence_labels: [batch]."""
        tokens = token_cross_entropy(logits.mlm, masked_labels, self.embeddings.first_id, self._grid)
        nsp = logits.nsp if logits.nsp.dtype == torch.float64 else logits.nsp.float()
        return BertSums(
            tokens.loss.sum(),
            F.cross_entropy(nsp, next_sentence_labels, reduction="sum"),
            tokens.correct.sum(),
            (nsp.argmax(dim=-1) == next_sentence_labels).sum(),
        )


def declarations(config: ModelConfig) -> dict[str, ParamSpec]:
    """Return every parameter of a model by name, without making the model."""
    model = Bert(config, Declare(config, device="meta"), ParallelGrid())
    return {name: parameter.spec for name, parameter in declared(model)}
