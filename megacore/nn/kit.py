"""What every part of a model is made with."""

from __future__ import annotations

from dataclasses import dataclass

from megacore.model_config import ModelConfig
from megacore.parallel.dropout import Dropout
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare


@dataclass(frozen=True)
class Kit:
    """The configuration, the maker of parameters, the process grid, the seed of dropout and whether to compile."""

    config: ModelConfig
    declare: Declare
    grid: ParallelGrid
    seed: int = 0
    compile: bool = False

    def hidden_dropout(self, site: str) -> Dropout:
        """Dropout on the residual stream."""
        return Dropout(self.config.hidden_dropout, self.seed, site)

    def attention_dropout(self, site: str) -> Dropout:
        """Dropout on attention probabilities."""
        return Dropout(self.config.attention_dropout, self.seed, site)
