"""Planted bugs of norms, clip factors and clipped sums."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "bound-1.03",
        "records are clipped to 1.03 C",
        "kernels/reference.py",
        "limits = torch.full_like(sq_norms, max_grad_norm * (1 - 2.0**-22))",
        "limits = torch.full_like(sq_norms, 1.03 * max_grad_norm * (1 - 2.0**-22))",
        "tests/mechanism/test_clipping.py::test_groups_that_are_all_clipped_reach_their_bounds_and_no_more",
    ),
    Mutant(
        "bound-ignored",
        "clipping ignores max_grad_norm, which the noise follows (Opacus 664)",
        "dpengine/mechanism/clipping.py",
        "        bound = self.max_grad_norm\n        values = _clip_and_sum(\n",
        "        bound = 1.0\n        values = _clip_and_sum(\n",
        "tests/mechanism/test_clipping.py::test_the_sum_equals_a_float64_loop_over_records",
    ),
    Mutant(
        "squared-norm",
        "the factor is C over the squared norm (FlashDP)",
        "kernels/reference.py",
        "limits.div_(sq_norms.sqrt() + gamma)",
        "limits.div_(sq_norms + gamma)",
        "tests/mechanism/test_clipping.py::test_groups_that_are_all_clipped_reach_their_bounds_and_no_more",
    ),
    Mutant(
        "no-margin",
        "the factor leaves no room for the rounding of norm and product",
        "kernels/reference.py",
        "max_grad_norm * (1 - 2.0**-22)",
        "max_grad_norm",
        "tests/mechanism/test_clipping.py::test_records_of_corner_values_are_bounded_in_rational_arithmetic",
    ),
    Mutant(
        "factor-rounded-to-nearest",
        "clip factors are rounded to nearest and not down",
        "kernels/reference.py",
        "    return (wanted.view(torch.int64) & -(2**29)).view(torch.float64)\n",
        "    return wanted.float().double()\n",
        "tests/kernels/test_reference_clipping.py::"
        "test_factors_below_the_normal_float32_range_do_not_round_upward",
    ),
    Mutant(
        "norms-in-float32",
        "squares are summed in float32, and small ones are lost",
        "kernels/reference.py",
        "torch.linalg.vector_norm(block, dim=1, keepdim=True, dtype=torch.float64)",
        "torch.linalg.vector_norm(block.float(), dim=1, keepdim=True).double()",
        "tests/kernels/test_reference_clipping.py::"
        "test_equal_elements_of_any_size_lose_no_more_than_the_stated_rounding",
    ),
    Mutant(
        "kernel-norms-in-float32",
        "the kernels sum squares in float32",
        "kernels/gpu/tiles.py",
        "    wide = values.to(tl.float64)\n",
        "    wide = values\n",
        "tests/kernels/test_layouts.py::"
        "test_gradients_are_rounded_into_a_narrow_slab_and_squared_as_stored[lora_side_b-whole]",
    ),
    Mutant(
        "norm-before-rounding",
        "the gradient that is measured is that before it is rounded to bfloat16",
        "kernels/reference.py",
        "    return grad if out is None else out.copy_(grad)\n",
        "    return grad if out is None else (out.copy_(grad), grad)[1]\n",
        "tests/kernels/test_reference_per_record.py::"
        "test_squared_norms_are_those_of_the_values_as_stored",
    ),
    Mutant(
        "kernel-norm-of-rounded-values",
        "the kernel squares gradients rounded to bfloat16, and clips them as they are stored",
        "kernels/gpu/sq_norms.py",
        "sum_of_squares(grads))",
        "sum_of_squares(grads.to(tl.bfloat16)))",
        "tests/kernels/test_triton.py::"
        "test_a_kernel_is_at_most_twice_as_wrong_as_eager_pytorch[sq_norms-odd]",
    ),
    Mutant(
        "mask-after-nan",
        "bad records and padding are multiplied by 0, not selected away (Opacus 1.6: NaN)",
        "kernels/reference.py",
        "        rows.view(torch.int64).bitwise_and_(kept_bits)\n",
        "        rows.mul_(kept_bits.neg())\n",
        "tests/mechanism/test_clipping.py::"
        "test_a_bad_record_contributes_exactly_zero_and_leaves_the_others_alone",
    ),
    Mutant(
        "product-mask-after-nan",
        "bad records are multiplied by 0 in the product of full weights",
        "kernels/reference.py",
        "total += torch.where(kept, weight * product.double(), 0.0)",
        "total += kept * weight * product.double()",
        "tests/kernels/test_reference_products.py::"
        "test_a_record_that_is_not_kept_changes_no_bit_of_the_others",
    ),
    Mutant(
        "nan-to-num",
        "NaN in a record is replaced by 0 and the rest is kept (fastDP), so its norm is unknown",
        "kernels/reference.py",
        "    kept_bits = (keep & (scaled < torch.inf)).long().neg_()[:, None]\n",
        "    kept_bits = keep.long().neg_()[:, None]\n",
        "tests/mechanism/test_clipping.py::"
        "test_a_bad_record_contributes_exactly_zero_and_leaves_the_others_alone",
    ),
    Mutant(
        "bad-in-one-layer",
        "per-layer clipping keeps the other layers of a bad record",
        "dpengine/mechanism/clipping.py",
        "keep = is_record & (torch.stack(norms).sum(0) < math.inf)",
        "keep = is_record",
        "tests/mechanism/test_clipping.py::"
        "test_a_bad_record_contributes_exactly_zero_and_leaves_the_others_alone",
    ),
    Mutant(
        "scale-after-norm",
        "a loss scale is undone after the norm was taken",
        "kernels/reference.py",
        "    scaled = sq_norms * loss_scale**2\n    weights = clip_factors(",
        "    scaled = sq_norms\n    weights = clip_factors(",
        "tests/mechanism/test_clipping.py::test_the_sum_equals_a_float64_loop_over_records",
    ),
    Mutant(
        "scale-not-undone",
        "the gradients of a scaled loss are clipped as they are (GradScaler with Opacus)",
        "dpengine/optim/optimizer.py",
        "return rows / self._source.draws_per_record / self.loss_scale",
        "return rows / self._source.draws_per_record",
        "tests/optim/test_opacus_bugs.py::"
        "test_a_scale_is_undone_before_the_norm_and_none_may_follow_overflows",
    ),
    Mutant(
        "mean-for-sum",
        "the gradients of a mean loss are clipped as if they were a record's own",
        "dpengine/optim/optimizer.py",
        'rows = n_rows if self.loss_reduction == "mean" else 1',
        "rows = 1",
        "tests/optim/test_optimizer.py::test_a_step_without_noise_is_the_clipped_sum_over_its_constant",
    ),
    Mutant(
        "mean-over-kept",
        "the sum is divided by the number of records, which is private",
        "kernels/reference.py",
        "    return _joined(sums, 0)\n",
        "    return _joined(sums, 0) / keep.sum().clamp(min=1)\n",
        "tests/mechanism/test_clipping.py::test_the_sum_equals_a_float64_loop_over_records",
    ),
    Mutant(
        "per-layer-without-root",
        "each of L layers gets the whole bound, without √L (FlashDP)",
        "dpengine/mechanism/clipping.py",
        "bound = self.max_grad_norm / math.sqrt(n_groups)",
        "return self.max_grad_norm",
        "tests/mechanism/test_clipping.py::test_the_bounds_of_the_groups_compose_to_the_sensitivity",
    ),
    Mutant(
        "group-bound-rounded",
        "the bounds of layers are rounded to nearest, and compose to more than C",
        "dpengine/mechanism/clipping.py",
        "            bound = math.nextafter(bound, 0)\n",
        "            break\n",
        "tests/mechanism/test_clipping.py::test_the_bounds_of_the_groups_compose_to_the_sensitivity",
    ),
    Mutant(
        "automatic-without-gamma-bound",
        "automatic clipping scales to C times the square root of the norm",
        "kernels/reference.py",
        "limits.div_(sq_norms.sqrt() + gamma)",
        "limits.div_(sq_norms.sqrt().add(gamma).sqrt() if gamma else sq_norms.sqrt())",
        "tests/mechanism/test_clipping.py::test_the_sum_equals_a_float64_loop_over_records",
    ),
    Mutant(
        "padding-is-a-record",
        "padding is clipped and summed like a record",
        "dpengine/capture/capture.py",
        "is_record=numbers < slot_set.notice.n_records.reveal()",
        "is_record=numbers < slot_set.n_slots",
        "tests/optim/test_optimizer.py::test_padding_and_bad_records_change_no_bit_of_the_update",
    ),
    Mutant(
        "some-tensors-outside-the-norm",
        "the norm leaves out the tensors that products are kept of",
        "dpengine/mechanism/clipping.py",
        "norms += [grads.sq_norms() for grads in per_record_grads if isinstance(grads, Product)]",
        "norms = norms or [grads.sq_norms() for grads in per_record_grads]",
        "tests/capture/test_norm_only.py::test_the_flat_update_is_that_of_single_records_in_float64",
    ),
    Mutant(
        "gram-without-cross-terms",
        "the ghost norm adds up rows, without the products of different rows",
        "kernels/reference.py",
        "gram = ((l @ l.mT) * (r @ r.mT)).sum((1, 2))",
        "gram = (l.square().sum(2) * r.square().sum(2)).sum(1)",
        "tests/kernels/test_reference_gram.py::test_gram_norms_bound_ordinary_products",
    ),
    Mutant(
        "gram-without-bound",
        "the ghost norm is taken as exact, though rounding can hide part of the product",
        "kernels/reference.py",
        "    return torch.where(finite, (exact + residue).square(), torch.inf)\n",
        "    return torch.where(finite, gram, torch.inf)\n",
        "tests/kernels/test_reference_gram.py::"
        "test_gram_norms_bound_what_is_left_of_draws_that_cancel",
    ),
    Mutant(
        "kernel-gram-without-cross-terms",
        "the ghost norm of the kernel leaves out pairs of different blocks",
        "kernels/gpu/gram.py",
        "tl.store(gram_ptr + (n * blocks + i) * blocks + j, tl.sum(tl.ravel(products)))",
        "tl.store(\n        gram_ptr + (n * blocks + i) * blocks + j,\n"
        "        tl.where(i == j, tl.sum(tl.ravel(products)), 0.0),\n    )",
        "tests/kernels/test_triton.py::"
        "test_a_kernel_is_at_most_twice_as_wrong_as_eager_pytorch[gram_sq_norms-odd]",
    ),
    Mutant(
        "kernel-counts-rows-twice",
        "rows beyond the last wrap around and count twice (FlashDP)",
        "kernels/gpu/tiles.py",
        "    mask = (q[:, None] < K * T) & (f[None, :] < F)\n",
        "    offsets = row_offsets(stride_row, stride_t, n, q % (K * T), K, T, FLAT)\n"
        "    mask = (q[:, None] >= 0) & (f[None, :] < F)\n",
        "tests/kernels/test_triton.py::"
        "test_a_kernel_is_at_most_twice_as_wrong_as_eager_pytorch[lora_side_b-odd]",
    ),
    Mutant(
        "kernel-keeps-what-was-there",
        "the sum of clipped products does not begin at zero (FlashDP: an empty buffer)",
        "kernels/gpu/weighted_product.py",
        "tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float64)",
        "tl.full((BLOCK_D, BLOCK_L), 1.0, dtype=tl.float64)",
        "tests/kernels/test_triton.py::"
        "test_a_kernel_is_at_most_twice_as_wrong_as_eager_pytorch[weighted_product-odd]",
    ),
    Mutant(
        "kernel-clips-without-scale",
        "the kernel clips by the norm of the scaled loss",
        "kernels/gpu/clip_and_sum.py",
        " * (loss_scale * loss_scale)\n",
        "\n",
        "tests/kernels/test_triton.py::"
        "test_a_kernel_is_at_most_twice_as_wrong_as_eager_pytorch[clip_and_sum-odd]",
    ),
    Mutant(
        "kernel-mask-after-nan",
        "the kernel loads bad records and multiplies them by 0",
        "kernels/gpu/clip_and_sum.py",
        "mask=kept[:, None] & (e[None, :] < E),",
        "mask=(n[:, None] < N) & (e[None, :] < E),",
        "tests/kernels/test_triton.py::test_a_bad_record_changes_no_bit_of_the_others",
    ),
    Mutant(
        "weight-on-rows",
        "rows are weighted before their product is rounded, whose residue no norm bounds",
        "kernels/reference.py",
        "    products = _products_one_by_one(left, right, len(weights))\n"
        "    for product, weight, kept in zip(products, weights.double(), keep, strict=True):\n",
        "    n, right = len(weights), right.reshape(-1, right.shape[-1])\n"
        "    rows = _records(left, n) * weights.to(left.dtype)[:, None, None]\n"
        "    products = _products_one_by_one(rows.flatten(0, 1), right, n)\n"
        "    for product, weight, kept in zip(products, [1.0] * n, keep, strict=True):\n",
        "tests/kernels/test_reference_products.py::"
        "test_a_clipped_record_contributes_at_most_the_bound",
    ),
    Mutant(
        "join-of-other-bounds",
        "sums of different sensitivity are joined under the first one's",
        "dpengine/mechanism/clipping.py",
        "    if left.sensitivity != right.sensitivity:\n",
        "    if False:\n",
        "tests/mechanism/test_clipping.py::test_join_refuses_sums_of_different_sensitivity",
    ),
)
