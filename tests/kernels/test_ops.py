"""The door to the kernels: argument checks, choice of implementation, registration."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import cases
from bench.shapes import SMALL
from dpengine.kernels import checks, ops, reference
from dpengine.kernels.gpu import launch, library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreter_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def arguments(**shapes):
    return {name: torch.ones(shape) for name, shape in shapes.items()}


LORA = {"activations": (6, 4, 5), "backprops": (6, 4, 7), "h": (6, 4, 2), "u": (6, 4, 2)}
LORA |= {"lora_a": (2, 5), "lora_b": (7, 2), "base_output": (6, 4, 7), "input_grad": (6, 4, 5)}


def call(name, n_records=3, **changes):
    tensors = arguments(**(LORA | changes))
    names = {
        "lora_forward": ("base_output", "activations", "lora_a", "lora_b"),
        "lora_side_b": ("backprops", "h", "lora_b"),
        "lora_side_a": ("activations", "u", "lora_a"),
    }
    extra = {
        "lora_forward": {"scaling": 1.0},
        "lora_side_b": {"scaling": 1.0, "n_records": n_records},
        "lora_side_a": {"n_records": n_records, "input_grad": tensors["input_grad"]},
    }
    return getattr(ops, name)(*(tensors[n] for n in names[name]), **extra[name])


@pytest.mark.parametrize("name", ["lora_forward", "lora_side_b", "lora_side_a"])
def test_shapes_that_fit_are_taken(name):
    call(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora_forward", {"base_output": (6, 3, 7)}, r"base_output and act.*\(6, 3, 7\)"),
        ("lora_forward", {"lora_a": (2, 4)}, r"lora_a must have the shape \(2, 5\).*\(2, 4\)"),
        ("lora_forward", {"lora_b": (7, 3)}, r"lora_b must have the shape \(7, 2\).*\(7, 3\)"),
        ("lora_side_b", {"h": (5, 4, 2)}, r"backprops and h.*\(6, 4, 7\) and \(5, 4, 2\)"),
        ("lora_side_b", {"lora_b": (2, 7)}, r"lora_b must have the shape \(7, 2\).*\(2, 7\)"),
        ("lora_side_a", {"u": (6, 3, 2)}, r"activations and u.*\(6, 4, 5\) and \(6, 3, 2\)"),
        ("lora_side_a", {"lora_a": (3, 5)}, r"lora_a must have the shape \(2, 5\).*\(3, 5\)"),
        ("lora_side_a", {"input_grad": (6, 4, 7)}, r"input_grad.*\(6, 4, 5\).*\(6, 4, 7\)"),
        ("lora_side_a", {"u": (6, 4, 0), "lora_a": (0, 5)}, "rank.*got 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        call(name, **changes)


def test_the_kernels_refuse_a_rank_above_a_tile_and_the_specification_takes_it():
    g, h, lora_b = torch.ones(6, 4, 7), torch.ones(6, 4, 200), torch.ones(7, 200)
    ops.lora_side_b(g, h, lora_b, scaling=1.0, n_records=3)
    with pytest.raises(ValueError, match=r"ranks up to 128.*got 200; use impl='reference'"):
        ops.lora_side_b(g, h, lora_b, scaling=1.0, n_records=3, impl="triton")


@pytest.mark.parametrize("name", ["lora_forward", "lora_side_a"])
def test_what_is_written_in_place_must_be_contiguous(name):
    wide = torch.ones(6, 4, 7, 2)[..., 0]
    with pytest.raises(ValueError, match=r"is written in place and must be contiguous"):
        if name == "lora_forward":
            x, a, b = torch.ones(6, 4, 5), torch.ones(2, 5), torch.ones(7, 2)
            ops.lora_forward(wide, x, a, b, scaling=1.0)
        else:
            x, u, a = torch.ones(6, 4, 7), torch.ones(6, 4, 2), torch.ones(2, 7)
            ops.lora_side_a(x, u, a, n_records=3, input_grad=wide)


@pytest.mark.parametrize(
    "out",
    [
        torch.ones(1, 7, 5).expand(3, 7, 5),
        torch.ones(100).as_strided((3, 7, 5), (1, 5, 1)),
        torch.ones(3, 5, 7).mT,
    ],
    ids=["one for all", "overlapping", "transposed"],
)
def test_records_must_lie_apart_in_a_slab(out):
    with pytest.raises(ValueError, match="out must hold each record's gradient in one piece"):
        ops.per_record_product(torch.ones(6, 4, 7), torch.ones(6, 4, 5), n_records=3, out=out)


def test_a_mask_of_rows_is_no_mask_of_records():
    """Taken as one, each draw would be clipped on its own: K times the bound."""
    g, x, keep = torch.ones(6, 4, 7), torch.ones(6, 4, 5), torch.ones(6, dtype=torch.bool)
    with pytest.raises(ValueError, match="must have one entry for each of the 3 records"):
        ops.weighted_product(g, x, keep.double(), keep, n_records=3)


def test_masks_and_norms_have_one_type():
    norms, keep = torch.ones(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"sq_norms must be a float64 vector, got torch\.float32"):
        ops.clip_and_sum([torch.ones(2, 3)], norms, keep, max_grad_norm=1.0)
    with pytest.raises(TypeError, match="keep must be bool"):
        ops.clip_and_sum([torch.ones(2, 3)], norms.double(), keep.int(), max_grad_norm=1.0)


@pytest.mark.parametrize("ids", [torch.uint8, torch.float32], ids=str)
def test_ids_are_whole_numbers_of_enough_bits(ids):
    with pytest.raises(TypeError, match="ids must be int32 or int64"):
        ops.embedding_per_record_grads(
            torch.ones(2, 3, dtype=ids), torch.ones(2, 3, 4), num_embeddings=5, n_records=2
        )


@pytest.mark.parametrize("padding_idx", [5, -6])
def test_the_padding_index_is_one_of_the_embeddings(padding_idx):
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"padding_idx must lie in \[-5, 5\), got {padding_idx}"):
        ops.embedding_per_record_grads(
            ids, torch.ones(2, 3, 4), num_embeddings=5, n_records=2, padding_idx=padding_idx
        )


@pytest.mark.parametrize(("name", "value"), [("stride", (0, 1)), ("kernel_size", 3)])
def test_the_numbers_of_a_convolution_are_pairs(name, value):
    geometry = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    with pytest.raises(ValueError, match=f"{name} must be two numbers"):
        ops.lora_conv_side_a(
            torch.ones(2, 3, 8, 8),
            torch.ones(2, 4, 8, 8),
            **(geometry | {name: value}),
            n_records=2,
        )


@pytest.mark.parametrize("n_records", [4, 0, -3])
@pytest.mark.parametrize("name", ["lora_side_b", "lora_side_a"])
def test_a_number_of_records_that_does_not_divide_the_rows_is_refused(name, n_records):
    with pytest.raises(ValueError, match=f"n_records must divide the 6 rows, got {n_records}"):
        call(name, n_records)


def test_inputs_of_two_types_are_refused():
    x, g = torch.ones(6, 4, 5), torch.ones(6, 4, 7, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"left and right must have one dtype.*bfloat16"):
        ops.per_record_product(g, x, n_records=3)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan], ids=str)
def test_a_bound_that_is_not_positive_is_refused(bound):
    ones = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"max_grad_norm.*{bound}"):
        ops.clip_factors(ones, bound)
    with pytest.raises(ValueError, match=f"max_grad_norm.*{bound}"):
        ops.clip_and_sum([torch.ones(2, 3)], ones, ones.bool(), max_grad_norm=bound)


@pytest.mark.parametrize("grads", [[], [torch.ones(2, 3), torch.ones(3, 3)]], ids=["none", "mixed"])
def test_tensors_without_one_number_of_records_are_refused(grads):
    with pytest.raises(ValueError, match="per_record_grads"):
        ops.sq_norms(grads)
    ones = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="per_record_grads"):
        ops.clip_and_sum(grads, ones, ones.bool(), max_grad_norm=1.0)


@pytest.mark.parametrize(("n_norms", "n_keep"), [(1, 2), (2, 1), (3, 3)])
def test_norms_and_keep_need_one_entry_for_each_record(n_norms, n_keep):
    norms, keep = torch.ones(n_norms, dtype=torch.float64), torch.ones(n_keep, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must have one entry for each of the 2 records"):
        ops.clip_and_sum([torch.ones(2, 3)], norms, keep, max_grad_norm=1.0)


def test_the_size_of_a_convolution_must_fit_its_output():
    x, u = torch.ones(2, 3, 8, 8), torch.ones(2, 4, 7, 8)
    with pytest.raises(ValueError, match=r"u must have the size.* 8 along axis 2"):
        ops.lora_conv_side_a(
            x,
            u,
            kernel_size=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            dilation=(1, 1),
            n_records=2,
        )


@pytest.mark.parametrize(
    "stream", [torch.zeros(11, dtype=torch.int32), torch.zeros(12, dtype=torch.int64)]
)
def test_a_stream_that_is_no_chacha20_state_is_refused(stream):
    with pytest.raises(TypeError, match=r"stream must be int32 \[12\]"):
        ops.chacha20_words(stream, 1)


def test_every_op_has_one_signature_in_the_specification_and_the_library():
    import inspect

    for name, function in vars(library).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            ours, spec = (inspect.signature(f) for f in (function, getattr(reference, name)))
            assert list(ours.parameters) == list(spec.parameters), name


def test_on_a_cpu_the_specification_runs(monkeypatch):
    monkeypatch.setattr(library, "sq_norms", None)
    assert ops.sq_norms([torch.ones(2, 4)]).tolist() == [4.0, 4.0]


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"impl must be 'auto', 'reference' or 'triton', got 'c'"):
        ops.sq_norms([torch.ones(2, 3)], impl="c")


def test_kernels_without_a_gpu_are_refused_and_not_replaced(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl='triton' needs tensors on a GPU, got cpu"):
        ops.sq_norms([torch.ones(2, 3)], impl="triton")


def test_kernels_refuse_float64():
    with pytest.raises(TypeError, match="float64"):
        ops.sq_norms([torch.ones(2, 3, dtype=torch.float64)], impl="triton")


class Recorder(TorchDispatchMode):
    """Collects the calls of registered operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dpengine":
            self.calls[function] = args
        return function(*args, **(kwargs or {}))


@interpreter_warns
def test_operators_are_registered_as_what_they_do():
    inputs = cases.make_inputs(SMALL["one_record"], torch.float32, DEVICE)
    with Recorder() as recorder:
        for run in cases.OPS.values():
            run(inputs, "triton")
    assert len(recorder.calls) == 13
    for operator, args in recorder.calls.items():
        torch.library.opcheck(
            operator,
            args,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@interpreter_warns
@pytest.mark.parametrize("op", ["lora_forward", "lora_side_b", "lora_side_a", "clip_and_sum"])
def test_the_kernels_are_traced_into_one_graph(op):
    inputs = cases.make_inputs(SMALL["odd"], torch.float32, DEVICE)
    run = cases.OPS[op]
    compiled = torch.compile(lambda: run(inputs, "triton"), fullgraph=True, backend="aot_eager")
    for name, expected in run(inputs, "triton").items():
        assert torch.equal(compiled()[name], expected)


@interpreter_warns
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_second_batch_size_needs_no_other_graph_than_a_dynamic_one(impl):
    def gradients(g, h, lora_b):
        return ops.lora_side_b(g, h, lora_b, scaling=1.0, n_records=len(g), impl=impl)[1]

    compiled = torch.compile(gradients, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_records in (2, 5):
        shape = replace(SMALL["odd"], n_records=n_records, draws=1)
        i = cases.make_inputs(shape, torch.float32, DEVICE)
        expected = gradients(i.g, i.h, i.lora_b)
        torch.testing.assert_close(compiled(i.g, i.h, i.lora_b), expected)


def test_checks_name_argument_rule_and_value():
    with pytest.raises(ValueError, match="divisor must be > 0, got -1"):
        checks.positive(divisor=-1)
