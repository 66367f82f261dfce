"""Planted bugs of the noise, and of the secret randomness that it is made of."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "sigma-0.97",
        "the noise has 0.97 of its standard deviation",
        "dpengine/mechanism/noise.py",
        "noise_multiplier * clipped_sum.sensitivity\n",
        "0.97 * noise_multiplier * clipped_sum.sensitivity\n",
        "tests/mechanism/test_noise.py::"
        "test_the_scale_is_multiplier_times_sensitivity_and_not_three_per_cent_off",
    ),
    Mutant(
        "noise-of-one",
        "the noise is hard-coded to standard deviation 1 (FlashDP)",
        "dpengine/mechanism/noise.py",
        "noise_multiplier * clipped_sum.sensitivity\n",
        "1.0\n",
        "tests/mechanism/test_noise.py::"
        "test_the_scale_is_multiplier_times_sensitivity_and_not_three_per_cent_off",
    ),
    Mutant(
        "sensitivity-over-batch",
        "noise for the sensitivity of the mean is added to the sum (Backprop-Clipping)",
        "dpengine/mechanism/noise.py",
        "noise_multiplier * clipped_sum.sensitivity\n",
        "noise_multiplier * clipped_sum.sensitivity / divisor\n",
        "tests/mechanism/test_noise.py::test_the_noise_is_added_to_the_sum_and_both_are_divided",
    ),
    Mutant(
        "noise-by-average",
        "the noise follows the size of the sum and not its sensitivity",
        "dpengine/mechanism/noise.py",
        "noise_multiplier * clipped_sum.sensitivity\n",
        "noise_multiplier * float(values.norm()) / divisor\n",
        "tests/mechanism/test_noise.py::"
        "test_the_scale_is_multiplier_times_sensitivity_and_not_three_per_cent_off",
    ),
    Mutant(
        "rest-without-noise",
        "all values after the first piece get no noise",
        "dpengine/mechanism/noise.py",
        "    for piece, part in zip(values.split(_PIECE), released.split(_PIECE), strict=True):\n",
        "    released.copy_(values)\n"
        "    for piece, part in ((values[:_PIECE], released[:_PIECE]),):\n",
        "tests/mechanism/test_noise.py::test_every_part_is_noised_with_mean_zero_and_normal_law",
    ),
    Mutant(
        "tensor-without-noise",
        "the last trained tensor gets its sum without noise",
        "dpengine/optim/optimizer.py",
        "        self._zero_sums()\n        self.clipping = noised.clipping\n",
        "        size = self._source.parameters[-1].numel()\n"
        "        noised.mean[-size:] = self._answers[0].values[-size:] / self.expected_batch_size\n"
        "        self._zero_sums()\n        self.clipping = noised.clipping\n",
        "tests/optim/test_optimizer.py::test_an_empty_batch_is_a_noise_only_step",
    ),
    Mutant(
        "noise-in-the-first-step-only",
        "noise is added only where none was before (fastDP)",
        "dpengine/optim/optimizer.py",
        "                self.noise_multiplier,\n                self.expected",
        "                self.noise_multiplier * (self.num_steps == 0),\n"
        "                self.expected",
        "tests/optim/test_optimizer.py::test_the_noise_has_the_scale_sigma_c_over_expected_size",
    ),
    Mutant(
        "one-noise-for-all-pieces",
        "the same normals are added to every piece",
        "dpengine/mechanism/noise.py",
        "    for piece, part in zip(values.split(_PIECE), released.split(_PIECE), strict=True):\n",
        "    from .noise import normals as draw\n"
        "    z = draw(random, _PIECE)\n"
        "    def normals(random, n):\n"
        "        return z[:n]\n"
        "    for piece, part in zip(values.split(_PIECE), released.split(_PIECE), strict=True):\n",
        "tests/mechanism/test_noise.py::test_no_noise_value_occurs_twice_in_a_call_or_in_two",
    ),
    Mutant(
        "reused-nonce",
        "every draw uses the first nonce (jax-chacha-prng: repeated states)",
        "dpengine/mechanism/secure_random.py",
        "itertools.count()",
        "itertools.repeat(0)",
        "tests/mechanism/test_noise.py::test_no_noise_value_occurs_twice_in_a_call_or_in_two",
    ),
    Mutant(
        "nonce-captured",
        "a stream for a kernel has a constant nonce, as one captured in a graph would",
        "dpengine/mechanism/secure_random.py",
        'struct.pack("<I", 0) + self._next_nonce()',
        "bytes(16)",
        "tests/mechanism/test_secure_random.py::test_a_stream_is_the_key_block_zero_and_a_nonce_of_its_own",
    ),
    Mutant(
        "seeded-key",
        "the key follows the global seed (Opacus without secure_mode)",
        "dpengine/mechanism/secure_random.py",
        "os.urandom(32)",
        "np.random.bytes(32)",
        "tests/mechanism/test_secure_random.py::test_seeds_have_no_effect",
    ),
    Mutant(
        "key-of-32-bits",
        "the key has 32 bits of entropy (jax_privacy's default has 31)",
        "dpengine/mechanism/secure_random.py",
        "os.urandom(32)",
        "os.urandom(4) * 8",
        "tests/mechanism/test_secure_random.py::test_the_key_comes_from_the_operating_system_with_256_bits",
    ),
    Mutant(
        "key-copied",
        "a copy has the key of the original",
        "dpengine/mechanism/secure_random.py",
        "        return SecureRandom, ()\n",
        '        return SecureRandom, (), {"_key": self._key}\n',
        "tests/mechanism/test_secure_random.py::test_no_two_draws_of_any_copies_share_a_word",
    ),
    Mutant(
        "key-saved",
        "a pickle holds the key",
        "dpengine/mechanism/secure_random.py",
        "        return SecureRandom, ()\n",
        '        return SecureRandom, (), {"_old_key": self._key}\n',
        "tests/mechanism/test_secure_random.py::test_neither_repr_nor_pickle_holds_the_key",
    ),
    Mutant(
        "key-forked",
        "a forked process goes on with the key and the nonces of its parent",
        "dpengine/mechanism/secure_random.py",
        "    os.register_at_fork(after_in_child=_rekey_after_fork)\n",
        "    pass\n",
        "tests/mechanism/test_secure_random.py::test_a_forked_child_shares_no_word_with_its_parent",
    ),
    Mutant(
        "coins-of-32-bits",
        "sampling coins have 32 bits, so that the rate is rounded (Opacus: 24 bits)",
        "dpengine/mechanism/secure_random.py",
        "return words < np.uint64(threshold)",
        "return (words >> np.uint64(32)) <= np.uint64(threshold >> 32)",
        "tests/mechanism/test_secure_random.py::"
        "test_a_coin_is_true_for_exactly_the_share_of_words_that_was_asked_for",
    ),
    Mutant(
        "coin-rounded-up",
        "a coin's probability is rounded up and not down",
        "dpengine/mechanism/secure_random.py",
        "int(probability * 2.0**64)",
        "int(np.ceil(probability * 2.0**64))",
        "tests/mechanism/test_secure_random.py::test_probability_one_is_everyone_and_zero_is_no_one",
    ),
    Mutant(
        "tail-of-tl.randn",
        "uniforms are at least 1e-7, so that no normal passes 5.68 (tl.randn)",
        "kernels/reference.py",
        "(-2 * ((uniform[:4] + 1) * 2.0**-64).log()).sqrt()",
        "(-2 * ((uniform[:4] + 1) * 2.0**-64).clamp(min=1e-7).log()).sqrt()",
        "tests/mechanism/test_secure_random.py::"
        "test_all_zero_words_reach_the_stated_nine_standard_deviations",
    ),
    Mutant(
        "torch.randn",
        "the noise comes from torch's generator, which a seed repeats",
        "dpengine/mechanism/noise.py",
        "    return ops.gaussians(words.reshape(n_blocks, 8))[:count]\n",
        "    return torch.randn(count, dtype=torch.float64)\n",
        "tests/mechanism/test_noise.py::test_a_seed_does_not_repeat_the_noise",
    ),
    Mutant(
        "noise-lattice",
        "the low bits of a noised sum tell the sum beneath",
        "dpengine/mechanism/noise.py",
        "        part.div_(step).round_().add_(whole).mul_(step)\n",
        "        part.add_(whole * step)\n",
        "tests/mechanism/test_noise.py::test_a_noised_sum_lies_on_a_public_grid_whatever_the_sum",
    ),
    Mutant(
        "kernel-noise-0.97",
        "the noise of the kernel has 0.97 of its standard deviation",
        "kernels/gpu/noise.py",
        "(value + noise_stddev * z) / divisor",
        "(value + 0.97 * noise_stddev * z) / divisor",
        "tests/kernels/test_triton.py::"
        "test_normals_agree_with_the_specification_to_four_units_in_the_last_place",
    ),
    Mutant(
        "kernel-pairs-share-words",
        "two pairs of normals of the kernel are made of the same words",
        "kernels/gpu/noise.py",
        "_gaussian_pair(w1, w5)",
        "_gaussian_pair(w0, w4)",
        "tests/kernels/test_triton.py::"
        "test_normals_agree_with_the_specification_to_four_units_in_the_last_place",
    ),
    Mutant(
        "kernel-ignores-nonce",
        "the kernel reads no nonce, so that all draws under a key are alike",
        "kernels/gpu/noise.py",
        "n0 = tl.load(stream_ptr + 9).to(tl.uint32, bitcast=True) + zero",
        "n0 = zero.to(tl.uint32)",
        "tests/kernels/test_triton.py::test_words_are_those_of_rfc_8439_section_2_3_2",
    ),
    Mutant(
        "four-rounds",
        "the kernel's ChaCha has 8 rounds and not 20",
        "kernels/gpu/noise.py",
        "for _ in range(10):",
        "for _ in range(4):",
        "tests/kernels/test_triton.py::test_words_are_those_of_rfc_8439_section_2_3_2",
    ),
    Mutant(
        "count-without-noise",
        "the count of adaptive clipping is released as it is",
        "dpengine/mechanism/step.py",
        "        noise.noisy_mean(answer, multiplier, expected_batch_size, random)\n",
        "        noise.noisy_mean(answer, 0.0, expected_batch_size, random)\n",
        "tests/optim/test_optimizer.py::test_an_adaptive_step_noises_sum_and_count",
    ),
    Mutant(
        "count-for-free",
        "the sum beside an adaptive count gets no more noise than without",
        "dpengine/mechanism/adaptive.py",
        "        return self.sum_noise_multiplier(noise_multiplier), self.count_noise_multiplier\n",
        "        return noise_multiplier, self.count_noise_multiplier\n",
        "tests/optim/test_optimizer.py::test_an_adaptive_step_noises_sum_and_count",
    ),
    Mutant(
        "count-of-one",
        "a record moves the count by 1 where the noise is for one half",
        "dpengine/mechanism/adaptive.py",
        ".double() - 0.5\n",
        ".double()\n",
        "tests/mechanism/test_adaptive.py::"
        "test_the_count_is_half_the_records_within_the_bound_less_half_of_those_beyond",
    ),
    Mutant(
        "multiplier-rounded-down",
        "a noise multiplier is rounded to nearest and not up (Google dp: rounded down)",
        "dpengine/mechanism/adaptive.py",
        "        while Fraction(multiplier) ** -2 > squared:\n"
        "            multiplier = math.nextafter(multiplier, math.inf)\n",
        "",
        "tests/mechanism/test_adaptive.py::"
        "test_the_noise_multiplier_of_the_sum_is_rounded_up_from_its_formula",
    ),
)
