"""Recurrent layers: cells in a loop and Opacus' layers of them have rules, torch's own do not."""

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn

from dpengine import Capture

N, T, WIDTH = 3, 4, 5


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.layer(x)[0])


class Cells(nn.Module):
    """A cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, 6)

    def forward(self, x):
        state, outputs = (x.new_zeros(len(x), 6), x.new_zeros(len(x), 6)), []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state


def opacus(kind, **options):
    return kind(WIDTH, 6, batch_first=True, **options)


LAYERS = {
    "DPLSTM": (lambda: opacus(DPLSTM), 6),
    "DPGRU": (lambda: opacus(DPGRU), 6),
    "DPRNN": (lambda: opacus(DPRNN), 6),
    "two layers, both ways": (lambda: opacus(DPLSTM, num_layers=2, bidirectional=True), 12),
    "without bias": (lambda: opacus(DPLSTM, bias=False), 6),
    "cells": (Cells, 6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_each_record_alone(name):
    make, width = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Recurrent(make(), width).train(), torch.randn(N, T, WIDTH)
    params = [param for param in model.parameters() if param.requires_grad]
    alone = [torch.autograd.grad(model(row[None]).square().sum(), params) for row in x]
    capture = Capture(model)
    model(x).square().sum().backward()
    for param, grads in zip(capture.parameters, capture.take().per_record_grads, strict=True):
        (place,) = (i for i, other in enumerate(params) if other is param)
        for n in range(N):
            torch.testing.assert_close(grads[n], alone[n][place], rtol=1e-4, atol=1e-5)


def test_torchs_own_layers_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"nn\.LSTMCell.*in a loop.*DPLSTM"):
        Capture(Recurrent(nn.LSTM(WIDTH, 6, batch_first=True), 6))
