"""Planted bugs of who and what is counted, and of what goes on under another's claim."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "fork-trains",
        "a fork trains on weights that it shares with its parent, and neither counts it",
        "dpengine/processes.py",
        "    if os.getpid() != process:\n",
        "    if False:\n",
        "tests/test_processes.py::test_a_fork_does_not_train_on_weights_that_its_parent_has",
    ),
    Mutant(
        "state-without-cost",
        "an optimizer's state does not tell what it cost, so that a resumed run claims its own",
        "dpengine/wrapper.py",
        '{**state, "charges": self.charges.state_dict()}',
        "state",
        "tests/dropin/test_saved_charges.py::test_a_run_resumed_by_accelerate_costs_what_both_cost",
    ),
    Mutant(
        "uncounted-state-loaded",
        "the state of private training whose charges are missing is taken",
        "dpengine/wrapper.py",
        '        if charges is None and self.charges is not None and rest["state"]:\n',
        "        if False:\n",
        "tests/dropin/test_saved_charges.py::test_a_state_without_its_charges_is_refused",
    ),
    Mutant(
        "second-run-not-told",
        "a second run on the same data claims its own epsilon without a word of both",
        "dpengine/finetune.py",
        "    if len(runs) < 2:\n",
        "    if len(runs) < 3:\n",
        "tests/test_finetune.py::test_a_second_run_on_the_same_data_says_what_both_cost",
    ),
    Mutant(
        "record-repeated",
        "a record that a dataset repeats is as many records",
        "dpengine/dropin/arguments.py",
        "        if self.unit_ids is None and _repeats(self.data_loader.dataset):\n",
        "        if False:\n",
        "tests/dropin/test_arguments.py::"
        "test_a_record_under_several_numbers_is_refused_unless_it_is_named",
    ),
    Mutant(
        "held-out-trained-on",
        "records that the caller's sampler holds out are drawn and trained on",
        "dpengine/dropin/loader.py",
        "    if not is_whole:\n",
        "    if False:\n",
        "tests/dropin/test_arguments.py::test_records_that_a_sampler_holds_out_are_not_trained_on",
    ),
    Mutant(
        "padded-to-the-longest",
        "rows get the length of the longest record, which changes everybody's gradient",
        "dpengine/dropin/loader.py",
        "        if len(records) > 1 and self.collate_fn is not default_collate:",
        "        if False:",
        "tests/dropin/test_loader.py::test_rows_as_long_as_the_longest_record_are_refused",
    ),
    Mutant(
        "code-of-a-base",
        "a base's index names any class of any module, which is imported",
        "dpengine/base.py",
        "        if not known or entry[1] not in _CLASSES.get(name, ()):\n",
        "        if False:\n",
        "tests/test_base.py::test_no_module_that_a_folder_names_is_imported",
    ),
    Mutant(
        "loop-draws-from-a-seed",
        "what is given to loops of one's own as secret normals comes from torch's generator",
        "dpengine/draws.py",
        "    values = normals(SecureRandom(), math.prod(shape)).reshape(tuple(shape))\n",
        "    values = torch.randn(tuple(shape), dtype=torch.float64)\n",
        "tests/test_draws.py::test_a_seed_does_not_repeat_what_a_loop_draws",
    ),
    Mutant(
        "size-in-a-repr",
        "the repr of a batch tells how many records a Poisson draw has taken",
        "dpengine/sampling.py",
        "    n_slots: int = field(repr=False)  # without",
        "    n_slots: int  # without",
        "tests/test_capture.py::test_what_holds_a_batch_does_not_tell_its_size",
    ),
)
