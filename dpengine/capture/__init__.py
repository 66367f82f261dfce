"""Per-record gradients of a module: its layers' rules, the batches they belong to, and checks."""

from .capture import Capture as Capture
from .capture import Loss as Loss
from .capture import Pass as Pass
from .selfcheck import check_per_record_grads as check_per_record_grads
