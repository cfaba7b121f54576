"""The configuration of a run: what is computed (`ModelConfig`), where (`ParallelConfig`), how (`TrainingConfig`).

Every size or layout has one key, used in YAML files, in ``key=value`` words and in checkpoint manifests alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from megacore.axes import AXES, Sharding
from megacore.errors import ConfigError
from megacore.settings import Settings


def divisors_near(number: int, value: int, most: int = 4) -> str:
    """Name the divisors of ``number`` nearest to ``value``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    nearest = sorted(divisors, key=lambda d: (abs(d - value), d))[:most]
    return ", ".join(str(d) for d in sorted(nearest))


class ModelConfig(Settings):
    """The function that is trained; a checkpoint carries it."""

    family: Literal["bert"] = "bert"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    layer_norm_eps: PositiveFloat = 1e-12
    hidden_dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    initializer_range: PositiveFloat = 0.02

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value(self) -> int:
        """Keys and values are one parameter with a leading axis of two."""
        return 2

    @property
    def nsp_classes(self) -> int:
        """Index 0: the second segment follows the first; index 1: it is from another document."""
        return 2

    def axis_size(self, name: str) -> int:
        """Return the size of the axis called ``name``."""
        size: int = getattr(self, AXES[name].key)
        return size

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}; "
                f"nearest that do: {divisors_near(self.hidden_size, self.num_attention_heads)}"
            )
        return self


class ParallelConfig(Settings):
    """How the ranks share the model; what is left of the world is data parallel."""

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: Literal[1] = 1

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of data-parallel replicas among ``world_size`` processes."""
        replica = self.tensor_parallel_size * self.pipeline_parallel_size
        if world_size % replica:
            raise ConfigError(
                f"the world has {world_size} processes, which is not a multiple of tensor_parallel_size="
                f"{self.tensor_parallel_size} × pipeline_parallel_size={self.pipeline_parallel_size}; start "
                f"{-(-world_size // replica) * replica} processes, or set tensor_parallel_size to one of: "
                f"{divisors_near(world_size, self.tensor_parallel_size)}"
            )
        return world_size // replica

    def check(self, model: ModelConfig) -> None:
        """Refuse a tensor-parallel size that does not cut the model's axes into usable parts."""
        parts = self.tensor_parallel_size
        for axis in AXES.values():
            size = getattr(model, axis.key)
            if axis.sharding is Sharding.EVEN and size % parts:
                raise ConfigError(
                    f"tensor_parallel_size={parts} does not divide {axis.key}={size}; "
                    f"nearest that do: {divisors_near(size, parts)}"
                )
            if axis.sharding is Sharding.BALANCED and size < parts:
                raise ConfigError(f"tensor_parallel_size={parts} is larger than {axis.key}={size}")


class TrainingConfig(Settings):
    """One stage of training: from an initial state, ``train_steps`` optimizer steps."""

    output_dir: Path
    initial_checkpoint: Path | None = None
    """Start from this checkpoint (a grown one, say) instead of from random weights; a resumed run ignores it."""
    deepspeed_config: Path = Path("ds_configs/zero1.json")
    seed: NonNegativeInt = 1234
    dtype: Literal["fp32", "bf16"] = "fp32"
    train_steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    learning_rate: PositiveFloat
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay_steps: NonNegativeInt = 0
    """Linear decay over the last ``decay_steps`` of the stage; in between the learning rate is constant."""
    weight_decay: NonNegativeFloat = 0.01
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: PositiveFloat = 1e-8
    gradient_clipping: NonNegativeFloat = 1.0
    log_interval: PositiveInt = 10
    eval_interval: NonNegativeInt = 0
    eval_samples: PositiveInt = 512
    save_interval: PositiveInt = 1000
    keep_last: PositiveInt = 2

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup_steps + self.decay_steps > self.train_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not fit into "
                f"train_steps={self.train_steps}"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        return self

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int:
        """Return the micro-batches per step of one replica."""
        per_step = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % per_step:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size="
                f"{self.micro_batch_size} × data_parallel_size={data_parallel_size}; nearest that are: "
                f"{max(1, self.global_batch_size // per_step) * per_step}, "
                f"{(self.global_batch_size // per_step + 1) * per_step}"
            )
        return self.global_batch_size // per_step


class DataConfig(Settings):
    """Where the pretraining instances are (directories written by ``megacore data instances``)."""

    train_data: Path
    validation_data: Path | None = None


class RunConfig(Settings):
    """Everything ``megacore train`` needs."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig
    data: DataConfig

    @model_validator(mode="after")
    def _layout_fits(self) -> Self:
        try:
            self.parallel.check(self.model)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.training.eval_interval and self.data.validation_data is None:
            raise ValueError("eval_interval needs validation_data: name a directory of held-out instances, or set 0")
        return self
