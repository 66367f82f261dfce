"""JSON lines that carry the SHA-256 of what they say."""

import hashlib
import json

_BEFORE, _AFTER = b', "sha256": "', b'"}\n'
_TAIL = len(_BEFORE) + 64 + len(_AFTER)


def encode(content: dict) -> tuple[bytes, str]:
    """``content``, not empty, as a line of JSON with its digest, and the digest as text."""
    body = json.dumps(content).encode()
    digest = sha256(body)
    return _line(body, digest), digest


def decode(line: bytes) -> tuple[dict, str]:
    """What ``encode`` was given, and the digest.

    Raises ValueError where a byte of the line differs; nothing is parsed before that is known.
    """
    body = line[:-_TAIL] + b"}"
    digest = sha256(body)
    if line != _line(body, digest):
        raise ValueError("the digest of a line differs from what it says")
    try:
        content = json.loads(body)
    except RecursionError as error:
        raise ValueError("a line is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("a line is no JSON object")
    return content, digest


def sha256(content: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _line(body: bytes, digest: str) -> bytes:
    return body[:-1] + _BEFORE + digest.encode() + _AFTER
