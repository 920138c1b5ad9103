"""A story comes back from its file bit for bit; a failed write leaves the old file; nothing in a file ever runs."""

import copy
import json
import os
import pickle
import re
import resource
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from example_stories import STORIES, TwoLatents, rows, small_vae
from torch import nn

from ppl_vae import check, checkpoint, configuration, fit, load, save
from ppl_vae.configuration import Bernoulli, Convolutional, Mlp, Normal, StoryConfiguration

CONFIGURED = {
    "mlp": StoryConfiguration(event_shape=(1, 6, 5), network=Mlp((8,))),
    "convolutional": StoryConfiguration(event_shape=(1, 6, 5), network=Convolutional((2, 3))),
    "fixed scale": StoryConfiguration(event_shape=(5,), likelihood=Normal(scale=0.3), network=Mlp((8,))),
    "learned scale": StoryConfiguration(event_shape=(5,), likelihood=Normal(scale="learned"), network=Mlp((8,))),
    "scale per dimension": StoryConfiguration(
        event_shape=(5,), likelihood=Normal(scale="per-dimension"), network=Mlp((8,))
    ),
    "scale network": StoryConfiguration(event_shape=(5,), likelihood=Normal(scale="network"), network=Mlp((8,))),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "story.safetensors"


def moved(story):
    """The story with every parameter and floating buffer at another place."""
    with torch.no_grad():
        for tensor in story.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return story


def assert_same_bits(story, other):
    state, others = story.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name])


def write(path, about, weights=None):
    """A file with this metadata, as an attacker would write it."""
    said = {"sha256": checkpoint.BLANK, "format": checkpoint.FORMAT}
    text = about if isinstance(about, str) else json.dumps(said | about)
    weights = {"w": torch.zeros(1)} if weights is None else weights
    content = safetensors.torch.save({f"story/{name}": tensor for name, tensor in weights.items()}, {"about": text})
    path.write_bytes(checkpoint.sealed(content) if checkpoint.BEFORE_CHECKSUM in content else content)


def about(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"]), [name.removeprefix("story/") for name in file.keys()]  # noqa: SIM118


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make for make, _ in STORIES.values()], ids=STORIES)
def test_a_story_is_filled_bit_for_bit(make, path):
    story, mine = moved(make()), make()
    save(story, path)
    assert load(path, story=mine) is mine
    assert_same_bits(mine, story)


@pytest.mark.parametrize("wanted", CONFIGURED.values(), ids=CONFIGURED)
def test_a_story_made_from_a_configuration_is_rebuilt_bit_for_bit(wanted, path):
    story = moved(configuration.build(wanted))
    save(story, path)
    rebuilt = load(path)
    assert rebuilt.configuration == wanted
    assert_same_bits(rebuilt, story)


@pytest.mark.parametrize("wanted", CONFIGURED.values(), ids=CONFIGURED)
def test_a_rebuilt_story_has_memory_and_trains(wanted, path):
    save(configuration.build(wanted), path)
    rebuilt = load(path)
    x = torch.bernoulli(torch.rand(20, *wanted.event_shape))
    before = copy.deepcopy(dict(rebuilt.named_parameters()))
    fit(rebuilt, x, epochs=1)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in rebuilt.named_parameters())


def test_double_precision_stays_double(path):
    story = moved(configuration.build(CONFIGURED["mlp"]).double())
    save(story, path)
    assert_same_bits(load(path), story)
    assert_same_bits(load(path, story=configuration.build(CONFIGURED["mlp"]).double()), story)


def test_a_fingerprint_is_of_the_numbers_and_not_of_how_they_lie_in_memory():
    x = torch.arange(6.0).reshape(2, 3)
    strange = torch.ones(1).as_strided((1, 1), (0, 0))
    assert checkpoint.fingerprint([x.t().contiguous().t()]) == checkpoint.fingerprint([x])
    assert checkpoint.fingerprint([strange]) == checkpoint.fingerprint([torch.ones(1, 1)])
    assert checkpoint.fingerprint([x.t()]) != checkpoint.fingerprint([x])


def test_batch_statistics_are_kept(path):
    def make():
        story = TwoLatents()
        story.guess = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6))
        return story

    story = make()
    fit(story, rows() + 3, epochs=2)
    assert story.guess[0].num_batches_tracked == 2
    save(story, path)
    mine = load(path, story=make())
    assert_same_bits(mine, story)
    assert mine.guess[0].running_mean.abs().sum() > 0


def test_the_same_story_makes_the_same_file(path, tmp_path):
    story = small_vae()
    save(story, path)
    save(story, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_saving_leaves_the_story_alone(path):
    story = small_vae()
    before = {name: (id(tensor), tensor.detach().clone()) for name, tensor in story.named_parameters()}
    save(story, path)
    for name, tensor in story.named_parameters():
        assert (id(tensor), tensor.requires_grad) == (before[name][0], True)
        assert torch.equal(tensor, before[name][1])


# Ties -----------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A story whose prior component and guide are one network, as in a VampPrior."""

    def __init__(self):
        super().__init__()
        self.loadings = nn.Linear(2, 5)
        self.guess = nn.Linear(5, 2)
        self.prior = nn.ModuleDict({"guess": self.guess})
        self.pseudo = nn.Parameter(torch.randn(5))

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior["guess"](self.pseudo), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.loadings(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(self.guess(x), 1.0).to_event(1))


def test_tied_tensors_are_written_once(path):
    save(Tied(), path)
    told, names = about(path)
    assert sorted(names) == ["guess.bias", "guess.weight", "loadings.bias", "loadings.weight", "pseudo"]
    assert told["ties"] == {"prior.guess.weight": "guess.weight", "prior.guess.bias": "guess.bias"}


def test_tied_modules_come_back_tied(path):
    story, mine = moved(Tied()), Tied()
    check(story, rows())
    save(story, path)
    load(path, story=mine)
    assert_same_bits(mine, story)
    assert mine.prior["guess"].weight is mine.guess.weight


def test_tensors_of_equal_values_are_not_tied(path):
    story = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    story[1].load_state_dict(story[0].state_dict())
    save(story, path)
    assert about(path)[0]["ties"] == {}


def test_a_tensor_that_is_a_part_of_another_is_written_in_full(path):
    def make(values):
        story = nn.Module()
        story.register_buffer("whole", values)
        story.register_buffer("part", values[:2])
        story.register_buffer("turned", values.reshape(2, 3).T)
        return story

    story = make(torch.arange(6.0))
    save(story, path)
    assert_same_bits(load(path, story=make(torch.zeros(6))), story)


def test_tensors_without_elements_are_kept_apart(path):
    story = nn.Module()
    story.register_buffer("first", torch.zeros(0, 2))
    story.register_buffer("second", torch.zeros(0, 2))
    save(story, path)
    assert about(path)[0]["ties"] == {}
    assert_same_bits(load(path, story=copy.deepcopy(story)), story)


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(step, path, monkeypatch):
    save(small_vae(), path)
    before = path.read_bytes()

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="No space left"):
        save(moved(small_vae()), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(path, monkeypatch):
    save(small_vae(), path)
    before = path.read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(moved(small_vae()), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_may_not_grow_leaves_the_old_one_and_no_other(path):
    path.write_bytes(b"the last good one")
    program = f"""
import resource, sys
import torch
from ppl_vae import save
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    save(torch.nn.Linear(100, 100), {str(path)!r})
except OSError as error:
    sys.exit(0 if "too large" in str(error) else str(error))
sys.exit("written")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert path.read_bytes() == b"the last good one"
    assert list(path.parent.iterdir()) == [path]


def test_a_process_killed_while_it_writes_leaves_the_old_file(path):
    story = small_vae()
    save(story, path)
    program = f"""
import os, signal
import torch
from ppl_vae import save
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
save(torch.nn.Linear(100, 100), {str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert_same_bits(load(path, story=small_vae()), story)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(small_vae(), tmp_path / "nowhere" / "story.safetensors")


# What is refused ------------------------------------------------------------------------------------------------------


def refusal(path, **options):
    """The message, one line, with which load refuses."""
    with pytest.raises(ValueError) as refused:
        load(path, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*story\.safetensors"):
        load(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load(tmp_path)


def test_a_file_of_another_story_is_refused_with_both_shapes(path):
    save(TwoLatents(), path)
    mine = TwoLatents()
    mine.loadings = nn.Linear(3, 5)
    before = copy.deepcopy(mine.state_dict())
    message = refusal(path, story=mine)
    assert (
        "belongs to another story: 'loadings.weight' has the shape (5, 2) in the file and (5, 3) in the story"
        in message
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())


def test_a_tensor_that_only_the_story_has_is_named(path):
    save(TwoLatents(), path)
    mine = TwoLatents()
    mine.extra = nn.Linear(1, 1)
    assert "'extra.bias' has the shape none in the file and (1,) in the story" in refusal(path, story=mine)


def test_a_tensor_that_only_the_file_has_is_named(path):
    story = TwoLatents()
    story.extra = nn.Linear(1, 1)
    save(story, path)
    assert "'extra.bias' has the shape (1,) in the file and none in the story" in refusal(path, story=TwoLatents())


def test_a_story_of_your_own_is_not_rebuilt_but_filled(path):
    save(TwoLatents(), path)
    assert "load(path, story=mine)" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(share, path):
    save(small_vae(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "is not a whole checkpoint" in refusal(path, story=small_vae())


@pytest.mark.parametrize("content", [b"hello, this is text", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 64, b"{}" * 40])
def test_what_is_no_safetensors_file_is_refused(content, path):
    path.write_bytes(content)
    assert "is not a whole checkpoint" in refusal(path)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    assert "is not a whole checkpoint" in refusal(path)


def test_a_file_of_another_program_is_refused(path):
    safetensors.torch.save_file({"w": torch.zeros(1)}, path)
    assert "has the format None; this version reads 'ppl_vae/checkpoint/1'" in refusal(path)


def test_a_file_of_another_format_is_refused(path):
    write(path, {"format": "ppl_vae/checkpoint/99"})
    assert "has the format 'ppl_vae/checkpoint/99'" in refusal(path)


@pytest.mark.parametrize("text", ["", "not json", "[" * 100_000, "3", "null", '["format"]'], ids=lambda text: text[:10])
def test_metadata_that_is_no_table_is_refused(text, path):
    write(path, text)
    assert refusal(path)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_pickle_in_its_place_is_refused_and_does_not_run(dump, path, tmp_path):
    mark = tmp_path / "it ran"
    with path.open("wb") as file:
        dump(Trap(mark), file)
    refusal(path)
    refusal(path, story=small_vae())
    assert not mark.exists()
    with path.open("rb") as file:  # the trap works where something unpickles it
        pickle.load(file) if dump is pickle.dump else torch.load(file, weights_only=False)  # noqa: S301
    assert mark.exists()


def hostile(**changes):
    return {"configuration": configuration.to_json(StoryConfiguration(event_shape=(5,))) | changes}


HUGE = {
    "latent_dim": hostile(latent_dim=2**40),
    "latent_dim beyond integers": hostile(latent_dim=10**40),
    "hidden_dims": hostile(network={"name": "mlp", "hidden_dims": [30_000, 30_000]}),
    "hidden_dims beyond integers": hostile(network={"name": "mlp", "hidden_dims": [2**40, 2**40]}),
    "many hidden_dims": hostile(network={"name": "mlp", "hidden_dims": [1] * 100_000}),
    "channels": hostile(event_shape=[1, 8, 8], network={"name": "convolutional", "channels": [2**14, 2**14]}),
    "event_shape": hostile(event_shape=[2**30]),
    "event_shape and scale": hostile(event_shape=[2**30], likelihood={"name": "normal", "scale": "per-dimension"}),
}


@pytest.mark.parametrize("told", HUGE.values(), ids=HUGE)
def test_huge_sizes_in_a_file_cost_no_memory(told, path):
    write(path, told)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(path)
    assert "belongs to another story" in message or "cannot be built" in message or "at most" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kilobytes


@pytest.mark.parametrize(
    "told",
    [
        hostile(prior={"name": "os.system"}),
        hostile(prior={"name": "standard-normal", "class_path": "os.system"}),
        hostile(init_args={"command": "true"}),
        hostile(latent_dim="2"),
        {"configuration": "os.system"},
        {"configuration": None},
    ],
)
def test_a_configuration_of_unknown_words_is_refused(told, path):
    write(path, told)
    assert refusal(path)


def test_a_tie_to_an_absent_tensor_is_refused(path):
    write(path, {"ties": {"v": "nowhere"}})
    assert "ties 'v' to 'nowhere', which it does not hold" in refusal(path)


@pytest.mark.parametrize("ties", [["v", "w"], {"v": 3}, {"v": ["w"]}, "w", 3], ids=repr)
def test_ties_that_are_no_pairs_of_names_are_refused(ties, path):
    write(path, {"ties": ties})
    assert "pairs of names" in refusal(path)


def test_whole_numbers_in_the_place_of_weights_are_refused(path):
    wanted = StoryConfiguration(event_shape=(5,), likelihood=Bernoulli(), network=Mlp((3,)))
    weights = {name: tensor.long() for name, tensor in configuration.build(wanted).state_dict().items()}
    write(path, {"configuration": configuration.to_json(wanted)}, weights)
    assert re.search("belongs to another story: .* is torch.int64 in the file and torch.float32", refusal(path))


def test_weights_of_several_precisions_are_refused(path):
    wanted = StoryConfiguration(event_shape=(5,), likelihood=Bernoulli(), network=Mlp((3,)))
    weights = configuration.build(wanted).state_dict()
    write(
        path,
        {"configuration": configuration.to_json(wanted)},
        weights | {"decoder.logits.0.bias": torch.zeros(3).double()},
    )
    assert "belongs to no story: its weights are torch.float32 and torch.float64" in refusal(path)
