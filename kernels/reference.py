"""Eager PyTorch specification of every op: the oracle of the kernels and the path on CPU.

Legend: N records, K draws per record, T tokens, R rank, I = in_features, O = out_features,
L, D the two dimensions of a product, C channels, V embeddings, P trainable parameters, M columns of
partial squared norms. Rows are ordered ``n * K + k``; all K·T rows of one record are summed, so
averaging over draws costs a reshape and no gradient per draw is ever formed.

Products accumulate in float32 (float64 for float64 inputs), whatever the inputs' type. Per-record
gradients come in that type, or rounded to the type of ``out``; their squared norms are those of the
values as stored, in float64, and come as [N, M] whose rows are to be summed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_forward(
    base_output: Tensor, activations: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """``base_output += s (x Aᵀ) Bᵀ`` in place; returns ``h = x Aᵀ`` for the backward pass.

    base_output [..., O], activations [..., I], lora_a [R, I], lora_b [O, R] -> h [..., R].
    """
    h = F.linear(activations, lora_a.to(activations.dtype))
    base_output.add_(F.linear(h, lora_b.to(h.dtype)), alpha=scaling)
    return h


def lora_side_b(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    n_records: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``u = s g B`` and ``grad_b[n] = s Σ_t g[n,t]ᵀ h[n,t]``.

    backprops g [N·K, ..., O], h [N·K, ..., R], lora_b [O, R] -> u [N·K, ..., R] in the type of g,
    grad_b [N, O, R], squared norms [N, M].
    """
    compute = torch.promote_types(backprops.dtype, torch.float32)
    # MKL is faster at a product with few columns when its right side lies transposed.
    b_transposed = lora_b.to(backprops.dtype).to(compute).T.contiguous()
    u = F.linear(backprops.to(compute), b_transposed).mul_(scaling).to(backprops.dtype)
    grad_b = _stored(_product(backprops, h, n_records).mul_(scaling), out)
    return u, grad_b, _squares(grad_b)


def lora_side_a(
    activations: Tensor,
    u: Tensor,
    lora_a: Tensor,
    n_records: int,
    input_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``grad_a[n] = Σ_t u[n,t]ᵀ x[n,t]``, and ``input_grad += u A`` in place.

    activations x [N·K, ..., I], u [N·K, ..., R], lora_a [R, I], input_grad like x ->
    grad_a [N, R, I], squared norms [N, M]. Adapters that share x go in one call: their u and
    lora_a joined along R.
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
) -> tuple[Tensor, Tensor]:
    """``grad_a[n, :, :, i, j] = Σ_p u[n,p]ᵀ x[n, p·stride - padding + (i, j)·dilation]``.

    activations x [N·K, C, H, W], u [N·K, R, H', W'] the gradient of ``h = conv(x, A)`` ->
    grad_a [N, R, C, kernel], squared norms [N, M]. One shifted view of x for each tap (i, j) of
    the kernel; no unfold. Pixels are the tokens, and B is 1x1, so side B is ``lora_side_b`` with
    the channels last.
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
    grad_a = _stored(grad_a, out)
    return grad_a, _squares(grad_a)


def per_record_product(
    left: Tensor, right: Tensor, n_records: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``grad[n] = Σ_t left[n,t]ᵀ right[n,t]``: the gradient of a linear layer's weight.

    left [N·K, ..., L] (backprops), right [N·K, ..., D] (activations) -> [N, L, D], squared norms
    [N, M].
    """
    grad = _stored(_product(left, right, n_records), out)
    return grad, _squares(grad)


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
    compute = torch.promote_types(left.dtype, torch.float32)
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


def clipped_product(
    left: Tensor, right: Tensor, keep: Tensor, max_grad_norm: float, loss_scale: float
) -> Tensor:
    """``Σ_n c[n] grad[n]`` of one weight clipped on its own: per-layer clipping in one pass.

    left [N·K, ..., L], right [N·K, ..., D], keep bool [N] -> float64 [L, D]. ``grad`` is
    ``loss_scale`` times ``per_record_product``, c[n] brings it to at most ``max_grad_norm``.
    """
    sq_norms = product_sq_norms(left, right, len(keep)).sum(1) * loss_scale**2
    weights = loss_scale * clip_factors(sq_norms, max_grad_norm).double()
    return weighted_product(left, right, weights, keep & sq_norms.isfinite())


def embedding_per_record_grads(
    ids: Tensor,
    backprops: Tensor,
    num_embeddings: int,
    n_records: int,
    padding_idx: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``grad[n, v] = Σ_{t: ids[n,t] = v} g[n,t]``, 0 for ``padding_idx``.

    ids int [N·K, ...], backprops [N·K, ..., D] -> [N, V, D], squared norms [N, M].
    """
    compute = torch.promote_types(backprops.dtype, torch.float32)
    ids = _records(ids.unsqueeze(-1), n_records).squeeze(-1)
    grad = backprops.new_zeros(n_records, num_embeddings, backprops.shape[-1], dtype=compute)
    rows = torch.arange(n_records, device=ids.device)[:, None].expand_as(ids)
    grad.index_put_((rows, ids), _records(backprops, n_records).to(compute), accumulate=True)
    if padding_idx is not None:
        grad[:, padding_idx] = 0
    grad = _stored(grad, out)
    return grad, _squares(grad)


def bias_per_record_grads(
    backprops: Tensor, n_records: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``grad[n] = Σ_t g[n,t]``: the gradient of a bias.

    backprops [N·K, ..., C] -> [N, C], squared norms [N, M].
    """
    compute = torch.promote_types(backprops.dtype, torch.float32)
    grad = _stored(_records(backprops, n_records).to(compute).sum(1), out)
    return grad, _squares(grad)


def scale_per_record_grads(
    backprops: Tensor, normalized: Tensor, n_records: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``grad[n] = Σ_t g[n,t] x̂[n,t]``: the gradient of a norm layer's weight.

    backprops [N·K, ..., C], normalized x̂ (the layer's output before weight and bias) of the same
    shape -> [N, C], squared norms [N, M].
    """
    compute = torch.promote_types(backprops.dtype, torch.float32)
    products = _records(backprops, n_records).to(compute) * _records(normalized, n_records)
    grad = _stored(products.sum(1), out)
    return grad, _squares(grad)


def sq_norms(per_record_grads: list[Tensor]) -> Tensor:
    """Squared L2 norm of each record's gradient over all tensors, summed in float64.

    Each tensor [N, ...] -> [N]. A float32 square is exact in float64, so nothing overflows and
    the only rounding is that of the sum: relative error at most P·2⁻⁵³ for P elements.
    """
    return sum_sq_norms([_squares(grad) for grad in per_record_grads])


def sum_sq_norms(partial: list[Tensor]) -> Tensor:
    """Squared norm over several tensors from their partial ones.  float64 [N, M] each -> [N]"""
    return torch.cat(partial, 1).sum(1)


def clip_factors(sq_norms: Tensor, max_grad_norm: float) -> Tensor:
    """The largest float32 factors at most 1 that keep every contribution within the bound.

    ``(C / norm)(1 - 2⁻²²)``, rounded toward zero to float32; 1 where that exceeds 1 (the norm is
    0 or clearly below C); 0 where the norm is not finite.  float64 [N] -> float32 [N].

    Guarantee: for up to 2²⁹ elements ``sq_norms`` is low by at most one part in 2²⁴, its root by
    2²⁵ with this function's own rounding included, and so ``factor * exact norm`` is below
    ``C (1 - 2⁻²²) / (1 - 2⁻²⁴) < C (1 - 2⁻²³)``. A factor of 1 is given only where
    ``norm <= C (1 - 2⁻²²)``, to which the same inequality applies.
    """
    limit = max_grad_norm * (1 - 2.0**-22)
    wanted = (limit / sq_norms.sqrt()).clamp(max=1.0)
    rounded = wanted.float()
    too_large = rounded.double() > wanted
    factors = torch.where(too_large, rounded.nextafter(torch.zeros_like(rounded)), rounded)
    return torch.where(sq_norms.isfinite(), factors, torch.zeros_like(factors))


def clip_and_sum(
    per_record_grads: list[Tensor],
    sq_norms: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
) -> Tensor:
    """``Σ_n c[n] · loss_scale · grad[n]`` over the kept records.  -> float64 [P]

    Each tensor [N, ...], in the order of the P elements; sq_norms float64 [N], those of the
    tensors as they are; keep bool [N]. c[n] brings ``loss_scale · grad[n]`` to at most
    ``max_grad_norm``. Records that are not kept, or whose norm is not finite, are removed by
    selection, because ``0 * inf`` is NaN. The sum runs over all N slots whatever is kept, so that
    a removed record leaves the order of summation, and with it every bit of the others, as it was.
    """
    scaled = sq_norms * loss_scale**2
    weights = loss_scale * clip_factors(scaled, max_grad_norm).double()
    keep = keep & scaled.isfinite()
    sums = []
    for grad in per_record_grads:
        rows = torch.where(keep[:, None], grad.unsqueeze(-1).flatten(1).double(), 0.0)
        sums.append(weights @ rows)
    return torch.cat(sums)


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


def _records(rows: Tensor, n_records: int) -> Tensor:
    tokens = rows.shape[:-1].numel() // max(n_records, 1)
    return rows.reshape(n_records, tokens, rows.shape[-1])


def _product(left: Tensor, right: Tensor, n_records: int) -> Tensor:
    compute = torch.promote_types(left.dtype, torch.float32)
    left, right = (_records(factor, n_records).to(compute) for factor in (left, right))
    if right.shape[-1] < left.shape[-1]:
        return _aligned_bmm(right.mT, left).mT.contiguous()
    return _aligned_bmm(left.mT, right).contiguous()


def _aligned_bmm(left: Tensor, right: Tensor) -> Tensor:
    # MKL rounds a record's product by the alignment of its result: give each a multiple of 64
    # bytes, so that a record has the same bits in every slot.
    size = left.shape[1] * right.shape[2]
    if size % 16 == 0 or torch.compiler.is_compiling():
        return torch.bmm(left, right)
    stride = -(-size // 16) * 16
    products = left.new_empty(len(left), stride)[:, :size].unflatten(1, (-1, right.shape[2]))
    return torch.bmm(left, right, out=products)


def _products_one_by_one(left: Tensor, right: Tensor, n_records: int) -> list[Tensor]:
    compute = torch.promote_types(left.dtype, torch.float32)
    left, right = _records(left, n_records), _records(right, n_records)
    return [l.to(compute).T @ r.to(compute) for l, r in zip(left, right, strict=True)]  # noqa: E741


def _stored(grad: Tensor, out: Tensor | None) -> Tensor:
    return grad if out is None else out.copy_(grad)


def _squares(grad: Tensor) -> Tensor:
    return grad.unsqueeze(-1).flatten(1).double().square().sum(1, keepdim=True)
