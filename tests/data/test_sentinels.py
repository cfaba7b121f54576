"""Sentinels: the last ids of the vocabulary, in the tokenizer's own file, and never the ids of text or of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_pipeline.build import SPLITS, build_sentences
from data_pipeline.loader import InstanceDataset
from data_pipeline.sentences import split_sentences
from data_pipeline.tokenizer import MASK, Tokenizer, sentinel_ids, train_tokenizer
from megacore.communicator import Alone
from megacore.errors import DataError
from tests.data.corpora import TEXTS, build_all

SENTENCES = [sentence for text in TEXTS for sentence in split_sentences(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(SENTENCES, 400, path / "plain.model")
    train_tokenizer(SENTENCES, 410, path / "ten.model", 10)
    return path


def test_sentinels_are_the_last_ids_and_leave_the_text_as_it_was(folder: Path) -> None:
    plain, ten = Tokenizer(folder / "plain.model"), Tokenizer(folder / "ten.model", 410, 10)
    assert (plain.vocab_size, plain.num_sentinels, plain.text_vocab_size) == (400, 0, 400)
    assert (ten.vocab_size, ten.num_sentinels, ten.text_vocab_size) == (410, 10, 400)
    assert ten.encode(SENTENCES) == plain.encode(SENTENCES)
    # As any other reader of the file sees them.
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ten.model"))
    assert [model.id_to_piece(id_) for id_ in sentinel_ids(410, 10).tolist()] == [f"<extra_id_{k}>" for k in range(10)]
    assert model.piece_to_id("<extra_id_0>") == 409 and model.piece_to_id("<extra_id_9>") == 400
    assert all(model.is_control(id_) for id_ in range(400, 410))


def test_no_text_is_encoded_to_sentinels(folder: Path) -> None:
    ten = Tokenizer(folder / "ten.model")
    texts = [*SENTENCES, "<extra_id_0> bake <extra_id_9>", "▁<extra_id_3>", "été 中文!"]
    encoded = ten.encode(texts)
    assert max(id_ for ids in encoded for id_ in ids) < 400
    assert ten.decode(encoded[-3]) == texts[-3]


def test_a_text_that_spells_sentinels_does_not_make_any(tmp_path: Path) -> None:
    train_tokenizer(["<extra_id_0>"] * 50 + SENTENCES, 400, tmp_path / "t.model")
    assert Tokenizer(tmp_path / "t.model").num_sentinels == 0


def test_masks_never_draw_sentinels(tmp_path: Path) -> None:
    """More than half of the vocabulary are sentinels, so that one wrong draw in two would show."""
    config = build_all(tmp_path, vocab_size=700, num_sentinels=400, masking_rate=0.5)
    drawn = 0
    for split in SPLITS:
        dataset = InstanceDataset(config.instances_path(split))
        for number in range(len(dataset)):
            instance = dataset[number]
            assert instance["input_ids"].max() < 300 and instance["masked_labels"].max() < 300
            hidden = instance["input_ids"][instance["masked_positions"]]
            drawn += np.count_nonzero((hidden != MASK) & (hidden != instance["masked_labels"]))
    assert drawn > 100


def test_a_tokenizer_with_another_number_of_sentinels_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ten\.model has 10 sentinels, not num_sentinels=0; train it again"):
        Tokenizer(folder / "ten.model", 410, 0)
    config = build_all(tmp_path)
    other = config.model_copy(update={"num_sentinels": 3})
    with pytest.raises(DataError, match="has 0 sentinels, not num_sentinels=3"):
        build_sentences(other, Alone())


def test_the_largest_vocabulary_of_a_text_counts_the_sentinels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=30000 is more than the text allows; at most ") as caught:
        train_tokenizer(SENTENCES, 30000, tmp_path / "t.model", 10)
    largest = int(str(caught.value).split("at most ")[1])
    train_tokenizer(SENTENCES, largest, tmp_path / "t.model", 10)
    assert Tokenizer(tmp_path / "t.model").vocab_size == largest
