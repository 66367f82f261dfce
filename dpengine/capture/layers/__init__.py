"""How each kind of layer gives its per-record gradients.

A rule is an autograd Function that takes the layer's place: the same output, the same gradient to
its input, and, instead of a weight gradient, the gradient of every record, written where the slot
set of the batch says. Layers that no rule covers run under `torch.func` (``fallback``).
"""

from .rules import TrainedLayer as TrainedLayer
from .rules import trained_layers as trained_layers
