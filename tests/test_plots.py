"""Pictures: each holds what it says where it says, and drawing leaves pyplot, generators and the story alone."""

import io

import matplotlib.pyplot
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from example_stories import images, small_vae
from matplotlib.colors import to_rgba
from torch import nn

from ppl_vae import VAE, History, likelihoods, networks, plots, posteriors, priors, traces


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    assert matplotlib.pyplot.get_fignums() == []


class Known(nn.Module):
    """Means that are known: a latent's prior quantiles as two pixels, an image's first two pixels as the latent."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, tensor):
        return self.function(tensor)


def quantile_story():
    """Decodes z to an image of two pixels, its quantiles under N(0, 1); encodes an image as its first two pixels."""
    return VAE(
        prior=priors.StandardNormal(2),
        decoder=likelihoods.Normal(Known(lambda z: torch.special.ndtr(z).reshape(-1, 1, 1, 2)), scale=0.1),
        encoder=posteriors.DiagonalNormal(Known(lambda x: torch.cat([x[:, 0, 0, :2], x[:, 0, 0, :2]], dim=-1))),
    )


def history(validation=None, train=(-9.0, -8.0, -7.0)):
    rows = [{"epoch": epoch, "train_elbo": elbo} for epoch, elbo in enumerate(train, start=1)]
    if validation is not None:
        rows = [row | {"validation_elbo": elbo} for row, elbo in zip(rows, validation, strict=True)]
    return History("svi", rows)


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def words(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# Convergence ----------------------------------------------------------------------------------------------------------


def settling():
    table = {
        "estimate": (("num_particles", "observation"), [[-9.0, -20.0], [-8.5, -18.0], [-8.4, -17.0]]),
        "standard_error": (("num_particles", "observation"), [[0.3, 0.9], [0.2, 0.9], [0.1, 0.9]]),
        "mean": ("num_particles", [-14.5, -13.25, -12.7]),
        "monte_carlo_error": ("num_particles", [0.5, 0.4, 0.3]),
    }
    return xr.Dataset(table, {"num_particles": [64, 128, 200], "observation": [0, 1]})


def test_convergence_draws_the_mean_and_each_observation_from_where_it_ends():
    left, right = plots.convergence(settling()).axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[64, -14.5], [128, -13.25], [200, -12.7]])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [-0.6, -0.1, 0.0])
    np.testing.assert_allclose(right.lines[1].get_ydata(), [-3.0, -1.0, 0.0])
    assert words(right) == ["0", "1"]


def test_the_band_of_convergence_is_two_errors_wide():
    left, _ = plots.convergence(settling()).axes
    corners = left.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([corners[:, 1].min(), corners[:, 1].max()], [-15.5, -12.1])


# Tiles ----------------------------------------------------------------------------------------------------------------


def test_image_k_lies_in_row_and_column_of_k():
    numbered = (torch.arange(1, 11) / 10).reshape(10, 1, 1, 1).expand(10, 1, 2, 3)
    tiles = plots.tile(numbered, columns=4)
    assert tiles.shape == (3 * 3, 4 * 4)
    for k in range(10):
        top, left = 3 * (k // 4), 4 * (k % 4)
        assert np.allclose(tiles[top : top + 2, left : left + 3], (k + 1) / 10)
        assert (tiles[top + 2, left : left + 4] == 0).all()
        assert (tiles[top : top + 3, left + 3] == 0).all()
    assert (tiles[6:, 8:] == 0).all()


def test_an_image_is_neither_turned_nor_mirrored():
    image = torch.arange(6).reshape(1, 1, 2, 3) / 5
    assert np.allclose(plots.tile(image, columns=1)[:2, :3], image[0, 0])


def test_values_outside_zero_and_one_are_shown_at_the_ends():
    assert plots.tile(torch.tensor([-3.0, 0.25, 7.0]).reshape(3, 1, 1, 1), columns=3)[0, ::2].tolist() == [0, 0.25, 1]


def test_colours_come_last():
    image = torch.rand(2, 3, 4, 5)
    tiles = plots.tile(image, columns=2)
    assert tiles.shape == (5, 12, 3)
    assert np.allclose(tiles[:4, 6:11], image[1].permute(1, 2, 0))


def test_more_columns_than_images_leave_places_empty():
    assert plots.tile(torch.ones(1, 1, 2, 2), columns=3).sum() == 4


@pytest.mark.parametrize(
    ("shape", "shown"),
    [((5, 1, 8, 8), True), ((5, 3, 8, 8), True), ((5, 2, 8, 8), False), ((5, 4, 8, 8), False), ((5, 64), False)],
)
def test_images_have_one_colour_or_three(shape, shown):
    assert plots.are_images(torch.zeros(shape)) is shown


# Panels ---------------------------------------------------------------------------------------------------------------


def test_each_panel_holds_its_images_under_its_title():
    panels = {"first": torch.rand(6, 1, 3, 3), "second": torch.rand(5, 1, 3, 3)}
    figure = plots.image_panels(panels, columns=3)
    for axes, (title, shown) in zip(figure.axes, panels.items(), strict=True):
        assert axes.get_title() == title
        assert np.array_equal(axes.images[0].get_array(), plots.tile(shown, 3))


def test_ink_is_dark_at_one_and_does_not_depend_on_the_images():
    (axes,) = plots.image_panels({"faint": torch.full((1, 1, 2, 2), 0.1)}).axes
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.images[0].get_cmap()(1.0) == (0, 0, 0, 1)


def test_samples_are_means_and_draws_of_the_same_latents():
    story = small_vae()
    means, drawn = (axes.images[0].get_array() for axes in plots.samples(story, num_observations=9, seed=3).axes)
    told = traces.draws(traces.prior_predictive(story, 9, seed=3))
    with torch.no_grad():
        expected = story.decoder(told["z"]).mean
    assert np.allclose(means, plots.tile(expected, 8))
    assert np.array_equal(drawn, plots.tile(told["x"], 8))


def test_reconstructions_stand_beside_their_images():
    story, x = quantile_story(), torch.randn(8, 1, 1, 2)
    originals, means, drawn = (axes.images[0].get_array() for axes in plots.reconstructions(story, x).axes)
    assert np.array_equal(originals, plots.tile(x, 4))
    spread = torch.nn.functional.softplus(x[:, 0, 0]) + 1e-4
    low, high = (torch.special.ndtr(x[:, 0, 0] + side * 5 * spread).reshape(8, 1, 1, 2) for side in (-1, 1))
    assert (plots.tile(low, 4) <= means).all() and (means <= plots.tile(high, 4)).all()
    assert np.abs(drawn - means).max() < 0.1 * 5
    assert not np.array_equal(drawn, means)


# The atlas ------------------------------------------------------------------------------------------------------------


def test_the_grid_is_decoded_at_prior_quantiles_with_the_second_latent_upwards():
    left = plots.latent_atlas(quantile_story(), torch.zeros(1, 1, 1, 2), size=4).axes[0]
    tiles = left.images[0].get_array()
    middles = (np.arange(4) + 0.5) / 4
    for row in range(4):
        for column in range(4):
            pixels = tiles[2 * row, 3 * column : 3 * column + 2]
            assert np.allclose(pixels, [middles[column], middles[3 - row]], atol=1e-6)
    assert left.images[0].get_extent() == [0, 1, 0, 1]
    assert left.images[0].origin == "upper"


def test_an_observation_lies_at_the_prior_quantile_of_its_encoders_mean():
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0], [-0.5, 3.0]])
    right = plots.latent_atlas(quantile_story(), x.reshape(3, 1, 1, 2), size=2).axes[1]
    (cloud,) = right.collections
    assert np.allclose(cloud.get_offsets(), scipy.stats.norm.cdf(x.numpy()), atol=1e-6)
    assert right.get_title() == "encoder's mean of z for 3 observations"


def test_both_panels_have_the_same_axes_with_ticks_that_say_z():
    figure = plots.latent_atlas(quantile_story(), torch.zeros(1, 1, 1, 2), size=2)
    for axes in figure.axes:
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (0, 1))
        for axis in (axes.xaxis, axes.yaxis):
            said = [float(label.get_text().replace("\N{MINUS SIGN}", "-")) for label in axis.get_ticklabels()]
            assert np.allclose(axis.get_ticklocs(), scipy.stats.norm.cdf(said))
            assert 0.0 in said


def test_each_label_has_its_points_its_colour_and_its_place_in_the_legend():
    x, labels = torch.randn(6, 2), torch.tensor([7, 1, 7, 1, 1, 0])
    right = plots.latent_atlas(quantile_story(), x.reshape(6, 1, 1, 2), labels, size=2).axes[1]
    assert words(right) == ["0", "1", "7"]
    for cloud, label in zip(right.collections, (0, 1, 7), strict=True):
        assert np.allclose(cloud.get_offsets(), scipy.stats.norm.cdf(x[labels == label].numpy()), atol=1e-6)
        assert np.allclose(cloud.get_facecolor()[0][:3], to_rgba(f"C{label}")[:3])
    assert [text.get_text() for text in right.texts] == ["0", "1", "7"]


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_the_atlas_of_another_number_of_latents_is_refused(latent_dim):
    story = VAE(
        prior=priors.StandardNormal(latent_dim),
        decoder=likelihoods.Bernoulli(nn.Sequential(nn.Linear(latent_dim, 4), nn.Unflatten(-1, (1, 2, 2)))),
        encoder=posteriors.DiagonalNormal(nn.Sequential(nn.Flatten(), nn.Linear(4, 2 * latent_dim))),
    )
    with pytest.raises(ValueError, match=f"two latent dimensions; this story has {latent_dim}"):
        plots.latent_atlas(story, torch.zeros(3, 1, 2, 2))


# The learning curve ---------------------------------------------------------------------------------------------------


def test_the_learning_curve_holds_the_history_and_the_epoch_that_was_kept():
    (axes,) = plots.learning_curve(history(validation=(-9.5, -8.0, -8.5))).axes
    training, validation, kept = axes.lines
    assert (list(training.get_xdata()), list(training.get_ydata())) == ([1, 2, 3], [-9, -8, -7])
    assert list(validation.get_ydata()) == [-9.5, -8.0, -8.5]
    assert set(kept.get_xdata()) == {2}
    assert words(axes) == ["training", "validation", "weights kept (epoch 2)"]


def test_without_validation_the_learning_curve_is_that_of_training():
    (axes,) = plots.learning_curve(history()).axes
    assert len(axes.lines) == 1
    assert words(axes) == ["training"]
    assert "nats per observation" in axes.get_ylabel()


def test_the_first_epochs_do_not_flatten_the_rest():
    train = (-1e6, *np.linspace(-9, -8, 99))
    (axes,) = plots.learning_curve(history(train=train)).axes
    low, high = axes.get_ylim()
    assert low > -10 and -8 < high < 0


def test_an_epoch_that_took_no_step_leaves_a_gap():
    train = (-1e6, np.nan, *np.linspace(-9, -8, 98))
    figure = plots.learning_curve(history(train=train, validation=(-1e6, -np.inf, *train[2:])))
    low, high = figure.axes[0].get_ylim()
    assert low > -10 and -8 < high < 0
    assert png(figure)


@pytest.mark.parametrize("first", [-5.0, -6.0])
def test_a_flat_history_is_drawn(first):
    assert png(plots.learning_curve(history(train=(first, *[-5.0] * 99))))


# What drawing leaves --------------------------------------------------------------------------------------------------

FIGURES = {
    "learning curve": lambda story: plots.learning_curve(history(validation=(-9.0, -8.0, -9.0))),
    "samples": lambda story: plots.samples(story, num_observations=5),
    "reconstructions": lambda story: plots.reconstructions(story, images(6)),
    "atlas": lambda story: plots.latent_atlas(story, images(6), torch.arange(6), size=3),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_becomes_a_png(draw):
    assert png(draw(small_vae())).startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_the_same_when_it_is_drawn_again(draw):
    story = small_vae()
    first = png(draw(story))
    torch.rand(3)
    assert png(draw(story)) == first


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_drawing_leaves_generator_and_modes_alone(draw):
    story = small_vae()
    story.encoder.eval()
    modes = [module.training for module in story.modules()]
    state = torch.get_rng_state()
    draw(story)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in story.modules()] == modes


def test_a_double_precision_story_is_drawn():
    story = small_vae().double()
    assert png(plots.latent_atlas(story, images(6), size=2))
    assert png(plots.samples(story, 3))


def test_the_atlas_of_another_prior_is_uniform_under_it():
    story = VAE(
        prior=priors.Uniform(2, -3.0, 5.0),
        decoder=likelihoods.Bernoulli(networks.mlp(2, (1, 2, 2))),
        encoder=posteriors.Box(posteriors.DiagonalNormal(networks.mlp((1, 2, 2), 4)), -3.0, 5.0),
    )
    left = plots.latent_atlas(story, torch.rand(5, 1, 2, 2), size=2).axes[0]
    positions, words = left.get_xticks(), [text.get_text() for text in left.get_xticklabels()]
    expected = [(float(word) + 3) / 8 for word in words]
    assert len(words) > 3 and np.allclose(positions, expected, atol=4 / np.sqrt(20_000))
