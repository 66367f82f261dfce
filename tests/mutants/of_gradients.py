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
        "        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not _is_held(child):\n",
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
        "            if self._before.get(name) != versions.get(name):\n",
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
        "        differing = _differing(before, after, kept, kept, SAME)\n",
        "        differing = None\n",
        "tests/test_first_batch.py::test_a_part_that_mixes_is_refused_whatever_a_record_holds",
    ),
    Mutant(
        "other-sizes-not-looked-at",
        "a tensor that all records share is taken for rows, as it is as long as the batch",
        "dpengine/first_batch.py",
        "            _compare_chosen(capture, _silenced(inputs, everyone), record)\n",
        "            pass\n",
        "tests/test_first_batch.py::"
        "test_what_all_records_share_is_no_row_though_it_is_as_long_as_the_batch",
    ),
    Mutant(
        "backward-not-looked-at",
        "a backward pass that mixes records is trained on",
        "dpengine/first_batch.py",
        "        _compare_gradients(capture, _silenced(inputs, everyone), record)\n",
        "        pass\n",
        "tests/test_first_batch.py::test_records_that_are_mixed_backward_are_refused",
    ),
    Mutant(
        "look-skips-large-batches",
        "the look at the first batch skips batches of more than 32 rows",
        "dpengine/first_batch.py",
        "        if n_rows < 2 * capture.draws_per_record or not (is_new or _coin(random)):\n",
        "        if not 2 * capture.draws_per_record <= n_rows <= 32 or not is_new:\n",
        "tests/test_first_batch.py::test_batches_of_every_size_are_looked_at",
    ),
    Mutant(
        "second-module-not-looked-at",
        "the batches of the first captured module are looked at, and of no other",
        "dpengine/first_batch.py",
        "    random, shapes, most, is_looking = SecureRandom(), set(), 0, False\n",
        "    if vars(look_now_and_then).setdefault('known', False):\n"
        "        return\n"
        "    vars(look_now_and_then)['known'] = True\n"
        "    random, shapes, most, is_looking = SecureRandom(), set(), 0, False\n",
        "tests/test_first_batch.py::test_every_capture_looks_for_itself",
    ),
    Mutant(
        "made-private-again-not-looked-at",
        "a module that is made private a second time is not looked at",
        "dpengine/dropin/privacy_engine.py",
        "        capture.expect_announcements()\n        first_batch.look_now_and_then(capture)\n",
        "        capture.expect_announcements()\n"
        "        if old is None:\n"
        "            first_batch.look_now_and_then(capture)\n",
        "tests/dropin/test_arguments.py::"
        "test_a_second_module_of_one_engine_and_one_made_private_again_are_looked_at",
    ),
    Mutant(
        "looked-at-once",
        "batches are looked at once, and never again",
        "dpengine/first_batch.py",
        "        is_new = shape not in shapes or n_rows > _LARGER * most\n",
        "        is_new = not shapes\n",
        "tests/test_first_batch.py::test_a_batch_much_larger_than_those_looked_at_is_looked_at_again",
    ),
    Mutant(
        "values-not-watched",
        "a module that initialises itself from private rows keeps their exact mean",
        "dpengine/first_batch.py",
        "    watch.check_values(values)\n",
        "",
        "tests/test_first_batch.py::"
        "test_a_module_that_keeps_something_of_its_first_batch_is_refused",
    ),
    Mutant(
        "buffers-watched-once",
        "buffers and frozen tensors are watched in the first pass only",
        "dpengine/soundness.py",
        "        versions = self._versions()\n",
        "        if hasattr(self, '_seen'):\n"
        "            return\n"
        "        self._seen, versions = True, self._versions()\n",
        "tests/test_first_batch.py::"
        "test_a_frozen_tensor_that_is_written_later_is_refused_in_that_pass",
    ),
    Mutant(
        "idle-layers-trained",
        "trained tensors that nothing calls become noise",
        "dpengine/first_batch.py",
        "    if idle:\n",
        "    if False:\n",
        "tests/test_first_batch.py::test_trained_layers_that_nothing_calls_are_refused_by_name",
    ),
    Mutant(
        "rounded-means",
        "below float32 a mean over a private number of rows rounds every record",
        "dpengine/capture.py",
        "            is_coarse=not slot_set.notice.is_public and slot_set.is_coarse,\n",
        "            is_coarse=False,\n",
        "tests/test_low_precision_mean.py::test_a_mean_below_float32_is_refused_and_a_sum_is_not",
    ),
)
