"""Work in pieces: what is finished is not computed again, and comes out as it went in."""

import numpy as np
import pytest
import torch
from example_stories import small_vae

from ppl_vae import log_evidence, shares, to_arviz
from ppl_vae.shares import Shares


def squares(piece):
    """A table with columns of different lengths and kinds."""
    return {
        "square": np.array([piece**2, -(piece**2)], dtype=np.float64),
        "word": np.array([f"of {piece}", "ä/\n"], dtype=object),
        "row": np.full((1, 3), piece, dtype=np.int32),
        "flag": np.array([piece % 2 == 0]),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype.kind == expected[name].dtype.kind


@pytest.fixture
def written_at_once(monkeypatch):
    monkeypatch.setattr(shares, "SECONDS_BETWEEN_FILES", 0.0)


def test_an_interrupted_task_goes_on_where_it_stopped(tmp_path, written_at_once):
    computed = []

    def until_five(piece):
        if piece == 5:
            raise KeyboardInterrupt
        computed.append(piece)
        return squares(piece)

    with pytest.raises(KeyboardInterrupt):
        list(Shares(tmp_path, "this").out(range(8), until_five, "squares"))

    def the_rest(piece):
        computed.append(piece)
        return squares(piece)

    again = dict(Shares(tmp_path, "this").out(range(8), the_rest, "squares"))
    assert computed == list(range(8))
    for piece in range(8):
        assert_same(again[piece], squares(piece))


def test_what_was_asked_otherwise_is_computed_anew(tmp_path, written_at_once):
    list(Shares(tmp_path, "this").out(range(3), squares, "squares"))
    other = dict(Shares(tmp_path, "that").out(range(3), lambda piece: {"x": np.zeros(1)}, "zeros"))
    assert all(list(table) == ["x"] for table in other.values())
    assert_same(dict(Shares(tmp_path, "this").out(range(3), pytest.fail, "squares"))[2], squares(2))


def test_the_steps_of_a_task_are_kept_apart(tmp_path, written_at_once):
    for _ in range(2):
        task = Shares(tmp_path, "this")
        first = dict(task.out(range(2), squares, "squares"))
        second = dict(task.out(range(2), lambda piece: squares(piece + 10), "other squares"))
    assert first[1]["square"][0] == 1 and second[1]["square"][0] == 121


def test_a_damaged_file_is_refused_by_name(tmp_path):
    list(Shares(tmp_path, "this").out(range(3), squares, "squares"))
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        list(Shares(tmp_path, "this").out(range(3), squares, "squares"))


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(Shares().out(range(3), squares, "squares"))
    assert not list(tmp_path.iterdir())


class Interrupted(torch.nn.Module):
    """A story that is interrupted when its model runs for the so-many-th time."""

    def __init__(self, story, calls):
        super().__init__()
        self.story = story
        self.left = calls

    def model(self, x=None, num_observations=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.story.model(x) if num_observations is None else self.story.model(num_observations=num_observations)

    def guide(self, x):
        return self.story.guide(x)


@pytest.mark.parametrize("method", ["importance", "mixture"])
def test_an_interrupted_estimation_goes_on_to_the_same_numbers(method, tmp_path, written_at_once):
    story, x = small_vae(), torch.rand(100, 1, 6, 5).round()
    whole = log_evidence(story, x, method=method, num_particles=300, progress=False).dataset
    with pytest.raises(KeyboardInterrupt):
        log_evidence(
            Interrupted(story, 200 if method == "mixture" else 40),
            x,
            method=method,
            num_particles=300,
            folder=tmp_path,
            progress=False,
        )
    first = len(list(tmp_path.iterdir()))
    assert 0 < first < 4
    again = log_evidence(Interrupted(story, -1), x, method=method, num_particles=300, folder=tmp_path, progress=False)
    assert again.dataset.drop_attrs().identical(whole.drop_attrs())
    assert len(list(tmp_path.iterdir())) == 4


def test_evidence_of_other_data_or_weights_is_not_taken_from_the_folder(tmp_path):
    story, x = small_vae(), torch.rand(40, 1, 6, 5).round()
    first = log_evidence(story, x, method="importance", num_particles=100, folder=tmp_path, progress=False)
    other = log_evidence(story, 1 - x, method="importance", num_particles=100, folder=tmp_path, progress=False)
    assert not np.isclose(first["estimate"], other["estimate"]).any()
    with torch.no_grad():
        next(story.decoder.parameters()).add_(0.1)
    moved = log_evidence(story, x, method="importance", num_particles=100, folder=tmp_path, progress=False)
    assert not np.isclose(first["estimate"], moved["estimate"]).any()


def test_a_tree_is_made_of_what_is_finished(tmp_path):
    story, x = small_vae(), torch.rand(70, 1, 6, 5).round()
    settings = {"num_draws": 5, "num_predictive": 2, "progress": False}
    whole = to_arviz(story, x, **settings)
    to_arviz(story, x, **settings, folder=tmp_path)
    again = to_arviz(Interrupted(story, 12), x, **settings, folder=tmp_path)
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats"):
        for name in whole[group]:
            np.testing.assert_array_equal(again[group][name], whole[group][name])
