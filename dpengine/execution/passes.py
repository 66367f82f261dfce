"""One forward and backward pass over a physical batch: eager, compiled, or as a CUDA graph.

All physical batches have one shape, so the pass can be recorded once and run again. What is
recorded ends with the per-record gradients: norms, clipping and noise work on them as stored, not
on what a compiler may have kept in registers at another precision.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..capture import Capture, Loss, Pass

How = Literal["eager", "inductor", "cuda-graph"]

_WARM_UPS = 3


def make_pass(capture: Capture, loss: Loss, how: How = "eager") -> Pass:
    """The forward pass of ``loss`` and its backward pass, run as ``how`` says.

    `inductor` traces the first call into one graph and compiles it; `cuda-graph` records the
    kernels of the first call and replays them. Both then take inputs of those shapes only, see
    later updates of the weights, and follow the protocol of the captured module.
    """
    if how not in get_args(How):
        raise ValueError(f"a pass must be run as one of {get_args(How)}, got {how!r}")
    if how == "inductor":
        return _Compiled(capture, loss)
    if how == "cuda-graph":
        return _CudaGraph(capture, loss)
    return lambda *inputs: loss(*inputs).backward()


class _Compiled:
    def __init__(self, capture: Capture, loss: Loss) -> None:
        self._capture, self._loss = capture, loss
        self._graph: Callable[..., list[Tensor]] | None = None

    def __call__(self, *batch: Tensor | dict[str, Tensor]) -> None:
        inputs, form = tree_flatten(batch)
        shapes = [(t.shape, t.dtype) for t in inputs]
        if self._graph is None:
            self._form, self._shapes = form, shapes
            self._configuration = self._capture.configuration
            loss = self._loss
            pure = self._capture.as_function(lambda *flat: loss(*tree_unflatten(flat, form)))
            self._graph = torch.compile(make_fx(pure)(*inputs), fullgraph=True, dynamic=False)
        _check_shapes((self._form, self._shapes), (form, shapes))
        _check_configuration(self._configuration, self._capture)
        with torch.no_grad():  # the graph holds its own backward pass
            self._capture.replay(len(inputs[0]), lambda: self._graph(*inputs))


class _CudaGraph:
    def __init__(self, capture: Capture, loss: Loss) -> None:
        self._capture, self._loss = capture, loss
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor | dict[str, Tensor]) -> None:
        inputs, form = tree_flatten(batch)
        if self._graph is None:
            self._record(inputs, form)
        _check_shapes(
            (self._form, [(t.shape, t.dtype) for t in self._inputs]),
            (form, [(t.shape, t.dtype) for t in inputs]),
        )
        _check_configuration(self._configuration, self._capture)
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)

        def run() -> list[Tensor]:
            self._graph.replay()
            return self._grads

        self._capture.replay(len(inputs[0]), run)

    def _record(self, inputs: list[Tensor], form: TreeSpec) -> None:
        if not inputs[0].is_cuda:
            raise ValueError(
                "a CUDA graph needs a GPU, got inputs on "
                f"{inputs[0].device}; choose 'inductor' or 'eager'"
            )
        self._form, self._inputs = form, [tensor.clone() for tensor in inputs]
        self._configuration = self._capture.configuration
        loss = self._loss
        pure = self._capture.as_function(lambda *flat: loss(*tree_unflatten(flat, form)))
        # Libraries set up their workspaces in the first runs, outside of the graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                pure(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._grads = pure(*self._inputs)


def _check_shapes(recorded: tuple[TreeSpec, list], got: tuple[TreeSpec, list]) -> None:
    if recorded[1] != got[1]:
        raise ValueError(
            "a recorded pass takes inputs of the shapes and types of its first call, "
            f"{recorded[1]}, got {got[1]}; make another pass for other shapes"
        )
    if recorded[0] != got[0]:
        raise ValueError(
            "a recorded pass takes a batch with the names of its first call, in their order; make "
            "another pass for others"
        )


def _check_configuration(recorded: tuple, capture: Capture) -> None:
    if recorded != capture.configuration:
        raise ValueError(
            "the module's mode, or its adapters or their scaling, changed since its pass was "
            "recorded; make another pass"
        )
