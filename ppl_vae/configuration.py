"""Typed configurations and the stories they stand for: the only place where names stand for modules.

A configuration is a frozen dataclass of numbers, words and other configurations. It goes to JSON and comes back
checked: unknown words are refused, and no word is ever looked up outside the tables below. Torch is imported when a
story is built, so that the command line answers before that.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

if TYPE_CHECKING:
    from torch import nn

    from ppl_vae.vae import VAE

    MakeNetwork = Callable[[], nn.Module]


def option(default: Any, text: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A field with a default, a help text, and how a word of the command line becomes its value."""
    return field(default=default, metadata={"help": text, "parse": parse or type(default)})


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    >>> whole_numbers("400,400")
    (400, 400)
    """
    return tuple(int(part) for part in text.split(",") if part)


SCALES = ("learned", "per-dimension", "network")


def scale(text: str) -> float | str:
    """A positive number, or one of the words "learned", "per-dimension" and "network"."""
    return text if text in SCALES else float(text)


# Priors


@dataclass(frozen=True)
class StandardNormal:
    """z ~ Normal(0, I)"""

    def build(self, latent_dim: int) -> "nn.Module":
        from ppl_vae import priors

        return priors.StandardNormal(latent_dim)


# Likelihoods


@dataclass(frozen=True)
class Bernoulli:
    """x ~ Bernoulli(f(z)), for pixels that are 0 or 1"""

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        from ppl_vae import likelihoods

        return likelihoods.Bernoulli(network())


@dataclass(frozen=True)
class Normal:
    """x ~ Normal(f(z), scale), for real numbers"""

    scale: float | str = option("learned", f"a number (fixed), or one of {', '.join(SCALES)}", scale)
    initial: float = option(0.5, "where a learned scale starts")
    floor: float = option(1e-3, "smallest value of a scale that trains")

    def __post_init__(self) -> None:
        if isinstance(self.scale, str) and self.scale not in SCALES:
            raise ValueError(f"likelihood.scale is a number or one of {', '.join(SCALES)}; found {self.scale!r}.")
        _positive(self, "floor", "initial", *(() if isinstance(self.scale, str) else ("scale",)))

    def build(self, network: "MakeNetwork", event_shape: tuple[int, ...]) -> "nn.Module":
        import torch

        from ppl_vae import likelihoods

        choices: dict[str | float, Callable[[], Any]] = {
            "learned": lambda: likelihoods.learned(self.initial),
            "per-dimension": lambda: likelihoods.learned(torch.full(event_shape, self.initial)),
            "network": network,
        }
        return likelihoods.Normal(network(), choices.get(self.scale, lambda: self.scale)(), floor=self.floor)


# Posteriors


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

# What each word stands for: the first is the default.
CHOICES: dict[str, dict[str, type]] = {
    "prior": {"standard-normal": StandardNormal},
    "likelihood": {"bernoulli": Bernoulli, "normal": Normal},
    "posterior": {"diagonal-normal": DiagonalNormal},
    "network": {"mlp": Mlp, "convolutional": Convolutional},
}


@dataclass(frozen=True)
class StoryConfiguration:
    """Everything that makes a :class:`~ppl_vae.VAE` but its weights."""

    event_shape: tuple[int, ...]
    latent_dim: int = option(2, "size of z")
    prior: StandardNormal = field(default_factory=StandardNormal)
    likelihood: Bernoulli | Normal = field(default_factory=Bernoulli)
    posterior: DiagonalNormal = field(default_factory=DiagonalNormal)
    network: Mlp | Convolutional = field(default_factory=Mlp)

    def __post_init__(self) -> None:
        _at_least(self, latent_dim=1)


@dataclass(frozen=True)
class DataConfiguration:
    """Which data, and what is done to them before the story sees them."""

    data: str = option("mnist-5k", "a named data set, or a path to .npy, .npz, .csv")
    data_root: str | None = option(
        None, "folder of downloaded data sets (also: the environment variable PPL_VAE_DATA)", str
    )
    download: bool = option(False, "download the data set if it is not there")
    binarization: str = option("auto", "none, static or dynamic; auto is dynamic for a Bernoulli likelihood, else none")

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
    patience: int = option(0, "stop after so many epochs without a better validation ELBO; 0 never stops early")
    num_particles: int = option(1000, "draws per observation where log p(x) is estimated by drawing")
    engine: str = option("auto", f"one of {', '.join(ENGINES)}")
    seed: int = option(0, "rules splits, binarization, initial weights, order and noise")

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ENGINES)
        _at_least(self, epochs=1, batch_size=1, kl_warmup=0, patience=0, num_particles=1, seed=0)
        _positive(self, "learning_rate")


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
class RunConfiguration:
    """All that a run is made from: ``config.json`` holds it."""

    data: DataConfiguration
    story: StoryConfiguration
    training: TrainingConfiguration


def _at_least(configuration: Any, **least: int) -> None:
    for name, value in least.items():
        if (found := getattr(configuration, name)) is not None and found < value:
            raise ValueError(f"{name} must be at least {value}; found {found}.")


def _one_of(name: str, word: str | None, words: tuple[str | None, ...]) -> None:
    if word not in words:
        raise ValueError(f"Unknown {name} {word!r}; choose one of {', '.join(filter(None, words))}.")


def _positive(configuration: Any, *names: str) -> None:
    for name in names:
        if not 0 < (value := getattr(configuration, name)) < math.inf:
            raise ValueError(f"{name} must be positive and finite; found {value}.")


def build(configuration: StoryConfiguration, seed: int = 0) -> "VAE":
    """The story that a configuration describes, its initial weights a function of the seed.

    Raises:
        ValueError: when there is no such story, or no memory for it.

    >>> story = build(StoryConfiguration(event_shape=(1, 28, 28), network=Mlp(hidden_dims=(64,))))
    >>> story.model(num_observations=3).shape
    torch.Size([3, 1, 28, 28])
    """
    import torch

    from ppl_vae import noise
    from ppl_vae.vae import VAE

    latent_dim, event_shape, network = configuration.latent_dim, configuration.event_shape, configuration.network
    try:
        with noise.unit(torch.device("cpu"), seed, noise.Purpose.INITIAL_WEIGHTS):
            story = VAE(
                prior=configuration.prior.build(latent_dim),
                decoder=configuration.likelihood.build(lambda: network.decoder(latent_dim, event_shape), event_shape),
                encoder=configuration.posterior.build(lambda output: network.encoder(event_shape, output), latent_dim),
            )
    except (RuntimeError, TypeError) as error:  # how torch says that a size is beyond its memory, or its integers
        raise ValueError(f"A story of these sizes cannot be built: {str(error).splitlines()[0]}.") from error
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
    if name in CHOICES and isinstance(value, Mapping):
        return from_json({key: part for key, part in value.items() if key != "name"}, choice(name, value.get("name")))
    if is_dataclass(kind):
        return from_json(value, cast(type, kind))
    if kind == tuple[int, ...]:
        if not isinstance(value, list) or len(value) > MOST_SIZES or any(type(v) is not int or v < 1 for v in value):
            found = f"{value!r:.80}"
            raise ValueError(f"{name} must be a list of at most {MOST_SIZES} positive whole numbers; found {found}.")
        return tuple(value)
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) in kinds:
        return value
    raise ValueError(f"{name} must be of type {getattr(kind, '__name__', kind)}; found {value!r}.")
