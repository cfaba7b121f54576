"""The sentencepiece tokenizer with BERT's special tokens and, at the end of the vocabulary, T5's sentinels."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from data_pipeline.sources import file_digest
from megacore.errors import DataError
from megacore.publish import os_errors, replace_file

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SENTINEL = "<extra_id_{}>"
_THREADS = 2
"""Fixed: the pieces depend on how the training is cut into threads."""
_WORD_START = re.compile("▁|[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""The mark that sentencepiece puts for a space; or kana and Chinese characters, which are written without spaces."""


def sentinel_ids(vocab_size: int, number: int) -> NDArray[np.int64]:
    """Return the ids of the first sentinels: ``<extra_id_0>`` is the last id, the others go down from it, as in T5."""
    return np.arange(vocab_size - 1, vocab_size - 1 - number, -1)


def train_tokenizer(sentences: Iterable[str], vocab_size: int, path: Path, num_sentinels: int = 0) -> None:
    """Train a unigram model with byte fallback and write it; special tokens have the ids 0 to 4.

    Args:
        sentences: to train on.
        vocab_size: pieces of all kinds, the special tokens and the sentinels included.
        path: of the file to write.
        num_sentinels: the last ids, which no text is encoded to.

    Raises:
        DataError: there is no text, or ``vocab_size`` is larger (or smaller) than the text allows.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size - num_sentinels,
            model_type="unigram",
            byte_fallback=True,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=-1,
            eos_id=-1,
            pad_piece=SPECIAL_TOKENS[PAD],
            unk_piece=SPECIAL_TOKENS[UNK],
            control_symbols=list(SPECIAL_TOKENS[CLS:]),
            num_threads=_THREADS,
            max_sentence_length=65536,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise _training_error(str(error), vocab_size, num_sentinels) from None
    with os_errors(path, DataError):
        replace_file(path, model.getvalue() + _sentinels(num_sentinels))


def _sentinels(number: int) -> bytes:
    """Return what to append to a model's bytes: the concatenation of two protobuf messages joins their lists."""
    pieces = [
        ModelProto.SentencePiece(piece=_SENTINEL.format(place), type=ModelProto.SentencePiece.CONTROL)
        for place in reversed(range(number))
    ]
    appended: bytes = ModelProto(pieces=pieces).SerializeToString()
    return appended


def _training_error(message: str, vocab_size: int, num_sentinels: int) -> DataError:
    if limit := re.search(r"value <= (\d+)", message):
        most = int(limit[1]) + num_sentinels
        return DataError(f"vocab_size={vocab_size} is more than the text allows; at most {most}")
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", message):
        least = int(limit[1]) + num_sentinels
        return DataError(f"vocab_size={vocab_size} is less than the text needs; at least {least}")
    return DataError(f"sentencepiece cannot train vocab_size={vocab_size}: {message.strip().splitlines()[-1]}")


class Tokenizer:
    """A trained tokenizer.

    Raises:
        DataError: the file is missing, is no sentencepiece model, or has other special tokens, another size or
            another number of sentinels.
    """

    def __init__(self, path: Path, vocab_size: int | None = None, num_sentinels: int | None = None) -> None:
        if not path.is_file():
            raise DataError(f"{path}: no tokenizer; train one with 'megacore data tokenizer'")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise DataError(f"{path}: not a sentencepiece model") from None
        self.vocab_size: int = self._model.get_piece_size()
        for number, token in enumerate(SPECIAL_TOKENS):
            if number >= self.vocab_size or self._model.id_to_piece(number) != token:
                raise DataError(
                    f"{path}: id {number} is not {token}; train the tokenizer with 'megacore data tokenizer'"
                )
        if vocab_size not in (None, self.vocab_size):
            raise DataError(
                f"{path} has {self.vocab_size} pieces, not vocab_size={vocab_size}; "
                "train it again with 'megacore data tokenizer'"
            )
        self.num_sentinels: int = next(place for place in count() if not self._is_sentinel(place))
        if num_sentinels not in (None, self.num_sentinels):
            raise DataError(
                f"{path} has {self.num_sentinels} sentinels, not num_sentinels={num_sentinels}; "
                "train it again with 'megacore data tokenizer'"
            )
        self.sha256 = file_digest(path)

    def _is_sentinel(self, place: int) -> bool:
        """Tell whether an id counted from the end is its sentinel (a piece of text may be spelt the same)."""
        number = self.vocab_size - 1 - place
        same: bool = self._model.id_to_piece(number) == _SENTINEL.format(place)
        return same and bool(self._model.is_control(number))

    @property
    def text_vocab_size(self) -> int:
        """Special tokens and pieces of text; the sentinels have the ids from here on."""
        return self.vocab_size - self.num_sentinels

    def encode(self, sentences: list[str]) -> list[list[int]]:
        """Return the ids of each sentence, without special tokens."""
        ids: list[list[int]] = self._model.encode(sentences, out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        text: str = self._model.decode([int(number) for number in ids])
        return text

    @cached_property
    def starts_word(self) -> NDArray[np.bool_]:
        """[vocab_size], true for pieces that begin a word; where text has no spaces, every piece is one."""
        pieces = (self._model.id_to_piece(number) for number in range(self.vocab_size))
        return np.array([_WORD_START.match(piece) is not None for piece in pieces])

    @property
    def id_dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
