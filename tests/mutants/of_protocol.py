"""Planted bugs of sampling, of logical batches, of charges and of copies."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "empty-batch-skipped",
        "an empty batch makes no step, so that their number is private (Opacus 161)",
        "dpengine/mechanism/batches.py",
        "    starts = range(0, max(len(indices), 1), physical_batch_size)\n",
        "    starts = range(0, len(indices), physical_batch_size)\n",
        "tests/mechanism/test_sampling.py::test_an_empty_logical_batch_is_one_batch_of_padding",
    ),
    Mutant(
        "grouped-after-sampling",
        "coins are tossed for records, so that a person of many images enters more often",
        "dpengine/mechanism/sampling.py",
        "            coins = self._random.bernoulli(self._sampling_rate, len(self._units))\n",
        "            units = self._units\n"
        "            n = int(units._sizes.sum())\n"
        "            tossed = self._random.bernoulli(self._sampling_rate, n)\n"
        "            coins = np.logical_or.reduceat(tossed, units._starts)\n",
        "tests/mechanism/test_sampling.py::"
        "test_every_unit_enters_with_probability_q_however_many_records_it_has",
    ),
    Mutant(
        "unit-split",
        "the rows of one person are cut into several records and clipped one by one",
        "dpengine/mechanism/batches.py",
        "    starts = range(0, max(len(indices), 1), physical_batch_size)\n",
        "    indices = indices.reshape(-1, 1)\n"
        "    starts = range(0, max(len(indices), 1), physical_batch_size)\n",
        "tests/mechanism/test_sampling.py::test_a_unit_fills_one_slot_with_its_own_records_only",
    ),
    Mutant(
        "unit-split-in-pieces",
        "the rows of one person are cut where batches are split for memory",
        "dpengine/dropin/memory_manager.py",
        "indices, dtype=np.int64).reshape(-1, self._rows_per_unit)",
        "indices, dtype=np.int64).reshape(-1, 1)",
        "tests/dropin/test_memory_manager.py::test_people_are_not_cut_where_signals_tell_the_end",
    ),
    Mutant(
        "unit-split-by-capture",
        "each image of a person is clipped on its own",
        "dpengine/dropin/privacy_engine.py",
        "draws_per_record=arguments.draws_per_record * arguments.rows_per_unit,",
        "draws_per_record=arguments.draws_per_record,",
        "tests/dropin/test_memory_manager.py::test_people_are_not_cut_and_count_once",
    ),
    Mutant(
        "coins-of-the-last-step",
        "one draw of coins serves all steps, as a fixed shuffle would",
        "dpengine/mechanism/sampling.py",
        "        for _ in range(self._num_steps):\n            self._reserve()\n"
        "            coins = self._random.bernoulli(self._sampling_rate, len(self._units))\n",
        "        coins = self._random.bernoulli(self._sampling_rate, len(self._units))\n"
        "        for _ in range(self._num_steps):\n            self._reserve()\n",
        "tests/mechanism/test_sampling.py::"
        "test_units_enter_independently_of_each_other_and_of_the_step_before",
    ),
    Mutant(
        "charge-after-draw",
        "a step is charged after its coins were tossed",
        "dpengine/mechanism/sampling.py",
        "            self._reserve()\n"
        "            coins = self._random.bernoulli(self._sampling_rate, len(self._units))\n",
        "            coins = self._random.bernoulli(self._sampling_rate, len(self._units))\n"
        "            self._reserve()\n",
        "tests/mechanism/test_sampling.py::"
        "test_each_step_is_reserved_before_its_coins_and_announced_before_it_is_handed_out",
    ),
    Mutant(
        "record-twice-in-a-pass",
        "an order that has a record twice is taken for a pass (Opacus 444)",
        "dpengine/mechanism/sampling.py",
        "    if len(np.unique(indices)) < len(indices) or seen[indices].any():\n",
        "    if len(np.unique(indices)) < len(indices):\n",
        "tests/dropin/test_accountant.py::"
        "test_a_record_twice_in_a_pass_is_refused_before_its_batch",
    ),
    Mutant(
        "divisor-from-the-batch",
        "the sum is divided by the true size of the batch",
        "dpengine/optim/optimizer.py",
        "        batch = self._source.take()\n",
        "        batch = self._source.take()\n"
        "        self.expected_batch_size = float(batch.is_record.sum().clamp(min=1))\n",
        "tests/optim/test_optimizer.py::test_a_step_without_noise_is_the_clipped_sum_over_its_constant",
    ),
    Mutant(
        "divisor-from-n",
        "the divisor is the rate times the true number of records (Opacus 571 and 819)",
        "dpengine/dropin/arguments.py",
        "        return float(public_batch_size(self.data_loader))\n",
        "        size = public_batch_size(self.data_loader)\n"
        "        return self.sample_rate * self.n_units if self.sample_rate else float(size)\n",
        "tests/dropin/test_privacy_engine.py::"
        "test_delta_is_compared_with_the_public_size_and_not_with_the_true_one",
    ),
    Mutant(
        "settings-dropped",
        "loss_reduction gets lost on the way to the optimizer (tf-privacy e65e14b)",
        "dpengine/dropin/privacy_engine.py",
        "                loss_reduction=arguments.loss_reduction,\n",
        "",
        "tests/dropin/test_memory_manager.py::"
        "test_pieces_add_up_to_the_clipped_sum_over_the_constant_divisor",
    ),
    Mutant(
        "steps-are-epochs",
        "the noise is calibrated to the number of epochs and not of steps (Opacus 030b723)",
        "dpengine/dropin/privacy_engine.py",
        "            num_charges,\n            checked.noised_values,\n",
        "            epochs or num_charges,\n            checked.noised_values,\n",
        "tests/dropin/test_privacy_engine.py::"
        "test_the_planned_epochs_spend_the_target_and_no_more[changed1]",
    ),
    Mutant(
        "budget-not-checked",
        "the loader draws beyond the planned number of charges",
        "dpengine/dropin/accountant.py",
        "        if self.remaining < 1:\n",
        "        if self.remaining < -100:\n",
        "tests/dropin/test_accountant.py::"
        "test_a_budget_refuses_what_was_not_planned_and_charges_nothing_for_it",
    ),
    Mutant(
        "step-beyond-the-plan",
        "the ledger grants one step more than planned",
        "dpengine/run/ledger.py",
        "        if self.remaining < 1:\n",
        "        if self.remaining < 0:\n",
        "tests/run/test_ledger.py::test_no_step_beyond_the_plan_is_granted_or_written",
    ),
    Mutant(
        "charge-without-noise",
        "batches are charged with other noise than their sum gets",
        "dpengine/mechanism/batches.py",
        "        if not is_charged and (charged_only or self.charged is not None):\n",
        "        if False:\n",
        "tests/dropin/test_privacy_engine.py::"
        "test_an_optimizer_of_ones_own_takes_no_batch_that_was_charged_otherwise",
    ),
    Mutant(
        "lower-epsilon",
        "the lower bound of epsilon is reported",
        "dpengine/dropin/accountant.py",
        "accounting.spent_together(charges, delta, self.adjacency).upper",
        "accounting.spent_together(charges, delta, self.adjacency).lower",
        "tests/dropin/test_accountant.py::test_a_pass_in_ones_own_order_costs_one_gaussian",
    ),
    Mutant(
        "tail-not-charged",
        "the cut tail of the noise does not come off delta",
        "dpengine/accounting/composition.py",
        "    return delta - tail\n",
        "    return delta\n",
        "tests/accounting/test_composition.py::test_the_tails_of_all_charges_come_off_delta",
    ),
    Mutant(
        "no-noise-no-cost",
        "a mechanism without noise costs nothing (jax_privacy crashed at sigma 0)",
        "dpengine/accounting/composition.py",
        '        return Epsilon(math.inf, math.inf, math.inf, "exact")\n',
        '        return Epsilon(0.0, 0.0, 0.0, "exact")\n',
        "tests/accounting/test_composition.py::"
        "test_a_charge_without_noise_is_no_privacy_and_none_at_all_is_no_cost",
    ),
    Mutant(
        "count-not-charged",
        "the tail of the adaptive count's noise is not charged",
        "dpengine/dropin/arguments.py",
        "        return sum(trained) + 2\n",
        "        return sum(trained)\n",
        "tests/dropin/test_accountant.py::test_the_noised_count_of_adaptive_clipping_is_noised_too",
    ),
    Mutant(
        "copies-charge-one-run",
        "what two copies charge is counted once",
        "dpengine/dropin/accountant.py",
        "        self._begin_run()  # what a copy charges from now on is its own\n",
        "",
        "tests/dropin/test_accountant.py::test_what_a_copy_charges_adds_to_what_the_original_does",
    ),
    Mutant(
        "several-processes",
        "several processes each add their noise, or none (Opacus: noise on rank 0 twice)",
        "dpengine/mechanism/ranks.py",
        "    if size > 1:\n",
        "    if size > 2:\n",
        "tests/dropin/test_privacy_engine.py::test_several_processes_are_refused",
    ),
    Mutant(
        "two-logical-batches",
        "an abandoned logical batch stays in the sum of the next, where a record counts twice",
        "dpengine/optim/optimizer.py",
        "        if batch.is_first or batch.logical is not self._logical:\n",
        "        if False:\n",
        "tests/optim/test_optimizer.py::test_an_abandoned_logical_batch_leaves_nothing_in_the_next",
    ),
    Mutant(
        "sum-stays",
        "the sum of a logical batch stays after its noise was added",
        "dpengine/optim/optimizer.py",
        "        self._zero_sums()\n        self.clipping = noised.clipping\n",
        "        self._is_complete = False\n        self.clipping = noised.clipping\n",
        "tests/optim/test_optimizer.py::test_an_update_that_fails_leaves_nothing_in_the_next",
    ),
    Mutant(
        "last-batch-only",
        "each physical batch replaces the sum of the ones before",
        "dpengine/optim/optimizer.py",
        "        self._answers = step.add(self._answers, clipped)\n",
        "        self._answers = clipped\n",
        "tests/optim/test_optimizer.py::test_physical_batches_add_up_to_the_logical_batch",
    ),
    Mutant(
        "closure-after-noise",
        "a closure is run again by the inner optimizer, after the noise was added (Opacus 330)",
        "dpengine/optim/optimizer.py",
        "        return self.original_optimizer.step() if self.pre_step() else None\n",
        "        return self.original_optimizer.step(closure) if self.pre_step() else None\n",
        "tests/optim/test_opacus_parity.py::"
        "test_the_same_calls_give_what_they_give_with_opacus[closure_given-captured]",
    ),
    Mutant(
        "backward-after-noise",
        "a backward pass adds to the noised gradient and it is applied",
        "dpengine/optim/wrapper.py",
        '            if grad is not None and getattr(grad, "_noised_at", None) != grad._version:\n',
        "            if False:\n",
        "tests/optim/test_wrapper.py::test_a_backward_pass_after_the_noise_is_refused",
    ),
    Mutant(
        "dynamic-loss-scale",
        "a GradScaler, which moves by private overflows, is let through",
        "dpengine/optim/wrapper.py",
        "    _step_supports_amp_scaling = True\n",
        "    _step_supports_amp_scaling = False\n",
        "tests/optim/test_opacus_bugs.py::"
        "test_a_scale_is_undone_before_the_norm_and_none_may_follow_overflows",
    ),
    Mutant(
        "batch-skipped",
        "a batch that was skipped gives its place in the logical batch to another",
        "dpengine/capture/announcements.py",
        "        if ahead not in (-1, prefetch):\n",
        "        if False:\n",
        "tests/capture/test_announcements.py::test_a_wrong_prefetch_is_refused_at_the_first_batch",
    ),
    Mutant(
        "pass-of-another-loader",
        "two passes over a loader take turns in one sum",
        "dpengine/capture/announcements.py",
        "        if of_pass not in (None, self._pass):\n",
        "        if False:\n",
        "tests/dropin/test_memory_manager.py::test_two_passes_at_once_do_not_share_a_sum",
    ),
    Mutant(
        "batch-not-announced",
        "a batch that no sampler drew is trained on",
        "dpengine/capture/announcements.py",
        "        if self._prefetch is None:\n            return BatchNotice(",
        "        if self._prefetch is None or not self._waiting:\n            return BatchNotice(",
        "tests/capture/test_announcements.py::test_a_pass_that_no_batch_was_announced_for_is_refused",
    ),
    Mutant(
        "sum-in-a-copy",
        "an optimizer's copy or pickle takes the unfinished sum along",
        "dpengine/optim/optimizer.py",
        '    "public_loss",\n)\n',
        '    "public_loss",\n    "_answers",\n)\n',
        "tests/optim/test_optimizer.py::test_a_pickle_holds_neither_the_sum_nor_the_key",
    ),
    Mutant(
        "random-state-in-a-checkpoint",
        "a checkpoint holds the state of torch's generator",
        "dpengine/dropin/checkpointing.py",
        "    state = EngineCheckpoint(dict(module), of_optimizer, accountant, extra)\n",
        "    import torch\n\n"
        "    module = {**module, 'rng_state': torch.get_rng_state()}\n"
        "    state = EngineCheckpoint(module, of_optimizer, accountant, extra)\n",
        "tests/dropin/test_checkpointing.py::"
        "test_a_file_is_tensors_and_json_and_holds_no_random_state",
    ),
    Mutant(
        "rows-of-the-next-record",
        "the draws of a record are taken from its neighbour in the batch",
        "dpengine/data/draws.py",
        "        return padded.repeat_interleave(draws_per_record, 0)\n",
        "        return torch.cat([padded] * draws_per_record)\n",
        "tests/data/test_draws.py::test_row_n_k_belongs_to_record_n",
    ),
    Mutant(
        "seeded-draws",
        "timesteps come from a generator that a seed repeats",
        "dpengine/data/draws.py",
        "random.uniform(strata.size).reshape(strata.shape)",
        "np.random.rand(*strata.shape)",
        "tests/data/test_draws.py::test_a_seed_does_not_repeat_the_draws",
    ),
    Mutant(
        "adjacency-of-n",
        "sizes that are the true ones are reported as public",
        "dpengine/dropin/arguments.py",
        'derived: Adjacency = "zero-out" if self.sample_rate is None else "add-remove"',
        'derived: Adjacency = "add-remove"',
        "tests/dropin/test_accountant.py::test_the_true_size_is_public_unless_a_rate_is_given",
    ),
    Mutant(
        "replace-one-ignored",
        "replace-one is ignored where a public sampling rate is given",
        "dpengine/dropin/arguments.py",
        "        return self.adjacency or derived\n",
        '        return derived if derived == "add-remove" else self.adjacency or derived\n',
        "tests/dropin/test_accountant.py::"
        "test_a_record_replaced_by_any_other_costs_what_its_own_accountant_says",
    ),
    Mutant(
        "latents-by-private-scale",
        "latents are divided by their standard deviation over the private data",
        "dpengine/training/job.py",
        "    images = _encode(objective, records.images)\n",
        "    images = _encode(objective, records.images)\n    images = images / images.std()\n",
        "tests/training/test_job.py::test_a_record_is_the_same_beside_any_others",
    ),
    Mutant(
        "memory-by-the-true-size",
        "the physical batch is bounded by the true number of records, which is private",
        "dpengine/training/job.py",
        "    public_size = settings.privacy.public_dataset_size or records.n_units\n",
        "    public_size = records.n_units\n",
        "tests/training/test_job.py::test_the_physical_batch_follows_the_public_size",
    ),
    Mutant(
        "timesteps-by-slot",
        "a slot has always the same timesteps",
        "dpengine/data/draws.py",
        "    uniforms = _stratified(batch.n_slots, rows_per_unit, draws_per_record, random)\n",
        "    uniforms = np.linspace(0, 0.999, batch.n_slots * rows_per_unit * draws_per_record)\n",
        "tests/data/test_draws.py::test_timesteps_do_not_follow_the_slot",
    ),
    Mutant(
        "signal-of-a-failed-step",
        "the signal of a step that failed joins the next two logical batches",
        "dpengine/optim/optimizer.py",
        "                del self._step_skip_queue[:1]\n            self._zero_sums()\n",
        "            self._zero_sums()\n",
        "tests/optim/test_failing_step.py::test_the_signal_of_a_step_that_failed_is_not_the_next_ones",
    ),
    Mutant(
        "gradients-of-a-failed-step",
        "gradients that failed to be taken are in the next batch's sum",
        "dpengine/optim/optimizer.py",
        "                self._source.drop()\n                del",
        "                del",
        "tests/optim/test_failing_step.py::"
        "test_a_grad_sample_that_failed_to_be_taken_is_not_in_the_next_sum",
    ),
    Mutant(
        "public-rows-are-clipped",
        "the rows of a public loss are taken for records",
        "dpengine/optim/sources.py",
        "    with source.suspended(), torch.enable_grad(), ",
        "    with torch.enable_grad(), ",
        "tests/optim/test_public_loss.py::test_the_gradient_is_added_to_the_noised_sum_as_it_is",
    ),
    Mutant(
        "public-draws-after-private-ones",
        "the draws of a public loss tell how much the private rows have drawn",
        "dpengine/optim/sources.py",
        "        torch.seed()\n",
        "        pass\n",
        "tests/optim/test_public_loss.py::"
        "test_the_place_of_torchs_generators_tells_it_nothing_and_is_left_alone",
    ),
)
