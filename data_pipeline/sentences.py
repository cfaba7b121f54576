"""Split text into sentences, quickly: regular expressions and a list of abbreviations."""

from __future__ import annotations

import re

_ABBREVIATIONS = frozenset(
    """dr mr mrs ms prof sr jr st vs etc e.g i.e cf al fig figs eq eqs sec secs no nos vol pp p ch approx resp inc ltd
    co corp dept est u.s u.k a.m p.m jan feb mar apr jun jul aug sep sept oct nov dec ref refs""".split()  # noqa: SIM905
)
# A full stop, question or exclamation mark, closing quotes or brackets, white space, then what begins a sentence;
# or Chinese punctuation, which needs no space; or an empty line. Looking back keeps long runs of dots linear.
_BOUNDARY = re.compile(r"""(?<![.!?])[.!?]+["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9])|[。！？；…]+[”’」』）]*|\n\s*\n\s*""")
_LAST_WORD = re.compile(r"([\w.]+)[.!?]+[\"'”’)\]]*\s+$")


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without surrounding white space; line breaks inside become spaces."""
    sentences = []
    begin = 0
    for match in _BOUNDARY.finditer(text):
        if _is_abbreviation(text, match):
            continue
        sentences.append(text[begin : match.end()])
        begin = match.end()
    sentences.append(text[begin:])
    return [" ".join(sentence.split()) for sentence in sentences if sentence.strip()]


def _is_abbreviation(text: str, match: re.Match[str]) -> bool:
    """Tell whether a full stop belongs to an abbreviation or an initial."""
    if not match[0].startswith(".") or match[0].startswith(".."):
        return False
    word = _LAST_WORD.search(text, max(0, match.start() - 20), match.end())
    if word is None:
        return False
    last = word[1].rstrip(".")
    return last.lower() in _ABBREVIATIONS or (len(last) == 1 and last.isupper() and last != "I")
