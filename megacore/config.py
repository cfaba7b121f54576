"""The configuration of a run: what is computed (`ModelConfig`), where (`ParallelConfig`), how (`TrainingConfig`).

Every size or layout has one key, used in YAML files, in ``key=value`` words and in checkpoint manifests alike.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from megacore.axes import AXES, Axis, Sharding
from megacore.errors import ConfigError
from megacore.model_config import ModelConfig, divisors_near
from megacore.settings import Settings


class ParallelConfig(Settings):
    """How the ranks share the model; what is left of the world is data parallel."""

    tensor_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    """Split the stream between the tensor-parallel regions along the tokens (Korthikanti et al. 2022)."""
    pipeline_parallel_size: PositiveInt = 1
    pipeline_partition: Literal["parameters", "uniform"] = "parameters"
    """Stages of about equal numbers of parameters, or of layers."""
    ulysses_parallel_size: PositiveInt = 1
    """Split long sequences over ranks that exchange heads for tokens in attention (DeepSpeed-Ulysses)."""
    expert_parallel_size: PositiveInt = 1
    """Ranks, out of the data-parallel ones, that share the experts of a mixture."""

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of data-parallel replicas among ``world_size`` processes."""
        sizes = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "ulysses_parallel_size": self.ulysses_parallel_size,
        }
        replica = math.prod(sizes.values())
        if world_size % replica:
            named = " × ".join(f"{key}={size}" for key, size in sizes.items() if size > 1)
            raise ConfigError(
                f"the world has {world_size} processes, which is not a multiple of {named}; start "
                f"{-(-world_size // replica) * replica} processes, or set tensor_parallel_size to one of: "
                f"{divisors_near(world_size, self.tensor_parallel_size)}"
            )
        replicas = world_size // replica
        if replicas % self.expert_parallel_size:
            raise ConfigError(
                f"expert_parallel_size={self.expert_parallel_size} does not divide the {replicas} data-parallel "
                f"replicas; nearest that do: {divisors_near(replicas, self.expert_parallel_size)}"
            )
        return replicas

    def check(self, model: ModelConfig) -> None:
        """Refuse sizes that do not cut the model into usable parts.

        Raises:
            ConfigError: naming the keys that do not go together, and what does.
        """
        for axis in AXES.values():
            self._check_axis(axis, getattr(model, axis.key))
        self._check_pipeline(model)
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ConfigError("sequence_parallel=true needs tensor_parallel_size > 1; set it to false")
        if self.ulysses_parallel_size > 1:
            self._check_ulysses(model)
        if model.num_experts:
            self._check_experts()
        elif self.expert_parallel_size > 1:
            raise ConfigError(f"expert_parallel_size={self.expert_parallel_size} needs num_experts > 0; set it to 1")

    def _check_axis(self, axis: Axis, size: int) -> None:
        parts = self.tensor_parallel_size
        if axis.sharding is Sharding.EVEN and size % parts:
            raise ConfigError(
                f"tensor_parallel_size={parts} does not divide {axis.key}={size}; "
                f"nearest that do: {divisors_near(size, parts)}"
            )
        if axis.sharding is Sharding.BALANCED and size < parts:
            raise ConfigError(f"tensor_parallel_size={parts} is larger than {axis.key}={size}")
        if axis.sharding is Sharding.EXPERT and size and size % self.expert_parallel_size:
            raise ConfigError(
                f"expert_parallel_size={self.expert_parallel_size} does not divide {axis.key}={size}; "
                f"nearest that do: {divisors_near(size, self.expert_parallel_size)}"
            )

    def _check_pipeline(self, model: ModelConfig) -> None:
        layers = model.layers_of("encoder") + model.layers_of("decoder")
        if self.pipeline_parallel_size > layers:
            raise ConfigError(
                f"pipeline_parallel_size={self.pipeline_parallel_size} is more than the model's {layers} layers "
                f"(num_hidden_layers={model.num_hidden_layers}); use {layers} stages at most"
            )

    def _check_ulysses(self, model: ModelConfig) -> None:
        parts = self.tensor_parallel_size * self.ulysses_parallel_size
        if model.num_attention_heads % parts:
            raise ConfigError(
                f"ulysses_parallel_size={self.ulysses_parallel_size} × tensor_parallel_size={self.tensor_parallel_size}"
                f" does not divide num_attention_heads={model.num_attention_heads}; nearest that do: "
                f"{divisors_near(model.num_attention_heads // self.tensor_parallel_size, self.ulysses_parallel_size)}"
            )
        if self.sequence_parallel:
            raise ConfigError(
                f"sequence_parallel=true and ulysses_parallel_size={self.ulysses_parallel_size} both split the tokens; "
                "set one of them to false or 1"
            )

    def _check_experts(self) -> None:
        for key in ("tensor_parallel_size", "pipeline_parallel_size", "ulysses_parallel_size"):
            if getattr(self, key) > 1:
                raise ConfigError(
                    f"{key}={getattr(self, key)} does not go together with num_experts: experts are shared by "
                    f"expert_parallel_size; set {key}=1"
                )


class TrainingConfig(Settings):
    """One stage of training: from an initial state, ``train_steps`` optimizer steps."""

    output_dir: Path
    initial_checkpoint: Path | None = None
    """Start from this checkpoint (a grown one, say) instead of from random weights; a resumed run ignores it."""
    deepspeed_config: Path = Path("ds_configs/zero1.json")
    seed: NonNegativeInt = 1234
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    """Keep only the layers' inputs and compute the rest again in the backward pass."""
    compile: bool = False
    """Compile the norms, activations and rotations (``torch.compile``)."""
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
    async_save: bool = True
    """Go on training while a checkpoint is written, from a copy in host memory."""
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    """Also keep the checkpoints of steps that are multiples of this; 0 for none."""

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
