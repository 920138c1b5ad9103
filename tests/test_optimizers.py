"""A torch optimizer's step as a function of tensors."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from ppl_vae.training.optimizers import LongRows, held_by, held_in, tensors_in

FUSED = {
    "Adam": partial(torch.optim.Adam, amsgrad=True, weight_decay=0.1, fused=True),
    "AdamW": partial(torch.optim.AdamW, betas=(0.5, 0.9), fused=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    "SGD without momentum": partial(torch.optim.SGD, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, fused=True),
}
OTHERS = {
    "Adam in single operations": partial(torch.optim.Adam, fused=False),
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,  # whose step depends on the shape
}


def parameters(dtype=torch.float64):
    """Of several shapes; the last but one never has a gradient, and the last one only later."""
    shapes = [(3, 4), (4,), (), (2, 2), (5,), (2, 3)]
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def take_a_step(optimizer, step, but=()):
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(held_by(optimizer)):
        has_none = number == 4 or number in but
        parameter.grad = None if has_none else torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    optimizer.step()


def started(make):
    """An optimizer of two groups that took two steps, the second one with one more parameter, if that is allowed."""
    held = parameters()
    groups = [{"params": held[:2]}, {"params": held[2:], "lr": 0.03}]
    optimizer = make(groups, lr=0.1)
    take_a_step(optimizer, 0, but=[] if isinstance(optimizer, torch.optim.SGD) else [5])
    take_a_step(optimizer, 1)
    return optimizer


def step_in_rows(optimizer, long_rows, rows, number):
    """What :func:`take_a_step` does, by rows."""
    generator = torch.Generator().manual_seed(number)
    held = held_by(optimizer)
    gradients = {p: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in enumerate(held) if n != 4}
    rates = [torch.tensor(group["lr"], dtype=torch.float64) for group in optimizer.param_groups]
    long_rows.move(rows, gradients, rates)


def copied(optimizer):
    return held_in(
        optimizer, {p: p.detach().clone() for p in held_by(optimizer)}, [t.clone() for t in tensors_in(optimizer)]
    )


@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_steps_in_long_rows_are_those_of_the_optimizer(name):
    optimizer = started((FUSED | OTHERS)[name])
    trained = [parameter for number, parameter in enumerate(held_by(optimizer)) if number != 4]
    long_rows = LongRows(optimizer, trained)
    before = copied(optimizer)
    rows = long_rows.gather(copied(optimizer))
    for number in (2, 3):
        step_in_rows(optimizer, long_rows, rows, number)
        take_a_step(optimizer, number)
    after, ours = copied(optimizer), long_rows.spread(rows)
    assert set(ours) == {place for place in after if place[0] is not held_by(optimizer)[4]}
    for place, tensor in ours.items():
        assert tensor.shape == after[place].shape
        assert torch.allclose(tensor, after[place], rtol=0, atol=1e-5)  # of steps by 0.1; Adam counts in float32
        assert not torch.allclose(tensor, before[place], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_parameters_that_took_equally_many_steps_share_a_row(name):
    optimizer = started(FUSED[name])
    trained = [parameter for number, parameter in enumerate(held_by(optimizer)) if number != 4]
    sizes = [row[""].numel() for row in LongRows(optimizer, trained).gather(copied(optimizer))]
    assert sizes == ([16, 11] if name.startswith("SGD") else [16, 5, 6])  # SGD does not count


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_keep_each_parameter_in_its_shape(name):
    optimizer = started(OTHERS[name])
    trained = [parameter for number, parameter in enumerate(held_by(optimizer)) if number != 4]
    rows = LongRows(optimizer, trained).gather(copied(optimizer))
    assert [row[""].shape for row in rows] == [parameter.shape for parameter in trained]


def test_numbers_of_other_kinds_are_in_other_rows():
    held = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    optimizer = torch.optim.Adam(held, fused=True)
    for parameter in held:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [row[""].numel() for row in LongRows(optimizer, held).gather(copied(optimizer))] == [2, 3]


def test_the_optimizer_is_not_touched():
    optimizer = started(FUSED["Adam"])
    state = copy.deepcopy(optimizer.state_dict())
    trained = [parameter for number, parameter in enumerate(held_by(optimizer)) if number != 4]
    long_rows = LongRows(optimizer, trained)
    step_in_rows(optimizer, long_rows, long_rows.gather(copied(optimizer)), 2)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert after["state"].keys() == state["state"].keys()
    for number, remembered in state["state"].items():
        for name, value in remembered.items():
            assert after["state"][number][name] is value or torch.equal(after["state"][number][name], value)
