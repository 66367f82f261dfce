"""The private optimizer, where its per-record gradients come from, and what follows the noise."""

from .optimizer import DPOptimizer as DPOptimizer
