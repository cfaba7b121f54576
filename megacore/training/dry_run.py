"""What a run would be, without starting it: parameters and memory of each rank, and the cost of a step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from deepspeed.runtime.utils import partition_balanced, partition_uniform

from megacore.config import RunConfig
from megacore.models.flops import Work, training_flops
from megacore.models.layers import Step, carried_names, layer_list
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared
from megacore.specs import Shard
from megacore.training.deepspeed_config import resolve_deepspeed_config

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline stage: parameters of each of its ranks, and bytes that a rank needs for each purpose."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes for all purposes."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class RunEstimate:
    """What a run would be on a number of processes."""

    data_parallel_size: int
    gradient_accumulation_steps: int
    stages: tuple[StageEstimate, ...]
    flops_per_step: float


def estimate(config: RunConfig, world_size: int) -> RunEstimate:
    """Check a run for a world of ``world_size`` processes, and estimate what it takes.

    Activations are estimated for sequences of full length (Korthikanti et al. 2022, equation 2, without the score
    matrix, which fused attention does not keep); offloaded optimizer state is counted as the device's own.

    Raises:
        ConfigError: the run is impossible; nothing was started.
    """
    training, parallel, model = config.training, config.parallel, config.model
    replicas = parallel.data_parallel_size(world_size)
    settings = resolve_deepspeed_config(config, replicas)
    stage, shares = settings["zero_optimization"]["stage"], replicas * parallel.ulysses_parallel_size
    width = _BYTES[training.dtype]
    tokens = training.micro_batch_size * model.max_position_embeddings // parallel.ulysses_parallel_size
    per_token = model.hidden_size * width * (1 if training.activation_checkpointing else 17)
    stages = []
    for number, (dense, experts, blocks) in enumerate(_stages(config)):
        parameters = dense + experts
        in_flight = min(parallel.pipeline_parallel_size - number, training.gradient_accumulation_steps(replicas))
        stages.append(
            StageEstimate(
                parameters=parameters,
                weights=parameters * width // (shares if stage == 3 else 1),
                gradients=parameters * width // (shares if stage >= 2 else 1),
                optimizer=(dense + experts * parallel.expert_parallel_size) * 12 // shares,
                activations=in_flight * blocks * tokens * per_token // parallel.tensor_parallel_size,
            )
        )
    lengths = [model.max_position_embeddings] * training.global_batch_size
    labels = sum(lengths) * (0.15 if model.architecture == "encoder" else 1.0)
    target = lengths if model.architecture == "encoder_decoder" else ()
    return RunEstimate(
        data_parallel_size=replicas,
        gradient_accumulation_steps=training.gradient_accumulation_steps(replicas),
        stages=tuple(stages),
        flops_per_step=training_flops(model, Work(lengths, round(labels), target)),
    )


def _stages(config: RunConfig) -> list[tuple[int, int, int]]:
    """Return each pipeline stage's (dense parameters of a rank, its experts', blocks), cut as DeepSpeed cuts them."""
    model, parallel = config.model, config.parallel
    shard = Shard(tensor_parts=parallel.tensor_parallel_size, expert_parts=parallel.expert_parallel_size)
    declare = Declare(model, shard, device="meta")
    layers = layer_list(model)
    names = carried_names(model, layers)
    sizes: list[dict[str, int]] = []
    for number, layer in enumerate(layers):
        step = Step(Kit(model, declare, ParallelGrid()), layer, names[number], names[number + 1])
        sizes.append({name: parameter.numel() for name, parameter in declared(step)})
        if layer.words in ("reads", "writes"):
            sizes[-1] = {"embeddings.word": sizes[0]["embeddings.word"]}
    parts = parallel.pipeline_parallel_size
    bounds = (
        partition_uniform(len(layers), parts)
        if parallel.pipeline_partition == "uniform"
        else partition_balanced([sum(size.values()) for size in sizes], parts)
    )
    stages = []
    for start, stop in pairwise(bounds):
        held = {name: size for part in sizes[start:stop] for name, size in part.items()}  # tied tables once
        experts = sum(size for name, size in held.items() if ".mlp.experts." in name)
        blocks = sum(".layers." in f".{layer.prefix}" for layer in layers[start:stop])
        stages.append((sum(held.values()) - experts, experts, blocks))
    return stages
