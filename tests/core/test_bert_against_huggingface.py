"""The model computes what Hugging Face's BERT (whole and tensor parallel) and RoFormer compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining, RoFormerConfig, RoFormerForMaskedLM

from megacore.config import ParallelConfig
from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch
from megacore.models.flops import Work, forward_flops
from megacore.models.loss import Loss
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared
from megacore.specs import region_shape
from tests.models import model_config
from tests.ranks import run_ranks

BATCH, SEQ = 4, 24
LENGTHS = (SEQ, 9, 17, SEQ)


ROFORMER = {"objective": "mlm", "position_embedding": "rotary_interleaved"}
CASES: dict[str, dict[str, Any]] = {"bert": {}, "roformer": ROFORMER}


def hugging_face(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    same += ("max_position_embeddings", "initializer_range")
    values = {key: getattr(config, key) for key in same} | {"layer_norm_eps": config.norm_eps}
    if config.objective == "mlm":
        model: Any = RoFormerForMaskedLM(RoFormerConfig(**values))
    else:
        model = BertForPreTraining(BertConfig(**values))
    with torch.no_grad():  # gains and biases too, so that each of them is tested
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def carried_over(source: Any, config: ModelConfig, of: Any = torch.Tensor.detach) -> dict[str, torch.Tensor]:
    """Name Hugging Face's weights (or gradients, as ``of`` picks them) as megacore's, written down by hand."""
    heads = (config.num_attention_heads, config.head_dim)
    hidden = config.hidden_size
    body, cls = f"{source.base_model_prefix}.", "cls.predictions."

    def theirs(name: str) -> torch.Tensor:
        found: torch.Tensor = of(source.get_parameter(name))
        return found

    result = {
        "embeddings.word": theirs(body + "embeddings.word_embeddings.weight"),
        "embeddings.segment": theirs(body + "embeddings.token_type_embeddings.weight"),
        "embeddings.norm.weight": theirs(body + "embeddings.LayerNorm.weight"),
        "embeddings.norm.bias": theirs(body + "embeddings.LayerNorm.bias"),
        "lm_head.transform_weight": theirs(cls + "transform.dense.weight"),
        "lm_head.transform_bias": theirs(cls + "transform.dense.bias"),
        "lm_head.norm.weight": theirs(cls + "transform.LayerNorm.weight"),
        "lm_head.norm.bias": theirs(cls + "transform.LayerNorm.bias"),
        "lm_head.bias": theirs(cls + "decoder.bias"),
    }
    if config.position_embedding == "learned":
        result["embeddings.position"] = theirs(body + "embeddings.position_embeddings.weight")
    if config.objective == "mlm_nsp":
        result |= {
            "nsp_head.pooler_weight": theirs(body + "pooler.dense.weight"),
            "nsp_head.pooler_bias": theirs(body + "pooler.dense.bias"),
            "nsp_head.weight": theirs("cls.seq_relationship.weight"),
            "nsp_head.bias": theirs("cls.seq_relationship.bias"),
        }
    for number in range(config.num_hidden_layers):
        layer, ours = f"{body}encoder.layer.{number}.", f"layers.{number}."
        attention = layer + "attention.self."
        result |= {
            ours + "attention.query_weight": theirs(attention + "query.weight").view(*heads, hidden),
            ours + "attention.query_bias": theirs(attention + "query.bias").view(*heads),
            ours + "attention.key_value_weight": torch.stack(
                [theirs(attention + name).view(*heads, hidden) for name in ("key.weight", "value.weight")]
            ),
            ours + "attention.key_value_bias": torch.stack(
                [theirs(attention + name).view(*heads) for name in ("key.bias", "value.bias")]
            ),
            ours + "attention.output_weight": theirs(layer + "attention.output.dense.weight").view(hidden, *heads),
            ours + "attention.output_bias": theirs(layer + "attention.output.dense.bias"),
            ours + "attention_residual.norm.weight": theirs(layer + "attention.output.LayerNorm.weight"),
            ours + "attention_residual.norm.bias": theirs(layer + "attention.output.LayerNorm.bias"),
            ours + "mlp.up_weight": theirs(layer + "intermediate.dense.weight"),
            ours + "mlp.up_bias": theirs(layer + "intermediate.dense.bias"),
            ours + "mlp.down_weight": theirs(layer + "output.dense.weight"),
            ours + "mlp.down_bias": theirs(layer + "output.dense.bias"),
            ours + "mlp_residual.norm.weight": theirs(layer + "output.LayerNorm.weight"),
            ours + "mlp_residual.norm.bias": theirs(layer + "output.LayerNorm.bias"),
        }
    return result


def inputs(vocab_size: int) -> ModelBatch:
    generator = torch.Generator().manual_seed(3)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    halves = torch.cat([(torch.arange(n) >= n // 2).long() for n in LENGTHS])
    ids = torch.randint(0, vocab_size, (sum(LENGTHS),), generator=generator)
    labelled = (positions % 5 == 2).nonzero().flatten()
    return ModelBatch(
        torch.stack([ids, halves, positions]),
        torch.tensor([LENGTHS, (0,) * BATCH, range(BATCH)]),
        labelled,
        torch.arange(len(labelled)) % vocab_size,
        torch.tensor([0, 1, 0, 1]),
    )


def expected_logits(model: Any, batch: ModelBatch) -> tuple[torch.Tensor, ...]:
    """Pad the sequences, as Hugging Face wants them, and pick the labelled tokens' logits; then the pairs'."""
    ids, segments, mask = torch.zeros(3, BATCH, SEQ, dtype=torch.long)
    start = 0
    for row, length in enumerate(LENGTHS):
        ids[row, :length], segments[row, :length] = batch.tokens[:2, start : start + length]
        mask[row, :length] = 1
        start += length
    output = model(input_ids=ids, token_type_ids=segments, attention_mask=mask)
    if "logits" in output:
        return (output.logits[mask.bool()][batch.label_positions],)
    return output.prediction_logits[mask.bool()][batch.label_positions], output.seq_relationship_logits


def filled(
    config: ModelConfig, weights: dict[str, torch.Tensor], grid: ParallelGrid, dtype: torch.dtype
) -> Transformer:
    model = Transformer(Kit(config, Declare(config, grid.shard, dtype=dtype), grid)).eval()
    with torch.no_grad():
        for name, parameter in declared(model):
            box = tuple(slice(start, stop) for start, stop in parameter.region)
            assert weights[name].shape == parameter.spec.shape
            assert region_shape(parameter.region) == parameter.shape
            parameter.copy_(weights[name][box])
    return model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_logits_and_gradients_equal_hugging_face(name: str, dtype: torch.dtype, tolerance: float) -> None:
    if name == "roformer":
        tolerance = max(tolerance, 1e-6)  # Hugging Face's angles are float32 in float64 too
    config = model_config(**CASES[name])
    reference, batch = hugging_face(config, dtype), inputs(config.vocab_size)
    model = filled(config, carried_over(reference, config), ParallelGrid(), dtype)
    ours, theirs = model(batch), expected_logits(reference, batch)
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        scale = 1.0 if dtype == torch.float32 else float(expected.detach().abs().max())
        assert float((found - expected).detach().abs().max()) <= tolerance * scale
    for outputs in (ours, theirs):
        loss = torch.nn.functional.cross_entropy(outputs[0], batch.labels)
        if len(outputs) > 1:
            loss = loss + torch.nn.functional.cross_entropy(outputs[1], batch.pair_labels)
        loss.backward()
    gradients = carried_over(reference, config, lambda parameter: parameter.grad)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, parameter in declared(model):
        assert parameter.grad is not None
        assert float((parameter.grad - gradients[key]).abs().max()) <= tolerance * largest, key


def tensor_parallel_logits(size: int) -> Any:
    from megacore.training.distributed import join_world, leave_world

    join_world()
    grid = ParallelGrid.create(ParallelConfig(tensor_parallel_size=size))
    config = model_config()
    reference, batch = hugging_face(config), inputs(config.vocab_size)
    model = filled(config, carried_over(reference, config), grid, torch.float32)
    with torch.inference_mode():
        logits = model(batch)
    mlm, nsp = expected_logits(reference, batch)
    losses = Loss(config, grid)
    sums = losses.sums(logits, losses.label_values(batch))
    loss = torch.nn.functional.cross_entropy(mlm, batch.labels, reduction="sum")
    hits = (mlm.argmax(-1) == batch.labels).sum()
    leave_world()
    first, stop = dict(declared(model))["embeddings.word"].region[0]
    return {
        "mlm": float((logits[0] - mlm[:, first:stop]).abs().max()),
        "nsp": float((logits[1] - nsp).abs().max()),
        "loss": float((sums.token_loss - loss).abs() / loss),
        "hits": int(sums.token_correct) - int(hits),
        "width": logits[0].shape[1],
    }


@pytest.mark.parametrize("size", [2, 4])
def test_logits_and_losses_equal_hugging_face_under_tensor_parallelism(size: int) -> None:
    results = run_ranks(tensor_parallel_logits, size, size)
    # 101 tokens are no multiple of 2 or 4: the vocabulary is shared without padding.
    assert sum(result["width"] for result in results) == 101
    for result in results:
        assert max(result["mlm"], result["nsp"]) <= 1e-5
        assert result["loss"] <= 1e-6
        assert result["hits"] == 0


def test_flops_equal_a_count_of_the_matrix_products() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = model_config()
    model = filled(config, carried_over(hugging_face(config), config), ParallelGrid(), torch.float32)
    batch = inputs(config.vocab_size)
    # The counter sees the products of plain attention, not those inside a fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch)
    counted = forward_flops(config, Work(LENGTHS, len(batch.labels)))
    assert np.isclose(counted, counter.get_total_flops(), rtol=1e-12)
