"""What is counted of a step: each operator and each product once."""

import torch

from bench.counting import OpCounter, count_flops


def counted(run):
    with OpCounter() as counter:
        run()
    return {name.removeprefix("aten."): count for name, count in counter.counts.items()}


def test_operators_are_counted_once_each_and_views_not():
    x = torch.arange(6.0).view(2, 3)

    def run():
        y = x.T[:, :1].expand(3, 2).detach()  # views alone
        y.reshape(6)  # not contiguous: a copy, and a view of it that hides itself
        x.mT @ x  # one product of two dimensions
        (x + 1).mul_(2).sum()  # in place is an operator too
        torch._foreach_add_([x.clone(), x.clone()], 1.0)

    assert counted(run) == {
        "clone.default": 3,
        "mm.default": 1,
        "add.Tensor": 1,
        "mul_.Tensor": 1,
        "sum.default": 1,
        "_foreach_add_.Scalar": 1,
    }


def test_the_backward_pass_and_the_update_are_counted_too():
    layer = torch.nn.Linear(3, 2, bias=False)
    sgd, x = torch.optim.SGD(layer.parameters(), lr=0.1), torch.ones(4, 3)

    def step():
        layer(x).sum().backward()  # y = x Wᵀ, its sum; the gradient of that: gᵀ x
        sgd.step()  # W += -lr grad
        sgd.zero_grad()

    step()
    counts = counted(step)
    assert counts.pop("ones_like.default") == 1  # the gradient of the loss, which is 1
    assert counts == {"mm.default": 2, "sum.default": 1, "add_.Tensor": 1}


def test_products_are_counted_in_place_as_well():
    x, square, batch = torch.ones(2, 3), torch.ones(2, 2), torch.ones(5, 2, 2)
    left = torch.ones(5, 2, 3)

    # Each of 2 · 2 elements takes 3 products and 3 sums.
    assert count_flops(lambda: x @ x.T) == 24
    assert count_flops(lambda: square.addmm_(x, x.T, alpha=2.0)) == 24
    assert count_flops(lambda: batch.baddbmm_(left, left.mT)) == 5 * 24
    assert count_flops(lambda: x.mul_(2)) == 0


def test_attention_is_counted_forward_and_backward():
    n, heads, tokens, width = 2, 3, 8, 4
    query, key, value = (torch.ones(n, heads, tokens, width).requires_grad_() for _ in range(3))
    product = 2 * n * heads * tokens * tokens * width

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).sum()

    # Scores and their sum of values; backward makes the scores again and two products for each.
    assert count_flops(attend) == 2 * product
    assert count_flops(lambda: attend().backward()) == (2 + 5) * product
