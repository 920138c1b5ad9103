"""Which component made an observation, where a story sums the components out."""

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import checks, discrete, noise, traces
from ppl_vae.discrete import Assignments
from ppl_vae.traces import Columns, Story


def responsibilities(story: Story, *columns: Tensor, num_particles: int = 100, seed: int = 0) -> Tensor:
    r"""The posterior of the one discrete latent that the model sums out, by Bayes' rule:

    .. math:: p(c \mid x_n) \propto p(x_n, c) \approx \frac1S \sum_s \frac{p(x_n, z_s, c)}{q(z_s \mid x_n)},
        \quad z_s \sim q(z \mid x_n)

    Args:
        story: its model marks a site ``infer={"enumerate": "parallel"}``, which its guide leaves alone.
        columns: tensors whose first dimension is the observation.
        num_particles: S, draws of the guide for each observation.
        seed: rules the draws.

    Returns:
        Probabilities of shape ``(N, C)``, where C is the number of values that c can take.

    Raises:
        ValueError: when the story or the data are not what :func:`ppl_vae.check` expects, or not exactly one site is
            summed out.
    """
    checks.dry_run(story, *columns)
    columns = traces.to_story(story, columns)
    with noise.unit(columns[0].device, seed, noise.Purpose.PREDICTIVE), traces.scoring(story):
        values = _values_of_c(story, columns)
        log_weights = torch.stack([_log_weights(story, columns, values) for _ in range(num_particles)])
    return log_weights.logsumexp(0).softmax(0).T


def _values_of_c(story: Story, columns: Columns) -> list[Assignments]:
    summed_out = discrete.summed_out(*traces.run(story, *columns))
    if len(summed_out) != 1:
        raise ValueError(f"Expected one site that the model sums out; found {sorted(summed_out) or 'none'}.")
    ((name, values),) = discrete.assignments(summed_out).values.items()
    return [Assignments({name: value.unsqueeze(0)}) for value in values]


def _log_weights(story: Story, columns: Columns, values: list[Assignments]) -> Tensor:
    """log p(x, z, c) - log q(z | x) of every c and one draw of z for each observation, shape ``(C, N)``."""
    guide_trace = poutine.trace(story.guide).get_trace(*columns)
    z = traces.draws(guide_trace)
    log_p = torch.stack([discrete.log_densities(story.model, columns, z, c)[1] for c in values])
    return log_p - traces.log_prob(guide_trace, traces.sample_sites(guide_trace))
