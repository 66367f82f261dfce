"""The noise stream against RFC 8439, the `cryptography` package and mpmath."""

import struct

import mpmath
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from dpengine.kernels import reference

# RFC 8439: section 2.3.2, and vectors 1 and 2 of appendix A.1.
VECTORS = {
    "section 2.3.2": (
        bytes(range(32)),
        1,
        bytes.fromhex("000000090000004a00000000"),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "zeros, block 0": (
        bytes(32),
        0,
        bytes(12),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "zeros, block 1": (
        bytes(32),
        1,
        bytes(12),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
}
KEY, NONCE = bytes(range(100, 132)), bytes(range(200, 212))
UNIT = 2.0**-53


def stream_of(key: bytes, counter: int, nonce: bytes) -> torch.Tensor:
    state = key + struct.pack("<I", counter) + nonce
    return torch.tensor(struct.unpack("<12i", state), dtype=torch.int32)


def words_of(keystream: bytes) -> list[list[int]]:
    words = struct.unpack(f"<{len(keystream) // 8}Q", keystream)
    return [list(words[i : i + 8]) for i in range(0, len(words), 8)]


def block(key: bytes, counter: int, nonce: bytes) -> list[int]:
    """Eight words of one block, whose 32-bit counter is given."""
    initial = struct.pack("<I", counter % 2**32) + nonce
    encryptor = Cipher(algorithms.ChaCha20(key, initial), mode=None).encryptor()
    return words_of(encryptor.update(bytes(64)))[0]


def unsigned(words: torch.Tensor) -> list[list[int]]:
    assert words.dtype == torch.int64
    return [[word % 2**64 for word in row] for row in words.tolist()]


def signed(words: list[list[int]]) -> torch.Tensor:
    rows = [[word - 2**64 if word >= 2**63 else word for word in row] for row in words]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 8)


def box_muller(words: list[list[int]]) -> list[tuple[mpmath.mpf, float]]:
    """Every element of ``gaussians`` with the error that float64 may make in it.

    Element ``j · n_blocks + b`` is the j-th normal of block b: cosines of pairs 0 to 3, then sines.
    """
    elements = []
    with mpmath.workprec(200):
        for function in (mpmath.cos, mpmath.sin):
            for pair in range(4):
                for row in words:
                    u = mpmath.mpf(row[pair] + 1) / 2**64
                    angle = 2 * mpmath.pi * row[pair + 4] / 2**64
                    radius = mpmath.sqrt(-2 * mpmath.log(u))
                    # u is rounded twice, the logarithm once; the root of that, or its slope.
                    square_error = 4 * 2 * UNIT + 8 * UNIT * float(radius) ** 2
                    slope_error = square_error / max(2 * float(radius), 1e-300)
                    radius_error = min(square_error**0.5, slope_error)
                    # The angle is rounded three times; root, cosine and product once each.
                    relative = 4 * UNIT * float(angle) + 8 * UNIT
                    elements.append(
                        (radius * function(angle), radius_error + float(radius) * relative)
                    )
    return elements


def assert_box_muller(z: torch.Tensor, words: list[list[int]]):
    assert z.dtype == torch.float64
    for value, (exact, error) in zip(z.tolist(), box_muller(words), strict=True):
        assert abs(value - exact) <= error


@pytest.mark.parametrize(
    ("key", "counter", "nonce", "expected"), VECTORS.values(), ids=VECTORS.keys()
)
def test_blocks_are_those_of_rfc_8439(key, counter, nonce, expected):
    words = reference.chacha20_words(stream_of(key, counter, nonce), 1)
    assert unsigned(words) == words_of(bytes.fromhex(expected))


@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    counter=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_any_stream_is_that_of_the_cryptography_package(key, nonce, counter):
    words = reference.chacha20_words(stream_of(key, counter, nonce), 3)
    assert unsigned(words) == [block(key, counter + i, nonce) for i in range(3)]


@pytest.mark.parametrize("start", [0, 2**31 - 2, 2**31, 2**32 - 2], ids=hex)
def test_the_block_counter_is_unsigned_and_wraps_without_touching_the_nonce(start):
    words = reference.chacha20_words(stream_of(KEY, start, NONCE), 4)
    assert unsigned(words) == [block(KEY, start + i, NONCE) for i in range(4)]


def test_many_blocks_are_one_keystream():
    encryptor = Cipher(algorithms.ChaCha20(KEY, struct.pack("<I", 5) + NONCE), mode=None)
    keystream = encryptor.encryptor().update(bytes(64 * 1000))
    words = reference.chacha20_words(stream_of(KEY, 5, NONCE), 1000)
    assert unsigned(words) == words_of(keystream)


def test_drawing_words_leaves_the_stream_as_it_was():
    stream = stream_of(KEY, 5, NONCE)
    reference.chacha20_words(stream, 3)
    assert torch.equal(stream, stream_of(KEY, 5, NONCE))


@pytest.mark.parametrize("n_blocks", [1, 2, 37])
def test_gaussians_are_box_muller_of_the_words_in_the_documented_order(n_blocks):
    words = [block(KEY, i, NONCE) for i in range(n_blocks)]
    assert_box_muller(reference.gaussians(signed(words)), words)


EXTREMES = [0, 1, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2**11, 2**64 - 1]


@pytest.mark.parametrize("first", EXTREMES, ids=hex)
def test_gaussians_are_box_muller_at_the_ends_of_the_words(first):
    words = [[first] * 4 + EXTREMES[i : i + 4] for i in range(0, len(EXTREMES) - 3)]
    assert_box_muller(reference.gaussians(signed(words)), words)


def test_gaussians_reach_nine_standard_deviations_and_are_always_finite():
    smallest = reference.gaussians(signed([[0] * 8]))
    assert smallest.max() > 9
    largest = reference.gaussians(signed([[2**64 - 1] * 8]))
    assert (largest == 0).all()


@pytest.mark.parametrize("n_blocks", [1, 3])
def test_no_two_normals_share_a_word_but_the_sine_and_cosine_of_a_pair(n_blocks):
    words = [block(KEY, i, NONCE) for i in range(n_blocks)]
    before = reference.gaussians(signed(words))
    users = {}
    for b in range(n_blocks):
        for word in range(8):
            changed = [row.copy() for row in words]
            changed[b][word] ^= 2**62
            after = reference.gaussians(signed(changed))
            users[b, word] = frozenset((before != after).nonzero().flatten().tolist())
    half = 4 * n_blocks
    pairs = set(users.values())
    assert pairs == {frozenset({i, half + i}) for i in range(half)}
    for b in range(n_blocks):
        for pair in range(4):
            assert users[b, pair] == users[b, pair + 4]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 200], ids="P={}".format)
def test_noise_is_the_first_normals_of_the_fewest_consecutive_blocks(size):
    noise = reference.add_noise(
        torch.zeros(size, dtype=torch.float64), stream_of(KEY, 2**31 - 3, NONCE), 1.0, 1.0
    )
    words = [block(KEY, 2**31 - 3 + i, NONCE) for i in range((size + 7) // 8)]
    assert noise.dtype == torch.float64 and noise.shape == (size,)
    for value, (exact, error) in zip(noise.tolist(), box_muller(words)[:size], strict=True):
        assert abs(value - exact) <= error


@pytest.mark.parametrize("divisor", [0.3, 1.0, 77.0])
@pytest.mark.parametrize("noise_stddev", [1e-3, 1.0, 13.7])
def test_noise_is_scaled_added_and_divided(noise_stddev, divisor):
    stream = stream_of(KEY, 0, NONCE)
    values = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-6, 6, 100, dtype=torch.float64)
    z = reference.add_noise(torch.zeros_like(values), stream, 1.0, 1.0)
    noisy = reference.add_noise(values, stream, noise_stddev, divisor)
    size = values.abs() + noise_stddev * z.abs()
    # One rounding each of the product, the sum and the quotient, on both sides.
    assert ((noisy * divisor - (values + noise_stddev * z)).abs() <= 8 * UNIT * size).all()


def test_without_noise_only_the_divisor_acts():
    values = torch.tensor([1.0, -2.5, 3e300], dtype=torch.float64)
    result = reference.add_noise(values, stream_of(KEY, 0, NONCE), 0.0, 2.0)
    assert torch.equal(result, values / 2)


def test_nothing_gets_no_noise():
    empty = torch.zeros(0, dtype=torch.float64)
    assert reference.add_noise(empty, stream_of(KEY, 0, NONCE), 1.0, 1.0).shape == (0,)


def test_adding_noise_leaves_the_values_as_they_were():
    values = torch.ones(9, dtype=torch.float64)
    reference.add_noise(values, stream_of(KEY, 0, NONCE), 1.0, 2.0)
    assert (values == 1).all()
