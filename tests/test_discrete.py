"""Discrete latents summed out: their joint values against products, sums against sums by hand, and refusals."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import ClustersInGuide, ThreeKinds, TwoClusters
from torch.distributions import Normal

from ppl_vae import discrete, traces


def sites(**distributions):
    return {name: {"fn": distribution} for name, distribution in distributions.items()}


def test_assignments_are_every_joint_value_once():
    kind, on = dist.Categorical(torch.ones(5, 3)), dist.Bernoulli(torch.full((5,), 0.5))
    switches = dist.Bernoulli(torch.full((5, 2), 0.5)).to_event(1)
    found = discrete.assignments(sites(kind=kind, on=on, switches=switches))
    values = torch.column_stack([found.values["kind"], found.values["on"], found.values["switches"]]).tolist()
    assert found.size == len(values) == 3 * 2 * 2 * 2
    assert sorted(values) == sorted(map(list, product(range(3), *[range(2)] * 3)))


def test_nothing_to_sum_out_is_one_assignment():
    assert discrete.assignments({}).size == 1


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (dist.Poisson(torch.ones(2)), "'kind' cannot be summed out"),
        (dist.Normal(torch.zeros(2), 1.0), "'kind' cannot be summed out"),
        (dist.Bernoulli(torch.full((2, 20), 0.5)).to_event(1), r"'kind' has 2\^20 values, more than 4096"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_too_many_values_is_named(distribution, message):
    with pytest.raises(ValueError, match=message):
        discrete.assignments(sites(kind=distribution))


def test_too_many_joint_values_are_counted():
    with pytest.raises(ValueError, match=r"\['one', 'two'\] have 10000 joint values, more than 4096"):
        discrete.assignments(sites(one=dist.Categorical(torch.ones(100)), two=dist.Categorical(torch.ones(100))))


class Labelled(TwoClusters):
    """Its clusters are marked, and observed."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            cluster = dist.Categorical(logits=self.logits)
            pyro.sample("cluster", cluster, obs=torch.zeros(len(x)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize(
    ("make", "names"), [(TwoClusters, {"cluster"}), (ClustersInGuide, set()), (ThreeKinds, set()), (Labelled, set())]
)
def test_marked_latents_that_the_guide_leaves_alone_are_summed_out(make, names):
    model_trace, guide_trace = traces.run(make(), torch.zeros(3))
    assert set(discrete.summed_out(model_trace, guide_trace)) == names


def test_densities_are_sums_over_the_values(float64):
    story, x, z = TwoClusters().double(), torch.linspace(-1, 2, 5), torch.linspace(2, -2, 5)
    summed = discrete.assignments(sites(cluster=dist.Categorical(logits=story.logits)))
    log_prior, log_joint = discrete.log_densities(story.model, (x,), {"z": z}, summed)
    by_hand = sum(0.5 * Normal(loc, 1.0).log_prob(z).exp() for loc in (-1.0, 1.0)).log()
    torch.testing.assert_close(log_prior.detach(), by_hand)
    torch.testing.assert_close(log_joint.detach(), by_hand + Normal(z, 0.5).log_prob(x))
