"""Eager PyTorch specification of every op: the oracle of the kernels and the path on CPU.

Legend: N records, K draws per record, T tokens, R rank, I = in_features, O = out_features,
L, D the two dimensions of a product, C channels, V embeddings, P trainable parameters. Rows are
ordered ``n * K + k``; all K·T rows of one record are summed, so averaging over draws costs a
reshape and no gradient per draw is ever formed.

Products accumulate in float32 (float64 for float64 inputs), whatever the inputs' type. Per-record
gradients come in that type, or rounded to the type of ``out``; ``sq_norms`` takes their squared
norms, in float64, of the values as stored. Norms of products that nobody stores come as [N, M],
whose rows are to be summed.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_BLOCK = 2**18
"""Elements of per-record gradients that are in float64 at a time: 2 MiB."""


def lora_forward(
    base_output: Tensor, activations: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """``base_output += s (x Aᵀ) Bᵀ`` in place; returns ``h = x Aᵀ`` for the backward pass.

    base_output [..., O], activations [..., I], lora_a [R, I], lora_b [O, R] -> h [..., R].
    """
    h = F.linear(activations, lora_a.to(activations.dtype))
    flat = base_output.view(-1, base_output.shape[-1])
    flat.addmm_(h.reshape(-1, h.shape[-1]), lora_b.T.to(h.dtype), alpha=scaling)
    return h


def lora_side_b(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    n_records: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``u = s g B`` and ``grad_b[n] = s Σ_t g[n,t]ᵀ h[n,t]``.

    backprops g [N·K, ..., O], h [N·K, ..., R], lora_b [O, R] -> u [N·K, ..., R] in the type of g,
    grad_b [N, O, R].
    """
    compute = _compute(backprops)
    # MKL is faster at a product with few columns when its right side lies transposed.
    b_transposed = lora_b.to(backprops.dtype).to(compute).T.contiguous()
    rows = backprops.reshape(-1, backprops.shape[-1]).to(compute)
    u = torch.addmm(b_transposed[:, 0], rows, b_transposed.T, beta=0, alpha=scaling)
    u = u.view(h.shape).to(backprops.dtype)
    grad_b = _product(backprops, h, n_records, out, scaling)
    return u, grad_b


def lora_side_a(
    activations: Tensor,
    u: Tensor,
    lora_a: Tensor,
    n_records: int,
    input_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``grad_a[n] = Σ_t u[n,t]ᵀ x[n,t]``, and ``input_grad += u A`` in place.

    activations x [N·K, ..., I], u [N·K, ..., R], lora_a [R, I], input_grad like x ->
    grad_a [N, R, I]. Adapters that share x go in one call: their u and lora_a joined along R.
    """
    if input_grad is not None:
        flat = input_grad.view(-1, input_grad.shape[-1])
        flat.addmm_(u.reshape(-1, u.shape[-1]), lora_a.to(u.dtype))
    return per_record_product(u, activations, n_records, out)


def lora_conv_side_a(
    activations: Tensor,
    u: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    n_records: int,
    out: Tensor | None = None,
) -> Tensor:
    """``grad_a[n, :, :, i, j] = Σ_p u[n,p]ᵀ x[n, p·stride - padding + (i, j)·dilation]``.

    activations x [N·K, C, H, W], u [N·K, R, H', W'] the gradient of ``h = conv(x, A)`` ->
    grad_a [N, R, C, kernel]. One shifted view of x for each tap (i, j) of the kernel; no unfold.
    Pixels are the tokens, and B is 1x1, so side B is ``lora_side_b`` with the channels last.
    """
    padded = F.pad(activations, (padding[1], padding[1], padding[0], padding[0]))
    height, width = u.shape[2:]
    u = u.movedim(1, -1)
    taps = []
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(left, left + (width - 1) * stride[1] + 1, stride[1])
            taps.append(_product(u, padded[:, :, rows, columns].movedim(1, -1), n_records))
    grad_a = torch.stack(taps, dim=-1).unflatten(-1, kernel_size)
    return _stored(grad_a, out)


def per_record_product(
    left: Tensor, right: Tensor, n_records: int, out: Tensor | None = None
) -> Tensor:
    """``grad[n] = Σ_t left[n,t]ᵀ right[n,t]``: the gradient of a linear layer's weight.

    left [N·K, ..., L] (backprops), right [N·K, ..., D] (activations) -> [N, L, D].
    """
    return _product(left, right, n_records, out)


def product_sq_norms(left: Tensor, right: Tensor, n_records: int) -> Tensor:
    """Squared norms of ``per_record_product`` without keeping it.  -> float64 [N, M]

    Each record's product is formed exactly as in ``weighted_product``: what is clipped there has,
    bit for bit, the norm found here.
    """
    products = _products_one_by_one(left, right, n_records)
    norms = [product.double().square().sum() for product in products]
    return torch.stack(norms)[:, None] if norms else left.new_zeros(0, 1, dtype=torch.float64)


def weighted_product(left: Tensor, right: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """``Σ_n weights[n] Σ_t left[n,t]ᵀ right[n,t]`` over the records kept.  -> float64 [L, D]

    left [N·K, ..., L], right [N·K, ..., D], weights float [N], keep bool [N]. The weight meets the
    finished product of its record, not the rows: rounding scaled rows would leave a residue that
    no norm bounds where draws cancel.
    """
    total = left.new_zeros(left.shape[-1], right.shape[-1], dtype=torch.float64)
    products = _products_one_by_one(left, right, len(weights))
    for product, weight, kept in zip(products, weights.double(), keep, strict=True):
        total += torch.where(kept, weight * product.double(), 0.0)
    return total


def gram_sq_norms(left: Tensor, right: Tensor, n_records: int) -> Tensor:
    """Upper bounds of the squared norms that ``weighted_product`` clips, from Gram matrices.

    ``‖Σ_t l_tᵀ r_t‖² = Σ_{t,t'} (l_t·l_t')(r_t·r_t')``, all K·T rows of a record against all.
    left [N·K, ..., L], right [N·K, ..., D] -> float64 [N, 1].

    Guarantee: at least the exact squared norm of the product as ``weighted_product`` computes it;
    ``gram_upper_bound`` adds what rounding can hide.
    """
    compute = _compute(left)
    l, r = _records(left, n_records).double(), _records(right, n_records).double()  # noqa: E741
    gram = ((l @ l.mT) * (r @ r.mT)).sum((1, 2))
    left_norms, right_norms = l.norm(dim=2), r.norm(dim=2)
    row_norms = torch.stack([left_norms * right_norms, left_norms, right_norms], -1).sum(1)
    features = left.shape[-1] + right.shape[-1]
    return gram_upper_bound(gram, row_norms, l.shape[1], features, torch.float64, compute)[:, None]


def gram_upper_bound(
    gram: Tensor,
    row_norms: Tensor,
    n_rows: int,
    features: int,
    gram_type: torch.dtype,
    compute: torch.dtype,
) -> Tensor:
    """``(√(max(gram, 0) + e) + m ε B)²`` with ``B = Σ_t ‖l_t‖ ‖r_t‖`` over m = ``n_rows`` rows.

    gram float64 [N]: sums over pairs of products of Gram entries, each a sum of up to ``features``
    = L + D products in ``gram_type``. row_norms float64 [N, 3]: B, ``Σ ‖l_t‖``, ``Σ ‖r_t‖``.
    ``compute``: the type of the product that will be clipped.  -> float64 [N]

    Proof. Below, ε is four units of roundoff, for tensor cores that truncate.

    The Gram sum. A computed entry differs from ``l_t·l_t'`` by at most ``ε L ‖l_t‖ ‖l_t'‖ + η``,
    where η = ``features`` · tiny stands for products that underflow; so does one of r. The product
    of two entries is then off by ``ε (L + D) ‖l_t‖ ‖l_t'‖ ‖r_t‖ ‖r_t'‖ + η ‖l_t‖ ‖l_t'‖ +
    η ‖r_t‖ ‖r_t'‖ + η²`` up to higher orders, and summed over pairs by
    ``e = (ε (L + D + 8) + 2⁻⁵² m²) B² + η (Σ ‖l_t‖)² + η (Σ ‖r_t‖)² + m² η²``, the 8 for those
    orders, the m² for the float64 sum. The norm of the exact product is at most √(gram + e).

    The product. As computed, each element differs from the exact one by at most
    ``γ_m Σ_t |l_t| |r_t|`` (Higham, Accuracy and Stability, section 3.1), and so its norm by
    ``γ_m B``; ``m ε`` exceeds γ_m for m < 2²⁰. Products that underflow take at most tiny from each
    of at most 2⁴⁰ elements, in each of m rows. Where B leaves room for an overflow, the answer is
    infinite: no partial sum exceeds B.
    """
    gram_info, info = torch.finfo(gram_type), torch.finfo(compute)
    products, left_norms, right_norms = (row_norms * (1 + 2.0**-30)).unbind(1)
    underflow = features * gram_info.tiny
    relative = 2 * gram_info.eps * (features + 8) + 2.0**-52 * n_rows**2
    error = relative * products.square() + (n_rows * underflow) ** 2
    error = error + underflow * (left_norms.square() + right_norms.square())
    exact = (gram.clamp(min=0) + error).sqrt()
    residue = 2 * info.eps * (n_rows + 2) * products + 2.0**20 * n_rows * info.tiny
    finite = gram.isfinite() & error.isfinite() & (products + residue < info.max)
    return torch.where(finite, (exact + residue).square(), torch.inf)


def embedding_per_record_grads(
    ids: Tensor,
    backprops: Tensor,
    num_embeddings: int,
    n_records: int,
    padding_idx: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``grad[n, v] = Σ_{t: ids[n,t] = v} g[n,t]``, 0 for ``padding_idx``.

    ids int [N·K, ...], backprops [N·K, ..., D] -> [N, V, D].
    """
    compute = _compute(backprops)
    ids = _records(ids.unsqueeze(-1), n_records).squeeze(-1)
    grad = backprops.new_zeros(n_records, num_embeddings, backprops.shape[-1], dtype=compute)
    rows = torch.arange(n_records, device=ids.device)[:, None].expand_as(ids)
    grad.index_put_((rows, ids), _records(backprops, n_records).to(compute), accumulate=True)
    if padding_idx is not None:
        grad[:, padding_idx] = 0
    return _stored(grad, out)


def bias_per_record_grads(backprops: Tensor, n_records: int, out: Tensor | None = None) -> Tensor:
    """``grad[n] = Σ_t g[n,t]``: the gradient of a bias.

    backprops [N·K, ..., C] -> [N, C].
    """
    compute = _compute(backprops)
    return _stored(_records(backprops, n_records).to(compute).sum(1), out)


def scale_per_record_grads(
    backprops: Tensor,
    normalized: Tensor,
    n_records: int,
    out: Tensor | None = None,
) -> Tensor:
    """``grad[n] = Σ_t g[n,t] x̂[n,t]``: the gradient of a norm layer's weight.

    backprops [N·K, ..., C], normalized x̂ (the layer's output before weight and bias) of the same
    shape -> [N, C].
    """
    compute = _compute(backprops)
    products = _records(backprops, n_records).to(compute) * _records(normalized, n_records)
    return _stored(products.sum(1), out)


def sq_norms(per_record_grads: list[Tensor]) -> Tensor:
    """Squared L2 norm of each record's gradient over all tensors, summed in float64.

    Each tensor [N, ...] -> [N]. A float32 square is exact in float64, so nothing overflows or
    underflows. What rounds is the sum, the root of a block's and its square: relative error at
    most (P + 3)·2⁻⁵³ for P elements.
    """
    norms = [
        torch.linalg.vector_norm(block, dim=1, keepdim=True, dtype=torch.float64)
        for block in _blocks(per_record_grads)
    ]
    return _joined(norms, 1).square().sum(1)


def sum_sq_norms(partial: list[Tensor]) -> Tensor:
    """Squared norm over several tensors from their partial ones.  float64 [N, M] each -> [N]"""
    return _joined(partial, 1).sum(1)


def clip_factors(sq_norms: Tensor, max_grad_norm: float, gamma: float | None = None) -> Tensor:
    """Factors that keep every contribution within the bound, rounded toward zero to 24 bits.

    Flat, ``gamma`` None: ``min(1, C / norm · (1 - 2⁻²²))``. Automatic (Bu et al., arXiv 2206.07136,
    AUTO-S): ``C / (norm + gamma) · (1 - 2⁻²²)``, which may exceed 1, at most 2¹²⁷ so that nothing
    overflows. 0 where the norm is not finite.  float64 [N] -> float64 [N], whose products with
    float32 elements are exact.

    Guarantee: ``factor * exact norm < C (1 - 2⁻²³)``. Proof: for up to 2²⁹ elements ``sq_norms`` is
    low by at most one part in 2²⁴ and a few in 2⁵³, so the norm computed here is at least
    ``(1 - 2⁻²⁴)`` of the exact one. This function's other roundings, 2⁻⁵³ each, raise the factor
    by less than ``1 + 2⁻²⁴``, and as gamma >= 0 the product is below
    ``C (1 - 2⁻²²)(1 + 2⁻²⁴) / (1 - 2⁻²⁴) < C (1 - 2⁻²³)``. Truncation and caps only lower a factor.
    """
    gamma, largest = factor_limits(gamma)
    limits = torch.full_like(sq_norms, max_grad_norm * (1 - 2.0**-22))
    wanted = limits.div_(sq_norms.sqrt() + gamma).clamp_(max=largest).nan_to_num_(nan=0.0)
    # Toward zero for factors of any size; a cast to float32 would round to nearest, and overflow.
    return (wanted.view(torch.int64) & -(2**29)).view(torch.float64)


def factor_limits(gamma: float | None) -> tuple[float, float]:
    """What is added to the norm, and the largest factor, of flat and of automatic clipping."""
    return (0.0, 1.0) if gamma is None else (gamma, 2.0**127)


def clip_and_sum(
    per_record_grads: list[Tensor],
    sq_norms: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
    gamma: float | None = None,
) -> Tensor:
    """``Σ_n c[n] · loss_scale · grad[n]`` over the kept records.  -> float64 [P]

    Each tensor [N, ...], in the order of the P elements; sq_norms float64 [N], those of the
    tensors as they are; keep bool [N]. c[n] brings ``loss_scale · grad[n]`` to at most
    ``max_grad_norm``, as ``clip_factors`` does with ``gamma``. Records that are not kept, or whose
    norm is not finite, are removed by selection, because ``0 * inf`` is NaN. The sum runs over all
    N slots whatever is kept, so that a removed record leaves the order of summation, and with it
    every bit of the others, as it was. Float64 copies hold ``_BLOCK`` elements at a time.
    """
    scaled = sq_norms * loss_scale**2
    weights = clip_factors(scaled, max_grad_norm, gamma).mul_(loss_scale)
    # All bits of a row or none: a selection too, and on a CPU a faster one than masked_fill.
    kept_bits = (keep & (scaled < torch.inf)).long().neg_()[:, None]
    sums = []
    for block in _blocks(per_record_grads):
        rows = block.to(torch.float64, copy=True)
        del block  # one block at a time
        rows.view(torch.int64).bitwise_and_(kept_bits)
        sums.append(torch.mv(rows.mT, weights))
        del rows
    return _joined(sums, 0)


def add_noise(values: Tensor, stream: Tensor, noise_stddev: float, divisor: float) -> Tensor:
    """``(values + noise_stddev · z) / divisor`` with z standard normal.  float64 [P] -> [P]

    stream: int32 [12], the ChaCha20 state behind its constants: key, block counter, nonce.
    """
    z = gaussians(chacha20_words(stream, -(-len(values) // 8)))[: len(values)]
    return (values + noise_stddev * z) / divisor


def chacha20_words(stream: Tensor, n_blocks: int) -> Tensor:
    """Keystream of ChaCha20 (RFC 8439, section 2.3) as little-endian 64-bit words.

    stream: int32 [12], key [8], block counter, nonce [3] -> int64 [n_blocks, 8], bit patterns.
    """
    constants = torch.tensor(_CHACHA_CONSTANTS, dtype=torch.int32, device=stream.device)
    initial = torch.cat([constants, stream])[:, None].repeat(1, n_blocks)
    initial[12] += torch.arange(n_blocks, dtype=torch.int32, device=stream.device)
    a, b, c, d = initial.view(4, 4, n_blocks)
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        # The columns of the rotated rows are the diagonals of the state.
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        a, b, c, d = _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    final = torch.cat([a, b, c, d]) + initial
    return final.T.clone(memory_format=torch.contiguous_format).view(torch.int64)


def gaussians(words: Tensor) -> Tensor:
    """Independent standard normals by Box-Muller in float64, one from each 64-bit word.

    int64 [n_blocks, 8], taken as unsigned -> float64 [8 n_blocks]. Words 0 to 3 of a block give
    ``u = (w + 1) 2⁻⁶⁴`` in (0, 1], words 4 to 7 ``v = w 2⁻⁶⁴``. The normals
    ``√(-2 ln u) cos 2πv`` come first, pair by pair and block by block, then
    ``√(-2 ln u) sin 2πv``: element ``j · n_blocks + b`` is the j-th normal of block b.
    """
    uniform = words.view(torch.uint64).to(torch.float64).T
    radius = (-2 * ((uniform[:4] + 1) * 2.0**-64).log()).sqrt()
    angle = uniform[4:] * (2 * torch.pi * 2.0**-64)
    return torch.cat([radius * angle.cos(), radius * angle.sin()]).flatten()


_CHACHA_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    for left, right in ((16, 12), (8, 7)):
        a = a + b
        d = _rotate_left(d ^ a, left)
        c = c + d
        b = _rotate_left(b ^ c, right)
    return a, b, c, d


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    # A right shift of a negative int32 carries its sign along.
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))


def _compute(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _records(rows: Tensor, n_records: int) -> Tensor:
    if rows.ndim > 2 and rows.stride(-1) != 1 and rows.shape[-1] > 1 and n_records:
        # Channels come first in memory: keep them so, MKL sums long rows more exactly and faster.
        by_draw = rows.movedim(-1, 1).unflatten(0, (n_records, -1))
        return by_draw.transpose(1, 2).reshape(n_records, rows.shape[-1], -1).mT
    tokens = rows.shape[:-1].numel() // max(n_records, 1)
    return rows.reshape(n_records, tokens, rows.shape[-1])


def _product(
    left: Tensor,
    right: Tensor,
    n_records: int,
    out: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    compute = _compute(left)
    left, right = (_records(factor, n_records).to(compute) for factor in (left, right))
    # MKL is faster where the result has many columns; it lies transposed then.
    if right.shape[-1] < left.shape[-1]:
        product = _aligned_product(right.mT, left, scaling).mT
    else:
        product = _aligned_product(left.mT, right, scaling)
    return _stored(product, out)


def _aligned_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    # MKL rounds a record's product by the alignment of its result: give each a multiple of 64
    # bytes, so that a record has the same bits in every slot.
    shape = len(left), left.shape[1], right.shape[2]
    size = shape[1] * shape[2]
    if left.numel() == 0:
        return torch.bmm(left, right)
    tracing = torch.compiler.is_compiling() or get_proxy_mode() is not None
    if size % 16 == 0 or tracing:
        return torch.baddbmm(left[:1, :1, :1], left, right, beta=0, alpha=scaling)
    stride = -(-size // 16) * 16
    result = left.new_empty(shape[0], stride)[:, :size].view(shape)
    return torch.baddbmm(result, left, right, beta=0, alpha=scaling, out=result)


def _products_one_by_one(left: Tensor, right: Tensor, n_records: int) -> list[Tensor]:
    compute = _compute(left)
    left, right = _records(left, n_records), _records(right, n_records)
    return [l.to(compute).T @ r.to(compute) for l, r in zip(left, right, strict=True)]  # noqa: E741


def _stored(grad: Tensor, out: Tensor | None) -> Tensor:
    return grad if out is None else out.copy_(grad)


def _blocks(per_record_grads: list[Tensor]) -> Iterator[Tensor]:
    """The columns of all tensors [N, ...] in order, ``_BLOCK`` elements or one column at a time."""
    waiting, size = [], 0
    for grad in per_record_grads:
        rows = grad.unsqueeze(-1).flatten(1)
        for piece in rows.split(max(1, _BLOCK // max(1, len(rows))), dim=1):
            if waiting and size + piece.numel() > _BLOCK:
                yield _joined(waiting, 1)
                waiting, size = [], 0
            waiting.append(piece)
            size += piece.numel()
    yield _joined(waiting, 1)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
