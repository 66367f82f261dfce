"""The kernel files as PyTorch operators ``dpengine::*``, for `torch.compile` and CUDA graphs.

Each operator runs the launches of one kernel file on tensors that it is given, and declares which
of them it writes; with nothing to return there is nothing for its fake implementation to make up.
Importing this module registers them; Triton is imported when one is called.
"""

import torch
from torch import Tensor


@torch.library.custom_op("dpengine::lora_forward", mutates_args=("base_output", "h"))
def _lora_forward(
    base_output: Tensor,
    activations: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    h: Tensor,
) -> None:
    from . import launch, lora_forward

    launch.run(lora_forward.launches(base_output, activations, lora_a, lora_b, scaling, h))


@torch.library.custom_op("dpengine::lora_side_b", mutates_args=("u", "grad_b"))
def _lora_side_b(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    u: Tensor,
    grad_b: Tensor,
) -> None:
    from . import launch, lora_side_b

    launch.run(lora_side_b.launches(backprops, h, lora_b, scaling, u, grad_b))


@torch.library.custom_op("dpengine::per_record_product", mutates_args=("input_grad", "grad"))
def _per_record_product(
    left: Tensor,
    right: Tensor,
    lora_a: Tensor | None,
    input_grad: Tensor | None,
    grad: Tensor,
) -> None:
    from . import launch, product

    launch.run(product.launches(left, right, grad, lora_a, input_grad))


@torch.library.custom_op("dpengine::lora_conv_side_a", mutates_args=("grad_a",))
def _lora_conv_side_a(
    activations: Tensor,
    u: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    grad_a: Tensor,
) -> None:
    from . import launch, lora_conv

    launch.run(lora_conv.launches(activations, u, stride, padding, dilation, grad_a))


@torch.library.custom_op("dpengine::product_sq_norms", mutates_args=("sq_norms",))
def _product_sq_norms(left: Tensor, right: Tensor, sq_norms: Tensor) -> None:
    from . import launch, product_sq_norms

    launch.run(product_sq_norms.launches(left, right, sq_norms))


@torch.library.custom_op("dpengine::weighted_product", mutates_args=("sums",))
def _weighted_product(
    left: Tensor, right: Tensor, weights: Tensor, keep: Tensor, sums: Tensor
) -> None:
    from . import launch, weighted_product

    launch.run(weighted_product.launches(left, right, weights, keep, sums))


@torch.library.custom_op("dpengine::gram", mutates_args=("gram", "row_norms"))
def _gram(left: Tensor, right: Tensor, gram: Tensor, row_norms: Tensor) -> None:
    from . import gram as kernel
    from . import launch

    launch.run(kernel.launches(left, right, gram, row_norms))


@torch.library.custom_op("dpengine::embedding", mutates_args=("grad",))
def _embedding(ids: Tensor, backprops: Tensor, padding_idx: int | None, grad: Tensor) -> None:
    from . import embedding, launch

    launch.run(embedding.launches(ids, backprops, padding_idx, grad))


@torch.library.custom_op("dpengine::column_sums", mutates_args=("grad",))
def _column_sums(backprops: Tensor, normalized: Tensor | None, grad: Tensor) -> None:
    from . import column_sums, launch

    launch.run(column_sums.launches(backprops, normalized, grad))


@torch.library.custom_op("dpengine::sq_norms", mutates_args=("sq_norms",))
def _sq_norms(grads: Tensor, sq_norms: Tensor) -> None:
    from . import launch
    from . import sq_norms as kernel

    launch.run(kernel.launches(grads, sq_norms))


@torch.library.custom_op("dpengine::clip_and_sum", mutates_args=("total",))
def _clip_and_sum(
    grads: Tensor,
    sq_norms: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
    gamma: float,
    largest: float,
    total: Tensor,
) -> None:
    from . import clip_and_sum, launch

    launch.run(
        clip_and_sum.launches(
            grads, sq_norms, keep, max_grad_norm, loss_scale, total, gamma, largest
        )
    )


@torch.library.custom_op("dpengine::add_noise", mutates_args=("out",))
def _add_noise(
    values: Tensor, stream: Tensor, noise_stddev: float, divisor: float, out: Tensor
) -> None:
    from . import launch, noise

    launch.run(noise.launches(values, stream, noise_stddev, divisor, out))


@torch.library.custom_op("dpengine::chacha20_words", mutates_args=("words",))
def _chacha20_words(stream: Tensor, words: Tensor) -> None:
    from . import launch, noise

    launch.run(noise.words_launches(stream, words))
