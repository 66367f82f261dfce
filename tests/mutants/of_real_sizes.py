"""Planted bugs that are none at small sizes and in the first steps."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "coins-above-the-rate",
        "coins are tossed at 1.002 times the rate that is accounted for",
        "dpengine/secure_random.py",
        "int(probability * 2.0**64)\n",
        "int(min(1, 1.002 * probability) * 2.0**64)\n",
        "tests/test_secure_random.py::test_a_coin_has_the_exact_threshold_of_its_probability",
    ),
    Mutant(
        "fork-rekeys-the-newest",
        "after a fork only the newest generator has a key of its own",
        "dpengine/secure_random.py",
        "    for stream in _LIVE:\n        stream._rekey()\n",
        "    for stream in list(_LIVE)[-1:]:\n        stream._rekey()\n",
        "tests/test_secure_random.py::test_every_generator_alive_gets_a_fresh_key_in_a_fork",
    ),
    Mutant(
        "nonces-repeat",
        "a nonce comes again after 4,096 draws",
        "dpengine/secure_random.py",
        '        return struct.pack("<QI", next(self._draws), 0)\n',
        '        return struct.pack("<QI", next(self._draws) % 4096, 0)\n',
        "tests/test_secure_random.py::test_no_nonce_comes_twice_in_ten_thousand_draws",
    ),
    Mutant(
        "large-sums-without-noise",
        "values beyond the first 2^20 get no noise",
        "dpengine/noise.py",
        "    for piece, part in zip(values.split(_PIECE), released.split(_PIECE), strict=True):\n",
        "    released.copy_(values)\n"
        "    pieces = zip(values.split(_PIECE), released.split(_PIECE), strict=True)\n"
        "    for piece, part in list(pieces)[:16]:\n",
        "tests/test_noise.py::test_every_value_of_a_large_sum_is_noised",
    ),
    Mutant(
        "norms-of-64-blocks",
        "squared norms stop after 64 blocks",
        "kernels/reference.py",
        "    return _block_sq_norms(per_record_grads).sum(1)\n",
        "    return _block_sq_norms(per_record_grads)[:, :64].sum(1)\n",
        "tests/kernels/test_reference_clipping.py::test_norms_are_of_all_blocks",
    ),
    Mutant(
        "noise-of-the-next-bound",
        "adaptive clipping noises the sum by the bound of the next batch",
        "dpengine/optimizer.py",
        "        self._noise_variance = (noise_multiplier * mode.sensitivity / divisor) ** 2\n",
        "        self._sum = ClippedSum(self._sum.values, self.clipping.sensitivity)\n"
        "        self._noise_variance = (noise_multiplier * mode.sensitivity / divisor) ** 2\n",
        "tests/test_adaptive.py::test_the_sum_is_noised_by_the_bound_that_clipped_it",
    ),
    Mutant(
        "noise-of-the-last-step",
        "a hundredth of a step's noise is that of the step before",
        "dpengine/optimizer.py",
        "        return noise.noisy_mean(self._sum, noise_multiplier, divisor, self._random)\n",
        "        noisy = noise.noisy_mean(self._sum, noise_multiplier, divisor, self._random)\n"
        "        last, fresh = vars(self).get('_last', 0), noisy - self._sum.values / divisor\n"
        "        self._last = fresh\n"
        "        return noisy + 0.01 * last\n",
        "tests/test_real_sizes.py::test_every_part_of_a_large_model_is_noised_afresh_in_every_step",
    ),
    Mutant(
        "noise-of-a-thousand-steps",
        "there is no noise after the first thousand steps",
        "dpengine/optimizer.py",
        "        noise_multiplier = self.noise_multiplier\n",
        "        noise_multiplier = self.noise_multiplier * (self.num_steps < 1000)\n",
        "tests/test_real_sizes.py::test_the_thousandth_step_is_noised_as_the_first",
    ),
    Mutant(
        "whole-pieces-noised",
        "the last piece of a large sum, which is not whole, gets no noise",
        "dpengine/noise.py",
        "        torch.add(piece.sub(whole, alpha=step), noise, alpha=noise_stddev, out=part)\n",
        "        is_whole = len(piece) == min(_PIECE, len(values))\n"
        "        spread = noise_stddev * is_whole\n"
        "        torch.add(piece.sub(whole, alpha=step), noise, alpha=spread, out=part)\n",
        "tests/test_noise.py::test_every_value_of_a_large_sum_is_noised",
    ),
    Mutant(
        "words-of-a-million",
        "a draw of more than 2^20 words repeats its first ones",
        "dpengine/secure_random.py",
        "        return chacha20_words(self._key, self._next_nonce(), 0, count)\n",
        "        words = chacha20_words(self._key, self._next_nonce(), 0, min(count, 2**20))\n"
        "        return np.resize(words, count)\n",
        "tests/test_real_sizes.py::test_no_word_comes_twice_in_a_draw_of_two_million",
    ),
    Mutant(
        "coins-of-a-thousand-steps",
        "the coins of a step are those of the step 1,024 before",
        "dpengine/sampling.py",
        "        for _ in range(self._num_steps):\n            self._reserve()\n"
        "            coins = self._random.bernoulli(self._sampling_rate, len(self._units))\n",
        "        tossed = {}\n"
        "        for step in range(self._num_steps):\n            self._reserve()\n"
        "            coins = self._random.bernoulli(self._sampling_rate, len(self._units))\n"
        "            coins = tossed.setdefault(step % 1024, coins)\n",
        "tests/test_real_sizes.py::test_no_two_of_five_thousand_steps_toss_the_same_coins",
    ),
    Mutant(
        "unit-at-a-late-border",
        "beyond 64 physical batches the first unit of each is in the one before as well",
        "dpengine/sampling.py",
        "indices[start : start + physical_batch_size] for start in starts]",
        "indices[start : start + physical_batch_size + (start > 64 * physical_batch_size)]\n"
        "        for start in starts\n    ]",
        "tests/test_real_sizes.py::test_a_logical_batch_of_hundreds_of_passes_holds_each_unit_once",
    ),
    Mutant(
        "late-batch-added-twice",
        "beyond 64 physical batches each is added to the sum twice",
        "dpengine/optimizer.py",
        "        self._sum = packed if self._sum is None else clipping.join(self._sum, packed)\n",
        '        self._n = 0 if self._sum is None else vars(self).get("_n", 0) + 1\n'
        "        self._sum = packed if self._sum is None else clipping.join(self._sum, packed)\n"
        "        self._sum = clipping.join(self._sum, packed) if self._n > 64 else self._sum\n",
        "tests/test_real_sizes.py::test_a_hundred_physical_batches_are_one_sum_of_clipped_records",
    ),
    Mutant(
        "factors-of-64-blocks",
        "columns beyond the first 64 blocks are not clipped",
        "kernels/reference.py",
        "        sums.append(torch.mv(rows.mT, weights))\n",
        "        late = torch.full_like(weights, loss_scale)\n"
        "        sums.append(torch.mv(rows.mT, weights if len(sums) < 64 else late))\n",
        "tests/test_real_sizes.py::test_every_block_of_a_large_slab_is_clipped_and_selected",
    ),
    Mutant(
        "selection-of-64-blocks",
        "bad records and padding are selected away in the first 64 blocks alone",
        "kernels/reference.py",
        "        rows.view(torch.int64).bitwise_and_(kept_bits)\n",
        "        rows.view(torch.int64).bitwise_and_(kept_bits if len(sums) < 64 else -1)\n",
        "tests/test_real_sizes.py::test_every_block_of_a_large_slab_is_clipped_and_selected",
    ),
    Mutant(
        "last-block-outside-the-norm",
        "the last block of many, which is not whole, is outside the norm",
        "kernels/reference.py",
        "    return _joined(norms, 1).square()\n",
        "    return _joined(norms[:-1] if len(norms) > 1 else norms, 1).square()\n",
        "tests/kernels/test_reference_clipping.py::"
        "test_a_slab_of_many_blocks_has_the_sums_and_norms_of_its_columns",
    ),
    Mutant(
        "selection-of-64-records",
        "in products of full weights bad records beyond the first 64 are kept",
        "kernels/reference.py",
        "    products = _products_one_by_one(left, right, len(weights))\n"
        "    for product, weight, kept in",
        "    products = _products_one_by_one(left, right, len(weights))\n"
        "    keep = keep | (torch.arange(len(keep), device=keep.device) >= 64)\n"
        "    for product, weight, kept in",
        "tests/test_real_sizes.py::test_every_record_of_a_large_batch_is_selected_in_a_product",
    ),
    Mutant(
        "charges-of-4096-steps",
        "steps beyond 4,096 are not charged",
        "dpengine/dropin/accountant.py",
        "        self._runs[self._run][mechanism] += 1\n",
        "        counts = self._runs[self._run]\n"
        "        counts[mechanism] += counts[mechanism] < 4096\n",
        "tests/test_real_sizes.py::test_five_thousand_charges_cost_five_thousand_steps",
    ),
    Mutant(
        "blocks-charged-short",
        "a line of a long run's ledger charges one step, and grants its block",
        "dpengine/ledger.py",
        "            self._charge(min(block_size(self.plan), self.remaining), bound)\n"
        "        self._open_steps -= 1\n",
        "            self._charge(1, bound)\n"
        "            self._open_steps = min(block_size(self.plan), self.remaining)\n"
        "        self._open_steps -= 1\n",
        "tests/test_ledger.py::test_attempts_with_blocks_charge_what_they_draw_and_less_than_a_block"
        "_more",
    ),
    Mutant(
        "pixels-by-the-part",
        "images of a large data set are centred on the mean of their part",
        "dpengine/data.py",
        "    fitted = [_fit(chunk, channels, size) for chunk in images.split(4096)]\n",
        "    means = [c.mean() if len(images) > 4096 else 0 for c in images.split(4096)]\n"
        "    parts = zip(images.split(4096), means, strict=True)\n"
        "    fitted = [_fit(chunk - mean, channels, size) for chunk, mean in parts]\n",
        "tests/test_real_sizes.py::test_one_image_among_ten_thousand_is_what_it_is_alone",
    ),
    Mutant(
        "kernel-noise-of-16-programs",
        "values beyond the first 16 programs of the noise kernel get none",
        "kernels/gpu/noise.py",
        "(value + noise_stddev * z) / divisor",
        "(value + tl.where(tl.program_id(0) < 16, noise_stddev, 0.0) * z) / divisor",
        "tests/kernels/test_triton.py::test_the_noise_of_many_programs_is_that_of_the_specification",
    ),
    Mutant(
        "kernel-norms-of-64-blocks",
        "the kernel's squared norms stop after 64 blocks",
        "kernels/gpu/sq_norms.py",
        "mask=e < E, other=0.0)",
        "mask=e < min(E, 64 * BLOCK), other=0.0)",
        "tests/kernels/test_triton.py::"
        "test_norms_and_clipped_sums_of_many_programs_are_of_all_columns_and_records",
    ),
    Mutant(
        "kernel-factors-of-1024-programs",
        "columns beyond the first 1,024 programs of the kernel are not clipped",
        "kernels/gpu/clip_and_sum.py",
        "        grads = tl.load(\n",
        "        weight = tl.where(tl.program_id(0) < 1024, weight, loss_scale)\n"
        "        grads = tl.load(\n",
        "tests/kernels/test_triton.py::"
        "test_norms_and_clipped_sums_of_many_programs_are_of_all_columns_and_records",
    ),
    Mutant(
        "kernel-selection-of-64-records",
        "the kernel keeps all records beyond the first 64",
        "kernels/gpu/clip_and_sum.py",
        "        kept = kept & is_finite(sq_norm)\n",
        "        kept = (kept & is_finite(sq_norm)) | ((n >= 64) & (n < N))\n",
        "tests/kernels/test_triton.py::"
        "test_norms_and_clipped_sums_of_many_programs_are_of_all_columns_and_records",
    ),
    Mutant(
        "noise-of-the-lowest-bound",
        "the sum is noised by the lowest bound that adaptive clipping has had",
        "dpengine/optimizer.py",
        "        return noise.noisy_mean(self._sum, noise_multiplier, divisor, self._random)\n",
        '        self._low = min(mode.sensitivity, vars(self).get("_low", mode.sensitivity))\n'
        "        total = ClippedSum(self._sum.values, self._low)\n"
        "        return noise.noisy_mean(total, noise_multiplier, divisor, self._random)\n",
        "tests/test_real_sizes.py::"
        "test_a_bound_that_falls_and_rises_is_that_of_each_steps_sum_and_noise",
    ),
)
