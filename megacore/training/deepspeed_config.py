"""DeepSpeed's JSON: its own format, with ``"auto"`` where megacore's configuration has the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacore.config import TrainingConfig
from megacore.errors import ConfigError

_REFUSED = {
    "scheduler": "the schedule is learning_rate, warmup_steps and decay_steps of the training configuration",
    "fp16": "set dtype to fp32 or bf16 in the training configuration",
    "tensor_parallel": "set tensor_parallel_size in the parallel configuration",
    "pipeline": "pipeline parallelism is not part of this version",
    "checkpoint": "megacore writes its own checkpoints",
    "data_types": "gradients are accumulated in dtype",
}


def resolve_deepspeed_config(path: Path, training: TrainingConfig, data_parallel_size: int) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and fill in every ``"auto"``.

    A value that megacore's configuration also has must be ``"auto"``, absent or equal to it.

    Raises:
        ConfigError: the file cannot be read, contradicts the configuration, leaves an ``"auto"`` that megacore
            cannot fill, or asks for what does not work; the message names the key.
    """
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
    for key in ("bf16", "zero_optimization", "optimizer"):
        if not isinstance(config.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}={config[key]!r}: expected a JSON object")
    _fill(path, config, "", _owned(training, data_parallel_size))
    _check_optimizer(path, config, training)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        why = {
            0: "without ZeRO DeepSpeed clips and steps wrongly in some layouts; stage 1 costs nothing more",
            3: "sharded weights are not part of this version",
        }.get(stage, "there is no such stage")
        raise ConfigError(f"{path}: zero_optimization.stage={stage}: {why}; use 1 or 2")
    for key in ("offload_optimizer", "offload_param"):
        if key in config["zero_optimization"]:
            raise ConfigError(f"{path}: remove zero_optimization.{key}; offload is not part of this version")
    return config


def _owned(training: TrainingConfig, data_parallel_size: int) -> dict[str, Any]:
    """Return what megacore's configuration decides, in DeepSpeed's words."""
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps(data_parallel_size),
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.dtype == "bf16"},
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
