"""Every story, ready-made or a user's own, passes the same tests: check, fit, log_evidence, save, load.

The ready-made ones are also told with linear networks, where everything about them is known: components and rows of
mixtures of normals are normal, and so are their marginals and their conditionals.
"""

import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from example_stories import STORIES, images, labels, rows
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from ppl_vae import VAE, check, fit, likelihoods, load, log_evidence, posteriors, priors, save, stories
from ppl_vae.networks import WithLabels, convolutional_encoder, mlp

SCRIPTS = Path(__file__).parents[1] / "scripts"


def holes(num_observations: int = 40) -> tuple[Tensor, Tensor]:
    """Rows of five correlated numbers, some of them NaN, and where they are not."""
    mask = torch.rand(num_observations, 5, generator=torch.Generator().manual_seed(3)) < 0.7
    return torch.where(mask, 3 + rows(num_observations), torch.nan), mask


def some_labels() -> Tensor:
    """Labels 0, 1, 2 in turn, every second one unknown."""
    return torch.where(torch.arange(40) % 2 == 0, labels(), -1)


def parts() -> dict[str, nn.Module]:
    """Prior, decoder and encoder of 6 x 5 binary images."""
    return {
        "prior": priors.StandardNormal(2),
        "decoder": likelihoods.Bernoulli(mlp(2, 16, (1, 6, 5))),
        "encoder": posteriors.DiagonalNormal(mlp((1, 6, 5), 16, 4)),
    }


def labelled_parts() -> dict[str, nn.Module]:
    """The same, with a decoder that also takes one of three labels."""
    return parts() | {"decoder": likelihoods.Bernoulli(WithLabels(mlp(2 + 3, 16, (1, 6, 5)), num_labels=3))}


def hierarchical() -> stories.HierarchicalVAE:
    """Two latents, of 1 and 2 dimensions."""
    return stories.HierarchicalVAE(
        prior=priors.StandardNormal(1),
        layers=[posteriors.DiagonalNormal(mlp(1, 8, 2 * 2))],
        decoder=likelihoods.Bernoulli(mlp(2, 16, (1, 6, 5))),
        encoders=[
            posteriors.DiagonalNormal(mlp((1, 6, 5), 16, 2 * 2)),
            posteriors.DiagonalNormal(mlp(2, 8, 2 * 1)),
        ],
    )


def missing_values() -> stories.MissingValuesVAE:
    """For rows of five numbers."""
    return stories.MissingValuesVAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Normal(mlp(2, 16, 5), scale=likelihoods.learned(1.0)),
        encoder=posteriors.DiagonalNormal(mlp(2 * 5, 16, 4)),
    )


READY_MADE = {
    "hierarchical": (hierarchical, lambda: (images(),)),
    "mixture": (
        lambda: stories.MixtureVAE(**labelled_parts() | {"prior": priors.PerClass(2, num_labels=3)}, components=3),
        lambda: (images(),),
    ),
    "semi-supervised": (
        lambda: stories.SemiSupervisedVAE(**labelled_parts(), num_labels=3),
        lambda: (images(), some_labels()),
    ),
    "missing": (missing_values, holes),
    "denoising": (
        lambda: stories.DenoisingVAE(**parts(), corrupt=lambda x: x + 0.3 * torch.randn_like(x)),
        lambda: (images(),),
    ),
    "per class": (
        lambda: stories.PerClassVAE(**parts() | {"prior": priors.PerClass(2, num_labels=3)}),
        lambda: (images(), labels()),
    ),
}
ALL = STORIES | READY_MADE

each_story = pytest.mark.parametrize(("make", "columns"), ALL.values(), ids=ALL)
each_ready_made_story = pytest.mark.parametrize(("make", "columns"), READY_MADE.values(), ids=READY_MADE)


@each_story
def test_check_accepts_the_story(make, columns):
    check(make(), *columns())


@each_story
def test_fit_improves_the_objective(make, columns):
    history = fit(make(), *columns(), epochs=40, batch_size=16)
    assert history["train_elbo"][-5:].mean() > history["train_elbo"][:3].mean() + 0.5
    assert history["skipped_steps"].sum() == 0


@each_story
def test_fit_moves_every_parameter(make, columns):
    story = make()
    before = {name: parameter.detach().clone() for name, parameter in story.named_parameters()}
    fit(story, *columns(), epochs=1)
    unmoved = [name for name, parameter in story.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []


@each_ready_made_story
def test_a_captured_step_is_the_step_of_svi(make, columns):
    torch.manual_seed(0)
    captured = fit(make(), *columns(), epochs=2, batch_size=16)
    torch.manual_seed(0)
    svi = fit(make(), *columns(), epochs=2, batch_size=16, engine="svi")
    assert captured.engine == "captured"
    assert captured["train_elbo"] == pytest.approx(svi["train_elbo"], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        pytest.param(*told, id=name, marks=[pytest.mark.slow] * (name not in ("plain", "mixture")))
        for name, told in ALL.items()
    ],
)
def test_importance_sampling_agrees_with_pyros_own_sampler(make, columns):
    story = make()
    fit(story, *columns(), epochs=20, batch_size=16)
    few = tuple(column[:3] for column in columns())
    ours = log_evidence(story, *few, num_particles=2000)
    pyros = log_evidence(story, *few, method="pyro", num_particles=300)
    error = (ours["standard_error"] ** 2 + pyros["standard_error"] ** 2) ** 0.5
    assert (abs(ours["estimate"] - pyros["estimate"]) < 4 * error).all()


@pytest.mark.slow
@each_story
def test_elbo_is_below_the_importance_estimate(make, columns):
    story = make()
    elbo = log_evidence(story, *columns(), method="elbo", num_particles=200)
    importance = log_evidence(story, *columns(), num_particles=200)
    assert elbo.summary().mean < importance.summary().mean


@each_story
def test_a_saved_story_gives_the_same_evidence_bit_for_bit(make, columns, tmp_path):
    story = make()
    fit(story, *columns(), epochs=2)
    save(story, tmp_path / "story.safetensors")
    loaded = load(tmp_path / "story.safetensors", story=make())
    before, after = (
        log_evidence(told, *columns(), method="importance", num_particles=10)["estimate"] for told in (story, loaded)
    )
    assert before.equals(after)


@pytest.mark.slow
@each_story
def test_the_story_works_in_double_precision(make, columns):
    story = make().double()
    history = fit(story, *columns(), epochs=1)
    assert all(parameter.dtype == torch.float64 for parameter in story.parameters())
    assert log_evidence(story, *columns(), num_particles=5)["estimate"].shape == (40,)
    assert history["train_elbo"].dtype.kind == "f"


def test_labels_help_the_conditional_story():
    make, columns = STORIES["conditional"]
    x, _ = columns()
    y = (x[:, 0, :, :2].mean((1, 2)) > 0.5).long()  # which half is dark
    informed, misled = make(), make()
    fit(informed, x, y, epochs=60, batch_size=16)
    fit(misled, x, torch.zeros_like(y), epochs=60, batch_size=16)
    held = log_evidence(informed, x, y).summary().mean, log_evidence(informed, x, 1 - y).summary().mean
    assert held[0] > held[1] + 5
    assert log_evidence(informed, x, y).summary().mean > log_evidence(misled, x, torch.zeros_like(y)).summary().mean


# Stories with linear networks: three numbers made from one latent, or one for each component


NOISE = 0.5
GIVEN_C = ((-1.0, 0.4), (0.5, 1.2))  # location and scale of z given each of two components
STANDARD = ((0.0, 1.0), (0.0, 1.0))
SHARES = (0.3, 0.7)
Moments = Sequence[tuple[float, float]]


def weight_and_bias() -> tuple[Tensor, Tensor]:
    """Of two linear maps from one number to three, shapes (2, 3, 1) and (2, 3); in the default dtype."""
    weight = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.0]]).unsqueeze(-1)
    bias = torch.tensor([[0.1, 0.7, -0.4], [-0.6, 0.0, 0.5]])
    return weight, bias


class Linear(nn.Module):
    """W_c z + b_c; without c the first map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(tensor) for tensor in weight_and_bias())

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        c = torch.zeros(z.shape[:-1], dtype=torch.long) if c is None else c
        return (self.weight[c] @ z.unsqueeze(-1)).squeeze(-1) + self.bias[c]


class Guide(nn.Module):
    """Any function of the observation that returns a distribution of z."""

    def __init__(self, function: Callable[..., dist.TorchDistribution]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        return self.function(x)


def per_class_prior() -> priors.PerClass:
    """z given c is normal with the moments GIVEN_C."""
    prior = priors.PerClass(1, num_labels=2)
    loc, scale = torch.tensor(GIVEN_C).T.unsqueeze(-1)
    with torch.no_grad():
        prior.normals.loc.copy_(loc)
        prior.normals.unconstrained_scale.copy_(torch.expm1(scale - prior.normals.floor).log())
    return prior


def with_shares(story):
    """The story, its components as probable as SHARES."""
    with torch.no_grad():
        story.logits.copy_(torch.tensor(SHARES).log())
    return story


def component(c: int, loc: float, scale: float) -> MultivariateNormal:
    """p(x | c) with z ~ N(loc, scale^2) integrated out."""
    weight, bias = (tensor[c] for tensor in weight_and_bias())
    return MultivariateNormal(bias + weight[:, 0] * loc, scale**2 * weight @ weight.T + NOISE**2 * torch.eye(3))


def posterior(x: Tensor, c: int, loc: float, scale: float) -> tuple[Tensor, Tensor]:
    """Location and scale of p(z | x, c), with z ~ N(loc, scale^2) a priori; shapes (N,) and ()."""
    weight, bias = (tensor[c] for tensor in weight_and_bias())
    precision = scale**-2 + weight.square().sum() / NOISE**2
    return (loc / scale**2 + (x - bias) @ weight[:, 0] / NOISE**2) / precision, precision**-0.5


def log_joint_of_components(x: Tensor, of_z: Moments) -> Tensor:
    """log p(c) + log p(x | c), shape (N, 2)."""
    log_p = [component(c, *moments).log_prob(x) for c, moments in enumerate(of_z)]
    return torch.stack(log_p, -1) + torch.tensor(SHARES).log()


def exact_mixture(of_z: Moments) -> Guide:
    """p(z | x), the mixture of p(z | x, c) by the responsibilities."""

    def q(x: Tensor) -> dist.TorchDistribution:
        locs, scales = zip(*(posterior(x, c, *moments) for c, moments in enumerate(of_z)), strict=True)
        loc = torch.stack(locs, -1).unsqueeze(-1)
        normals = dist.Normal(loc, torch.stack(scales).unsqueeze(-1).expand_as(loc)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=log_joint_of_components(x, of_z)), normals)

    return Guide(q)


def linear_mixture() -> stories.MixtureVAE:
    """Two components, with the exact posterior as the guide."""
    decoder = likelihoods.Normal(Linear(), scale=NOISE)
    return with_shares(stories.MixtureVAE(per_class_prior(), decoder, exact_mixture(GIVEN_C), components=2))


def linear_semi_supervised() -> stories.SemiSupervisedVAE:
    """Two classes, with the posterior of an observation without a label as the guide."""
    decoder, guide = likelihoods.Normal(Linear(), scale=NOISE), exact_mixture(STANDARD)
    return with_shares(stories.SemiSupervisedVAE(priors.StandardNormal(1), decoder, guide, num_labels=2))


def linear_per_class() -> stories.PerClassVAE:
    """A latent whose prior depends on the label; the guide is that of a wider prior."""

    def q(x: Tensor) -> dist.TorchDistribution:
        loc, scale = posterior(x, 0, 0.0, 2.0)
        return dist.Normal(loc.unsqueeze(-1), 1.5 * scale).to_event(1)

    return stories.PerClassVAE(per_class_prior(), likelihoods.Normal(Linear(), scale=NOISE), Guide(q))


class LinearHierarchy:
    """z3 ~ N(0, 1), z2 ~ N(0.8 z3 + 0.3, 0.6^2), z1 ~ N(-1.1 z2 + 0.2, 0.9^2), x as above; its exact guide climbs."""

    slopes, shifts, scales = (0.8, -1.1), (0.3, 0.2), (0.6, 0.9)

    def __init__(self) -> None:
        self.moments = [(0.0, 1.0)]  # of z3, z2, z1
        for slope, shift, scale in zip(self.slopes, self.shifts, self.scales, strict=True):
            loc, spread = self.moments[-1]
            self.moments.append((slope * loc + shift, math.hypot(slope * spread, scale)))

    def story(self) -> stories.HierarchicalVAE:
        layers = []
        for slope, shift, scale in zip(self.slopes, self.shifts, self.scales, strict=True):
            layer = nn.Linear(1, 1)
            nn.init.constant_(layer.weight, slope), nn.init.constant_(layer.bias, shift)
            layers.append(likelihoods.Normal(layer, scale=scale))
        bottom, middle, top = self._of_x, self._above(1), self._above(0)
        return stories.HierarchicalVAE(
            priors.StandardNormal(1),
            layers,
            likelihoods.Normal(Linear(), scale=NOISE),
            [Guide(bottom), Guide(middle), Guide(top)],
        )

    def _of_x(self, x: Tensor) -> dist.TorchDistribution:
        loc, scale = posterior(x, 0, *self.moments[-1])
        return dist.Normal(loc.unsqueeze(-1), scale).to_event(1)

    def _above(self, layer: int) -> Callable[[Tensor], dist.TorchDistribution]:
        """p(z above | z below) through one of the layers, from the top."""
        slope, shift, scale, (loc, spread) = (
            self.slopes[layer],
            self.shifts[layer],
            self.scales[layer],
            self.moments[layer],
        )
        gain = slope * spread**2 / (slope**2 * spread**2 + scale**2)
        left = spread * math.sqrt(1 - gain * slope)
        return lambda z: dist.Normal(loc + gain * (z - slope * loc - shift), left).to_event(1)

    def of_x(self) -> MultivariateNormal:
        return component(0, *self.moments[-1])


class LinearFactors:
    """Four numbers made from two latents, some of them missing; the guide is the exact posterior, or a widened one."""

    def __init__(self, widened: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight, self.bias = torch.randn(4, 2, generator=generator), torch.randn(4, generator=generator)
        self.covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(4)
        self.widened = widened

    def story(self) -> stories.MissingValuesVAE:
        loc = nn.Linear(2, 4)
        with torch.no_grad():
            loc.weight.copy_(self.weight), loc.bias.copy_(self.bias)
        decoder = likelihoods.Normal(loc, scale=NOISE)
        return stories.MissingValuesVAE(priors.StandardNormal(2), decoder, Guide(self._q))

    def _q(self, filled_and_mask: Tensor) -> dist.TorchDistribution:
        x, mask = filled_and_mask.chunk(2, dim=-1)
        weight = mask.unsqueeze(-1) * self.weight / NOISE
        precision = weight.mT @ weight + torch.eye(2)
        loc = torch.linalg.solve(precision, ((x - self.bias) / NOISE).unsqueeze(-2) @ weight, left=False).squeeze(-2)
        return dist.MultivariateNormal(loc, precision_matrix=precision / self.widened**2)

    def data(self, num_observations: int = 12) -> tuple[Tensor, Tensor]:
        x = MultivariateNormal(self.bias, self.covariance).sample((num_observations,))
        return x, torch.rand(num_observations, 4) < 0.6

    def log_evidence(self, x: Tensor, mask: Tensor) -> Tensor:
        """log N(x_obs; b_obs, C_obs,obs) of each row; 0 where nothing was observed."""
        return torch.stack([self._log_evidence(row, seen) for row, seen in zip(x, mask, strict=True)])

    def _log_evidence(self, x: Tensor, seen: Tensor) -> Tensor:
        if not seen.any():
            return torch.zeros(())
        return MultivariateNormal(self.bias[seen], self.covariance[seen][:, seen]).log_prob(x[seen])

    def conditional(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the missing numbers of a row given the others."""
        inverse = torch.linalg.inv(self.covariance[seen][:, seen])
        gain = self.covariance[~seen][:, seen] @ inverse
        mean = self.bias[~seen] + gain @ (x[seen] - self.bias[seen])
        return mean, (self.covariance[~seen][:, ~seen] - gain @ self.covariance[seen][:, ~seen]).diagonal()


def observations(num_observations: int = 12) -> Tensor:
    """Three numbers in each row."""
    return 1.5 * torch.randn(num_observations, 3, generator=torch.Generator().manual_seed(4))


# What is known of them


@pytest.mark.parametrize(
    ("make", "truth"),
    [
        (lambda: LinearHierarchy().story(), lambda x: LinearHierarchy().of_x().log_prob(x)),
        (linear_mixture, lambda x: log_joint_of_components(x, GIVEN_C).logsumexp(-1)),
        (linear_semi_supervised, lambda x: log_joint_of_components(x, STANDARD).logsumexp(-1)),
    ],
    ids=["hierarchical", "mixture", "semi-supervised"],
)
def test_exact_guide_makes_weights_constant(make, truth, float64):
    x = observations()
    evidence = log_evidence(make(), x, method="importance", num_particles=10)
    assert evidence["estimate"].values == pytest.approx(truth(x).numpy(), abs=1e-9)
    assert (evidence["standard_error"] < 1e-7).all()


def generated(of_z: Moments, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a mixture of components with these moments of z."""
    normals = [component(c, *moments) for c, moments in enumerate(of_z)]
    mean = torch.stack([p.mean for p in normals])
    second = torch.stack([p.covariance_matrix + torch.outer(p.mean, p.mean) for p in normals])
    mean, second = shares @ mean, torch.einsum("c,cij->ij", shares, second)
    return mean, second - torch.outer(mean, mean)


@pytest.mark.parametrize(
    ("make", "of_z", "shares"),
    [
        (lambda: LinearHierarchy().story(), LinearHierarchy().moments[-1:], (1.0,)),
        (linear_mixture, GIVEN_C, SHARES),
        (linear_semi_supervised, STANDARD, SHARES),
    ],
    ids=["hierarchical", "mixture", "semi-supervised"],
)
def test_model_without_data_draws_from_the_prior_predictive(make, of_z, shares):
    size = 100_000
    x = make().model(num_observations=size).detach()
    mean, covariance = generated(of_z, torch.tensor(shares))
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < 4.5 * (variance / size).sqrt()).all()
    spread = ((x - mean).unsqueeze(-1) * (x - mean).unsqueeze(-2)).std(0)
    assert ((torch.cov(x.T) - covariance).abs() < 4.5 * spread / math.sqrt(size)).all()


# Several layers


def test_a_hierarchy_has_a_site_for_each_latent():
    trace = poutine.trace(hierarchical().model).get_trace(num_observations=7)
    shapes = {name: tuple(trace.nodes[name]["value"].shape) for name in ("z2", "z1", "x")}
    assert shapes == {"z2": (7, 1), "z1": (7, 2), "x": (7, 1, 6, 5)}


def test_a_hierarchy_without_layers_is_a_vae():
    one = parts()
    story = stories.HierarchicalVAE(one["prior"], [], one["decoder"], [one["encoder"]])
    flat = log_evidence(VAE(**one), images(), num_particles=20, method="importance")
    assert log_evidence(story, images(), num_particles=20, method="importance")["estimate"].equals(flat["estimate"])


def test_every_latent_needs_an_encoder():
    one = parts()
    with pytest.raises(ValueError, match="2 latents, each with an encoder of its own; found 1"):
        stories.HierarchicalVAE(one["prior"], [nn.Linear(2, 2)], one["decoder"], [one["encoder"]])


# Components


def test_responsibilities_follow_from_bayes_rule(float64):
    x = observations()
    truth = log_joint_of_components(x, GIVEN_C).softmax(-1)
    estimate = linear_mixture().responsibilities(x, num_particles=400)
    spread = (truth * (1 - truth)).sqrt()  # of a 0 or a 1, and p(c | x, z) spreads less
    assert ((estimate - truth).abs() < 4.5 * spread / math.sqrt(400)).all()
    assert torch.allclose(estimate.sum(-1), torch.ones(12))


def test_components_find_the_clusters():
    generator = torch.Generator().manual_seed(5)
    kind = torch.arange(200) % 2
    x = torch.where(kind == 0, -3.0, 3.0).unsqueeze(-1) + torch.randn(200, 2, generator=generator)
    torch.manual_seed(1)
    story = stories.MixtureVAE(
        prior=priors.PerClass(1, num_labels=2),
        decoder=likelihoods.Normal(WithLabels(nn.Linear(1 + 2, 2), num_labels=2), scale=likelihoods.learned(1.0)),
        encoder=posteriors.DiagonalNormal(mlp(2, 16, 2)),
        components=2,
    )
    fit(story, x, epochs=60, batch_size=50, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    agreement = (story.responsibilities(x).argmax(-1) == kind).float().mean()
    assert max(agreement, 1 - agreement) > 0.95


def test_responsibilities_are_of_one_site():
    with pytest.raises(ValueError, match="one site that the model sums out; found none"):
        stories.responsibilities(VAE(**parts()), images())


# Some labels


def test_evidence_of_a_labelled_row_is_that_of_both(float64):
    x, y = observations(), torch.tensor([0, 1, -1] * 4)
    joint = log_joint_of_components(x, STANDARD)
    truth = torch.where(y >= 0, joint.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1), joint.logsumexp(1))
    quadrature = log_evidence(linear_semi_supervised(), x, y, method="quadrature")
    assert quadrature["estimate"].values == pytest.approx(truth.numpy(), abs=1e-5)
    weighed = log_evidence(linear_semi_supervised(), x, y, method="importance", num_particles=4000)
    assert (abs(weighed["estimate"] - truth.numpy()) < 4.5 * weighed["standard_error"] + 1e-9).all()


def test_classify_is_bayes_rule(float64):
    x = observations()
    truth = log_joint_of_components(x, STANDARD).softmax(-1)
    estimate = linear_semi_supervised().classify(x, num_particles=400)
    assert ((estimate - truth).abs() < 4.5 * (truth * (1 - truth)).sqrt() / math.sqrt(400)).all()


def test_a_wrong_label_has_a_finite_loss_and_finite_gradients():
    story, x = linear_semi_supervised(), observations()
    elbos = []
    for label in (0, 1, -1):
        columns = (x, torch.full((12,), label))
        elbos.append(log_evidence(story, *columns, method="elbo", num_particles=200).summary().mean)
        trace = poutine.trace(poutine.condition(story.model, {"c": torch.ones(12).long()})).get_trace(*columns)
        gradients = torch.autograd.grad(trace.log_prob_sum(), story.decoder.parameters())
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(math.isfinite(elbo) for elbo in elbos)
    assert len({round(elbo, 1) for elbo in elbos}) == 3


def test_a_known_label_teaches_what_the_class_looks_like():
    x = images(200)
    y = (x[:, 0, :, :2].mean((1, 2)) > 0.5).long()  # which half is dark
    torch.manual_seed(0)
    decoder = likelihoods.Bernoulli(WithLabels(mlp(2 + 2, 16, (1, 6, 5)), num_labels=2))
    story = stories.SemiSupervisedVAE(**parts() | {"decoder": decoder}, num_labels=2)
    fit(story, x[:100], torch.where(torch.arange(100) < 20, y[:100], -1), epochs=60, batch_size=10)
    assert (story.classify(x[100:], num_particles=20).argmax(-1) == y[100:]).float().mean() > 0.9


# Missing values


def test_evidence_is_that_of_the_observed_numbers(float64):
    factors = LinearFactors()
    x, mask = factors.data()
    evidence = log_evidence(factors.story(), x, mask, method="importance", num_particles=10)
    assert evidence["estimate"].values == pytest.approx(factors.log_evidence(x, mask).numpy(), abs=1e-9)


@pytest.mark.parametrize("instead", [torch.nan, torch.inf, 1e30])
def test_what_stands_in_missing_places_does_not_matter(instead):
    x, mask = holes()
    torch.manual_seed(0)
    story = missing_values()
    found = []
    for column in (torch.where(mask, x, 0.0), torch.where(mask, x, instead)):
        torch.manual_seed(1)
        guide_trace = poutine.trace(story.guide).get_trace(column, mask)
        model_trace = poutine.trace(poutine.replay(story.model, guide_trace)).get_trace(column, mask)
        loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
        found.append([loss, *torch.autograd.grad(loss, list(story.parameters()))])
    assert all(torch.equal(zero, other) and zero.isfinite().all() for zero, other in zip(*found, strict=True))


def test_what_fills_missing_places_does_not_change_the_evidence(float64):
    factors = LinearFactors()
    x, mask = factors.data()
    story = factors.story()
    story.fill.fill_(7.0)  # the exact guide does not look at it
    evidence = log_evidence(story, x, mask, method="importance", num_particles=10)
    assert evidence["estimate"].values == pytest.approx(factors.log_evidence(x, mask).numpy(), abs=1e-9)


@pytest.mark.parametrize("widened", [1.0, 1.6])
def test_imputation_has_the_mean_and_variance_of_the_conditional(widened, float64):
    factors, size = LinearFactors(widened), 20_000
    x, mask = factors.data(4)
    mask[0], mask[1] = torch.tensor([True, False, True, False]), torch.tensor([False, False, True, True])
    draws = factors.story().impute(torch.where(mask, x, torch.nan), mask, num_draws=size, num_particles=size)
    assert draws.shape == (size, 4, 4) and torch.equal(draws[:, mask], x[mask].expand(size, -1))
    independent = size / (1 + widened**4 / (2 * widened**2 - 1))  # draws, and the particles they choose from
    for row in range(2):
        mean, variance = factors.conditional(x[row], mask[row])
        missing = draws[:, row, ~mask[row]]
        assert ((missing.mean(0) - mean).abs() < 4.5 * (variance / independent).sqrt()).all()
        assert ((missing.var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / independent)).all()


def test_imputation_beats_the_column_mean():
    generator = torch.Generator().manual_seed(6)
    whole = rows(400) + 0.2 * torch.randn(400, 5, generator=generator)
    mask = torch.rand(400, 5, generator=generator) < 0.75
    x = torch.where(mask, whole, torch.nan)
    story = missing_values()
    fit(story, x, mask, epochs=60, batch_size=50, optimizer=lambda p: torch.optim.Adam(p, lr=5e-3))
    imputed = story.impute(x, mask, num_draws=20, num_particles=200).mean(0)
    mean = x.nanmean(0).expand_as(x)
    errors = [((guess - whole)[~mask]).square().mean().sqrt() for guess in (imputed, mean)]
    assert errors[0] < 0.7 * errors[1]


def test_columns_of_any_kind_may_have_holes(float64):
    z, x = torch.randn(6, 2), torch.tensor([[0.3, 2.0, 3.0, 1.0, 0.5]]).repeat(6, 1)
    table = likelihoods.ByColumn(
        likelihoods.LogNormal(nn.Linear(2, 2), scale=0.7),
        likelihoods.Poisson(nn.Linear(2, 1)),
        likelihoods.Bernoulli(nn.Linear(2, 1)),
        likelihoods.Normal(nn.Linear(2, 1), scale=0.4),
    )
    mask = torch.rand(6, 5) < 0.5
    columns = zip(table(z).parts, x.split([2, 1, 1, 1], -1), strict=True)
    each = torch.cat([part.base_dist.log_prob(column) for part, column in columns], -1)
    seen = stories.missing.observed(table(z), mask).log_prob(torch.where(mask, x, 1.0))
    assert torch.allclose(seen, (each * mask).sum(-1))


def test_a_table_of_any_kind_of_columns_with_holes_trains():
    x = torch.stack([torch.randn(60).exp(), torch.poisson(torch.full((60,), 3.0)), torch.randn(60)], -1)
    mask = torch.rand(60, 3) < 0.7
    story = stories.MissingValuesVAE(
        prior=priors.StandardNormal(1),
        decoder=likelihoods.ByColumn(
            likelihoods.LogNormal(nn.Linear(1, 1), scale=0.7),
            likelihoods.Poisson(nn.Linear(1, 1)),
            likelihoods.Normal(nn.Linear(1, 1), scale=0.4),
        ),
        encoder=posteriors.DiagonalNormal(mlp(2 * 3, 8, 2)),
        fill=torch.tensor([1.0, 0.0, 0.0]),
    )
    history = fit(story, torch.where(mask, x, torch.nan), mask, epochs=20, batch_size=20)
    assert history.engine == "captured" and history["skipped_steps"].sum() == 0
    assert history["train_elbo"][-1] > history["train_elbo"][0]


def test_images_may_have_holes():
    mask = torch.rand(40, 1, 6, 5) < 0.8
    story = stories.MissingValuesVAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Bernoulli(mlp(2, 16, (1, 6, 5))),
        encoder=posteriors.DiagonalNormal(convolutional_encoder((2, 6, 5), 4, 8, output=4)),  # values, and the mask
    )
    check(story, images(), mask)
    imputed = story.impute(images(), mask, num_draws=3, num_particles=10)
    assert torch.equal(imputed[:, mask], images()[mask].expand(3, -1))
    assert ((imputed == 0) | (imputed == 1)).all()


def test_a_likelihood_that_is_no_product_is_refused():
    class Correlated(nn.Module):
        def forward(self, z: Tensor) -> dist.TorchDistribution:
            return dist.MultivariateNormal(torch.zeros(len(z), 5), torch.eye(5))

    story = stories.MissingValuesVAE(priors.StandardNormal(2), Correlated(), missing_values().encoder)
    with pytest.raises(TypeError, match="product over dimensions; found MultivariateNormal"):
        check(story, *holes())


def test_a_mask_is_asked_for():
    with pytest.raises(TypeError, match="which values are there"):
        missing_values().model(rows())


def test_a_value_that_is_missing_and_not_marked_is_refused():
    x, mask = holes()
    with pytest.raises(ValueError, match="x is nan"):
        check(missing_values(), x, torch.ones_like(mask))


# Noisy observations


def test_evidence_of_the_denoising_story_is_that_of_a_vae():
    same = parts()
    story = stories.DenoisingVAE(**same, corrupt=lambda x: torch.full_like(x, torch.nan))
    for mode in (True, False):
        evidence = log_evidence(story.train(mode), images(), num_particles=50, method="importance")
        plain = log_evidence(VAE(**same), images(), num_particles=50, method="importance")
        assert evidence["estimate"].equals(plain["estimate"])


def test_only_the_guide_in_training_sees_the_noise():
    story = stories.DenoisingVAE(**parts(), corrupt=torch.zeros_like)
    clean, dark = (story.encoder(x).base_dist.loc for x in (images(), torch.zeros_like(images())))
    located = {}
    for mode in (True, False):
        trace = poutine.trace(story.train(mode).guide).get_trace(images())
        located[mode] = trace.nodes["z"]["fn"].base_dist.loc
    assert torch.equal(located[True], dark) and torch.equal(located[False], clean)
    assert not torch.equal(clean, dark)


def test_the_training_objective_is_a_lower_bound_for_any_noise(float64):
    def exact_if_clean(x: Tensor) -> dist.TorchDistribution:
        loc, scale = posterior(x, 0, 0.0, 1.0)
        return dist.Normal(loc.unsqueeze(-1), scale).to_event(1)

    decoder, noisy = likelihoods.Normal(Linear(), scale=NOISE), lambda x: x + 0.5 * torch.randn_like(x)
    story = stories.DenoisingVAE(priors.StandardNormal(1), decoder, Guide(exact_if_clean), corrupt=noisy).train()
    x = observations().repeat(2000, 1)
    with torch.no_grad():
        guide_trace = poutine.trace(story.guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(story.model, guide_trace)).get_trace(x)
        for trace in (model_trace, guide_trace):
            trace.compute_log_prob()
    log_p = model_trace.nodes["z"]["log_prob"] + model_trace.nodes["x"]["log_prob"]
    elbos = (log_p - guide_trace.nodes["z"]["log_prob"]).reshape(2000, 12)
    truth = component(0, 0.0, 1.0).log_prob(observations())
    assert (elbos.mean(0) + 4.5 * elbos.std(0) / math.sqrt(2000) < truth).all()


# A prior for each label


def test_evidence_given_a_label_is_that_of_its_normal(float64):
    x, y = observations(), torch.tensor([0, 1] * 6)
    truth = torch.stack([component(0, *GIVEN_C[c]).log_prob(row) for row, c in zip(x, y.tolist(), strict=True)])
    story = linear_per_class()
    quadrature = log_evidence(story, x, y, method="quadrature")
    assert quadrature["estimate"].values == pytest.approx(truth.numpy(), abs=1e-5)
    weighed = log_evidence(story, x, y, method="importance", num_particles=4000)
    assert (abs(weighed["estimate"] - truth.numpy()) < 4.5 * weighed["standard_error"]).all()


def test_with_the_label_unknown_it_is_the_even_mixture(float64):
    x, story = observations(), linear_per_class()
    log_p = torch.stack([component(0, *moments).log_prob(x) for moments in GIVEN_C])
    truth = log_p.logsumexp(0) - math.log(2)
    without_label = VAE(story.prior, story.decoder, story.encoder)
    evidence = log_evidence(without_label, x, method="quadrature")
    assert evidence["estimate"].values == pytest.approx(truth.numpy(), abs=1e-5)


def test_each_label_has_observations_of_its_own():
    size = 100_000
    for label, moments in enumerate(GIVEN_C):
        x = linear_per_class().model(y=torch.full((size,), label)).detach()
        truth = component(0, *moments)
        assert ((x.mean(0) - truth.mean).abs() < 4.5 * (truth.variance / size).sqrt()).all()


def test_a_label_is_asked_for():
    with pytest.raises(TypeError, match="needs the label"):
        linear_per_class().model()


# Scripts that tell a story


def test_the_factor_script_compares_both_stories(capsys):
    runpy.run_path(str(SCRIPTS / "factors_story.py"))["main"](["--epochs", "2", "--factors", "1", "--particles", "20"])
    printed = capsys.readouterr().out
    assert "factor analysis in closed form" in printed and "143 observations" in printed


def test_the_table_script_compares_two_likelihoods(capsys):
    runpy.run_path(str(SCRIPTS / "table_story.py"))["main"](["--epochs", "2", "--latent-dim", "1", "--particles", "20"])
    printed = capsys.readouterr().out
    assert "negative binomial" in printed and "100 observations" in printed
