"""A training that was interrupted goes on as if nothing had happened, or says why it does not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import safetensors
import torch
from example_stories import TwoLatents, images, rows, small_vae
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import checkpoint, fit, load
from ppl_vae.training import checkpoints
from ppl_vae.training.checkpoints import files_in

SETTINGS = {
    "svi": {"engine": "svi"},
    "captured": {"engine": "captured"},
    "SGD with momentum": {"optimizer": partial(torch.optim.SGD, lr=1e-3, momentum=0.9)},
    "RMSprop on a schedule": {
        "optimizer": torch.optim.RMSprop,
        "schedule": lambda optimizer: CosineAnnealingLR(optimizer, 4),
    },
    "warm-up, clipping, beta": {"kl_warmup": 3, "clip": 1.0, "beta": {"z": 0.5}},
    "validation and coins": {"validation": images(20), "patience": 3, "transform": torch.bernoulli},
}


def make():
    torch.manual_seed(0)
    return small_vae()


def trained(story, **settings):
    return fit(story, images(200), epochs=4, batch_size=32, progress=False, **settings)


def same(story, other):
    pairs = zip(story.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == theirs and torch.equal(tensor, value) for (name, tensor), (theirs, value) in pairs)


class StoppedHereError(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts a training right after so many checkpoints."""

    def after(number):
        write, written = checkpoints.Checkpoints.write, []

        def counted(self, tally):
            write(self, tally)
            written.append(tally.step)
            if len(written) == number:
                monkeypatch.setattr(checkpoints.Checkpoints, "write", write)
                raise StoppedHereError

        monkeypatch.setattr(checkpoints.Checkpoints, "write", counted)

    return after


def interrupted(folder, interrupt, number=11, **settings):
    interrupt(number)
    with pytest.raises(StoppedHereError):
        trained(make(), checkpoints=folder, checkpoint_every=0.0, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_f2_a_training_resumed_in_mid_epoch_ends_with_the_same_bits(settings, tmp_path, interrupt):
    whole, mine = make(), make().requires_grad_(True)
    history = trained(whole, **settings)
    interrupted(tmp_path, interrupt, **settings)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(1.0)
    resumed = trained(mine, resume=tmp_path, **settings)
    assert same(mine, whole)
    assert [row["train_elbo"] for row in resumed] == [row["train_elbo"] for row in history]
    assert resumed.best_epoch == history.best_epoch


@pytest.mark.slow
def test_f2_a_compiled_training_resumed_in_mid_epoch_ends_with_the_same_bits(tmp_path, interrupt):
    settings = {"engine": "captured", "compile": True}
    whole, mine = make(), make()
    assert trained(whole, **settings).engine == "captured, compiled"
    interrupted(tmp_path, interrupt, number=5, **settings)
    assert trained(mine, resume=tmp_path, **settings).engine == "captured, compiled"
    assert same(mine, whole)


def test_batch_statistics_are_kept(tmp_path, interrupt):
    def story():
        torch.manual_seed(0)
        made = TwoLatents()
        made.guess = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 6))
        return made

    whole, mine, settings = story(), story(), {"epochs": 3, "batch_size": 16, "progress": False}
    fit(whole, rows(), **settings)
    interrupt(5)
    with pytest.raises(StoppedHereError):
        fit(story(), rows(), checkpoints=tmp_path, checkpoint_every=0.0, **settings)
    fit(mine, rows(), resume=tmp_path, **settings)
    assert same(mine, whole)


def test_more_epochs_go_on_from_the_last(tmp_path):
    whole, mine = make(), make()
    fit(whole, images(), epochs=5, batch_size=16, progress=False)
    fit(mine, images(), epochs=2, batch_size=16, progress=False, checkpoints=tmp_path)
    fit(mine, images(), epochs=5, batch_size=16, progress=False, resume=tmp_path, checkpoints=tmp_path)
    assert same(mine, whole)


def test_a_training_that_is_over_stays_as_it_is(tmp_path):
    story, mine = make(), make()
    history = trained(story, checkpoints=tmp_path, validation=images(20))
    again = trained(mine, resume=tmp_path, validation=images(20))
    assert same(mine, story)
    assert again.rows == history.rows


def test_only_the_last_two_are_kept(tmp_path, interrupt):
    interrupted(tmp_path, interrupt, engine="svi")
    assert sorted(os.listdir(tmp_path)) == ["step-0000000010.safetensors", "step-0000000011.safetensors"]


def test_the_story_can_be_loaded_from_a_checkpoint(tmp_path):
    story = make()
    trained(story, checkpoints=tmp_path)
    assert same(load(files_in(tmp_path)[0], story=make()), story)


# What does not go on


def refusal(**settings):
    with pytest.raises(ValueError) as error:
        trained(make(), **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"seed": 1}, "seed 0 there and 1 here"),
        ({"clip": 2.0}, "clip None there and 2.0 here"),
        ({"kl_warmup": 2}, "kl_warmup 0 there and 2 here"),
        ({"optimizer": torch.optim.SGD}, "optimizer 'Adam' there and 'SGD' here"),
        ({"transform": torch.bernoulli}, "transform"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_settings_are_refused_by_name(settings, word, tmp_path):
    trained(make(), checkpoints=tmp_path)
    assert word in refusal(resume=tmp_path, **settings)


def test_other_data_are_refused(tmp_path):
    trained(make(), checkpoints=tmp_path)
    with pytest.raises(ValueError, match="data"):
        fit(make(), 1 - images(200), epochs=4, batch_size=32, progress=False, resume=tmp_path)


def test_a_story_of_other_shapes_is_refused(tmp_path):
    fit(TwoLatents(), rows(), epochs=1, batch_size=16, progress=False, checkpoints=tmp_path)
    wider = TwoLatents()
    wider.guess = torch.nn.Linear(5, 8)
    with pytest.raises(ValueError, match="guess"):
        fit(wider, rows(), epochs=2, batch_size=16, progress=False, resume=tmp_path)


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trained(make(), resume=tmp_path)


def test_a_saved_story_is_no_training(tmp_path):
    checkpoint.save(make(), tmp_path / "story.safetensors")
    assert "holds a story and no training" in refusal(resume=tmp_path / "story.safetensors")


def test_f4_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_offered(tmp_path, interrupt):
    interrupted(tmp_path, interrupt, engine="svi")
    last, before = files_in(tmp_path)
    content = bytearray(last.read_bytes())
    content[-5] ^= 4
    last.write_bytes(content)
    said = refusal(resume=tmp_path, engine="svi")
    assert "its checksum is not that of its content" in said
    assert str(before) in said
    whole, mine = make(), make()
    trained(whole, engine="svi")
    trained(mine, resume=before, engine="svi")
    assert same(mine, whole)


def test_other_threads_and_versions_are_said(tmp_path):
    trained(make(), checkpoints=tmp_path)
    (file,) = files_in(tmp_path)
    about, tensors = checkpoint.read(file)
    about["training"]["environment"] |= {"threads": "63", "torch": "1.0"}
    checkpoint.write(
        file, tensors, {name: about[name] for name in about if name not in ("sha256", "format", "versions")}
    )
    with pytest.warns(UserWarning, match=r"not bit for bit: .*torch 1\.0 there.*threads 63 there"):
        trained(make(), resume=tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: kept.pop("tally"),
        lambda kept: kept["tally"].update(epoch="x"),
        lambda kept: kept["tally"].update(observations=10**400),
        lambda kept: kept.update(history=3),
        lambda kept: kept["history"][0].pop("epoch"),
        lambda kept: kept["optimizer"].update(groups=[]),
        lambda kept: kept["optimizer"].update(numbers={"900": {"step": 1}}),
        lambda kept: kept.update(best=[]),
        lambda kept: kept.update(engine={}),
        lambda kept: kept["best"].update(epoch=float("inf")),
    ],
    ids=[
        "no tally",
        "a word",
        "a huge number",
        "no rows",
        "a row of no epoch",
        "no groups",
        "an unknown parameter",
        "a list",
        "no engine",
        "an infinite epoch",
    ],
)
def test_f5_a_checkpoint_that_somebody_wrote_is_refused(spoil, tmp_path):
    trained(make(), checkpoints=tmp_path)
    (file,) = files_in(tmp_path)
    about, tensors = checkpoint.read(file)
    spoil(about["training"])
    checkpoint.write(file, tensors, {"ties": about["ties"], "training": about["training"]})
    assert "malformed" in refusal(resume=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda remembered: remembered | {"exp_avg": torch.zeros(())},
        lambda remembered: remembered | {"exp_avg": torch.zeros(1, 1)},
        lambda remembered: remembered | {"exp_avg_sq": torch.zeros(3)},
        lambda remembered: remembered | {"step": torch.zeros(2)},
        lambda remembered: remembered | {"max_exp_avg_sq": remembered["exp_avg"].clone()},
        lambda remembered: {name: tensor for name, tensor in remembered.items() if name != "exp_avg_sq"},
    ],
    ids=["a number", "one number", "another shape", "two steps", "something more", "something less"],
)
def test_f5_what_an_optimizer_remembers_has_its_shapes(change, tmp_path):
    """A fused optimizer writes to it without a look at its size: to memory that is not its own."""
    trained(make(), checkpoints=tmp_path)
    (file,) = files_in(tmp_path)
    about, tensors = checkpoint.read(file)
    remembered = {
        name.removeprefix("optimizer/0/"): tensors.pop(name) for name in list(tensors) if "optimizer/0/" in name
    }
    tensors |= {f"optimizer/0/{name}": tensor for name, tensor in change(remembered).items()}
    checkpoint.write(file, tensors, {"ties": about["ties"], "training": about["training"]})
    assert "malformed: the optimizer remembers" in refusal(resume=tmp_path)


@pytest.mark.parametrize("engine", ["svi", "captured"])
def test_f5_weights_that_are_no_numbers_are_named(engine, tmp_path):
    trained(make(), checkpoints=tmp_path, engine=engine)
    (file,) = files_in(tmp_path)
    about, tensors = checkpoint.read(file)
    name = next(name for name in tensors if name.startswith("story/encoder"))
    tensors[name] *= torch.nan
    checkpoint.write(file, tensors, {"ties": about["ties"], "training": about["training"]})
    with pytest.raises(FloatingPointError, match=f"The parameter '{name.removeprefix('story/')}' is not finite"):
        fit(make(), images(200), epochs=9, batch_size=32, progress=False, resume=tmp_path, engine=engine)


# Real processes

SCRIPT = """
    import sys, torch, signal
    sys.path.insert(0, {tests!r})
    from example_stories import images, small_vae
    from ppl_vae import fit, save
    torch.set_num_threads(1)
    torch.manual_seed(0)
    story = small_vae()
    resume = sys.argv[2] if len(sys.argv) > 2 else None
    fit(story, images(400), epochs={epochs}, batch_size=16, engine="svi", progress=False, checkpoints=sys.argv[1],
        checkpoint_every=0.0, resume=resume, callbacks=[lambda story, row: print("epoch", flush=True)])
    save(story, sys.argv[1] + "/story.safetensors")
"""


def started(tmp_path, *arguments, epochs=3):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), epochs=epochs)))
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_f12_a_signal_finishes_the_step_and_saves(number, status, tmp_path):
    process = started(tmp_path, tmp_path / "run", epochs=10_000)
    assert process.stdout is not None
    assert process.stdout.readline() == "epoch\n"
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode in (status, 1) if number == signal.SIGINT else process.returncode == status, complaint
    about, _ = checkpoint.read(files_in(tmp_path / "run")[0])
    assert about["training"]["tally"]["epoch"] >= 1


@pytest.mark.slow
def test_f1_a_killed_training_goes_on_bit_for_bit(tmp_path):
    whole = started(tmp_path, tmp_path / "whole")
    assert whole.communicate(timeout=120) is not None and whole.returncode == 0
    process = started(tmp_path, tmp_path / "run")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    assert files_in(tmp_path / "run")
    again = started(tmp_path, tmp_path / "run", tmp_path / "run")
    _, complaint = again.communicate(timeout=120)
    assert again.returncode == 0, complaint
    first, second = (tmp_path / name / "story.safetensors" for name in ("whole", "run"))
    assert first.read_bytes() == second.read_bytes()


def test_the_state_of_a_training_is_words_and_numbers(tmp_path):
    trained(make(), checkpoints=tmp_path)
    with safetensors.safe_open(files_in(tmp_path)[0], framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["training"]["asked"]["seed"] == 0
    assert about["training"]["environment"]["torch"] == torch.__version__
