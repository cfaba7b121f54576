"""Next-sentence pairs: windows over a document, half of them with a foreign second segment (Devlin et al. 2019).

A document's tokens are used once each, in order, and nothing is dropped: a window that ends inside a sentence is
continued by the next window. The first segment ends at a random sentence end inside the window (in its middle, if
there is none). With even chance the rest of the window is the second segment; otherwise it is replaced by a window
that begins at a random sentence of another document, and the document goes on after its first segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import Dataset
from megacore.random import stream_key, uniform

_DRAWS = 5
"""Random numbers of a pair: length, first segment's end, foreign or not, foreign document, foreign sentence."""


class Pair(NamedTuple):
    """Two segments of tokens; ``is_random`` if the second is from another document (label 1), else label 0."""

    first: NDArray[Any]
    second: NDArray[Any]
    is_random: bool


class Corpus:
    """The documents of one split of a sentence data set, by number."""

    def __init__(self, sentences: Dataset, split: str) -> None:
        self.files = [name for name in sentences.manifest.shards if name.startswith(f"{split}-")]
        shards = [sentences.columns(name) for name in self.files]
        self._tokens = [shard["tokens"] for shard in shards]
        # Token offset of each sentence, and sentence number of each document, within its file.
        self._sentence_ends = [np.cumsum(shard["sentence_lengths"], dtype=np.int64) for shard in shards]
        self._document_ends = [np.cumsum(shard["document_sentences"], dtype=np.int64) for shard in shards]
        self.first_documents = np.cumsum([0, *(len(ends) for ends in self._document_ends)])

    def __len__(self) -> int:
        return int(self.first_documents[-1])

    def file_documents(self, file: int) -> range:
        """Return the numbers of the documents of a file."""
        return range(int(self.first_documents[file]), int(self.first_documents[file + 1]))

    def document(self, number: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return a document's tokens, and the ends of its sentences in them."""
        file = int(np.searchsorted(self.first_documents, number, side="right")) - 1
        local = number - int(self.first_documents[file])
        first = int(self._document_ends[file][local - 1]) if local else 0
        ends = self._sentence_ends[file][first : int(self._document_ends[file][local])]
        start = int(self._sentence_ends[file][first - 1]) if first else 0
        return self._tokens[file][start : int(ends[-1])], ends - start


def document_pairs(
    corpus: Corpus, number: int, capacity: int, short_probability: float, key_names: Sequence[str | int], seed: int
) -> Iterator[Pair]:
    """Yield the pairs of a document; a pure function of the seed, ``key_names`` and the document's number.

    Args:
        corpus: at least two documents.
        number: of the document.
        capacity: tokens of a pair, without special tokens.
        short_probability: share of the windows that are shorter, by a random length.
        key_names: name the stream of randomness (the copy of the corpus, say).
        seed: of the data.
    """
    tokens, ends = corpus.document(number)
    key = stream_key(seed, "pairs", *key_names, number)
    position = drawn = 0
    while position < len(tokens):
        length_draw, end_draw, foreign_draw, document_draw, sentence_draw = uniform(
            key, np.arange(drawn, drawn + _DRAWS)
        )
        drawn += _DRAWS
        length = capacity
        if length_draw < short_probability:
            length = 2 + int((length_draw / short_probability) * (capacity - 1))
        stop = min(position + length, len(tokens))
        cut = _first_segment_end(ends, position, stop, end_draw)
        is_random = bool(foreign_draw < 0.5) or cut == stop
        if is_random:
            cut = min(cut, position + length - 1)
            other = int(document_draw * (len(corpus) - 1))
            foreign = _foreign_window(corpus, other + (other >= number), length - (cut - position), sentence_draw)
            yield Pair(tokens[position:cut], foreign, True)
            position = cut
        else:
            yield Pair(tokens[position:cut], tokens[cut:stop], False)
            position = stop


def _first_segment_end(ends: NDArray[np.int64], position: int, stop: int, draw: float) -> int:
    inside = ends[np.searchsorted(ends, position, side="right") : np.searchsorted(ends, stop, side="left")]
    if len(inside):
        return int(inside[int(draw * len(inside))])
    return position + max(1, (stop - position) // 2)


def _foreign_window(corpus: Corpus, number: int, length: int, draw: float) -> NDArray[Any]:
    tokens, ends = corpus.document(number)
    sentence = int(draw * len(ends))
    start = int(ends[sentence - 1]) if sentence else 0
    return tokens[start : start + length]
