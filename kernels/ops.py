"""The ops that other packages import: each checks its arguments, then dispatches.

``impl``: `reference` is eager PyTorch, `triton` the kernels, `auto` the kernels on a GPU for the
types and ranks they know (float32, bfloat16, float16; up to 128) and the reference elsewhere.
Formulas and guarantees stand in `reference`, under the same names. None is differentiable: they
belong inside an autograd Function.
"""

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from . import checks, cost, reference
from .gpu import library

Impl = Literal["auto", "reference", "triton"]

_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def lora_forward(
    base_output: Tensor,
    activations: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    impl: Impl = "auto",
) -> Tensor:
    """``base_output += scaling · (x Aᵀ) Bᵀ`` in place; returns ``h = x Aᵀ``.

    base_output [..., O], activations x [..., I], lora_a [R, I], lora_b [O, R] -> h [..., R].
    """
    checks.same_rows(base_output=base_output, activations=activations)
    checks.fits("lora_a", lora_a, (len(lora_a), activations.shape[-1]))
    checks.fits("lora_b", lora_b, (base_output.shape[-1], len(lora_a)))
    checks.written(base_output=base_output)
    run = _implementation(impl, activations, rank=len(lora_a))
    return run.lora_forward(base_output, activations, lora_a, lora_b, scaling)


def lora_side_b(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    n_records: int,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``u = scaling · g B`` and the per-record gradients of lora_b, in one read of g.

    backprops g [N·K, ..., O] of the summed loss, h [N·K, ..., R] from the forward pass,
    lora_b [O, R] -> u [N·K, ..., R], grad_b [N, O, R] (``out`` where given: a view of a slab).
    """
    checks.same_rows(backprops=backprops, h=h)
    checks.fits("lora_b", lora_b, (backprops.shape[-1], h.shape[-1]))
    checks.records(backprops, n_records)
    checks.fits("out", out, (n_records, *lora_b.shape))
    checks.slab_view(out)
    run = _implementation(impl, backprops, rank=h.shape[-1])
    return run.lora_side_b(backprops, h, lora_b, scaling, n_records, out)


def lora_side_a(
    activations: Tensor,
    u: Tensor,
    lora_a: Tensor,
    *,
    n_records: int,
    input_grad: Tensor | None = None,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The per-record gradients of lora_a and ``input_grad += u A`` in place, in one read of x.

    activations x [N·K, ..., I], u [N·K, ..., R] from side B, lora_a [R, I], input_grad like x: the
    base layer's own, which the caller has just made -> grad_a [N, R, I] (``out`` where given).
    Adapters that share x go in one call, joined along R, up to a rank of 128 together.
    """
    checks.same_rows(activations=activations, u=u)
    checks.fits("lora_a", lora_a, (u.shape[-1], activations.shape[-1]))
    checks.fits("input_grad", input_grad, activations.shape)
    if input_grad is not None:
        checks.same_type(activations=activations, input_grad=input_grad)
        checks.written(input_grad=input_grad)
    checks.records(activations, n_records)
    checks.fits("out", out, (n_records, *lora_a.shape))
    checks.slab_view(out)
    run = _implementation(impl, activations, rank=u.shape[-1])
    return run.lora_side_a(activations, u, lora_a, n_records, input_grad, out)


def lora_conv_side_a(
    activations: Tensor,
    u: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    n_records: int,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The per-record gradients of a k x k lora_a, without an unfold.

    activations [N·K, C, H, W], u [N·K, R, H', W'] the gradient of the adapter's first convolution
    -> grad_a [N, R, C, *kernel_size] (``out`` where given). A 1-D convolution is one with H = 1.
    """
    checks.same_type(activations=activations, u=u)
    if len(activations) != len(u) or activations.ndim != 4 or u.ndim != 4:
        raise ValueError(
            "activations [N·K, C, H, W] and u [N·K, R, H', W'] must agree on their rows, got "
            f"{tuple(activations.shape)} and {tuple(u.shape)}"
        )
    checks.pairs(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    for axis in (0, 1):
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        size = (activations.shape[2 + axis] + 2 * padding[axis] - reach) // stride[axis] + 1
        if u.shape[2 + axis] != size:
            raise ValueError(
                f"u must have the size of the convolution's output, {size} along axis {2 + axis}, "
                f"got {tuple(u.shape)}"
            )
    checks.records(activations, n_records)
    checks.fits("out", out, (n_records, u.shape[1], activations.shape[1], *kernel_size))
    checks.slab_view(out)
    run = _implementation(impl, activations)
    return run.lora_conv_side_a(
        activations, u, kernel_size, stride, padding, dilation, n_records, out
    )


def per_record_product(
    left: Tensor,
    right: Tensor,
    *,
    n_records: int,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``Σ_t left[n,t]ᵀ right[n,t]``: the per-record gradients of a full weight.

    left [N·K, ..., L] (backprops), right [N·K, ..., D] (activations) -> [N, L, D] (``out`` where
    given).
    """
    checks.same_rows(left=left, right=right)
    checks.records(left, n_records)
    checks.fits("out", out, (n_records, left.shape[-1], right.shape[-1]))
    checks.slab_view(out)
    return _implementation(impl, left).per_record_product(left, right, n_records, out)


def product_sq_norms(left: Tensor, right: Tensor, *, n_records: int, impl: Impl = "auto") -> Tensor:
    """Partial squared norms of ``per_record_product`` without a slab.  -> float64 [N, M]"""
    checks.same_rows(left=left, right=right)
    checks.records(left, n_records)
    return _implementation(impl, left).product_sq_norms(left, right, n_records)


def gram_sq_norms(left: Tensor, right: Tensor, *, n_records: int, impl: Impl = "auto") -> Tensor:
    """Upper bounds of the same from Gram matrices, for few rows.  -> float64 [N, 1]"""
    checks.same_rows(left=left, right=right)
    checks.records(left, n_records)
    return _implementation(impl, left).gram_sq_norms(left, right, n_records)


def weight_sq_norms(left: Tensor, right: Tensor, *, n_records: int, impl: Impl = "auto") -> Tensor:
    """Squared norms for ``weighted_product``, no slab, by the cheaper way.  -> float64 [N, M]

    From the products themselves, or from Gram matrices, which give an upper bound: see ``cost``.
    """
    checks.same_rows(left=left, right=right)
    n_rows = left.shape[:-1].numel() // max(n_records, 1)
    way = cost.cheapest(n_rows, left.shape[-1], right.shape[-1], left.element_size())
    of_way = gram_sq_norms if way == "gram" else product_sq_norms
    return of_way(left, right, n_records=n_records, impl=impl)


def weighted_product(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    keep: Tensor,
    *,
    n_records: int,
    impl: Impl = "auto",
) -> Tensor:
    """``Σ_n weights[n] Σ_t left[n,t]ᵀ right[n,t]`` over the records kept.  -> float64 [L, D]"""
    checks.same_rows(left=left, right=right)
    checks.records(left, n_records)
    checks.per_record(n_records, weights=weights, keep=keep)
    checks.boolean(keep=keep)
    return _implementation(impl, left).weighted_product(left, right, weights, keep)


def embedding_per_record_grads(
    ids: Tensor,
    backprops: Tensor,
    *,
    num_embeddings: int,
    n_records: int,
    padding_idx: int | None = None,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The per-record gradients of an embedding; ids must lie in [0, num_embeddings).

    ids int [N·K, ...], backprops [N·K, ..., D] -> [N, V, D] (``out`` where given).
    """
    checks.indices(ids, num_embeddings, padding_idx)
    if ids.shape != backprops.shape[:-1]:
        raise ValueError(
            "ids must have the shape of backprops without its last dimension, got "
            f"{tuple(ids.shape)} and {tuple(backprops.shape)}"
        )
    checks.records(backprops, n_records)
    checks.fits("out", out, (n_records, num_embeddings, backprops.shape[-1]))
    checks.slab_view(out)
    run = _implementation(impl, backprops)
    return run.embedding_per_record_grads(
        ids, backprops, num_embeddings, n_records, padding_idx, out
    )


def bias_per_record_grads(
    backprops: Tensor,
    *,
    n_records: int,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The per-record gradients of a bias.

    backprops [N·K, ..., C] -> [N, C] (``out`` where given).
    """
    checks.records(backprops, n_records)
    checks.fits("out", out, (n_records, backprops.shape[-1]))
    checks.slab_view(out)
    return _implementation(impl, backprops).bias_per_record_grads(backprops, n_records, out)


def scale_per_record_grads(
    backprops: Tensor,
    normalized: Tensor,
    *,
    n_records: int,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The per-record gradients of the weight of LayerNorm, GroupNorm or RMSNorm.

    backprops and normalized (before weight and bias) [N·K, ..., C] -> [N, C] (``out`` where given).
    """
    checks.same_rows(backprops=backprops, normalized=normalized)
    checks.fits("normalized", normalized, backprops.shape)
    checks.records(backprops, n_records)
    checks.fits("out", out, (n_records, backprops.shape[-1]))
    checks.slab_view(out)
    run = _implementation(impl, backprops)
    return run.scale_per_record_grads(backprops, normalized, n_records, out)


def sq_norms(per_record_grads: list[Tensor], *, impl: Impl = "auto") -> Tensor:
    """Squared L2 norm of each record's gradient over all tensors.  [N, ...] each -> float64 [N]"""
    checks.one_batch(per_record_grads)
    return _implementation(impl, per_record_grads[0]).sq_norms(per_record_grads)


def clip_factors(sq_norms: Tensor, max_grad_norm: float, *, gamma: float | None = None) -> Tensor:
    """Factors that bring every norm to at most ``max_grad_norm``.  float64 [N] -> float64 [N]

    ``gamma`` None clips flat: factors in [0, 1], 1 for a zero norm. Else automatic clipping:
    ``C / (norm + gamma)``, which may exceed 1. 0 for a norm that is not finite; never rounded up.
    """
    checks.positive(max_grad_norm=max_grad_norm, gamma=1.0 if gamma is None else gamma)
    checks.double(sq_norms=sq_norms)
    return reference.clip_factors(sq_norms, max_grad_norm, gamma)


def clip_and_sum(
    per_record_grads: list[Tensor],
    sq_norms: Tensor,
    keep: Tensor,
    *,
    max_grad_norm: float,
    loss_scale: float = 1.0,
    gamma: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``Σ_n c[n] · loss_scale · grad[n]``, each record clipped, over the records where ``keep``.

    Each tensor [N, ...], sq_norms float64 [N] of the tensors as they are, keep bool [N] ->
    float64 [P], the tensors one after another. ``gamma`` None clips flat, a number > 0 clips
    automatically. Records that are not kept or not finite are selected away, not multiplied away.
    A slab [N, P], or columns of one, is one tensor, and takes one launch.
    """
    checks.one_batch(per_record_grads)
    checks.positive(max_grad_norm=max_grad_norm, loss_scale=loss_scale)
    checks.positive(gamma=1.0 if gamma is None else gamma)
    checks.per_record(len(per_record_grads[0]), sq_norms=sq_norms, keep=keep)
    checks.boolean(keep=keep)
    checks.double(sq_norms=sq_norms)
    run = _implementation(impl, per_record_grads[0])
    return run.clip_and_sum(per_record_grads, sq_norms, keep, max_grad_norm, loss_scale, gamma)


def add_noise(
    values: Tensor,
    stream: Tensor,
    *,
    noise_stddev: float,
    divisor: float,
    impl: Impl = "auto",
) -> Tensor:
    """``(values + noise_stddev · z) / divisor`` with z standard normal from ``stream``.

    values float64 [P], stream int32 [12]: ChaCha20's key, block counter and nonce, never to be used
    for a second draw -> float64 [P].
    """
    checks.positive(noise_stddev=noise_stddev, divisor=divisor)
    checks.double(values=values)
    checks.stream(stream)
    if values.numel() > 8 * 2**32:
        raise ValueError(f"one stream has noise for 2**35 values, got {values.numel()}")
    run = _choose(impl, values.is_cuda, values)
    return run.add_noise(values, stream, noise_stddev, divisor)


def chacha20_words(stream: Tensor, n_blocks: int, *, impl: Impl = "auto") -> Tensor:
    """Keystream of ChaCha20 (RFC 8439) as little-endian 64-bit words.  -> int64 [n_blocks, 8]"""
    checks.stream(stream)
    return _choose(impl, stream.is_cuda, stream).chacha20_words(stream, n_blocks)


def gaussians(words: Tensor) -> Tensor:
    """Standard normals from uniform 64-bit words.  int64 [n_blocks, 8] -> float64 [8 n_blocks]"""
    return reference.gaussians(words)


def _implementation(impl: Impl, tensor: Tensor, rank: int = 1) -> ModuleType:
    """`library` (Triton) or `reference`, for inputs like ``tensor``."""
    checks.rank(rank)
    known_type = tensor.dtype in _KERNEL_TYPES
    if impl == "triton":
        checks.kernel_rank(rank)
        if not known_type:
            raise TypeError(
                f"the kernels take float32, bfloat16 and float16, got {tensor.dtype}; use "
                "impl='reference'"
            )
    return _choose(impl, tensor.is_cuda and known_type and rank <= checks.MAX_RANK, tensor)


def _choose(impl: Impl, use_kernels: bool, tensor: Tensor) -> ModuleType:
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be 'auto', 'reference' or 'triton', got {impl!r}")
    if impl == "reference" or (impl == "auto" and not use_kernels):
        return reference
    if not tensor.is_cuda:
        from .gpu.launch import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"impl='triton' needs tensors on a GPU, got {tensor.device}; set "
                "TRITON_INTERPRET=1 before the import to run the kernels on the CPU"
            )
    return library
