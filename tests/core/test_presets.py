"""Presets are the published models: they have as many parameters as Hugging Face's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RoFormerConfig,
    RoFormerForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from megacore.errors import ConfigError
from megacore.model_config import ModelConfig, presets
from megacore.models.transformer import declarations
from megacore.settings import validated

BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504}
T5 = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}


def count(preset: str) -> int:
    specs = declarations(validated(ModelConfig, {"preset": preset})).values()
    return sum(math.prod(spec.shape) for spec in specs)


@pytest.mark.parametrize(
    ("preset", "kind", "config"),
    [
        ("bert-base", BertForPreTraining, BertConfig()),
        ("bert-large", BertForPreTraining, BertConfig(**BERT_LARGE)),
        ("deepnorm-bert-base", BertForPreTraining, BertConfig()),
        ("gpt2", GPT2LMHeadModel, GPT2Config()),
        ("unilm-base", GPT2LMHeadModel, GPT2Config()),
        ("mixtral-8x7b", MixtralForCausalLM, MixtralConfig()),
        ("llama-1b3", LlamaForCausalLM, LlamaConfig(vocab_size=32000, **LLAMA)),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, kind: Any, config: Any) -> None:
    with torch.device("meta"):
        reference = kind(config)
    assert count(preset) == sum(parameter.numel() for parameter in reference.parameters())


def test_t5_has_an_output_table_of_its_own_beside_what_hugging_face_ties() -> None:
    with torch.device("meta"):
        reference = T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **T5))
    tied = sum(parameter.numel() for parameter in reference.parameters())
    assert count("t5-v1_1-base") == tied + T5["vocab_size"] * T5["d_model"]


def test_roformer_keeps_no_table_of_sines() -> None:
    with torch.device("meta"):
        reference = RoFormerForMaskedLM(RoFormerConfig())
    everything = sum(parameter.numel() for parameter in reference.parameters())
    assert count("roformer-base") == everything - 1536 * 64  # Hugging Face counts the sines of its angles


def test_a_post_norm_decoder_has_no_final_norm() -> None:
    assert count("deepnorm-gpt-base") == count("gpt2") - 2 * 768


def test_a_decoder_layer_that_reads_an_encoder_has_a_second_attention() -> None:
    attention, mlp, norm = 4 * (768**2 + 768), 2 * 768 * 3072 + 768 + 3072, 2 * 768
    layers = 12 * (attention + mlp + 2 * norm) + 12 * (2 * attention + mlp + 3 * norm)
    assert count("rope-encoder-decoder-base") == layers + 32128 * 768 + 2 * norm
    assert count("deepnorm-encoder-decoder-base") == layers + (32128 + 2 * 512) * 768


def test_roformer_v2_has_matrices_and_tables_only() -> None:
    layers = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert count("roformer-v2-base") == layers + (12000 + 2) * 768


def test_a_preset_can_be_changed_and_an_unknown_one_names_those_there_are() -> None:
    changed = validated(ModelConfig, {"preset": "gpt2", "num_hidden_layers": 3})
    assert (changed.num_hidden_layers, changed.hidden_size, changed.objective) == (3, 768, "causal_lm")
    with pytest.raises(ConfigError, match=f"preset=gpt9.*{', '.join(presets())}"):
        validated(ModelConfig, {"preset": "gpt9"})
