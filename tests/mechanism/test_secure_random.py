"""Secret randomness: RFC 8439, the law of every draw, and that no stream is ever repeated.

The statistical tests use fresh keys; each rejects a sound generator with a probability of at
most ``FALSE_ALARM``.
"""

import copy
import os
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from dpengine.kernels import ops
from dpengine.mechanism import secure_random
from dpengine.mechanism.noise import normals
from dpengine.mechanism.secure_random import MAX_GAUSSIAN, SecureRandom, chacha20_words

FALSE_ALARM = 1e-7
COUNTING_KEY = bytes(range(32)).hex()
KEYSTREAM = {
    "2.3.2": (
        COUNTING_KEY,
        "000000090000004a00000000",
        1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        "00" * 32,
        "00" * 12,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        "00" * 32,
        "00" * 12,
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        "00" * 31 + "01",
        "00" * 12,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        "00ff" + "00" * 30,
        "00" * 12,
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        "00" * 32,
        "00" * 11 + "02",
        0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


@pytest.mark.parametrize(("key", "nonce", "counter", "stream"), KEYSTREAM.values(), ids=KEYSTREAM)
def test_rfc_8439_keystream(key, nonce, counter, stream):
    words = chacha20_words(bytes.fromhex(key), bytes.fromhex(nonce), counter, 8)
    assert words.dtype == np.uint64
    assert [int(w) for w in words] == [
        int.from_bytes(bytes.fromhex(stream[i : i + 16]), "little") for i in range(0, 128, 16)
    ]


def test_rfc_8439_cipher_of_section_2_4_2():
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    cipher = bytes.fromhex(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
        "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
        "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )
    nonce = bytes.fromhex("000000000000004a00000000")
    words = chacha20_words(bytes.fromhex(COUNTING_KEY), nonce, 1, 16)
    stream = words.astype("<u8").tobytes()
    assert bytes(a ^ b for a, b in zip(plain, stream, strict=False)) == cipher


def test_the_last_block_is_drawn_and_the_one_after_is_refused():
    key, nonce = bytes(32), bytes(12)
    assert len(chacha20_words(key, nonce, 2**32 - 1, 8)) == 8
    for counter, count in ((2**32 - 1, 9), (2**32, 1), (0, 2**35 + 1), (-1, 1)):
        with pytest.raises(ValueError, match="counter"):
            chacha20_words(key, nonce, counter, count)


def test_all_zero_words_reach_the_stated_nine_standard_deviations():
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    assert ops.gaussians(zeros).max() == MAX_GAUSSIAN >= 9


def test_no_word_reaches_further_than_stated():
    words = (0, 1, 2**63 - 1, -(2**63), -1)
    blocks = [[r] * 4 + [a] * 4 for r in words for a in words]
    cosines, sines = ops.gaussians(torch.tensor(blocks)).view(2, -1)
    assert cosines.isfinite().all() and sines.isfinite().all()
    assert torch.hypot(cosines, sines).max() <= MAX_GAUSSIAN * (1 + 1e-15)


def accept(p_value):
    assert p_value > FALSE_ALARM


def assert_standard_normal(z):
    count = len(z)
    accept(2 * stats.norm.sf(abs(z.mean()) * np.sqrt(count)))
    squares = stats.chi2(count)
    accept(2 * min(squares.cdf((z**2).sum()), squares.sf((z**2).sum())))
    # The third and fourth moment of n normals have variance 15 / n and 96 / n.
    accept(2 * stats.norm.sf(abs((z**3).mean()) / np.sqrt(15 / count)))
    accept(2 * stats.norm.sf(abs((z**4).mean() - 3) / np.sqrt(96 / count)))
    accept(stats.kstest(z[:200_000], "norm").pvalue)
    for reach in (1, 2, 3, 4, 5):
        for side in (z > reach, z < -reach):
            accept(stats.binomtest(int(side.sum()), count, stats.norm.sf(reach)).pvalue)


def test_normals_have_the_moments_the_distribution_and_the_tails_of_the_standard_normal():
    assert_standard_normal(normals(SecureRandom(), 2_000_000).numpy())


@pytest.mark.slow
def test_a_billion_normals_have_the_tail_counts_of_the_standard_normal():
    stream, block = SecureRandom(), 10_000_000
    reaches = np.arange(1.0, 6.5, 0.5)
    counts = np.zeros(len(reaches), dtype=int)
    for _ in range(100):
        z = normals(stream, block).abs().numpy()
        counts += [int((z > reach).sum()) for reach in reaches]
    for reach, tail in zip(reaches, counts, strict=True):
        accept(stats.binomtest(int(tail), 100 * block, 2 * stats.norm.sf(reach)).pvalue)


def test_the_two_normals_of_a_pair_are_independent():
    count = 500_000
    x, y = normals(SecureRandom(), 2 * count).view(2, count).numpy()
    for f in (lambda z: z, lambda z: z**2 - 1, np.abs):
        r = np.corrcoef(f(x), f(y))[0, 1]
        accept(2 * stats.norm.sf(abs(r) * np.sqrt(count)))
    angle = np.arctan2(y, x)
    accept(stats.kstest(angle[:200_000], "uniform", (-np.pi, 2 * np.pi)).pvalue)


def test_uniforms_are_multiples_of_2_to_the_minus_53_below_one():
    u = SecureRandom().uniform(300_000)
    assert (u >= 0).all() and (u < 1).all()
    assert (u * 2**53 == np.floor(u * 2**53)).all()
    assert ((u * 2**53) % 2 == 1).any()
    accept(stats.kstest(u, "uniform").pvalue)


@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_draws_have_the_length_that_was_asked_for(count):
    stream = SecureRandom()
    draws = (stream.words, stream.uniform, lambda n: stream.bernoulli(0.5, n))
    assert [len(draw(count)) for draw in draws] == [count] * 3


def copies():
    stream = SecureRandom()
    stream.words(3)
    return [
        stream,
        SecureRandom(),
        copy.copy(stream),
        copy.deepcopy(stream),
        copy.deepcopy([stream])[0],
        pickle.loads(pickle.dumps(stream)),
    ]


def test_no_two_draws_of_any_copies_share_a_word():
    words = np.concatenate([s.words(1000) for s in copies() for _ in range(3)])
    # Two of 18,000 random words agree with probability 1e-11.
    assert len(np.unique(words)) == len(words)


def test_kinds_of_draws_share_no_words():
    class Recorder(SecureRandom):
        def words(self, count):
            seen.append(super().words(count))
            return seen[-1]

    seen = []
    stream = Recorder()
    for draw in (stream.words, stream.uniform, lambda n: normals(stream, n)):
        draw(104)
    stream.bernoulli(0.5, 104)
    seen.append(ops.chacha20_words(torch.from_numpy(stream.stream()), 13).numpy().ravel())
    words = np.concatenate([words.astype(np.uint64) for words in seen])
    assert len(words) == len(np.unique(words)) == 520


def test_a_stream_is_the_key_block_zero_and_a_nonce_of_its_own(monkeypatch):
    key = bytes(range(32))
    monkeypatch.setattr(os, "urandom", lambda size: key[:size])
    random = SecureRandom()
    first, second = random.stream(), random.stream()
    for index, stream in enumerate((first, second)):
        assert stream.dtype == np.int32
        nonce = index.to_bytes(8, "little") + bytes(4)
        assert stream.tobytes() == key + bytes(4) + nonce
        expected = chacha20_words(key, nonce, 0, 24)
        words = ops.chacha20_words(torch.from_numpy(stream), 3)
        assert words.numpy().ravel().astype(np.uint64).tolist() == expected.tolist()


def test_a_forked_child_shares_no_word_with_its_parent():
    stream = SecureRandom()
    stream.words(1)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, stream.words(100).tobytes())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        theirs = np.frombuffer(pipe.read(), dtype=np.uint64)
    os.waitpid(child, 0)
    assert len(theirs) == 100
    assert not np.isin(theirs, stream.words(100)).any()


def test_seeds_have_no_effect():
    def draw():
        torch.manual_seed(0)
        np.random.seed(0)
        return SecureRandom().words(100)

    state = torch.get_rng_state()
    first, second = draw(), draw()
    torch.set_rng_state(state)
    assert not np.isin(first, second).any()


def test_the_key_comes_from_the_operating_system_with_256_bits(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(size) or bytes(size))
    SecureRandom()
    assert sum(asked) >= 32


def test_a_failing_entropy_source_stops_the_draw(monkeypatch):
    def fail(size):
        raise OSError("no entropy")

    monkeypatch.setattr(os, "urandom", fail)
    with pytest.raises(OSError, match="no entropy"):
        SecureRandom()


def test_neither_repr_nor_pickle_holds_the_key(monkeypatch):
    key = b"0123456789abcdef0123456789abcdef"
    monkeypatch.setattr(os, "urandom", lambda size: key[:size])
    stream = SecureRandom()
    assert key not in pickle.dumps(stream)
    assert key.decode() not in repr(stream)


PROBABILITIES = [0.5, 0.25, 1 / 3, 0.1, 256 / 60_000, 1e-7, 2.0**-64, 1 - 2.0**-53]


@pytest.mark.parametrize("probability", PROBABILITIES, ids="{:.3g}".format)
def test_a_coin_is_true_for_exactly_the_share_of_words_that_was_asked_for(probability, monkeypatch):
    threshold = int(probability * 2**64)  # exact: a float64 times a power of two
    edge = [0, threshold - 1, threshold, 2**64 - 1]
    words = np.array(edge, dtype=np.uint64)
    monkeypatch.setattr(secure_random, "chacha20_words", lambda key, nonce, first, n: words[:n])
    coins = SecureRandom().bernoulli(probability, 4)
    assert coins.tolist() == [True, True, False, False]


def test_probability_one_is_everyone_and_zero_is_no_one(monkeypatch):
    words = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(secure_random, "chacha20_words", lambda key, nonce, first, n: words[:n])
    stream = SecureRandom()
    assert stream.bernoulli(1.0, 4).all()
    assert not stream.bernoulli(0.0, 4).any()
    assert not stream.bernoulli(2.0**-65, 4).any()  # rounded down, never up


@pytest.mark.parametrize("probability", [0.5, 0.1, 0.004, 0.97])
def test_coins_have_the_frequency_that_was_asked_for(probability):
    coins = SecureRandom().bernoulli(probability, 1_000_000)
    assert coins.dtype == bool
    accept(stats.binomtest(int(coins.sum()), len(coins), probability).pvalue)
    both = int((coins[1:] & coins[:-1]).sum())
    spread = probability * np.sqrt((1 - probability) * (1 + 3 * probability) * len(coins))
    accept(2 * stats.norm.sf(abs(both - probability**2 * (len(coins) - 1)) / spread))


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")], ids=str)
def test_a_probability_outside_zero_and_one_is_refused(probability):
    with pytest.raises(ValueError, match="probability"):
        SecureRandom().bernoulli(probability, 3)


@pytest.mark.parametrize("q", [0.1, 1 / 3, 0.999, 2.0**-40])
def test_a_coin_has_the_exact_threshold_of_its_probability(q, monkeypatch):
    """P[True] = ⌊q 2⁶⁴⌋ 2⁻⁶⁴: one word more or less would be another rate than is accounted for."""
    threshold = int(Fraction(q) * 2**64)
    words = np.array([threshold - 1, threshold], np.uint64)
    monkeypatch.setattr(SecureRandom, "words", lambda self, count: words)
    assert SecureRandom().bernoulli(q, 2).tolist() == [True, False]


def test_every_generator_alive_gets_a_fresh_key_in_a_fork():
    streams = [SecureRandom() for _ in range(3)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"".join(stream.words(2).tobytes() for stream in streams))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reader, 4096), np.uint64)
    ours = np.concatenate([stream.words(2) for stream in streams])
    assert len(set(theirs.tolist()) | set(ours.tolist())) == 12


def test_no_nonce_comes_twice_in_ten_thousand_draws():
    random = SecureRandom()
    assert len({random.stream()[-3:].tobytes() for _ in range(10_000)}) == 10_000
