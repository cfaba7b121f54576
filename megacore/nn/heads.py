"""From the stream to logits: the token head at the labelled positions only, and the sentence-pair head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megacore.nn.kit import Kit
from megacore.nn.mlp import ACTIVATIONS
from megacore.nn.norm import Norm, stream_copies
from megacore.nn.packed import Part, packed
from megacore.parallel.collectives import copy_to_tensor_parallel, gather_stream
from megacore.parallel.grid import ParallelGrid
from megacore.params import index, read, write


def own_rows(positions: Tensor, part: Part) -> Tensor:
    """Tell which positions of a micro-batch this process has at a place of the model: [n] -> [n] bool."""
    return (positions >= part.start) & (positions < part.stop)


def _rows(x: Tensor, positions: Tensor, part: Part, grid: ParallelGrid) -> Tensor:
    """Pick this rank's rows of the stream at the given positions of the micro-batch."""
    x = gather_stream(x, grid)
    if grid.ulysses_parallel_size > 1:
        positions = positions[own_rows(positions, part)] - part.start
    return x.index_select(0, positions)


class TokenHead(nn.Module):
    """What precedes the output table: BERT's dense layer, activation and norm, where the model has them.

    Forward: x [tokens, hidden], label_positions [labels] -> [labels of this rank, hidden], and the output's bias.
    """

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        config, declare = kit.config, kit.declare
        self.transform_weight = self.transform_bias = self.norm = None
        if config.lm_transform:
            self.transform_weight = declare(write("transform"), read("hidden"), initial="normal")
            self.transform_bias = declare(write("transform"), initial="zeros")
            self.norm = Norm(kit, "transform", tied=config.tie_word_embeddings, whole=True)
        self.bias = declare(write("vocab"), initial="zeros") if config.lm_bias else None
        weighs = config.norm_copies and config.tie_word_embeddings and not config.has_output_gain
        copies = kit.declare.constant(stream_copies(config)) if weighs else None
        self.register_buffer("_copies", copies, persistent=False)
        self._originals = config.norm_copies[0] if weighs else 1
        self._activation = ACTIVATIONS[config.activation]
        self._grid, self._multiplier = kit.grid, config.logit_multiplier

    def forward(
        self, x: Tensor, tokens: Tensor, sequences: Tensor, label_positions: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens, sequences: of the stream that is read."""
        x = _rows(x, label_positions, packed(tokens, sequences, self._grid).inner, self._grid)
        if self.transform_weight is not None and self.norm is not None:
            x = self.norm(self._activation(F.linear(x, self.transform_weight, self.transform_bias)))
        if isinstance(self._copies, Tensor):  # the copies of a coordinate count once in the products with the table
            x = x * (self._originals / self._copies.double()).to(x.dtype)
        x = copy_to_tensor_parallel(x if self._multiplier == 1.0 else self._multiplier * x, self._grid)
        # The bias travels on to the table, which may be tied to the embedding's, in another layer.
        return x if self.bias is None else (x, self.bias.clone())


class OutputTable(nn.Module):
    """The output's matrix: [labels, hidden] -> logits [labels, vocab/tp].

    Args:
        kit: what parts are made with.
        tied: the word table to use, instead of a table of its own.
    """

    def __init__(self, kit: Kit, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = kit.declare(index("vocab"), read("hidden"), initial="normal") if tied is None else tied

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [labels, hidden], bias: [vocab/tp] -> [labels, vocab/tp]."""
        return F.linear(x, self.weight, bias)


class NSPHead(nn.Module):
    """Pooler over the first token (dense, tanh) and the classifier: 0 = is the next segment, 1 = is not."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        declare = kit.declare
        self.pooler_weight = declare(write("pooled"), read("hidden"), initial="normal")
        self.pooler_bias = declare(write("pooled"), initial="zeros")
        self.weight = declare(write("nsp_classes"), read("pooled"), initial="normal")
        self.bias = declare(write("nsp_classes"), initial="zeros")
        self._grid = kit.grid

    def forward(self, x: Tensor, tokens: Tensor, sequences: Tensor, pair_positions: Tensor) -> Tensor:
        """x: [tokens, hidden], pair_positions: [n], first tokens of the pairs -> [pairs of this rank, 2]."""
        x = _rows(x, pair_positions, packed(tokens, sequences, self._grid).inner, self._grid)
        return F.linear(F.linear(x, self.pooler_weight, self.pooler_bias).tanh(), self.weight, self.bias)
