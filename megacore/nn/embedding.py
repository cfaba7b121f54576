"""From token ids to the stream's first value."""

from __future__ import annotations

from torch import Tensor, nn

from megacore.nn.kit import Kit
from megacore.nn.norm import Norm
from megacore.nn.packed import packed
from megacore.parallel.collectives import on_stream
from megacore.parallel.vocabulary import embed_tokens
from megacore.params import index, write


class WordTable(nn.Module):
    """The word table, which tensor-parallel ranks share by rows; an output head may be tied to it."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.word = kit.declare(index("vocab"), write("hidden"), initial="normal")
        self._grid = kit.grid

    def forward(self, tokens: Tensor, sequences: Tensor) -> Tensor:
        """tokens: [3, total] -> [tokens of this rank, hidden]."""
        stream, grid = packed(tokens, sequences, self._grid).stream, self._grid
        ids = tokens[0] if grid.sequence_parallel else tokens[0, stream.start : stream.stop]
        return embed_tokens(ids, self.word, self.word.region[0][0], grid)


class InputEmbedding(nn.Module):
    """Adds positions and segments, as far as the model has them; then the embedding norm and dropout."""

    def __init__(self, kit: Kit, site: str) -> None:
        super().__init__()
        config, declare = kit.config, kit.declare
        learned = config.position_embedding == "learned"
        self.position = declare(index("positions"), write("hidden"), initial="normal") if learned else None
        segments = config.type_vocab_size > 0
        self.segment = declare(index("segments"), write("hidden"), initial="normal") if segments else None
        self.norm = Norm(kit) if config.embedding_norm else None
        self._dropout, self._grid = kit.hidden_dropout(site), kit.grid

    def forward(self, x: Tensor, tokens: Tensor, sequences: Tensor) -> Tensor:
        """x: [tokens of this rank, hidden] -> the same."""
        stream = packed(tokens, sequences, self._grid).stream
        if self.position is not None:
            x = x + on_stream(self.position, self._grid)[stream.positions]
        if self.segment is not None:
            x = x + on_stream(self.segment, self._grid)[tokens[1, stream.start : stream.stop]]
        if self.norm is not None:
            x = self.norm(x)
        if self.training and self._dropout.rate:
            x = self._dropout.stream(x, stream.samples, stream.positions)
        return x
