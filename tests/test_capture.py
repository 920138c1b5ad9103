"""capture against the function that it traced, run as Python runs it."""

import operator

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import closed_form_log_evidence, linear_gaussian
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae import capture
from ppl_vae.capture import CaptureError

X = torch.linspace(-2, 3, 12).reshape(3, 4)
OTHER = X.flip(0).sin() * 3


def same(ours, theirs) -> bool:
    return all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)


def operations(program: capture.Program) -> list[str]:
    return [node.target.__name__ for node in program.graph.graph.nodes if node.op == "call_function"]


@pytest.fixture
def unvalidated():
    """Pyro looks at no values, as in training."""
    with pyro.validation_enabled(False):
        yield


# Values


def shapes(x):
    left, right = x.split(2, dim=-1)
    return left.t() @ right, torch.cat([right, left], -1).view(-1)[None].expand(2, -1), x.unsqueeze(0).permute(2, 0, 1)


def numbers(x):
    return x.exp().log1p() + 2, x.clamp(min=0.5) / 3, torch.where(x > 0, x, -x).sqrt(), (x**2).sum().reciprocal()


def repeated(x):
    return x.exp() + x.exp(), x.t().t().detach().view(3, 4).expand(3, 4) - 0.0 * x.exp()


def gradient(x):
    weight = torch.ones(4, 2, requires_grad=True)
    loss = torch.tanh(x @ weight).square().sum()
    loss.backward()
    return loss.detach(), weight.grad


def gradient_of_what_was_handed_in(x):
    leaf = x.detach().requires_grad_()
    nn.functional.softplus(leaf).logsumexp(0).sum().backward()
    return (leaf.grad,)


@pytest.mark.parametrize("function", [shapes, numbers, repeated, gradient, gradient_of_what_was_handed_in])
def test_a_replay_computes_what_the_function_computes_for_other_tensors(function):
    program = capture.capture(function, X)
    assert same(program(OTHER), function(OTHER))
    assert not torch.equal(program(OTHER)[0], program(X)[0])


def test_a_replay_records_no_gradient():
    assert not capture.capture(shapes, X)(OTHER.clone().requires_grad_())[0].requires_grad


def test_tracing_moves_neither_what_is_handed_in_nor_the_generator():
    x, before = X.clone(), torch.random.get_rng_state()
    capture.capture(lambda x: (x.add_(torch.randn(3, 4)),), x)
    assert torch.equal(x, X)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pyros_loss_of_an_exact_guide_is_minus_the_log_evidence(float64, unvalidated):
    story = linear_gaussian(num_features=4, latent_dim=2)

    def loss(x):
        return (torch.as_tensor(Trace_ELBO().loss_and_grads(story.model, story.guide, x)),)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    program = capture.capture(loss, x.flip(0))
    assert program(x)[0].item() == pytest.approx(-closed_form_log_evidence(story, x).sum().item(), rel=1e-9)


# Numbers that leave a tensor


def test_a_number_taken_out_of_a_tensor_has_no_gradient():
    def function(x):
        leaf = x.detach().requires_grad_()
        (leaf * leaf.item()).backward()
        return (leaf.grad,)

    three = torch.tensor(3.0)
    assert same(capture.capture(function, torch.zeros(()))(three), function(three))


def test_adding_to_a_number_does_not_add_to_the_tensor_it_came_from():
    def function(x):
        total = x.sum()
        number = total.item()
        number += 5
        return total, x * number

    assert same(capture.capture(function, X)(OTHER), function(OTHER))


# Two stages


LINEAR = nn.Linear(4, 6)


def encoded(x, y):
    """What x alone gives is small; the rest draws, writes in place, and uses both."""
    hidden = LINEAR(x).relu().sum(0)
    noise = torch.empty(5, 6).normal_()
    return hidden + noise * y, x + y.sum(), hidden.expand(5, 6).exp() * y


def partly_large(x, y):
    """What is large is needed by the rest, and by something small."""
    large = x.exp().repeat(9, 1)
    return large * y.sum(), large.sum(0)[:3] + y[:3]


def only_late(x, y):
    return x * y[:4], y.sum() + LINEAR.weight.t().sum()


def only_early(x, y):
    return (x.exp().sum(0),)


def written_later(x, y):
    first = x.sum(0)
    first += y.sum()
    return (first,)


Y = torch.tensor([0.3, -2.0, 1.0, 0.5, 4.0, -1.0])


@pytest.mark.parametrize("function", [encoded, only_early, partly_large])
def test_a_program_in_two_stages_computes_and_draws_the_same(function, unvalidated):
    first, rest = capture.capture(function, X, Y).split(1)
    known = first(OTHER)
    for y in (Y, Y.flip(0)):
        torch.manual_seed(3)
        ours = rest(*known, OTHER, y)
        state = torch.random.get_rng_state()
        torch.manual_seed(3)
        assert same(ours, [value.detach() for value in function(OTHER, y)])
        assert torch.equal(torch.random.get_rng_state(), state)


def test_the_second_stage_repeats_nothing_of_the_first():
    first, rest = capture.capture(encoded, X, Y).split(1)
    assert {"addmm", "relu", "t"} <= set(operations(first))
    assert not {"addmm", "relu", "t"} & set(operations(rest))
    assert len(operations(first)) + len(operations(rest)) == len(operations(capture.capture(encoded, X, Y)))


@pytest.mark.parametrize("function", [only_late, written_later])
def test_what_cannot_come_earlier_makes_no_stage(function):
    assert capture.capture(function, X, Y).split(1) is None


def test_what_would_take_more_memory_than_its_inputs_stays_in_the_second_stage():
    first, rest = capture.capture(lambda x, y: (x.exp().repeat(9, 1) * y.sum(),), X, Y).split(1)
    assert operations(first) == ["exp"] and "exp" not in operations(rest)


# Random numbers

DRAWS = {
    "normal": lambda x: dist.Normal(x, 1.0).rsample(),
    "uniform": lambda x: torch.rand(3, 4) + x,
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "gamma": lambda x: dist.Gamma(x.exp(), 1.0).rsample(),
    "dirichlet": lambda x: dist.Dirichlet(x.exp()).rsample(),
    "poisson": lambda x: dist.Poisson(x.exp()).sample(),
    "categorical": lambda x: dist.Categorical(logits=x).sample(),
    "multivariate": lambda x: dist.MultivariateNormal(x, torch.eye(4)).rsample(),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_replay_draws_what_the_function_draws_also_what_nobody_uses(draw, unvalidated):
    def function(x):
        first, unused, second = draw(x), draw(x), draw(x)
        del unused
        return first, second

    program = capture.capture(function, X)
    torch.manual_seed(7)
    theirs, state = function(OTHER), torch.random.get_rng_state()
    torch.manual_seed(7)
    ours = program(OTHER)
    assert same(ours, theirs) and not torch.equal(*ours)
    assert torch.equal(torch.random.get_rng_state(), state)


# Writing in place


def a_write_between_two_reads(x):
    before = x * 2
    x.add_(1)
    return before, x * 2


def a_write_through_a_view(x):
    before = x.exp()
    x.t()[0].zero_()
    return before, x.exp()


def a_write_to_one_of_two_equals(x):
    one, other = x * 2, x * 2
    one.add_(1)
    return one, other


def a_write_to_a_view_of_one_of_two_equals(x):
    one, other = x * 2, x * 2
    one.view(-1)[3:].fill_(7)
    return one, other


def two_sums_that_start_alike(x):
    one, other = torch.zeros_like(x), torch.zeros_like(x)
    one += x
    one += 1
    return one, other


def two_leaves_with_one_gradient(x):
    leaves = [torch.zeros((), requires_grad=True) for _ in range(2)]
    (x * (leaves[0] + leaves[1])).sum().backward()
    for leaf in leaves:
        leaf.grad.div_(3)
    return leaves[0].grad, leaves[1].grad


WRITES = [
    a_write_between_two_reads,
    a_write_through_a_view,
    a_write_to_one_of_two_equals,
    a_write_to_a_view_of_one_of_two_equals,
    two_sums_that_start_alike,
    two_leaves_with_one_gradient,
]


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_what_is_written_in_place_is_read_as_it_was_at_the_time(function):
    ours, theirs = OTHER.clone(), OTHER.clone()
    assert same(capture.capture(function, X)(ours), function(theirs))
    assert torch.equal(ours, theirs)


# What the program holds


def test_what_is_written_twice_is_computed_once_and_what_is_unused_never():
    def function(x):
        x.log()
        return (x.exp() * x.exp(),)

    assert operations(capture.capture(function, X)) == ["exp", "mul"]


def test_a_tensor_that_was_not_handed_in_is_a_constant_read_anew_by_every_replay():
    shift = torch.ones(4)
    program = capture.capture(lambda x: (x + shift,), X)
    assert [constant is shift for constant in program.constants] == [True]
    shift += 1
    assert torch.equal(program(X)[0], X + 2)


def test_a_function_of_what_it_is_handed_has_no_constants():
    assert capture.capture(operator.itemgetter(slice(0, 1)), X).constants == ()
    assert capture.capture(lambda x: (x @ x.t(),), X).constants == ()


def test_clones_share_nothing_with_the_originals():
    x = X.clone()
    (copy,) = capture.clones([x])
    x.zero_()
    assert torch.equal(copy, X)


# Refusals


def branch(x):
    return (x if x.sum() > 0 else -x,)


def number(x):
    return (x * float(x.sum()),)


def loop(x):
    return (sum(x[0] for _ in range(int(x.max()))),)


def branch_on_an_item(x):
    return (x if x.sum().item() > 0 else -x,)


@pytest.mark.parametrize("function", [branch, number, loop, branch_on_an_item])
def test_control_flow_that_depends_on_data_is_refused_and_named(function):
    with pytest.raises(CaptureError, match="Python's control flow, or a shape, depends on the data"):
        capture.capture(function, X)


def test_an_error_of_the_function_is_the_reason():
    def function(x: Tensor):
        raise KeyError("nothing there\nsecond line")

    with pytest.raises(CaptureError, match=r"^KeyError: 'nothing there") as caught:
        capture.capture(function, X)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("function", [shapes, branch])
def test_pyro_looks_for_nan_again_afterwards(function):
    before = pyro.util.torch_isnan
    try:
        capture.capture(function, X)
    except CaptureError:
        assert function is branch
    assert pyro.util.torch_isnan is before
    with pytest.warns(UserWarning, match="NaN"):
        pyro.util.warn_if_nan(torch.tensor(float("nan")), "x")


# Compilation


@pytest.mark.slow
def test_a_compiled_program_computes_the_same(float64):
    def function(x):
        x = x + 0
        a_write_to_one_of_two_equals(x)
        return *shapes(x), *numbers(x), *gradient_of_what_was_handed_in(x)

    x = X.double()
    compiled = capture.capture(function, x).compiled(x)
    other = OTHER.double()
    for ours, theirs in zip(compiled(other), function(other), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)
