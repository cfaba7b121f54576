"""The encoder-decoder computes what Hugging Face's T5 v1.1 computes."""

from __future__ import annotations

import torch
from transformers import T5Config, T5ForConditionalGeneration

from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared
from tests.models import MODEL, model_config

SOURCE, TARGET = (30, 9, 17), (6, 12, 3)
CONFIG = model_config(
    **{
        "architecture": "encoder_decoder",
        "num_decoder_layers": 3,
        "head_dim": 8,
        "position_embedding": "relative",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "type_vocab_size": 0,
        "norm": "rms_norm",
        "norm_eps": 1e-6,
        "residual": "pre_norm",
        "embedding_norm": False,
        "activation": "gelu_tanh",
        "gated_mlp": True,
        "attention_bias": False,
        "linear_bias": False,
        "attention_scale": 1.0,
        "lm_transform": False,
        "lm_bias": False,
    }
)


def hugging_face() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=MODEL["vocab_size"],
            d_model=MODEL["hidden_size"],
            d_kv=8,
            d_ff=MODEL["intermediate_size"],
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,  # no factor on the logits
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + float("norm" in name))
    return model.eval()


def carried_over(source: T5ForConditionalGeneration, config: ModelConfig) -> dict[str, torch.Tensor]:
    theirs = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    heads = (config.num_attention_heads, config.head_dim)
    result = {"embeddings.word": theirs["shared.weight"]}

    def attention(ours: str, part: str) -> None:
        query, key, value = (theirs[f"{part}.{name}.weight"].view(*heads, -1) for name in "qkv")
        result[f"{ours}.query_weight"] = query
        result[f"{ours}.key_value_weight"] = torch.stack([key, value])
        result[f"{ours}.output_weight"] = theirs[f"{part}.o.weight"].view(-1, *heads)

    for stack, layers in (("encoder", 2), ("decoder", 3)):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        result[f"{stack}.relative_bias.weight"] = theirs[table]
        result[f"{stack}.final_norm.weight"] = theirs[f"{stack}.final_layer_norm.weight"]
        for number in range(layers):
            a, b = f"{stack}.block.{number}.layer", f"{stack}.layers.{number}"
            attention(f"{b}.attention", f"{a}.0.SelfAttention")
            result[f"{b}.attention_residual.norm.weight"] = theirs[f"{a}.0.layer_norm.weight"]
            if stack == "decoder":
                attention(f"{b}.cross_attention", f"{a}.1.EncDecAttention")
                result[f"{b}.cross_attention_residual.norm.weight"] = theirs[f"{a}.1.layer_norm.weight"]
            last = f"{a}.{2 if stack == 'decoder' else 1}"
            inner = [theirs[f"{last}.DenseReluDense.{name}.weight"] for name in ("wi_0", "wi_1")]
            result[f"{b}.mlp.up_weight"] = torch.stack(inner)
            result[f"{b}.mlp.down_weight"] = theirs[f"{last}.DenseReluDense.wo.weight"]
            result[f"{b}.mlp_residual.norm.weight"] = theirs[f"{last}.layer_norm.weight"]
    return result


def stream(lengths: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, CONFIG.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])
    sequences = torch.tensor([lengths, (0,) * len(lengths), range(len(lengths))])
    return torch.stack([ids, torch.zeros_like(ids), positions]), sequences


def test_logits_equal_hugging_face() -> None:
    source = hugging_face()
    model = Transformer(Kit(CONFIG, Declare(CONFIG), ParallelGrid())).eval()
    weights = carried_over(source, CONFIG)
    assert weights.keys() == dict(declared(model)).keys()
    with torch.no_grad():
        for name, parameter in declared(model):
            parameter.copy_(weights[name])
        (tokens, sequences), (target, target_sequences) = stream(SOURCE, 1), stream(TARGET, 2)
        everywhere = torch.arange(sum(TARGET))
        batch = ModelBatch(tokens, sequences, everywhere, target[0], None, target, target_sequences)
        (logits,) = model(batch)
        rows = zip(tokens[0].split(SOURCE), target[0].split(TARGET), strict=True)
        expected = torch.cat([source(input_ids=a[None], decoder_input_ids=b[None]).logits[0] for a, b in rows])
    assert float(expected.abs().max()) > 0.5
    assert float((logits - expected).abs().max()) <= 1e-5
