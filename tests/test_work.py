"""What is counted of some operations, against counts by hand."""

import torch
from torch import nn

from ppl_vae.work import Work, counted


def test_products_are_counted_by_their_operations_and_all_else_by_what_it_returns():
    x, layer = torch.randn(5, 4), nn.Linear(4, 3)
    with counted() as work, torch.no_grad():
        hidden = layer(x).relu()  # 5 * 3 numbers
        hidden.t().unsqueeze(0).expand(7, 3, 5)  # views return none
        (hidden + hidden.sum(0)).split(2)  # 3, and 5 * 3
    assert work == Work(flops=2 * 5 * 4 * 3, numbers=15 + 3 + 15)


def test_the_widest_tensor_is_that_of_the_most_numbers_a_row():
    x, others = torch.randn(13, 4), torch.randn(500, 4)
    with counted(rows=13) as work:
        distances = (x[:, None] - others).square().sum(-1)  # 500 * 4 numbers a row
        (others.exp() @ torch.ones(4, 9000)).sum()  # rows of nothing
        distances.repeat(2, 1)  # two for each row, less wide
    assert work.widest == 500 * 4


def test_a_backward_pass_counts_as_well():
    x = torch.randn(5, 4, requires_grad=True)
    with counted() as forward:
        loss = (x @ torch.ones(4, 3)).exp().sum()
    with counted() as backward:
        loss.backward()
    assert forward.flops == backward.flops == 2 * 5 * 4 * 3
    assert backward.numbers >= 15
