"""Typed configurations and the stories they stand for: the only place where names stand for modules.

A configuration is a frozen dataclass of numbers, words and other configurations. It goes to JSON and comes back
checked: unknown words are refused, and no word is ever looked up outside the tables below. Torch is imported when a
story is built, so that the command line answers before that.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

if TYPE_CHECKING:
    from torch import nn

    from ppl_vae.vae import VAE

    MakeNetwork = Callable[[tuple[int, ...]], nn.Module]

# What a likelihood takes the grey levels of images for: probabilities of coins to be thrown, numbers from 0 to 1, or
# whole numbers from 0 to 16 or 255.
Pixels = Literal["coins", "grey", "counts"]


def option(default: Any, text: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A field with a default, a help text, and how a word of the command line becomes its value."""
    return field(default=default, metadata={"help": text, "parse": parse or type(default)})


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    >>> whole_numbers("400,400")
    (400, 400)
    """
    return tuple(int(part) for part in text.split(",") if part)


def words(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


LARGEST = 2**63 - 1
LARGEST_WEIGHT = 1e12  # that objectives allow; here too, so that the command line knows it before torch is imported

POSITIVE = ("learned", "per-dimension", "network")


def positive(text: str) -> float | str:
    """A positive number, or one of the words "learned", "per-dimension" and "network"."""
    return text if text in POSITIVE else float(text)


def positive_option(default: float | str, of: str) -> Any:
    """A field for a positive parameter of a likelihood: fixed, trained, or a network of z."""
    return option(default, f"{of}: a number (fixed), or one of {', '.join(POSITIVE)}", positive)


# Priors: ``build(latent_dim, encoder, event_shape)`` returns the module


@dataclass(frozen=True)
class StandardNormal:
    """z ~ Normal(0, I)"""

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.StandardNormal(latent_dim)


@dataclass(frozen=True)
class LearnedNormal:
    """z ~ Normal with learned location and scale"""

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.Normal(latent_dim)


@dataclass(frozen=True)
class LaplacePrior:
    """z ~ Laplace(0, 1), independent dimensions"""

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.Laplace(latent_dim)


@dataclass(frozen=True)
class StudentTPrior:
    """z ~ Student-t, independent dimensions"""

    df: float = option(5.0, "degrees of freedom")

    def __post_init__(self) -> None:
        _positive(self, "df")

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.StudentT(latent_dim, self.df)


@dataclass(frozen=True)
class UniformPrior:
    """z ~ Uniform on a box; the posterior is mapped to the same box"""

    low: float = option(-1.0, "lower end of every dimension")
    high: float = option(1.0, "upper end of every dimension")

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"prior.low must lie below prior.high; found {self.low} and {self.high}.")

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.Uniform(latent_dim, self.low, self.high)


@dataclass(frozen=True)
class MixturePrior:
    """z ~ a learned mixture of normals"""

    components: int = option(10, "how many")

    def __post_init__(self) -> None:
        _at_least(self, components=1)

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.MixtureOfNormals(latent_dim, self.components)


@dataclass(frozen=True)
class PerClass:
    """z ~ the even mixture of learned normals, one for each class"""

    num_labels: int = option(10, "how many classes")

    def __post_init__(self) -> None:
        _at_least(self, num_labels=1)

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.PerClass(latent_dim, self.num_labels)


@dataclass(frozen=True)
class Vamp:
    """z ~ the even mixture of the encoder's guesses at learned pseudo-inputs"""

    components: int = option(500, "how many pseudo-inputs")

    def __post_init__(self) -> None:
        _at_least(self, components=1)

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        import torch

        from ppl_vae import priors

        return priors.VampPrior(encoder, torch.rand(self.components, *event_shape))


@dataclass(frozen=True)
class RealNVP:
    """z = g(u), u ~ Normal(0, I), g of affine couplings"""

    num_layers: int = option(4, "couplings")
    hidden_dims: tuple[int, ...] = option((64, 64), "sizes of the hidden layers of each coupling", whole_numbers)

    def __post_init__(self) -> None:
        _at_least(self, num_layers=1)

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.Flow(latent_dim, priors.realnvp(latent_dim, self.num_layers, self.hidden_dims))


@dataclass(frozen=True)
class Splines:
    """z = g(u), u ~ Normal(0, I), g of spline couplings"""

    num_layers: int = option(2, "couplings")
    hidden_dims: tuple[int, ...] = option((64, 64), "sizes of the hidden layers of each coupling", whole_numbers)

    def __post_init__(self) -> None:
        _at_least(self, num_layers=1)

    def build(self, latent_dim: int, encoder: "nn.Module", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import priors

        return priors.Flow(latent_dim, priors.splines(latent_dim, self.num_layers, self.hidden_dims))


# Likelihoods: ``build(network, event_shape)`` returns the module, with ``network(shape)`` a fresh network from z.
# ``pixels`` says what they take grey levels for.


@dataclass(frozen=True)
class Bernoulli:
    """x ~ Bernoulli(f(z)), for pixels that are 0 or 1"""

    pixels: ClassVar[Pixels] = "coins"

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Bernoulli(network(event_shape))


@dataclass(frozen=True)
class ContinuousBernoulli:
    """x ~ continuous Bernoulli(f(z)), for numbers from 0 to 1"""

    pixels: ClassVar[Pixels] = "grey"

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.ContinuousBernoulli(network(event_shape))


@dataclass(frozen=True)
class _LocationScale:
    """What a family with a location and a scale is made from."""

    pixels: ClassVar[Pixels] = "grey"

    scale: float | str = positive_option("learned", "the scale")
    initial: float = option(0.5, "where a learned scale starts")
    floor: float = option(1e-3, "smallest value of a scale that trains")

    def __post_init__(self) -> None:
        _positive_or_word(self, "scale")
        _positive(self, "floor", "initial")


@dataclass(frozen=True)
class Normal(_LocationScale):
    """x ~ Normal(f(z), scale), for real numbers"""

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Normal(
            network(event_shape), _parameter(self.scale, self.initial, network, event_shape), self.floor
        )


@dataclass(frozen=True)
class Laplace(_LocationScale):
    """x ~ Laplace(f(z), scale), for real numbers"""

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Laplace(
            network(event_shape), _parameter(self.scale, self.initial, network, event_shape), self.floor
        )


@dataclass(frozen=True)
class StudentT(_LocationScale):
    """x ~ Student-t(f(z), scale), for real numbers with outliers"""

    df: float | str = positive_option("learned", "degrees of freedom")
    initial_df: float = option(5.0, "where learned degrees of freedom start")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive_or_word(self, "df")
        _positive(self, "initial_df")

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        scale = _parameter(self.scale, self.initial, network, event_shape)
        df = _parameter(self.df, self.initial_df, network, event_shape)
        return likelihoods.StudentT(network(event_shape), scale, df, self.floor)


@dataclass(frozen=True)
class LogNormal(_LocationScale):
    """log x ~ Normal(f(z), scale), for positive numbers"""

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.LogNormal(
            network(event_shape), _parameter(self.scale, self.initial, network, event_shape), self.floor
        )


@dataclass(frozen=True)
class Beta(_LocationScale):
    """x ~ Beta with mode f(z), for numbers between 0 and 1"""

    floor: float = option(0.02, "smallest value of a scale that trains")

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Beta(
            network(event_shape), _parameter(self.scale, self.initial, network, event_shape), self.floor
        )


@dataclass(frozen=True)
class DiscretizedLogistic(_LocationScale):
    """x ~ a logistic distribution rounded to grey levels"""

    initial: float = option(0.1, "where a learned scale starts")
    floor: float = option(1e-4, "smallest value of a scale that trains")
    levels: int = option(256, "grey levels from 0 to 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, levels=2)

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        scale = _parameter(self.scale, self.initial, network, event_shape)
        return likelihoods.DiscretizedLogistic(network(event_shape), scale, self.levels, self.floor)


@dataclass(frozen=True)
class MixtureOfDiscretizedLogistics(DiscretizedLogistic):
    """x ~ for each pixel a mixture of logistic distributions rounded to grey levels"""

    components: int = option(5, "how many")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, components=1)

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        shape = (*event_shape, self.components)
        scale = _parameter(self.scale, self.initial, network, shape)
        family = likelihoods.MixtureOfDiscretizedLogistics
        return family(network(shape), network(shape), scale, self.levels, self.floor)


@dataclass(frozen=True)
class Binomial:
    """x ~ Binomial(total_count, f(z)), for counts up to a known number"""

    pixels: ClassVar[Pixels] = "counts"

    total_count: int = option(255, "the largest count, such as 16 for digits and 255 for images of 8 bits")

    def __post_init__(self) -> None:
        _at_least(self, total_count=1)

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Binomial(network(event_shape), self.total_count)


@dataclass(frozen=True)
class Categorical:
    """x ~ Categorical(f(z)), for the classes 0, 1, 2 and so on"""

    pixels: ClassVar[Pixels] = "counts"

    classes: int = option(256, "how many")

    def __post_init__(self) -> None:
        _at_least(self, classes=2)

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Categorical(network((*event_shape, self.classes)))


@dataclass(frozen=True)
class Poisson:
    """x ~ Poisson(exp f(z)), for counts"""

    pixels: ClassVar[Pixels] = "counts"

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Poisson(network(event_shape))


@dataclass(frozen=True)
class NegativeBinomial:
    """x ~ negative binomial with mean exp f(z), for counts of more than Poisson's variance"""

    pixels: ClassVar[Pixels] = "counts"

    dispersion: float | str = positive_option("learned", "the dispersion")
    initial: float = option(0.5, "where a learned dispersion starts")

    def __post_init__(self) -> None:
        _positive_or_word(self, "dispersion")
        _positive(self, "initial")

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        dispersion = _parameter(self.dispersion, self.initial, network, event_shape)
        return likelihoods.NegativeBinomial(network(event_shape), dispersion)


@dataclass(frozen=True)
class ZeroInflatedPoisson:
    """x ~ Poisson(exp f(z)) or an extra zero"""

    pixels: ClassVar[Pixels] = "counts"

    gate: float | str = positive_option("network", "probability of an extra zero")

    def __post_init__(self) -> None:
        _probability_or_word(self, "gate")

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.ZeroInflatedPoisson(network(event_shape), _parameter(self.gate, 0.5, network, event_shape))


@dataclass(frozen=True)
class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """x ~ negative binomial with mean exp f(z), or an extra zero"""

    gate: float | str = positive_option("network", "probability of an extra zero")

    def __post_init__(self) -> None:
        super().__post_init__()
        _probability_or_word(self, "gate")

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        dispersion = _parameter(self.dispersion, self.initial, network, event_shape)
        gate = _parameter(self.gate, 0.5, network, event_shape)
        return likelihoods.ZeroInflatedNegativeBinomial(network(event_shape), dispersion, gate)


@dataclass(frozen=True)
class ByColumn:
    """x ~ a likelihood for each column of a table"""

    pixels: ClassVar[Pixels] = "grey"

    columns: tuple[str, ...] = option(
        (), "in the order of the table, such as 4*normal,poisson,categorical:3 (a categorical of 3 classes)", words
    )

    def __post_init__(self) -> None:
        for word in self.columns:
            _column(word)

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        if not self.columns:
            raise ValueError("by-column needs likelihood.columns, such as 4*normal,poisson,categorical:3.")
        parts = [_column(word) for word in self.columns]
        width = sum(number for number, _ in parts)
        if event_shape != (width,):
            raise ValueError(
                f"likelihood.columns speaks of {width} columns; the observations have the shape {event_shape}."
            )
        return likelihoods.ByColumn(*(kind.build(network, (number,)) for number, kind in parts))


def _column(word: str) -> tuple[int, Any]:
    """How many columns such a word stands for, and of which likelihood."""
    number, _, name = word.rpartition("*")
    name, _, detail = name.partition(":")
    details = {"categorical": "classes", "binomial": "total_count"}
    kind = choice("likelihood", name)
    if kind is ByColumn or (detail and name not in details) or not (number or "1").isdecimal() or number == "0":
        raise ValueError(f"likelihood.columns holds words such as 4*normal, poisson or categorical:3; found {word!r}.")
    if detail and not detail.isdecimal():
        raise ValueError(f"{name} takes a whole number after the colon; found {word!r}.")
    return int(number or 1), kind(**({details[name]: int(detail)} if detail else {}))


def _parameter(value: float | str, initial: float, network: "MakeNetwork", shape: tuple[int, ...]) -> Any:
    """A parameter as a likelihood takes it."""
    import torch

    from ppl_vae import likelihoods

    if isinstance(value, float):
        return value
    starts = {"learned": torch.tensor(initial), "per-dimension": torch.full(shape, initial)}
    return likelihoods.learned(starts[value]) if value in starts else network(shape)


# Posteriors: ``build(network, latent_dim)`` returns the module, with ``network(output)`` a network of x


@dataclass(frozen=True)
class DiagonalNormal:
    """q(z | x) = Normal with independent dimensions"""

    floor: float = option(1e-4, "smallest standard deviation")

    def __post_init__(self) -> None:
        _positive(self, "floor")

    def build(self, network: "Callable[[int], nn.Module]", latent_dim: int) -> "nn.Module":
        from ppl_vae import posteriors

        family = posteriors.DiagonalNormal
        return family(network(family.num_parameters(latent_dim)), floor=self.floor)


@dataclass(frozen=True)
class FullNormal(DiagonalNormal):
    """q(z | x) = Normal with a full covariance"""

    def build(self, network: "Callable[[int], nn.Module]", latent_dim: int) -> "nn.Module":
        from ppl_vae import posteriors

        family = posteriors.FullNormal
        return family(network(family.num_parameters(latent_dim)), floor=self.floor)


@dataclass(frozen=True)
class MixturePosterior:
    """q(z | x) = a mixture of normals"""

    components: int = option(5, "how many")

    def __post_init__(self) -> None:
        _at_least(self, components=1)

    def build(self, network: "Callable[[int], nn.Module]", latent_dim: int) -> "nn.Module":
        from ppl_vae import posteriors

        family = posteriors.MixtureOfNormals
        return family(network(family.num_parameters(latent_dim, self.components)), self.components)


@dataclass(frozen=True)
class InverseAutoregressive:
    """q(z | x) = a normal sent through an inverse autoregressive flow"""

    num_layers: int = option(2, "transforms")
    context_dim: int = option(16, "numbers of x that every transform sees")

    def __post_init__(self) -> None:
        _at_least(self, num_layers=1, context_dim=1)

    def build(self, network: "Callable[[int], nn.Module]", latent_dim: int) -> "nn.Module":
        from ppl_vae import posteriors

        hidden_dims = [max(64, latent_dim)] * 2
        transforms = posteriors.inverse_autoregressive(latent_dim, self.context_dim, self.num_layers, hidden_dims)
        output = posteriors.Flow.num_parameters(latent_dim, self.context_dim)
        return posteriors.Flow(network(output), latent_dim, transforms)


@dataclass(frozen=True)
class AutoregressiveSplines(InverseAutoregressive):
    """q(z | x) = a normal sent through autoregressive splines"""

    def build(self, network: "Callable[[int], nn.Module]", latent_dim: int) -> "nn.Module":
        from ppl_vae import posteriors

        hidden_dims = [max(64, latent_dim)] * 2
        transforms = posteriors.splines(latent_dim, self.context_dim, self.num_layers, hidden_dims)
        output = posteriors.Flow.num_parameters(latent_dim, self.context_dim)
        return posteriors.Flow(network(output), latent_dim, transforms)


# Networks


@dataclass(frozen=True)
class Mlp:
    """multilayer perceptrons"""

    hidden_dims: tuple[int, ...] = option((256, 256), "sizes of the hidden layers, such as 400,400", whole_numbers)

    def encoder(self, event_shape: tuple[int, ...], output: int) -> "nn.Module":
        from ppl_vae import networks

        return networks.mlp(event_shape, *self.hidden_dims, output)

    def decoder(self, latent_dim: int, event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import networks

        return networks.mlp(latent_dim, *reversed(self.hidden_dims), event_shape)


@dataclass(frozen=True)
class Convolutional:
    """3 x 3 convolutions of stride 2, for images"""

    channels: tuple[int, ...] = option(
        (32, 64), "channels after each halving of the image, such as 32,64", whole_numbers
    )

    def encoder(self, event_shape: tuple[int, ...], output: int) -> "nn.Module":
        from ppl_vae import networks

        return networks.convolutional_encoder(event_shape, *self.channels, output=output)

    def decoder(self, latent_dim: int, event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import networks

        return networks.convolutional_decoder(latent_dim, *reversed(self.channels), image=event_shape)


# The longest list of sizes that is believed.
MOST_SIZES = 1000

# Objectives: ``build()`` returns the loss for ``fit``, None for its default


@dataclass(frozen=True)
class Elbo:
    """the ELBO, by draws"""

    def build(self) -> Any:
        return None


@dataclass(frozen=True)
class MeanField:
    """the ELBO, its KL divergence in closed form where there is one"""

    def build(self) -> Any:
        from pyro.infer import TraceMeanField_ELBO

        return TraceMeanField_ELBO()


@dataclass(frozen=True)
class ImportanceWeighted:
    """the importance-weighted bound, with doubly reparameterized gradients"""

    particles: int = option(5, "draws per observation inside the logarithm")

    def __post_init__(self) -> None:
        _at_least(self, particles=1)

    def build(self) -> Any:
        from ppl_vae import objectives

        return objectives.ImportanceWeightedELBO(self.particles)


@dataclass(frozen=True)
class Renyi:
    """Renyi's bound of order alpha"""

    alpha: float = option(0.5, "the order, below 1; 0 is the importance-weighted bound")
    particles: int = option(5, "draws per observation inside the logarithm")

    def __post_init__(self) -> None:
        _at_least(self, particles=1)
        if not -math.inf < self.alpha < math.inf or self.alpha == 1:
            raise ValueError(f"objective.alpha is a finite number other than 1; found {self.alpha}.")

    def build(self) -> Any:
        from ppl_vae import objectives

        return objectives.RenyiELBO(self.alpha, self.particles)


# What each word stands for: the first is the default.
CHOICES: dict[str, dict[str, type]] = {
    "prior": {
        "standard-normal": StandardNormal,
        "normal": LearnedNormal,
        "mixture": MixturePrior,
        "vamp": Vamp,
        "realnvp": RealNVP,
        "splines": Splines,
        "per-class": PerClass,
        "laplace": LaplacePrior,
        "student-t": StudentTPrior,
        "uniform": UniformPrior,
    },
    "likelihood": {
        "bernoulli": Bernoulli,
        "continuous-bernoulli": ContinuousBernoulli,
        "normal": Normal,
        "laplace": Laplace,
        "student-t": StudentT,
        "log-normal": LogNormal,
        "beta": Beta,
        "discretized-logistic": DiscretizedLogistic,
        "mixture-of-discretized-logistics": MixtureOfDiscretizedLogistics,
        "binomial": Binomial,
        "categorical": Categorical,
        "poisson": Poisson,
        "negative-binomial": NegativeBinomial,
        "zero-inflated-poisson": ZeroInflatedPoisson,
        "zero-inflated-negative-binomial": ZeroInflatedNegativeBinomial,
        "by-column": ByColumn,
    },
    "posterior": {
        "diagonal-normal": DiagonalNormal,
        "full-normal": FullNormal,
        "mixture": MixturePosterior,
        "inverse-autoregressive": InverseAutoregressive,
        "autoregressive-splines": AutoregressiveSplines,
    },
    "network": {"mlp": Mlp, "convolutional": Convolutional},
    "objective": {
        "elbo": Elbo,
        "mean-field": MeanField,
        "importance-weighted": ImportanceWeighted,
        "renyi": Renyi,
    },
}

STORY_SLOTS = ("prior", "likelihood", "posterior", "network")


@dataclass(frozen=True)
class StoryConfiguration:
    """Everything that makes a :class:`~ppl_vae.VAE` but its weights."""

    event_shape: tuple[int, ...]
    latent_dim: int = option(2, "size of z")
    prior: Any = field(default_factory=StandardNormal)
    likelihood: Any = field(default_factory=Bernoulli)
    posterior: Any = field(default_factory=DiagonalNormal)
    network: Mlp | Convolutional = field(default_factory=Mlp)

    def __post_init__(self) -> None:
        _at_least(self, latent_dim=1)
        for slot in STORY_SLOTS:
            _check_part(slot, getattr(self, slot))


@dataclass(frozen=True)
class OwnStory:
    """A story of the user's own: where its class is, for the reader of ``config.json``; never imported from there."""

    file: str
    name: str
    event_shape: tuple[int, ...]


@dataclass(frozen=True)
class StoryFile:
    """Where the class of a story of one's own is: ``path/to/file.py:Class``, as typed.

    >>> StoryFile.parse("stories/factors.py:ScaledFactors").name
    'ScaledFactors'
    """

    file: Path
    name: str

    @classmethod
    def parse(cls, text: str) -> "StoryFile":
        """ValueError where the text is not of that form."""
        file, _, name = text.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise ValueError(f"--story takes path/to/file.py:Class; found {text!r}.")
        return cls(Path(file), name)


@dataclass(frozen=True)
class DataConfiguration:
    """Which data, and what is done to them before the story sees them."""

    data: str = option("mnist-5k", "a named data set, or a path to .npy, .npz, .csv")
    data_root: str | None = option(
        None, "folder of downloaded data sets (also: the environment variable PPL_VAE_DATA)", str
    )
    download: bool = option(False, "download the data set if it is not there")
    binarization: str = option("auto", "none, static or dynamic; auto is dynamic for a Bernoulli likelihood, else none")
    standardize: tuple[str, ...] = option(
        (), "columns of a table to give mean 0 and deviation 1, by name; real is all that are not whole numbers", words
    )
    with_labels: bool = option(False, "hand the labels to the story as its second column (with --story)")
    stream: bool = option(False, "leave the observations of a .npy, or of a folder of them, on disk, and read batches")

    def __post_init__(self) -> None:
        if self.binarization not in ("auto", "none", "static", "dynamic"):
            raise ValueError(f"binarization is one of auto, none, static and dynamic; found {self.binarization!r}.")


ENGINES = ("auto", "svi", "captured")


@dataclass(frozen=True)
class TrainingConfiguration:
    """How long and how fast a story is trained, and how many particles judge it."""

    epochs: int = option(150, "passes over the training data")
    batch_size: int = option(100, "observations per step")
    learning_rate: float = option(2e-3, "of Adam")
    kl_warmup: int = option(0, "epochs over which the latent terms grow to full weight")
    beta: float = option(1.0, "weight of the latent terms, in training only")
    free_bits: float | None = option(None, "nats of each latent site that cost nothing, in training only", float)
    patience: int = option(0, "stop after so many epochs without a better validation ELBO; 0 never stops early")
    num_particles: int = option(1000, "draws per observation where log p(x) is estimated by drawing")
    engine: str = option("auto", f"one of {', '.join(ENGINES)}")
    shards: int | None = option(None, "parts of a batch, each with noise of its own (default: processes)", int)
    objective: Any = field(default_factory=Elbo)
    seed: int = option(0, "rules splits, binarization, initial weights, order and noise")

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ENGINES)
        _at_least(self, epochs=1, batch_size=1, kl_warmup=0, patience=0, num_particles=1, shards=1, seed=0)
        _positive(self, "learning_rate", "beta", *(() if self.free_bits is None else ("free_bits",)))
        if (largest := max(self.beta, self.free_bits or 0.0)) > LARGEST_WEIGHT:
            raise ValueError(f"beta and free_bits must be at most {LARGEST_WEIGHT:g}; found {largest}.")
        _check_part("objective", self.objective)
        if self.free_bits is not None and not isinstance(self.objective, Elbo):
            raise ValueError("free_bits is an objective of its own; leave it out, or the other objective.")


# The splits of a data set, and the methods and corrections of log_evidence: written here too, so that the command line
# knows them before torch is imported.
SPLITS = ("train", "validation", "test")
METHODS = ("auto", "importance", "mixture", "annealed", "laplace", "prior", "elbo", "pyro", "quadrature", "exact")
CORRECTIONS = ("jackknife", "jackknife-2", "pareto")


@dataclass(frozen=True)
class EvidenceConfiguration:
    """How log p(x) of the observations of a run is estimated: the arguments of ``log_evidence``, and of how many."""

    method: str = option("auto", f"one of {', '.join(METHODS)}")
    num_particles: int | None = option(None, "draws (chains, if annealed) per observation (default: the method's)", int)
    tolerance: float | None = option(None, "standard error wanted of every observation, in nats", float)
    budget: int = option(60_000, "evaluations of log p(x, z) per observation that auto or a tolerance may spend")
    correction: str | None = option(None, f"one of {', '.join(CORRECTIONS)}; a corrected estimate is no bound", str)
    limit: int | None = option(None, "score only the first so many observations of a split", int)
    seed: int | None = option(None, "rules the noise (default: the seed of the run, the first of several)", int)

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("correction", self.correction, (None, *CORRECTIONS))
        _at_least(self, num_particles=1, budget=1, limit=1, seed=0)
        if self.tolerance is not None:
            _positive(self, "tolerance")


@dataclass(frozen=True)
class ComparisonConfiguration(EvidenceConfiguration):
    """How stories are compared: all by one method, which a weak encoder does not mislead."""

    method: str = option("mixture", f"one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class DiagnosisConfiguration:
    """Which test observations of a run are diagnosed, and how."""

    limit: int = option(1000, "diagnose only the first so many test observations")
    sections: tuple[str, ...] = option((), "only these, separated by commas (default: all that apply)", words)
    seed: int | None = option(None, "rules the noise (default: the seed of the run)", int)

    def __post_init__(self) -> None:
        _at_least(self, limit=2, seed=0)


@dataclass(frozen=True)
class RunConfiguration:
    """All that a run is made from: ``config.json`` holds it."""

    data: DataConfiguration
    story: StoryConfiguration | OwnStory
    training: TrainingConfiguration


def _at_least(configuration: Any, **least: int) -> None:
    for name, value in least.items():
        if (found := getattr(configuration, name)) is not None and found < value:
            raise ValueError(f"{name} must be at least {value}; found {found}.")
        if found is not None and found > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST}; found {found!s:.20}...")


def _one_of(name: str, word: str | None, words: tuple[str | None, ...]) -> None:
    if word not in words:
        raise ValueError(f"Unknown {name} {word!r}; choose one of {', '.join(filter(None, words))}.")


def _positive(configuration: Any, *names: str) -> None:
    for name in names:
        if not 0 < (value := getattr(configuration, name)) < math.inf:
            raise ValueError(f"{name} must be positive and finite; found {value}.")


def _positive_or_word(configuration: Any, name: str) -> None:
    if isinstance(value := getattr(configuration, name), str):
        _one_of(name, value, POSITIVE)
    else:
        _positive(configuration, name)


def _probability_or_word(configuration: Any, name: str) -> None:
    _positive_or_word(configuration, name)
    if not isinstance(value := getattr(configuration, name), str) and value >= 1:
        raise ValueError(f"{name} is a probability below 1; found {value}.")


def _check_part(slot: str, part: Any) -> None:
    kinds = CHOICES[slot].values()
    if type(part) not in kinds:
        raise ValueError(f"{slot} is one of {', '.join(kind.__name__ for kind in kinds)}; found {part!r}.")


def build(configuration: StoryConfiguration, seed: int = 0) -> "VAE":
    """The story that a configuration describes, its initial weights a function of the seed.

    Raises:
        ValueError: when there is no such story, or no memory for it.

    >>> story = build(StoryConfiguration(event_shape=(1, 28, 28), network=Mlp(hidden_dims=(64,))))
    >>> story.model(num_observations=3).shape
    torch.Size([3, 1, 28, 28])
    """
    import torch

    from ppl_vae import noise, posteriors
    from ppl_vae.vae import VAE

    latent_dim, event_shape, network = configuration.latent_dim, configuration.event_shape, configuration.network
    try:
        with noise.unit(torch.device("cpu"), seed, noise.Purpose.INITIAL_WEIGHTS):
            decoder = configuration.likelihood.build(partial(network.decoder, latent_dim), event_shape)
            encoder = configuration.posterior.build(partial(network.encoder, event_shape), latent_dim)
            if isinstance(configuration.prior, UniformPrior):
                encoder = posteriors.Box(encoder, configuration.prior.low, configuration.prior.high)
            prior = configuration.prior.build(latent_dim, encoder, event_shape)
            story = VAE(prior, decoder, encoder)
    except (RuntimeError, TypeError, MemoryError) as error:  # how a size beyond memory, or 64 bits, is told
        raise ValueError(
            f"A story of these sizes cannot be built: {str(error).splitlines()[0].rstrip('.')}."
        ) from error
    story.configuration = configuration
    return story


# To JSON and back


def to_json(configuration: Any) -> dict[str, Any]:
    """A configuration as words and numbers; a choice carries its word as ``name``.

    >>> to_json(StoryConfiguration(event_shape=(5,)))["prior"]
    {'name': 'standard-normal'}
    """
    table: dict[str, Any] = {}
    for item in fields(configuration):
        value = getattr(configuration, item.name)
        if item.name in CHOICES:
            word = next(word for word, kind in CHOICES[item.name].items() if kind is type(value))
            value = {"name": word} | to_json(value)
        elif is_dataclass(value):
            value = to_json(value)
        table[item.name] = list(value) if isinstance(value, tuple) else value
    return table


def to_arguments(configuration: Any, prefix: str = "") -> list[str]:
    """The options of ``ppl-vae train`` that make a configuration, without those that are as by default.

    >>> to_arguments(StoryConfiguration(event_shape=(5,), latent_dim=3, prior=Vamp(components=50)))
    ['--latent-dim', '3', '--prior', 'vamp', '--prior.components', '50']
    """
    arguments: list[str] = []
    for item in fields(configuration):
        value, flag = getattr(configuration, item.name), f"--{prefix}{hyphened(item.name)}"
        if item.name in CHOICES:
            default, *_ = CHOICES[item.name].values()
            word = to_json(configuration)[item.name]["name"]
            arguments += ([] if type(value) is default else [flag, word]) + to_arguments(value, f"{item.name}.")
        elif isinstance(value, OwnStory):
            arguments += [flag, f"{value.file}:{value.name}"]
        elif is_dataclass(value):
            arguments += to_arguments(value)
        elif "help" in item.metadata and value != item.default:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            arguments += [flag] if value is True else [flag, shown]
    return arguments


def hyphened(name: str) -> str:
    """A field as the command line writes it."""
    return name.replace("_", "-")


def from_json(table: Any, kind: type = StoryConfiguration) -> Any:
    """The configuration that :func:`to_json` wrote.

    Raises:
        ValueError: for a word that is not in the tables, a missing or unknown field, or a value of another type.

    >>> configuration = StoryConfiguration(event_shape=(5,), likelihood=Normal(scale="network"))
    >>> from_json(to_json(configuration)) == configuration
    True
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"Expected the fields of {kind.__name__}; found {table!r}.")
    known = {item.name: item.type for item in fields(kind)}
    if unknown := set(table) - set(known):
        raise ValueError(f"Unknown fields {sorted(unknown)} of {kind.__name__}; known are {sorted(known)}.")
    values = {name: _value(name, value, known[name]) for name, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"Incomplete fields of {kind.__name__}: {error}.") from None


def choice(slot: str, word: object) -> type:
    """The configuration that a word stands for; ValueError naming the choices if it stands for none."""
    if not isinstance(word, str) or word not in CHOICES[slot]:
        raise ValueError(f"Unknown {slot} {word!r}; choose one of {', '.join(CHOICES[slot])}.")
    return CHOICES[slot][word]


def _value(name: str, value: Any, kind: Any) -> Any:
    if name in CHOICES:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be an object with a name; found {value!r:.80}.")
        return from_json({key: part for key, part in value.items() if key != "name"}, choice(name, value.get("name")))
    if name == "story":
        kind = OwnStory if isinstance(value, Mapping) and "file" in value else StoryConfiguration
    if is_dataclass(kind):
        return from_json(value, cast(type, kind))
    if kind == tuple[int, ...]:
        if not isinstance(value, list) or len(value) > MOST_SIZES or any(type(v) is not int or v < 1 for v in value):
            found = f"{value!r:.80}"
            raise ValueError(f"{name} must be a list of at most {MOST_SIZES} positive whole numbers; found {found}.")
        return tuple(value)
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or len(value) > MOST_SIZES or any(type(v) is not str for v in value):
            raise ValueError(f"{name} must be a list of at most {MOST_SIZES} words; found {value!r:.80}.")
        return tuple(value)
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} must be a number that a computer holds; found {value!r:.20}...") from None
    if type(value) in kinds:
        return value
    raise ValueError(f"{name} must be of type {getattr(kind, '__name__', kind)}; found {value!r}.")
