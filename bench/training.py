"""Training steps against Hugging Face on the same batches of real text, and the use of a GPU.

One step is forward, backward, clipping and AdamW. megacore trains through its whole engine (DeepSpeed ZeRO 1, one
process); Hugging Face as its users do: rows padded to the batch's longest, ``model(...).loss``, ``torch.optim.AdamW``.
Both see the same samples, in the same dtype, with the same threads, one step of each in turn; tokens are the real ones.

    python bench/training.py            # about 6 minutes on 2 cores
    python bench/training.py --small    # under 2 minutes

The last line is one JSON object: ``bert_vs_hf`` and ``llama_vs_hf`` are ratios of median tokens per second; on a GPU
``mfu_llama_1b3`` and ``mfu_bert_large`` are shares of its peak in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from text import VOCAB_SIZE, write_instances
from transformers import BertConfig, BertForPreTraining, LlamaConfig, LlamaForCausalLM

from data_pipeline.loader import Batch, InstanceDataset, PretrainingBatches
from megacore.config import RunConfig
from megacore.models.batch import ModelBatch
from megacore.models.flops import Work, training_flops
from megacore.parallel.grid import ParallelGrid
from megacore.settings import validated
from megacore.training.batches import model_batch
from megacore.training.deepspeed_config import resolve_deepspeed_config
from megacore.training.distributed import join_world, leave_world
from megacore.training.engine import TrainingEngine

SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
LEARNING_RATE = 1e-4
SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 384, "num_hidden_layers": 6}
BERT: dict[str, Any] = {**SIZES, "num_attention_heads": 6, "intermediate_size": 1536}
LLAMA: dict[str, Any] = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16, from the vendor's data sheets (SXM)."""


class Megacore:
    """The training engine of one process."""

    def __init__(self, model: dict[str, Any], dtype: str, batch_size: int, device: torch.device) -> None:
        zero1 = Path(__file__).parents[1] / "ds_configs" / "zero1.json"
        training = {
            "output_dir": "unused",
            "train_steps": 1,
            "global_batch_size": batch_size,
            "micro_batch_size": batch_size,
            "learning_rate": LEARNING_RATE,
            "dtype": dtype,
            "deepspeed_config": str(zero1),
            "compile": device.type == "cuda",
        }
        config = validated(RunConfig, {"model": model, "training": training, "data": {"train_data": "unused"}})
        self.config, self._device, self._count = config.model, device, 0
        grid = ParallelGrid.create(config.parallel)
        self.engine = TrainingEngine(config, grid, device, resolve_deepspeed_config(config, 1))

    def step(self, batch: ModelBatch) -> None:
        """Train on one batch."""
        self.engine.step([batch], self._count, LEARNING_RATE)
        self._count += 1


class HuggingFace:
    """Hugging Face's model of the same sizes, in a plain training loop."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._model = model.to(device).train()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)

    def step(self, inputs: dict[str, torch.Tensor]) -> None:
        """Train on one batch."""
        self._model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def padded(batch: Batch, causal: bool) -> dict[str, torch.Tensor]:
    """Return a packed batch as rows of the longest one's length, as Hugging Face's collators make them."""
    lengths = batch.sequences[0].tolist()
    rows = torch.nn.utils.rnn.pad_sequence

    def row_wise(values: torch.Tensor, filler: int = 0) -> torch.Tensor:
        return rows(list(values.split(lengths)), batch_first=True, padding_value=filler)

    tokens = torch.as_tensor(batch.tokens)
    inputs = {"input_ids": row_wise(tokens[0]), "attention_mask": row_wise(torch.ones_like(tokens[0]))}
    if causal:
        return inputs | {"labels": row_wise(tokens[0], -100)}
    labels = torch.full_like(tokens[0], -100)
    labels[torch.as_tensor(batch.label_positions)] = torch.as_tensor(batch.labels)
    pairs = torch.as_tensor(batch.next_sentence_labels)
    return inputs | {
        "token_type_ids": row_wise(tokens[1]),
        "labels": row_wise(labels, -100),
        "next_sentence_label": pairs,
    }


def compare(name: str, data: Path, model: dict[str, Any], peer: Any, device: torch.device, steps: int) -> float:
    """Run both in turn; return the ratio of median tokens per second."""
    ours, theirs = Megacore(model, "fp32", BATCH_SIZE, device), HuggingFace(peer, device)
    batches = PretrainingBatches(InstanceDataset(data), 1, BATCH_SIZE, BATCH_SIZE)
    made = [batches.step_batches(number * BATCH_SIZE)[0] for number in range(steps + 1)]
    real = sum(int(batch.sequences[0].sum()) for batch in made[1:])
    rows = [padded(batch, causal=batch.next_sentence_labels is None) for batch in made]
    places = sum(row["input_ids"].numel() for row in rows[1:])
    speeds: dict[str, list[float]] = {"megacore": [], "hugging face": []}
    for number, (batch, row) in enumerate(zip(made, rows, strict=True)):
        packed = model_batch(batch, device)
        inputs = {key: value.to(device) for key, value in row.items()}
        runs: list[tuple[str, Callable[[], None]]] = [
            ("megacore", lambda packed=packed: ours.step(packed)),
            ("hugging face", lambda inputs=inputs: theirs.step(inputs)),
        ]
        for who, run in runs if number % 2 else runs[::-1]:
            seconds = timed(run, device)
            if number > 0:  # the first warms up
                speeds[who].append(batch.tokens.shape[1] / seconds)
    ours_speed, theirs_speed = (statistics.median(speeds[who]) for who in ("megacore", "hugging face"))
    print(
        f"{name}: megacore {ours_speed:,.0f} tokens/s, Hugging Face {theirs_speed:,.0f} tokens/s, "
        f"{steps} steps each, {1 - real / places:.0%} of the padded rows is padding",
        flush=True,
    )
    return ours_speed / theirs_speed


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that a call takes, on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def utilisation(preset: str, length: int, batch_size: int, labels: int, device: torch.device, steps: int) -> float:
    """Return the share of the GPU's peak that a preset trains at in bf16, on full-length rows."""
    name = torch.cuda.get_device_name(device)
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    if peak is None:
        raise SystemExit(f"no peak is known for {name}; add it to PEAK_FLOPS")
    ours = Megacore({"preset": preset, "hidden_dropout": 0.0, "attention_dropout": 0.0}, "bf16", batch_size, device)
    generator = torch.Generator().manual_seed(0)
    total = batch_size * length
    ids = torch.randint(5, ours.config.vocab_size, (total,), generator=generator)
    positions = torch.arange(length).repeat(batch_size)
    sequences = torch.tensor([[length] * batch_size, [0] * batch_size, range(batch_size)])
    places = (torch.arange(batch_size)[:, None] * length + torch.arange(labels)).flatten()
    pairs = torch.zeros(batch_size, dtype=torch.int64) if ours.config.objective == "mlm_nsp" else None
    tokens = torch.stack([ids, torch.zeros_like(ids), positions])
    batch = ModelBatch(tokens, sequences, places, ids[places], pairs).to(device)
    seconds = statistics.median([timed(lambda: ours.step(batch), device) for _ in range(steps + 3)][3:])
    share = training_flops(ours.config, Work([length] * batch_size, len(places))) / seconds / peak
    print(f"{preset}: {total / seconds:,.0f} tokens/s, {share:.1%} of {peak / 1e12:.0f} TFLOP/s ({name})", flush=True)
    return share


def main() -> None:
    """Measure, and print the figures as the last line."""
    parser = argparse.ArgumentParser(description="Training steps against Hugging Face, and the use of a GPU.")
    parser.add_argument("--small", action="store_true", help="fewer steps: under 2 minutes")
    small = parser.parse_args().small
    steps = 5 if small else 21
    torch.set_num_threads(os.cpu_count() or 1)
    device = join_world()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_instances(Path(folder), ["mlm_nsp", "lm"], SEQUENCE_LENGTH, corpus_mb=12.0)
        torch.manual_seed(0)
        bert = BertForPreTraining(BertConfig(**BERT))
        figures["bert_vs_hf"] = compare("BERT", data["mlm_nsp"], BERT, bert, device, steps)
        llama = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False))
        ours = {"preset": "llama-1b3", **LLAMA, "head_dim": 64}
        figures["llama_vs_hf"] = compare("LLaMA-like", data["lm"], ours, llama, device, steps)
    if device.type == "cuda":
        count = 10 if small else 30
        figures["mfu_llama_1b3"] = utilisation("llama-1b3", 2048, 8, 2047, device, count)
        figures["mfu_bert_large"] = utilisation("bert-large", 512, 64, 77, device, count)
    leave_world()
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
