"""Secret randomness: ChaCha20 keyed by the operating system, and what is drawn from it.

Everything that must stay secret for the guarantee to hold is drawn here: the DP noise, the
sampling coins, and the timesteps and diffusion noise of the private records. Keys are never
stored, logged, copied or derived from a seed, so no run can be repeated, and no two can share
noise.
"""

import itertools
import os
import struct
import weakref

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

MAX_GAUSSIAN = float(np.sqrt(2 * 64 * np.log(2)))
"""Reach R of Box-Muller on 64-bit words: no normal is further out than this (9.42)."""

_BLOCK_BYTES = 64
_MAX_BLOCKS = 2**32


def chacha20_words(key: bytes, nonce: bytes, counter: int, count: int) -> np.ndarray:
    """Keystream of ChaCha20 (RFC 8439, section 2.4) as ``count`` little-endian 64-bit words.

    key: 32 bytes; nonce: 12 bytes; counter: number of the first 64-byte block. uint64 [count].
    """
    if counter < 0 or counter + -(-8 * count // _BLOCK_BYTES) > _MAX_BLOCKS:
        raise ValueError(
            f"counter and count must stay within 2**32 blocks of 64 bytes, got counter {counter} "
            f"and {count} words; draw fewer words under one nonce"
        )
    cipher = Cipher(ChaCha20(key, struct.pack("<I", counter) + nonce), mode=None)
    return np.frombuffer(cipher.encryptor().update(bytes(8 * count)), dtype="<u8")


class SecureRandom:
    """A stream of secret random numbers under a fresh 256-bit key from the operating system.

    Each draw uses a nonce of its own, so no keystream block is ever used twice. A copy, an
    unpickled instance and the child of a fork get a fresh key. There is no seed and no state to
    save, by design.
    """

    def __init__(self) -> None:
        self._rekey()
        _LIVE.add(self)

    def _rekey(self) -> None:
        self._key = os.urandom(32)
        # next() on a counter is atomic: threads cannot draw under one nonce.
        self._draws = itertools.count()

    def _next_nonce(self) -> bytes:
        return struct.pack("<QI", next(self._draws), 0)

    def words(self, count: int) -> np.ndarray:
        """``count`` independent uniform 64-bit words.  uint64 [count]"""
        return chacha20_words(self._key, self._next_nonce(), 0, count)

    def uniform(self, count: int) -> np.ndarray:
        """Independent uniforms in [0, 1), multiples of 2⁻⁵³.  float64 [count]"""
        return (self.words(count) >> np.uint64(11)) * 2.0**-53

    def stream(self) -> np.ndarray:
        """A fresh ChaCha20 state behind its constants, for one draw elsewhere.  int32 [12]

        Key, block counter 0, and a nonce that no other draw has.
        """
        state = self._key + struct.pack("<I", 0) + self._next_nonce()
        return np.frombuffer(state, dtype="<i4").copy()

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """Independent coins, each True with ``probability`` rounded down to 64 bits.  [count]

        Rounding down keeps the inclusion probability at most the one that is accounted for.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must lie between 0 and 1, got {probability}")
        words, threshold = self.words(count), int(probability * 2.0**64)
        if threshold == 2**64:
            return np.ones(count, dtype=bool)
        return words < np.uint64(threshold)

    def __repr__(self) -> str:
        return "SecureRandom()"

    def __reduce__(self) -> tuple:
        # copy, deepcopy and pickle all come through here
        return SecureRandom, ()


_LIVE: weakref.WeakSet[SecureRandom] = weakref.WeakSet()


def _rekey_after_fork() -> None:
    for stream in _LIVE:
        stream._rekey()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_rekey_after_fork)
