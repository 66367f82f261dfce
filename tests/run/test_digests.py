"""Lines of JSON with their digest."""

import hashlib
import json

import pytest

from dpengine.run import digests


def test_a_line_is_json_and_its_digest_that_of_the_rest():
    line, digest = digests.encode({"a": [1, 0.1, None, "\u00e9\n"], "b": {"c": True}})
    content = json.loads(line)
    assert line.endswith(b"}\n") and line.count(b"\n") == 1
    assert content.pop("sha256") == digest
    assert digest == hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert digests.decode(line) == (content, digest)


def test_every_other_byte_is_refused_at_every_place():
    line, _ = digests.encode({"step": 1, "bound": 0.5})
    for at in range(len(line)):
        for byte in range(256):
            changed = line[:at] + bytes([byte]) + line[at + 1 :]
            if changed != line:
                with pytest.raises(ValueError, match="digest"):
                    digests.decode(changed)


@pytest.mark.parametrize("line", [b"", b"\n", b"{}\n", b'{"a": 1}\n', b"\x80\x04N."])
def test_what_has_no_digest_is_refused(line):
    with pytest.raises(ValueError, match="digest"):
        digests.decode(line)


@pytest.mark.parametrize("body", [b"[1}", b"[" * 100_000 + b"}", b"1}", b"\xff}"])
def test_what_is_no_object_is_refused_though_its_digest_is_right(body):
    """One that was made to be refused by nothing but the parser, too deep for it as well."""
    digest = hashlib.sha256(body).hexdigest().encode()
    with pytest.raises(ValueError):
        digests.decode(body[:-1] + b', "sha256": "' + digest + b'"}\n')
