"""JSON objects that carry a checksum of themselves, so that a damaged or edited manifest is known as such."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_SEAL = "sha256"


def seal(body: dict[str, Any]) -> str:
    """Serialise an object with the checksum of everything else in it; a line for each entry of a section."""
    sections = (f"{_json(key)}: {_section(value)}" for key, value in (body | {_SEAL: digest(body)}).items())
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _section(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return _json(value)
    return "{\n" + ",\n".join(f"  {_json(key)}: {_json(entry)}" for key, entry in value.items()) + "\n}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def unseal(text: str) -> dict[str, Any]:
    """Read a sealed object back, without its seal.

    Raises:
        ValueError: the text is no JSON object, or its checksum does not match.
    """
    body = json.loads(text)
    if not isinstance(body, dict):
        raise ValueError(f"expected a JSON object, got {type(body).__name__}")
    if body.pop(_SEAL, None) != digest(body):
        raise ValueError("altered since it was written (its checksum does not match)")
    return body


def digest(body: dict[str, Any]) -> str:
    """Return the SHA-256 of an object as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
