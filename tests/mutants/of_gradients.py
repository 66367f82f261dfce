"""Planted bugs of per-record gradients: rules, slots, and what is captured."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "bias-norm-of-rows",
        "the norm of a bias gradient is ‖G‖ over rows, not that of their sum (Opacus 751)",
        "kernels/reference.py",
        "    grad = _stored(_records(backprops, n_records).to(compute).sum(1), out)\n"
        "    return grad, _squares(grad, norms)\n",
        "    grad = _stored(_records(backprops, n_records).to(compute).sum(1), out)\n"
        "    return grad, _squares(_records(backprops, n_records).to(compute).flatten(1), norms)\n",
        "tests/kernels/test_reference_per_record.py::"
        "test_squared_norms_are_those_of_the_values_as_stored",
    ),
    Mutant(
        "kernel-bias-norm-of-rows",
        "the kernel squares single rows of a bias gradient, not their sum (Opacus 751)",
        "kernels/gpu/column_sums.py",
        "sum_of_squares(stored))",
        "sum_of_squares(total))",
        "tests/kernels/test_triton.py::"
        "test_a_kernel_is_at_most_twice_as_wrong_as_eager_pytorch[bias-odd]",
    ),
    Mutant(
        "lora-scaling",
        "the gradient of lora_B lacks the adapter's scaling",
        "kernels/reference.py",
        "    grad_b = _product(backprops, h, n_records, out, scaling)\n",
        "    grad_b = _product(backprops, h, n_records, out)\n",
        "tests/kernels/test_reference_lora.py::"
        "test_the_three_ops_are_the_backward_pass_of_every_single_record",
    ),
    Mutant(
        "norm-layer-wrong-tensor",
        "the gradient of a norm's weight is taken with its scaled output (tf-privacy LayerNorm)",
        "dpengine/layers/norm.py",
        "        ctx.save_for_backward(normalized if needs_input else None, weight)\n"
        "        output = normalized if weight is None else normalized * weight\n",
        "        output = normalized if weight is None else normalized * weight\n"
        "        ctx.save_for_backward(output if needs_input else None, weight)\n",
        "tests/layers/test_rules.py::test_a_layer_in_full",
    ),
    Mutant(
        "aliased-sums",
        "sums are accumulated in place, in a tensor that others hold (Opacus 53b3c25)",
        "dpengine/clipping.py",
        "    return ClippedSum(left.values + right.values, left.sensitivity)\n",
        "    return ClippedSum(left.values.add_(right.values), left.sensitivity)\n",
        "tests/test_clipping.py::test_join_adds_the_sums_and_keeps_the_sensitivity",
    ),
    Mutant(
        "second-use-lost",
        "the second use of a tensor replaces the first, in the norm and in the sum",
        "dpengine/slab.py",
        "            before.add_(grads)\n",
        "            self._grads[param] = grads.to(self._layout.dtype)\n",
        "tests/test_slab.py::test_a_second_use_is_added_and_a_missing_one_is_zero",
    ),
    Mutant(
        "stale-slab",
        "an unused tensor keeps the gradients of the batch before",
        "dpengine/slab.py",
        "            if param not in self._written:\n                view.zero_()\n",
        "            pass\n",
        "tests/test_slab.py::test_a_slab_is_written_over_by_the_next_batch",
    ),
    Mutant(
        "clip-per-draw",
        "each draw of a record is clipped on its own, so it moves the sum by K C",
        "dpengine/capture.py",
        "n_slots, rest = divmod(n_rows, self.draws_per_record)",
        "n_slots, rest = n_rows, 0",
        "tests/test_optimizer.py::test_all_draws_of_a_record_are_one_contribution",
    ),
    Mutant(
        "draws-of-neighbours",
        "rows are cut into records draw by draw, so that records share their gradients",
        "kernels/reference.py",
        "    return rows.reshape(n_records, tokens, rows.shape[-1])\n",
        "    return rows.reshape(tokens, n_records, rows.shape[-1]).transpose(0, 1)\n",
        "tests/test_optimizer.py::test_a_step_without_noise_is_the_clipped_sum_over_its_constant",
    ),
    Mutant(
        "two-batches-in-a-set",
        "a second batch joins the slots of the first, where a record can count twice",
        "dpengine/capture.py",
        '        elif self._set.state != "open":\n',
        '        elif self._set.state != "open":\n            self._set.state = "open"\n'
        "        elif False:\n",
        "tests/test_capture.py::test_a_forward_before_take_is_refused",
    ),
    Mutant(
        "backward-twice",
        "a second backward pass doubles the gradients of its records",
        "dpengine/record_grads.py",
        '        if self.state == "closed":\n            raise PrivacyError(\n'
        '                "backward ran twice',
        '        if self.state == "lost":\n            raise PrivacyError(\n'
        '                "backward ran twice',
        "tests/test_capture.py::test_a_second_backward_is_refused",
    ),
    Mutant(
        "ordinary-gradient",
        "an unclipped gradient beside the captured ones is let through",
        "dpengine/capture.py",
        "            if param.grad is not None:\n                raise PrivacyError(",
        "            if False:\n                raise PrivacyError(",
        "tests/test_capture.py::test_an_ordinary_gradient_is_refused",
    ),
    Mutant(
        "tensor-dropped",
        "an optimizer that misses trained tensors is taken (fastDP drops what it does not know)",
        "dpengine/sources.py",
        "    if {id(param) for param in params} != {id(param) for param in source.parameters}:\n",
        "    if False:\n",
        "tests/test_optimizer.py::test_an_optimizer_that_misses_a_tensor_is_refused",
    ),
    Mutant(
        "added-after-capture",
        "layers that came after the capture train without clipping",
        "dpengine/capture.py",
        "            any(\n                list(modules.values()) != before",
        "            False and any(\n                list(modules.values()) != before",
        "tests/test_capture.py::test_tensors_that_begin_or_end_to_train_after_capture_are_refused",
    ),
    Mutant(
        "thawed-after-capture",
        "a tensor that was frozen when the module was captured trains without clipping",
        "dpengine/capture.py",
        "            or any(param.requires_grad for param in self._frozen)\n",
        "",
        "tests/test_capture.py::test_tensors_that_begin_or_end_to_train_after_capture_are_refused",
    ),
    Mutant(
        "batch-norm",
        "BatchNorm, which mixes records, is let through",
        "dpengine/soundness.py",
        "        if isinstance(child, nn.modules.batchnorm._BatchNorm):\n",
        "        if False:\n",
        "tests/test_capture.py::test_batch_norm_is_refused",
    ),
    Mutant(
        "dropout",
        "dropout draws from a generator that is not secret",
        "dpengine/soundness.py",
        "        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:\n",
        "        if False:\n",
        "tests/test_capture.py::test_dropout_is_refused",
    ),
    Mutant(
        "running-statistics",
        "buffers that forward passes write carry private values out without noise",
        "dpengine/soundness.py",
        "            if self._before.get(name) != state:\n",
        "            if False:\n",
        "tests/test_capture.py::test_what_a_forward_pass_leaves_behind_or_draws_is_refused",
    ),
    Mutant(
        "unknown-layer",
        "a subclass that changes a layer's arithmetic gets the layer's rule",
        "dpengine/layers/conv.py",
        "    return own and numeric and layer.groups == 1\n",
        "    return numeric and layer.groups == 1\n",
        "tests/layers/test_rules.py::test_a_subclass_with_another_convolution",
    ),
    Mutant(
        "mixing-not-looked-for",
        "a model that mixes records is trained on",
        "dpengine/first_batch.py",
        "        if differing is not None:\n",
        "        if False:\n",
        "tests/test_first_batch.py::test_a_part_that_mixes_is_refused_whatever_a_record_holds",
    ),
)
