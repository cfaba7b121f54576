"""Hugging Face in and out: transformers loads what is written, and computes what megacore computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from megacore.checkpoint.load import load_model
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.hf_config import config_of
from megacore.convert.huggingface import HuggingFaceSource, export_huggingface
from megacore.convert.imports import import_checkpoint
from megacore.errors import MegacoreError
from megacore.growth.plan import Symmetry, make_plan
from megacore.growth.verify import random_batch
from megacore.models.batch import ModelBatch
from tests.growth.small import family

BERT = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
LLAMA = {**BERT, "num_key_value_heads": 2, "max_position_embeddings": 64}
T5 = {"vocab_size": 101, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "bert": (hf.BertForPreTraining, hf.BertConfig(**BERT, layer_norm_eps=1e-7)),
    "bert mlm": (hf.BertForMaskedLM, hf.BertConfig(**BERT)),
    "roformer": (hf.RoFormerForMaskedLM, hf.RoFormerConfig(**BERT, max_position_embeddings=64)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=101, n_embd=24, n_layer=2, n_head=4, n_positions=64)),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA)),
    "llama tied": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_theta=5e4)),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**LLAMA)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**LLAMA, head_dim=8)),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}


def saved(name: str, path: Path) -> Any:
    """Write a model of transformers' with random values everywhere."""
    torch.manual_seed(0)
    kind, config = FAMILIES[name]
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model


def imported(path: Path, target: Path, **layout: int) -> CheckpointReader:
    import_checkpoint(lambda: HuggingFaceSource(path), target, ParallelConfig(**layout), Alone())
    return CheckpointReader(target)


def expected_logits(model: Any, batch: ModelBatch) -> torch.Tensor:
    sources = batch.tokens.split(batch.sequences[0].tolist(), dim=1)
    if batch.target_tokens is not None and batch.target_sequences is not None:
        targets = batch.target_tokens[0].split(batch.target_sequences[0].tolist())
        rows = zip(sources, targets, strict=True)
        outputs = [model(input_ids=a[:1], decoder_input_ids=b[None]).logits[0] for a, b in rows]
    else:
        segments = "token_type_ids" if "ert" in type(model).__name__ or "RoF" in type(model).__name__ else None
        outputs = []
        for row in sources:
            result = model(input_ids=row[:1], **({segments: row[1:2]} if segments else {}))
            outputs.append(result["logits" if "logits" in result else "prediction_logits"][0])
    return torch.cat(outputs)[batch.label_positions]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_imported_model_computes_the_same_and_comes_back_bit_for_bit(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = saved(name, tmp_path / "hf")
    reader = imported(tmp_path / "hf", tmp_path / "imported", tensor_parallel_size=2, pipeline_parallel_size=2)
    reader.check_coverage()
    batch = random_batch(reader.manifest.model, samples=3)
    with torch.no_grad():
        logits = load_model(reader, torch.float32)(batch)[0]
        expected = expected_logits(source, batch)
    assert float((logits - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))

    export_huggingface(reader, tmp_path / "back", "float32", Alone())
    kind = FAMILIES[name][0]
    again, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not {key: names for key, names in report.items() if names}
    state = again.state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(state[key], value), key
    first, second = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "back"))
    # transformers 5 writes that T5 is tied and not scaled; older versions, that it is not tied.
    different = {key for key in first if first[key] != second.get(key)} - {"transformers_version"}
    assert different == ({"tie_word_embeddings"} if name == "t5" else set())


def test_a_model_without_heads_says_which_parts_are_new(tmp_path: Path) -> None:
    hf.BertModel(hf.BertConfig(**BERT)).save_pretrained(tmp_path / "hf")
    source = HuggingFaceSource(tmp_path / "hf")
    assert {name.split(".")[0] for name in source.new} == {"lm_head", "nsp_head"}
    assert "nsp_head.pooler_weight" not in source.new  # it has a pooler
    reader = imported(tmp_path / "hf", tmp_path / "imported")
    assert reader.manifest.lineage[0]["new"] == list(source.new)


def test_another_task_s_head_is_left_out_by_name(tmp_path: Path) -> None:
    hf.BertForSequenceClassification(hf.BertConfig(**BERT)).save_pretrained(tmp_path / "hf")
    assert HuggingFaceSource(tmp_path / "hf").left_out == ("classifier.bias", "classifier.weight")


def test_torch_files_are_read_as_weights_only(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}  # as the first GPT-2 files
    torch.save({**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "hf" / "pytorch_model.bin")
    assert HuggingFaceSource(tmp_path / "hf").new == ()
    torch.save({"a": Path("/")}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(MegacoreError, match=r"pytorch_model\.bin.*not a file of weights"):
        HuggingFaceSource(tmp_path / "hf")


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "untied", "cut"])
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    saved("gpt2", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.1.mlp.c_fc.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        name = "transformer.h.2.mlp.c_fc.weight"
        tensors[name] = torch.zeros(24, 96)
    elif damage == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif damage == "untied":
        name = "lm_head.weight"
        tensors[name] = torch.zeros(101, 24)
    save_file(tensors, file)
    if damage == "cut":
        name = "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(MegacoreError, match=name.replace(".", r"\.")):
        imported(tmp_path / "hf", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "bloom"),
        ("attention_bias", True),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("hidden_act", "mish"),
        ("num_attention_heads", 5),
    ],
)
def test_a_model_that_megacore_does_not_compute_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    saved("llama", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(MegacoreError, match=key):
        HuggingFaceSource(tmp_path / "hf")


@pytest.mark.parametrize(
    ("name", "sizes", "parts"),
    [
        ("bert", {"hidden_size": 48}, ["bert", "head_dim=6 instead of 12"]),
        ("gpt2", {"head_dim": 12}, ["gpt2", "head_dim=12 instead of 6"]),
        ("gpt2", {"hidden_size": 50, "num_attention_heads": 8}, ["gpt2", "head_dim=6 instead of 6.25"]),
        ("bert", {"num_attention_heads": 8, "num_key_value_heads": 4}, ["num_key_value_heads=4 instead of 8"]),
        ("t5", {"num_attention_heads": 8, "num_key_value_heads": 4}, ["t5", "num_key_value_heads=4 instead of 8"]),
        ("bert", {"hidden_size": 36}, ["norm_copies=(24,) instead of ()"]),
        ("bert", {"num_hidden_layers": 3}, ["norm_eps_of={"]),
        ("llama", {"head_dim": 8}, ["rope_frequencies=("]),
    ],
)
def test_what_growing_made_and_hugging_face_lacks_is_refused_by_its_key(
    name: str, sizes: dict[str, int], parts: list[str]
) -> None:
    """``config.json`` would mean other shapes, or another function."""
    with pytest.raises(MegacoreError, match="Hugging Face has no architecture") as error:
        config_of(make_plan(family(name).model_copy(update={"hidden_dropout": 0.0}), sizes, Symmetry()).target)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_bf16_is_rounded_as_torch_rounds(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "hf")
    reader = imported(tmp_path / "hf", tmp_path / "imported")
    export_huggingface(reader, tmp_path / "back", "bfloat16", Alone())
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    for key, value in source.state_dict().items():
        assert torch.equal(tensors[key], value.bfloat16()), key


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    saved("bert", tmp_path / "hf")
    (tmp_path / "hf" / "vocab.txt").write_text("[PAD]\n")
    reader = imported(tmp_path / "hf", tmp_path / "imported")
    shutil.rmtree(tmp_path / "hf")
    export_huggingface(reader, tmp_path / "back", "float32", Alone())
    assert (tmp_path / "back" / "vocab.txt").read_text() == "[PAD]\n"
