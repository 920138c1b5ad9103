"""The captured engine against the reference: pyro.infer.SVI, step by step, from the same seed."""

import copy
import logging
import math
import random
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from example_stories import STORIES, Fragile, TwoClusters, TwoLatents, images, rows, small_vae
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints
from torch.optim import lr_scheduler

from ppl_vae import VAE, fit, likelihoods, noise, objectives, posteriors, priors
from ppl_vae.capture import CaptureError
from ppl_vae.networks import mlp
from ppl_vae.training import captured
from ppl_vae.work import Work

ADAM = partial(torch.optim.Adam, lr=1e-2, fused=True)


def train(story, columns, **arguments):
    """21 steps by default, every third of them with a smaller batch."""
    return fit(story, *columns, **{"epochs": 7, "batch_size": 16, "optimizer": ADAM, "seed": 3} | arguments)


def by_both(make, columns, engine="captured", **arguments):
    """A story trained by SVI and its twin trained by another engine, each with its history."""
    torch.manual_seed(5)
    story = make()
    twin = copy.deepcopy(story)
    reference = train(story, columns, engine="svi", **arguments)
    return (story, reference), (twin, train(twin, columns, engine=engine, **arguments))


def assert_same(svi, other, name="captured"):
    (story, reference), (twin, history) = svi, other
    assert (reference.engine, history.engine) == ("svi", name)
    for key, tensor in story.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[key]), key
    assert history["train_elbo"] == pytest.approx(reference["train_elbo"], rel=1e-6)
    for column in ("learning_rate", "kl_factor", "skipped_steps"):
        assert (history[column] == reference[column]).all()


# The same steps, whatever the story


def normal_vae(scale=0.5, encoder=None):
    decoder = likelihoods.Normal(mlp(2, 8, 5), scale=scale() if callable(scale) else scale)
    return VAE(priors.StandardNormal(2), decoder, (encoder or partial(posteriors.DiagonalNormal, mlp(5, 8, 4)))())


def noisy_encoder():
    layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4))
    return posteriors.DiagonalNormal(nn.Sequential(*layers))


class FullCovariance(nn.Module):
    def __init__(self):
        super().__init__()
        self.guess = nn.Linear(5, 2 + 4)

    def forward(self, x):
        loc, entries = self.guess(x).split([2, 4], -1)
        root = entries.unflatten(-1, (2, 2))
        return dist.MultivariateNormal(loc, scale_tril=root.tril(-1) + torch.diag_embed(root[..., 0].exp()))


class Rates(nn.Module):
    """rate ~ Gamma(a, b), x ~ Poisson(rate)."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(2))
        self.guess = nn.Linear(1, 2)

    def model(self, x):
        with pyro.plate("observations", len(x)):
            rate = pyro.sample("rate", dist.Gamma(*self.prior.exp()))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(self, x):
        concentration, rate = self.guess(x[:, None] / 4).exp().unbind(-1)
        with pyro.plate("observations", len(x)):
            pyro.sample("rate", dist.Gamma(concentration + 1, rate))


class Shares(nn.Module):
    """shares ~ Dirichlet(a), x ~ Multinomial(7, shares)."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.ones(3))
        self.guess = nn.Linear(3, 3)

    def model(self, x):
        with pyro.plate("observations", len(x)):
            shares = pyro.sample("shares", dist.Dirichlet(self.prior.exp()))
            pyro.sample("x", dist.Multinomial(7, shares), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("shares", dist.Dirichlet(self.guess(x / 7).exp()))


class Kinds(nn.Module):
    """kind ~ Categorical, x ~ N(loc[kind], 0.8^2); nothing is reparametrized, so the guide learns by its score."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.arange(3.0))
        self.guess = nn.Linear(1, 3)

    def model(self, x):
        with pyro.plate("observations", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.full((3,), 1 / 3)))
            pyro.sample("x", dist.Normal(self.loc[kind], 0.8), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("kind", dist.Categorical(logits=self.guess(x[:, None])))


class Shifted(nn.Module):
    """z ~ N(0, 1), x ~ N(z + a + b, beta^2): two parameters with the same gradient, and a number of Python's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(-0.3))
        self.guess = nn.Linear(1, 1)
        self.beta = 1.0

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.a + self.b, self.beta), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.guess(x[:, None]).squeeze(-1), 1.0))


class Tied(nn.Module):
    """A layer under two names, and another layer that has its weight."""

    def __init__(self):
        super().__init__()
        self.shared = self.also = nn.Linear(5, 5)
        self.other = nn.Linear(5, 5)
        self.other.weight = self.shared.weight
        self.up, self.down = nn.Linear(2, 5), nn.Linear(5, 2)

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.other(self.also(self.up(z))), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.down(self.shared(x)), 1.0).to_event(1))


class Constrained(PyroModule):
    """Model and guide share a positive parameter."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)
        self.guess = PyroModule[nn.Linear](1, 1)

    @pyro_method
    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.guess(x[:, None]).squeeze(-1), self.scale))


class Counting(Shifted):
    """A buffer that the model moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows_seen", torch.zeros(()))

    def model(self, x):
        self.rows_seen += len(x)
        super().model(x)


def partly_frozen():
    """With a gradient left over from elsewhere, which must neither count nor change."""
    story = TwoLatents()
    story.loadings.bias.requires_grad_(False).grad = torch.full((5,), 100.0)
    return story


def counts():
    return (torch.arange(40.0) % 7,)


def multinomial_counts():
    x = torch.arange(40.0) % 7
    return (torch.stack([x, (7 - x) // 2, 7 - x - (7 - x) // 2], -1),)


def row():
    return (rows()[:, 0],)


def matrix():
    return (rows(),)


TOLD = STORIES | {
    "fixed scale": (normal_vae, matrix),
    "learned scale": (partial(normal_vae, partial(likelihoods.learned, 0.5)), matrix),
    "scale per dimension": (partial(normal_vae, lambda: likelihoods.learned(torch.ones(5))), matrix),
    "predicted scale": (partial(normal_vae, lambda: mlp(2, 8, 5)), matrix),
    "gamma": (Rates, counts),
    "dirichlet": (Shares, multinomial_counts),
    "multivariate normal": (partial(normal_vae, 0.5, FullCovariance), matrix),
    "BatchNorm and Dropout": (partial(normal_vae, 0.5, noisy_encoder), matrix),
    "tied": (Tied, matrix),
    "partly frozen": (partly_frozen, matrix),
    "constrained": (Constrained, row),
    "score function": (Kinds, row),
    "equal gradients": (Shifted, row),
    "moving buffer": (Counting, row),
    "double": (lambda: small_vae().double(), lambda: (images(),)),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_captured_story_takes_the_steps_of_svi_bit_for_bit(name):
    make, columns = TOLD[name]
    torch.manual_seed(5)
    before = make().state_dict()
    svi, other = by_both(make, columns(), clip=5.0)
    assert_same(svi, other)
    for key, parameter in other[0].named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key


# Whatever the loss

LOSSES = {
    "two particles": Trace_ELBO(num_particles=2),
    "two particles in a plate": Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    "mean field": TraceMeanField_ELBO(),
    "Renyi": RenyiELBO(alpha=0, num_particles=2),
    "Renyi in a plate": RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "graph": TraceGraph_ELBO(),
}
OBJECTIVES = {
    "summed out": objectives.SummedOutELBO(2),
    "importance weighted": objectives.ImportanceWeightedELBO(3, doubly_reparameterized=False),
    "doubly reparameterized": objectives.ImportanceWeightedELBO(3),
    "Renyi by row": objectives.RenyiELBO(0.5, 3),
    "free bits": objectives.FreeBitsELBO(0.1),
    "free bits of a site": objectives.FreeBitsELBO({"z": 0.1}, num_particles=2),
}


@pytest.mark.parametrize("loss", (LOSSES | OBJECTIVES).values(), ids=(LOSSES | OBJECTIVES).keys())
def test_every_loss_is_captured_with_a_warm_up_and_a_beta(loss):
    assert_same(*by_both(small_vae, (images(),), loss=loss, kl_warmup=3, beta=1.3))


@pytest.mark.parametrize("loss", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_every_objective_is_captured_where_a_latent_is_summed_out(loss):
    assert_same(*by_both(TwoClusters, row(), loss=loss, kl_warmup=3, beta={"z": 0.7}))


def vamp_vae():
    """Its prior holds its encoder."""
    encoder = posteriors.DiagonalNormal(mlp(5, 8, 4))
    return VAE(priors.VampPrior(encoder, rows(3)), likelihoods.Normal(mlp(2, 8, 5), scale=0.5), encoder)


def flow_vae():
    layers = posteriors.inverse_autoregressive(2, context_dim=3, hidden_dims=(8,))
    return normal_vae(encoder=lambda: posteriors.Flow(mlp(5, 8, 4 + 3), 2, layers))


TOLD_BY_PARTICLES = {
    name: TOLD[name] for name in ("plain", "convolutional", "conditional", "gamma", "tied", "constrained", "double")
} | {"shared prior": (vamp_vae, matrix), "flow": (flow_vae, matrix)}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLD_BY_PARTICLES)
def test_the_doubly_reparameterized_gradient_is_captured_whatever_the_story(name):
    make, columns = TOLD_BY_PARTICLES[name]
    assert_same(*by_both(make, columns(), loss=OBJECTIVES["doubly reparameterized"]))


def test_betas_by_site_and_free_bits_are_captured_with_a_warm_up():
    arguments = {"beta": {"size": 1.7, "factors": 0.3}, "free_bits": {"size": 0.2}, "kl_warmup": 3, "clip": 0.5}
    assert_same(*by_both(TwoLatents, matrix(), **arguments))


@pytest.mark.parametrize("loss", [objectives.SummedOutELBO(2), objectives.FreeBitsELBO(0.1)], ids=["ELBO", "free bits"])
def test_objectives_learn_a_discrete_guide_by_its_score_when_captured(loss):
    assert_same(*by_both(Kinds, row(), loss=loss))


def test_what_the_default_captures_without_being_asked():
    assert_same(*by_both(TwoClusters, row(), engine="auto"))
    assert_same(*by_both(TwoClusters, row(), engine="auto", free_bits=0.5, beta=2.0))


def test_particles_in_a_plate_learn_a_discrete_guide_by_its_score():
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    assert_same(*by_both(Kinds, row(), loss=loss))


# Whatever the optimizer


def two_rates(parameters):
    parameters = list(parameters)
    groups = [{"params": parameters[:4], "lr": 1e-3}, {"params": parameters[4:]}]
    return torch.optim.Adam(groups, lr=1e-2, fused=True)


def of_the_decoder_alone(parameters):
    return ADAM(list(parameters)[:4])


OPTIMIZERS = {
    "fused Adam": ADAM,
    "Adam": partial(torch.optim.Adam, lr=1e-2),
    "fused AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, amsgrad=True, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "fused SGD with momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "SGD with momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3),
    "NAdam": partial(torch.optim.NAdam, lr=1e-2),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "two rates": two_rates,
    "of the decoder alone": of_the_decoder_alone,
    "rate in a tensor": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(1e-2), fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_as_it_would_with_schedule_and_clip(name):
    decay = partial(lr_scheduler.ExponentialLR, gamma=0.8)
    assert_same(*by_both(small_vae, (images(),), optimizer=OPTIMIZERS[name], schedule=decay, clip=0.5))


def test_a_schedule_that_moves_betas_too_is_followed():
    cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=5)
    assert_same(*by_both(Shifted, row(), schedule=cycle, epochs=4))


# Whatever else


@pytest.mark.parametrize(
    "arguments",
    [
        {"transform": torch.bernoulli},
        {"mixed_precision": True},
        {"batch_size": 64, "epochs": 20},
        {"batch_size": 13},
        {"validation": images(24), "patience": 2},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_transform_precision_batch_size_and_validation_are_those_of_svi(arguments):
    x = images() / 2 + 0.25 if "transform" in arguments else images()
    assert_same(*by_both(small_vae, (x,), **arguments))


def test_a_captured_training_learns():
    history = train(small_vae(), (images(),), engine="captured", epochs=40)
    assert history["train_elbo"][-5:].mean() > history["train_elbo"][:5].mean() + 2


# What changes between epochs


def at_epoch(number, change):
    return lambda story, row: change(story) if row["epoch"] == number else None


def set_beta(story):
    story.beta = 2.0


def unfreeze_then_freeze(story, row):
    story.loadings.bias.requires_grad_(row["epoch"] % 3 != 1)


def quarter(story):
    story.load_state_dict({name: tensor / 4 for name, tensor in story.state_dict().items()})


def zero(story):
    with torch.no_grad():
        story.guess.weight.zero_()


def rest(story):
    story.encoder.eval()


def drop_more(story):
    story.encoder.network[2].p = 0.9


CHANGES = {
    "number": (Shifted, row, at_epoch(2, set_beta)),
    "frozen": (TwoLatents, matrix, unfreeze_then_freeze),
    "loaded": (Shifted, row, at_epoch(2, quarter)),
    "in place": (Shifted, row, at_epoch(2, zero)),
    "buffer": (Counting, row, at_epoch(2, lambda story: story.rows_seen.zero_())),
    "eval mode": (partial(normal_vae, 0.5, noisy_encoder), matrix, at_epoch(2, rest)),
    "number of a layer": (partial(normal_vae, 0.5, noisy_encoder), matrix, at_epoch(2, drop_more)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_changes_is_seen_in_the_next_epoch(name):
    make, columns, change = CHANGES[name]
    svi, other = by_both(make, columns(), epochs=4, callbacks=[change], clip=5.0)
    assert_same(svi, other)
    torch.manual_seed(5)
    undisturbed = make()
    train(undisturbed, columns(), engine="svi", epochs=4, clip=5.0)
    pairs = zip(undisturbed.state_dict().values(), other[0].state_dict().values(), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)


def test_a_change_of_the_optimizers_numbers_is_seen_in_the_next_epoch():
    made = []

    def optimizer(parameters):
        made.append(torch.optim.AdamW(parameters, lr=1e-2, fused=True))
        return made[-1]

    def decay(story, row):
        made[-1].param_groups[0]["weight_decay"] = 10.0

    assert_same(*by_both(Shifted, row(), optimizer=optimizer, epochs=3, callbacks=[decay]))


# Refusals


class Bare(Shifted):
    """Its parameter outside of the module is hidden from the check, which looks in eval mode."""

    def guide(self, x):
        shift = pyro.param("bare", torch.tensor(0.5)) if self.training else 0.5
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.guess(x[:, None]).squeeze(-1) + shift, 1.0))


class Hidden(Shifted):
    """Its list is no ParameterList, so the optimizer does not know what is in it; the check looks in eval mode."""

    def __init__(self):
        super().__init__()
        self.hidden = [torch.tensor(0.5, requires_grad=True)]

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            hidden = self.hidden[0] if self.training else 0.5
            pyro.sample("x", dist.Normal(z + self.a + self.b + hidden, 1.0), obs=x)


class Branching(Shifted):
    def model(self, x):
        super().model(x)
        if x.sum() > 0:
            self.beta = 1.0


ENUMERATED = {"loss": TraceEnum_ELBO(max_plate_nesting=1)}
REFUSED = {
    "bare parameter": (Bare, {}, r"'bare' is not the story's own \(a bare pyro.param\)"),
    "hidden parameter": (Hidden, {}, "trains a tensor that is no parameter of the story"),
    "branch": (Branching, {}, "control flow, or a shape, depends on the data"),
    "Pyro's own branch": (TwoClusters, ENUMERATED, "control flow, or a shape, depends on the data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_named_or_trained_by_svi_from_the_first_step(name, caplog):
    make, arguments, reason = REFUSED[name]
    with pytest.raises(CaptureError, match=f"^The story cannot be captured: .*{reason}.*engine='svi'"):
        train(make(), row(), engine="captured", **arguments)
    with caplog.at_level(logging.INFO, logger="ppl_vae"):
        assert_same(*by_both(make, row(), engine="auto", **arguments), name="svi")
    (record,) = [record for record in caplog.records if record.name == "ppl_vae"]
    assert record.levelno == logging.INFO and "\n" not in record.getMessage()
    assert "training by svi" in record.getMessage()


def test_random_numbers_of_pythons_are_noticed(caplog):
    def transform(x):
        return x * random.choice((1.0, 1.1, 1.2, 1.3)) * random.uniform(0.5, 1.5)

    with pytest.raises(CaptureError, match="random numbers outside torch"):
        train(Shifted(), row(), engine="captured", transform=transform)
    with caplog.at_level(logging.INFO, logger="ppl_vae"):
        assert train(Shifted(), row(), transform=transform).engine == "svi"
    assert [r.getMessage() for r in caplog.records if "random numbers outside torch" in r.getMessage()]


def test_svi_cannot_be_compiled():
    with pytest.raises(ValueError, match="Only a captured step can be compiled"):
        train(Shifted(), row(), engine="svi", compile=True)


# Steps that are not finite


@pytest.mark.parametrize("name", ["fused Adam", "Adam", "fused SGD with momentum", "NAdam"])
def test_the_steps_that_are_not_finite_are_skipped_as_by_svi(name):
    x = torch.linspace(-1, 1, 40)
    x[[7, 13, 22, 31]] = 99.0
    svi, other = by_both(Fragile, (x,), batch_size=6, optimizer=OPTIMIZERS[name])
    assert_same(svi, other)
    assert 7 <= other[1]["skipped_steps"].sum() < 7 * 7
    assert all(parameter.isfinite() and parameter != 0 for parameter in other[0].parameters())


@pytest.mark.parametrize("good_epochs", [0, 2])
def test_ten_bad_batches_in_a_row_end_training_with_the_words_of_svi_and_nothing_moved(good_epochs):
    texts = []
    for engine in ("svi", "captured"):
        story, kept = Fragile(), [torch.zeros(2)]
        x = torch.linspace(-1, 1, 40)
        if not good_epochs:
            x[2:] = 99.0  # the dry run looks at the first two

        def spoil(story, row, x=x, kept=kept):
            kept.append(torch.stack([*story.parameters()]).detach())
            if row["epoch"] == good_epochs:
                x.fill_(99.0)

        with pytest.raises(FloatingPointError, match=r"epoch \d+, batch \d+, seed 3.*'z' of the guide") as caught:
            train(story, (x,), batch_size=6, engine=engine, callbacks=[spoil])
        texts.append(str(caught.value))
        assert torch.equal(torch.stack([*story.parameters()]), kept[good_epochs])
        assert (kept[good_epochs] != 0).all() == bool(good_epochs)
    assert texts[0] == texts[1]


def test_training_ends_at_the_tenth_bad_batch_also_where_good_ones_would_follow():
    x = torch.linspace(-1, 1, 80)
    for batch in noise.permutation(80, 3, 1).split(4)[3:13]:
        x[batch.max()] = 99.0
    ended = []
    for engine in ("svi", "captured"):
        story = Fragile()
        with pytest.raises(FloatingPointError, match="epoch 1, batch 12, seed 3") as caught:
            train(story, (x,), batch_size=4, engine=engine)
        ended.append((str(caught.value), story.shift.item(), story.guess.item()))
    assert ended[0] == ended[1]


# Isolation


@pytest.mark.parametrize(
    ("make", "engine", "name"),
    [(Shifted, "captured", "captured"), (Constrained, "captured", "captured"), (Branching, "auto", "svi")],
)
def test_what_is_the_users_is_left_as_it_was(make, engine, name):
    story = make().eval()
    story.guess.train()
    pyro.param("mine", torch.ones(1))
    tensors = {key: id(tensor) for key, tensor in (*story.named_parameters(), *story.named_buffers())}
    states = torch.random.get_rng_state(), random.getstate(), pyro.util.torch_isnan
    assert train(story, row(), engine=engine, epochs=2).engine == name
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), pyro.util.torch_isnan) == states[1:]
    assert list(pyro.get_param_store()) == ["mine"] and pyro.param("mine").item() == 1
    assert [module.training for module in (story, story.guess)] == [False, True]
    assert {key: id(tensor) for key, tensor in (*story.named_parameters(), *story.named_buffers())} == tensors
    assert all(type(parameter) is nn.Parameter and parameter.grad is None for parameter in story.parameters())


def test_the_frozen_parameters_gradient_is_the_users():
    story = partly_frozen()
    train(story, matrix(), engine="captured", epochs=1, clip=0.1)
    assert torch.equal(story.loadings.bias.grad, torch.full((5,), 100.0))


# Compilation


def test_a_short_training_is_captured_and_not_compiled_by_default():
    assert fit(small_vae(), images(), epochs=2).engine == "captured"


class Regression(nn.Module):
    """y ~ N(f(x), 1), without a latent: no noise, so that compiled steps must be those of SVI."""

    def __init__(self):
        super().__init__()
        self.network = mlp(1, 8, 1)

    def model(self, x, y):
        with pyro.plate("observations", len(x)):
            pyro.sample("y", dist.Normal(self.network(x[:, None]).squeeze(-1), 1.0), obs=y)

    def guide(self, x, y):
        pass


def some_calls_and_a_rest(batch_size):
    return batch_size * (2 * captured.MOST_STEPS_PER_CALL + 1) + batch_size // 2


def relative_error(ours, theirs, start):
    moved = [(a - b).norm() / (b - c).norm() for a, b, c in zip(ours, theirs, start, strict=True)]
    return torch.stack(moved).max().item()


@pytest.mark.slow
def test_compiled_steps_without_noise_are_the_steps_of_svi(float64):
    x = torch.linspace(-3, 3, some_calls_and_a_rest(8))
    start = Regression()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    arguments = {"batch_size": 8, "epochs": 3, "clip": 0.5, "schedule": partial(lr_scheduler.ExponentialLR, gamma=0.5)}
    history = train(ours, (x, x.sin()), engine="captured", compile=True, **arguments)
    reference = train(theirs, (x, x.sin()), engine="svi", **arguments)
    assert history.engine == "captured, compiled"
    assert relative_error(ours.parameters(), theirs.parameters(), start.parameters()) < 1e-5
    assert history["train_elbo"] == pytest.approx(reference["train_elbo"], rel=1e-6)  # Adam counts in float32


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("MOST_STEPS_PER_CALL", 1), ("LARGE_STEP", 0)])
def test_compiled_steps_with_the_same_noise_are_the_steps_of_svi(name, value, float64, monkeypatch):
    monkeypatch.setattr(captured, name, value)  # noise starts anew with every call, which is then one step
    start = small_vae()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    history = train(ours, (images(),), engine="captured", compile=True)
    train(theirs, (images(),), engine="svi")
    assert history.engine == "captured, compiled"
    assert relative_error(ours.parameters(), theirs.parameters(), start.parameters()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.Adam, fused=True), torch.optim.Adam])
def test_large_compiled_steps_move_by_any_optimizer_and_skip_what_is_not_finite(optimizer, monkeypatch):
    monkeypatch.setattr(captured, "LARGE_STEP", 0)
    x = torch.linspace(-1, 1, 60)
    x[[7, 33]] = 99.0
    arguments = {"batch_size": 6, "optimizer": partial(optimizer, lr=1e-3)}
    (story, reference), _ = by_both(Fragile, (x,), **arguments)
    compiled = Fragile()
    history = train(compiled, (x,), engine="captured", compile=True, **arguments)
    assert history.engine == "captured, compiled"
    assert history["skipped_steps"].tolist() == reference["skipped_steps"].tolist()
    assert reference["skipped_steps"].sum() > 0
    for ours, theirs in zip(compiled.parameters(), story.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_compiled_noise_has_the_distribution_of_svis_and_differs_from_step_to_step():
    x = images(some_calls_and_a_rest(4))
    arguments = {"batch_size": 4, "epochs": 100, "optimizer": partial(torch.optim.SGD, lr=1e-30)}
    story = small_vae()
    theirs = train(story, (x,), engine="svi", **arguments)["train_elbo"]
    history = train(story, (x,), engine="captured", compile=True, **arguments)
    ours = history["train_elbo"]
    assert history.engine == "captured, compiled"
    error = math.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 100)
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    # Repeated noise would multiply the variance of an epoch's mean; the quotient is F-distributed.
    low, high = scipy.stats.f(99, 99).ppf([1e-4, 1 - 1e-4])
    assert low < ours.var() / theirs.var() < high


@pytest.mark.slow
def test_compiled_steps_that_are_not_finite_are_skipped_as_by_svi():
    x = torch.linspace(-1, 1, some_calls_and_a_rest(6))
    x[[7, 13, 31]] = 99.0
    (story, reference), _ = by_both(Fragile, (x,), batch_size=6)
    compiled = Fragile()
    history = train(compiled, (x,), engine="captured", compile=True, batch_size=6)
    assert history.engine == "captured, compiled"
    assert history["skipped_steps"].tolist() == reference["skipped_steps"].tolist()
    for ours, theirs in zip(compiled.parameters(), story.parameters(), strict=True):
        assert ours.item() == pytest.approx(theirs.item(), abs=0.1) and ours != 0


def test_steps_are_compiled_where_they_are_many_or_each_has_much_to_do():
    little, much = Work(flops=10**9, numbers=10**5), Work(flops=10**9, numbers=10**8)
    assert captured.pays(200_000, little, 200) and not captured.pays(20_000, little, 200)
    assert captured.pays(2000, much, 200) and not captured.pays(200, much, 200)
    assert not captured.pays(2000, much, 2000)  # a step of so many operations takes longer to compile


def test_what_a_step_has_to_do_is_seen_before_it_is_decided(monkeypatch):
    seen = []
    monkeypatch.setattr(captured, "pays", lambda steps, work, operations: seen.append(work))
    for components in (2, 200):
        prior, encoder = priors.MixtureOfNormals(3, components), posteriors.DiagonalNormal(mlp(5, 6))
        train(VAE(prior, likelihoods.Bernoulli(mlp(3, 5)), encoder), (torch.rand(16, 5).round(),), batch_size=8)
    few, many = seen
    assert few.flops == many.flops > 0
    assert many.numbers - few.numbers > 8 * 198 * 3  # of the first batch: components times latents


@pytest.mark.slow
def test_without_a_compiler_training_is_not_compiled_and_says_so(monkeypatch, tmp_path, caplog):
    from torch import _inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(captured, "pays", lambda *arguments: True)
    columns = (rows(some_calls_and_a_rest(8))[:, 0],)
    with _inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        with pytest.raises(CaptureError, match="could not be compiled"):
            train(Shifted(), columns, engine="captured", compile=True, batch_size=8)
        with caplog.at_level(logging.INFO, logger="ppl_vae"):
            assert_same(*by_both(Shifted, columns, engine="auto", batch_size=8))
    assert [r for r in caplog.records if "captured but not compiled" in r.getMessage()]
