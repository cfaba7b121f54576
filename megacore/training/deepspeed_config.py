"""DeepSpeed's JSON: its own format, with ``"auto"`` where megacore's configuration has the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacore.config import RunConfig, TrainingConfig
from megacore.errors import ConfigError

_REFUSED = {
    "scheduler": "the schedule is learning_rate, warmup_steps and decay_steps of the training configuration",
    "tensor_parallel": "set tensor_parallel_size in the parallel configuration",
    "pipeline": "set pipeline_parallel_size and pipeline_partition in the parallel configuration",
    "activation_checkpointing": "set activation_checkpointing in the training configuration",
    "sequence_parallel_size": "set ulysses_parallel_size in the parallel configuration",
    "checkpoint": "megacore writes its own checkpoints",
    "data_types": "gradients are accumulated in dtype",
}


def resolve_deepspeed_config(run: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and fill in every ``"auto"``.

    A value that megacore's configuration also has must be ``"auto"``, absent or equal to it.

    Raises:
        ConfigError: the file cannot be read, contradicts the configuration, leaves an ``"auto"`` that megacore
            cannot fill, or asks for what does not work; the message names the key.
    """
    training, parallel = run.training, run.parallel
    path = training.deepspeed_config
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"deepspeed_config={path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"deepspeed_config={path}: not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"deepspeed_config={path}: expected a JSON object")
    for key, instead in _REFUSED.items():
        if key in config:
            raise ConfigError(f"{path}: remove '{key}'; {instead}")
    for key in ("bf16", "fp16", "zero_optimization", "optimizer"):
        if not isinstance(config.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}={config[key]!r}: expected a JSON object")
    # Ulysses ranks are further replicas to DeepSpeed, which see the same samples.
    replicas = data_parallel_size * parallel.ulysses_parallel_size
    _fill(path, config, "", _owned(training, data_parallel_size, replicas))
    _check_optimizer(path, config, training)
    _check_stage(path, config.get("zero_optimization", {}), run)
    config["zero_force_ds_cpu_optimizer"] = False  # offloaded or not, AdamW is torch's own
    return config


def _check_stage(path: Path, zero: dict[str, Any], run: RunConfig) -> None:
    """Refuse what DeepSpeed computes wrongly, or not at all."""
    stage, parallel = zero.get("stage", 0), run.parallel
    if stage not in (1, 2, 3):
        why = "without ZeRO DeepSpeed clips and steps wrongly in some layouts; stage 1 costs nothing more"
        raise ConfigError(
            f"{path}: zero_optimization.stage={stage}: {why if stage == 0 else 'there is no such stage'}; use 1, 2 or 3"
        )
    if parallel.pipeline_parallel_size > 1 and stage != 1:
        raise ConfigError(
            f"{path}: zero_optimization.stage={stage} does not go together with pipeline_parallel_size="
            f"{parallel.pipeline_parallel_size}: use ds_configs/zero1.json, or pipeline_parallel_size=1"
        )
    if run.model.num_experts and stage == 3:
        raise ConfigError(
            f"{path}: zero_optimization.stage=3 does not go together with num_experts={run.model.num_experts}: "
            "DeepSpeed's mixture of experts works with stages 1 and 2"
        )
    if run.model.num_experts and not zero.get("reduce_scatter", True):
        raise ConfigError(
            f"{path}: zero_optimization.reduce_scatter=false averages experts over ranks that hold others; remove it"
        )
    if "offload_param" in zero:
        raise ConfigError(
            f"{path}: remove zero_optimization.offload_param; the optimizer can be offloaded, weights not"
        )
    device = zero.get("offload_optimizer", {}).get("device", "none")
    if device not in ("none", "cpu"):
        raise ConfigError(f"{path}: zero_optimization.offload_optimizer.device={device!r}: use cpu or none")
    if parallel.pipeline_parallel_size > 1 and device == "cpu":
        raise ConfigError(
            f"{path}: zero_optimization.offload_optimizer does not go together with pipeline_parallel_size="
            f"{parallel.pipeline_parallel_size}; remove one of them"
        )


def _owned(training: TrainingConfig, data_parallel_size: int, replicas: int) -> dict[str, Any]:
    """Return what megacore's configuration decides, in DeepSpeed's words."""
    return {
        "train_batch_size": training.global_batch_size * replicas // data_parallel_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps(data_parallel_size),
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.dtype == "bf16"},
        "fp16": {"enabled": training.dtype == "fp16"},
    }


def _fill(path: Path, config: dict[str, Any], prefix: str, owned: dict[str, Any]) -> None:
    for key, value in owned.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _fill(path, config.setdefault(key, {}), f"{name}.", value)
        elif config.get(key, "auto") == "auto":
            config[key] = value
        elif config[key] != value:
            raise ConfigError(
                f"{path}: {name}={config[key]!r} contradicts the training configuration, which makes it {value!r}; "
                f'write "auto"'
            )
    for key, value in config.items():
        if value == "auto" and key not in owned:
            raise ConfigError(f'{path}: {prefix}{key} is "auto", but megacore has no value for it; give one')
        if isinstance(value, dict) and key not in owned and not (prefix == "" and key == "optimizer"):
            _fill(path, value, f"{prefix}{key}.", {})


def _check_optimizer(path: Path, config: dict[str, Any], training: TrainingConfig) -> None:
    """Check an ``optimizer`` section against the configuration, then take it out: megacore makes the optimizer."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    if section.get("type") != "AdamW":
        raise ConfigError(f"{path}: optimizer.type={section.get('type')!r}; megacore trains with AdamW")
    expected = {
        "lr": training.learning_rate,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": training.adam_eps,
        "weight_decay": training.weight_decay,
    }
    for key, value in section.get("params", {}).items():
        if key not in expected:
            raise ConfigError(f"{path}: optimizer.params.{key} is not used; known: {', '.join(expected)}")
        if value not in ("auto", expected[key]):
            raise ConfigError(
                f"{path}: optimizer.params.{key}={value!r} contradicts the training configuration, "
                f'which makes it {expected[key]!r}; write "auto"'
            )
