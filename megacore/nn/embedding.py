"""BERT's input embeddings: word, position and segment tables, summed and normalised."""

from __future__ import annotations

from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.nn.norm import LayerNorm
from megacore.nn.residual import HiddenDropout
from megacore.parallel.dropout import DropoutKeys
from megacore.parallel.grid import ParallelGrid
from megacore.parallel.vocabulary import embed_tokens
from megacore.params import Declare, index, write


class Embeddings(nn.Module):
    """The stream's first value; the word table is also the MLM head's output table."""

    def __init__(self, config: ModelConfig, declare: Declare, grid: ParallelGrid) -> None:
        super().__init__()
        self.word = declare(index("vocab"), write("hidden"), initial="normal")
        self.position = declare(index("positions"), write("hidden"), initial="normal")
        self.segment = declare(index("segments"), write("hidden"), initial="normal")
        self.norm = LayerNorm(declare, "hidden", config.layer_norm_eps)
        self._dropout = HiddenDropout(config.hidden_dropout, "embeddings")
        self._grid = grid

    @property
    def first_id(self) -> int:
        """The token id of the word table's first row on this rank."""
        return self.word.region[0][0]

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, dropout: DropoutKeys | None) -> Tensor:
        """input_ids, token_type_ids: [batch, seq] -> [batch, seq, hidden]."""
        words = embed_tokens(input_ids, self.word, self.first_id, self._grid)
        x = words + self.position[: input_ids.shape[1]] + self.segment[token_type_ids]
        output: Tensor = self._dropout(self.norm(x), dropout)
        return output
