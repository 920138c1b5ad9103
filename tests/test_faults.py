"""Each fault that a run must survive, made for real: the test of fault n is called test_fn.

The first five, and the twelfth, are also in test_resuming; the eighteenth, a process of several that dies, is in
test_ranks.
"""

import contextlib
import gc
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_stories import Fragile, TwoLatents, images, rows, small_vae
from torch import nn

from ppl_vae import check, fit, load, log_evidence, save
from ppl_vae.cli import main
from ppl_vae.configuration import Mlp, StoryConfiguration, build
from ppl_vae.training.checkpoints import files_in

SMALL = ("--epochs", "2", "--network.hidden-dims", "4", "--num-particles", "5", "--engine", "svi")
FIT = {"epochs": 2, "batch_size": 20, "engine": "svi", "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data in files, and a small run on them that nobody writes into."""
    folder = tmp_path_factory.mktemp("made")
    generator = np.random.default_rng(0)
    x = generator.random((60, 1, 4, 4)).round().astype(np.float32)
    np.savez(folder / "images.npz", x=x, labels=generator.integers(0, 2, 60))
    with contextlib.redirect_stdout(io.StringIO()):
        command = ["train", "--data", str(folder / "images.npz"), "--out", str(folder / "run"), *SMALL]
        assert main(command) == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the small run."""
    return shutil.copytree(made / "run", tmp_path / "run")


def says(capsys, *arguments):
    """What a command prints that succeeds."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments):
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("ppl-vae: ")
    return said


def vae():
    torch.manual_seed(0)
    return small_vae()


def same(story, other):
    pairs = zip(story.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(tensor, theirs) for tensor, theirs in pairs)


# F3: no room ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_above(size):
    """Inside, this process may write no larger file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system in memory, where that is allowed; may be called again to change its options."""
    place = tmp_path / "mounted"
    place.mkdir()
    there = []

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*there, options]), "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            pytest.skip("nothing can be mounted here")
        there[:] = ["remount"]
        return place

    if shutil.which("mount") is None:
        pytest.skip("nothing can be mounted here")
    yield mount
    if there:
        gc.collect()  # cycles of objects may still hold files that were read
        subprocess.run(["umount", str(place)], check=True)


def filled(folder):
    """Leaves no room in the file system of a folder; returns the file that fills it."""
    file = folder / "ballast"
    with file.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(b"\0" * 1024):
            pass
    return file


def test_f3_a_checkpoint_that_does_not_fit_is_an_error_and_the_last_ones_are_as_they_were(tmp_path):
    folder, story, whole = tmp_path / "checkpoints", vae(), vae()
    fit(story, images(), **FIT, checkpoints=folder, checkpoint_every=0.0)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    longer = FIT | {"epochs": 4}
    with no_file_above(4000), pytest.raises(OSError, match="too large"):
        fit(vae(), images(), **longer, resume=folder, checkpoints=folder, checkpoint_every=0.0)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    fit(story, images(), **longer, resume=folder)
    fit(whole, images(), **longer)
    assert same(story, whole)


def test_f3_a_full_disk_is_an_error_and_the_last_checkpoints_are_as_they_were(mounted):
    folder, story, whole = mounted("size=256k") / "checkpoints", vae(), vae()
    fit(story, images(), **FIT, checkpoints=folder, checkpoint_every=0.0)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    filled(folder.parent)
    longer = FIT | {"epochs": 4}
    with pytest.raises(OSError, match="No space left on device"):
        fit(vae(), images(), **longer, resume=folder, checkpoints=folder, checkpoint_every=0.0)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    fit(story, images(), **longer, resume=folder)
    fit(whole, images(), **longer)
    assert same(story, whole)


@pytest.mark.parametrize("kilobytes", [160, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 12, 40))])
def test_f3_a_run_on_a_full_disk_is_one_line_that_names_a_file_and_goes_on_when_there_is_room(
    kilobytes, mounted, made, capsys
):
    place = mounted(f"size={kilobytes}k")
    train = ("train", "--data", made / "images.npz", "--out", place / "run", *SMALL)
    said = refusal(capsys, *train)
    assert "No space left on device" in said
    assert f"'{place / 'run'}" in said
    mounted("size=8m")
    says(capsys, *(("train", "--resume", place / "run") if (place / "run" / "config.json").exists() else train))
    assert same(load(place / "run" / "story.safetensors"), load(made / "run" / "story.safetensors"))
    assert not list(place.rglob(".*"))


COMMANDS = (
    ["evidence", "RUN"],
    ["evidence", "RUN", "--out", "RUN/new.nc"],
    ["diagnose", "RUN", "--sections", "collapse"],
    ["report", "RUN"],
    ["sample", "RUN", "--num-observations", "500"],
    ["train", "--resume", "RUN", "--epochs", "3"],
)


@pytest.mark.slow
def test_f3_results_that_do_not_fit_are_one_line_each_and_the_old_ones_stay(run):
    """In another process, because libraries in C have died of this."""
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    commands = [[word.replace("RUN", str(run)) for word in command] for command in COMMANDS]
    program = f"""
import resource, sys
from ppl_vae import runs
from ppl_vae.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for command in {commands}:
    assert main(command) == 1, command
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done
    said = done.stderr.splitlines()
    assert len(said) == len(commands), said
    assert [line for line in said if "too large" not in line or f"'{run}" not in line] == []
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


# F4: damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    fit(vae(), images(), **FIT, validation=images(20), checkpoints=folder)
    return files_in(folder)[0]


def assert_refused(file, story, what):
    before = {name: tensor.clone() for name, tensor in story.state_dict().items()}
    try:
        load(file, story=story)
    except ValueError as error:
        assert str(file) in str(error), what
        assert "\n" not in str(error), what
    else:
        pytest.fail(f"{what} was not noticed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in story.state_dict().items()), what


def assert_flips_are_refused(content, file, places):
    story = vae()
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert_refused(file, story, f"bit {place % 8} of byte {place // 8}")


def test_f4_a_flipped_bit_anywhere_in_a_training_is_refused(checkpoint_file, tmp_path):
    content, random_bits = checkpoint_file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [random_bits.randrange(8 * header) for _ in range(200)]
    places += [random_bits.randrange(8 * header, 8 * len(content)) for _ in range(100)]
    assert_flips_are_refused(content, tmp_path / "flipped.safetensors", [*range(64), *places])


@pytest.mark.slow
def test_f4_every_eleventh_bit_of_a_header_is_refused_when_flipped(checkpoint_file, tmp_path):
    content = checkpoint_file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert_flips_are_refused(content, tmp_path / "flipped.safetensors", range(0, 8 * header, 11))


def test_f4_a_training_cut_short_or_made_longer_is_refused(checkpoint_file, tmp_path):
    content, file, story = checkpoint_file.read_bytes(), tmp_path / "cut.safetensors", vae()
    lengths = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(content) - 1, *(lengths.randrange(len(content)) for _ in range(150))]:
        file.write_bytes(content[:length])
        assert_refused(file, story, f"{length} of {len(content)} bytes")
    for more in (b"\0", b"\0" * 4096):
        file.write_bytes(content + more)
        assert_refused(file, story, f"{len(more)} bytes more")


def test_f4_a_page_of_zeros_in_a_training_is_refused(checkpoint_file, tmp_path):
    content, file, story = checkpoint_file.read_bytes(), tmp_path / "zeros.safetensors", vae()
    for start in range(0, len(content), 4096):
        damaged = content[:start] + b"\0" * len(content[start : start + 4096]) + content[start + 4096 :]
        file.write_bytes(damaged)
        assert_refused(file, story, f"zeros from byte {start}")


def test_f4_a_run_with_a_damaged_checkpoint_names_it_and_the_one_before_and_goes_on_from_that(run, capsys):
    says(capsys, "train", "--resume", run, "--epochs", 3)
    story = load(run / "story.safetensors")
    last, before = files_in(run / "checkpoints")
    content = bytearray(last.read_bytes())
    content[-9] ^= 16
    last.write_bytes(content)
    said = refusal(capsys, "train", "--resume", run, "--epochs", 3)
    assert f"'{last}' is damaged" in said
    assert f"The one before it is '{before}'" in said
    says(capsys, "train", "--resume", before, "--epochs", 3)
    assert same(load(run / "story.safetensors"), story)


# F6: data that are no data --------------------------------------------------------------------------------------------


def with_number(x, row, column, value):
    x = x.clone()
    x[row, column] = value
    return x


BAD_COLUMNS = {
    "NaN": (TwoLatents, (with_number(rows(), 17, 2, math.nan),), "row 17, column 2"),
    "infinity": (TwoLatents, (with_number(rows(), 39, 4, -math.inf),), "row 39, column 4"),
    "outside the support": (small_vae, (images() * 3,), "Bernoulli is a distribution over 0 and 1"),
    "another shape": (small_vae, (images()[..., :4],), "shape|shapes"),
    "whole numbers": (TwoLatents, (rows().long(),), "int64|float|Long"),
    "another length": (TwoLatents, (rows(), rows(39)), "40.*39|39.*40|columns"),
    "nothing": (TwoLatents, (rows()[:0],), "empty|at least|no observations|none"),
    "one row": (TwoLatents, (rows()[:1],), "at least two observations; found one"),
}


@pytest.mark.parametrize(("make", "columns", "words"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_f6_bad_data_are_refused_before_the_first_step(make, columns, words, tmp_path):
    story = make()
    before = {name: tensor.clone() for name, tensor in story.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=words):
        fit(story, *columns, **FIT, checkpoints=tmp_path / "checkpoints")
    assert all(torch.equal(tensor, before[name]) for name, tensor in story.state_dict().items())
    assert list(tmp_path.iterdir()) == []


BAD_FILES = {
    "hole.csv": ("a,b\n" + "1,0\n" * 9 + "0,\n" + "1,1\n" * 9, ["row 9", "column"]),
    "word.csv": ("a,b\n1,0\n0,what\n", ["row 1", "'what'", "column 'b'"]),
    "ragged.csv": ("a,b\n1,0\n0\n", ["row 1", "1 cells, expected 2"]),
    "nothing.csv": ("", ["holds no observations"]),
    "one row.csv": ("a,b\n1,0\n", ["1 rows", "leaves none to train on"]),
}


@pytest.mark.parametrize(("name", "case"), BAD_FILES.items(), ids=BAD_FILES)
def test_f6_a_bad_file_is_one_line_that_names_the_place_and_no_run(name, case, tmp_path, capsys):
    text, words = case
    (tmp_path / name).write_text(text)
    said = refusal(capsys, "train", "--data", tmp_path / name, "--out", tmp_path / "run", *SMALL)
    assert [word for word in words if word not in said] == []
    assert not (tmp_path / "run").exists()


# F7: losses that are no numbers ---------------------------------------------------------------------------------------


def test_f7_steps_that_are_not_finite_are_not_taken_and_the_last_good_checkpoint_stays(tmp_path):
    """The check sees the rows as they are; the transform spoils them later."""
    story, seen = Fragile(), []

    def spoils(x):
        seen.append(len(x))
        return torch.full_like(x, 99.0) if len(seen) > 12 else x

    with pytest.raises(FloatingPointError, match=r"ten batches|10 batches") as error:
        fit(
            story,
            torch.linspace(-1, 1, 40),
            epochs=50,
            batch_size=10,
            engine="svi",
            transform=spoils,
            progress=False,
            checkpoints=tmp_path,
            checkpoint_every=0.0,
        )
    assert re.search(r"\(epoch \d+, batch \d+, seed 0\).*site 'z' of the guide", str(error.value))
    kept = load(files_in(tmp_path)[0], story=Fragile())
    assert all(bool(tensor.isfinite().all()) for tensor in kept.state_dict().values())
    assert same(kept, story)


def test_f7_a_training_that_explodes_is_one_line(made, tmp_path, capsys):
    data = ("--data", made / "images.npz", "--learning-rate", "1e30", "--out", tmp_path / "run")
    said = refusal(capsys, "train", *data, *SMALL[2:], "--epochs", 20)
    assert "finite" in said and ("seed" in said or "learning rate" in said)


# F8, F9: scales that vanish or explode --------------------------------------------------------------------------------


def test_f8_a_scale_that_runs_to_zero_is_held_by_its_floor_and_reported(tmp_path, capsys):
    table = np.random.default_rng(0).normal(size=(80, 1)) * np.zeros(3) + [1.0, 2.0, 3.0]
    table[:, 0] += np.random.default_rng(1).normal(size=80)
    np.save(tmp_path / "constant.npy", table.astype(np.float32))
    normal = ("--likelihood", "normal", "--likelihood.scale", "per-dimension", "--learning-rate", "0.1")
    train = ("train", "--data", tmp_path / "constant.npy", "--out", tmp_path / "run")
    said = says(capsys, *train, *normal, *SMALL[2:], "--epochs", 40)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert math.isfinite(results["test_log_evidence"])
    assert "of the scales sit on their floor" in said
    assert results["scale_floor"] > 0


@pytest.mark.parametrize("extreme", [-1e4, -300.0, 300.0, 1e4])
@pytest.mark.parametrize("part", ["loc", "scale"])
def test_f9_extreme_outputs_of_the_encoder_leave_density_and_gradient_finite(part, extreme):
    story = vae()
    (*_, bias) = (parameter for name, parameter in story.encoder.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        bias.view(2, 2)[("loc", "scale").index(part)] = extreme
    loss = pyro.infer.Trace_ELBO().differentiable_loss(story.model, story.guide, images())
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in story.parameters())


# F10: weights that are nothing ----------------------------------------------------------------------------------------


class Box(dist.Uniform):
    """A uniform density that is zero outside, where no support says so."""

    support = torch.distributions.constraints.real


class Within(nn.Module):
    """z ~ N(0, 1), x ~ Uniform(z - 2, z + 2); the guide draws z around x, but far away for observations above 1."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Box(z + self.shift - 2, z + self.shift + 2), obs=x)

    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.Normal(torch.where(x > 1, x + 100, x) + self.shift, 0.9))


def test_f10_particles_of_weight_zero_count_as_zero(float64):
    x, normal = torch.tensor([-1.0, 0.0, 0.5]), torch.distributions.Normal(0.0, 1.0)
    found = log_evidence(Within(), x, method="importance", num_particles=4000)
    truth = ((normal.cdf(x + 2) - normal.cdf(x - 2)) / 4).log().numpy()
    assert (abs(found["estimate"].values - truth) < 4.5 * found["standard_error"].values).all()


def test_f10_no_particle_with_any_weight_is_minus_infinity_and_said_so(float64):
    found = log_evidence(Within(), torch.tensor([0.0, 0.5, 3.0]), method="importance", num_particles=50)
    assert np.isneginf(found["estimate"].values).tolist() == [False, False, True]
    assert found["verdict"].values[2] in ("poor", "unresolved")


class NotANumber(Within):
    """A story whose density is no number for the observations above 1."""

    def model(self, x):
        with pyro.plate("observations", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.where(x > 1, torch.log(-z.abs()), z)
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)


def test_f10_weights_that_are_no_number_name_the_observations():
    with pytest.raises(ValueError, match=r"NaN or infinite for the observations \[2, 4\]"):
        log_evidence(NotANumber(), torch.tensor([0.0, 0.5, 2.0, -1.0, 3.0]), method="importance", num_particles=5)


# F11: no memory -------------------------------------------------------------------------------------------------------


IN_LITTLE_MEMORY = """
import resource, torch
from ppl_vae import VAE, likelihoods, log_evidence, networks, posteriors, priors
from ppl_vae.evidence.joint import ROWS_AT_ONCE

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
decoder = likelihoods.Normal(torch.nn.Linear(2, 3000), scale=2.0)
story = VAE(priors.StandardNormal(2), decoder, posteriors.DiagonalNormal(networks.mlp(3000, 4)))
x = story.model(num_observations=8).detach()
plenty = log_evidence(story, x, method="METHOD", num_particles=4000)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27, resource.RLIM_INFINITY))
held = []  # what the allocator kept of the first estimate, until a whole chunk finds no place
while True:
    try:
        torch.empty(ROWS_AT_ONCE, 3000).fill_(0)
    except RuntimeError:
        break
    held.append(torch.zeros(2**22))
little = log_evidence(story, x, method="METHOD", num_particles=4000)
torch.testing.assert_close(little["estimate"].values, plenty["estimate"].values, rtol=1e-12, atol=0)
"""


def in_little_memory(method):
    """An estimate in another process, whose operating system tells torch's allocator no."""
    program = IN_LITTLE_MEMORY.replace("METHOD", method)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.slow
def test_f11_an_estimate_in_little_memory_is_the_same():
    done = in_little_memory("importance")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_f11_what_does_not_fit_at_all_is_a_memory_error():
    done = in_little_memory("laplace")
    assert done.stderr.splitlines()[-1].startswith("MemoryError: "), done.stderr[-2000:]


# F12: signals ---------------------------------------------------------------------------------------------------------


def interrupted(made, folder, number, epochs=100_000):
    """Sends a signal to a run in another process, once it has trained two epochs; returns what it said."""
    command = [sys.executable, "-m", "ppl_vae", "train", "--data", str(made / "images.npz"), "--out", str(folder)]
    process = subprocess.Popen(
        [*command, *SMALL[2:], "--epochs", str(epochs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_f12_a_run_that_is_told_to_stop_saves_says_how_to_go_on_and_then_ends_with_the_same_bits(
    number, status, made, tmp_path, capsys
):
    folder = tmp_path / "my run"
    found, said = interrupted(made, folder, number)
    assert found == status, said
    assert f"go on with: ppl-vae train --resume '{folder}'" in said
    assert "Traceback" not in said
    epochs = json.loads(_about(files_in(folder / "checkpoints")[0]))["training"]["tally"]["epoch"] + 2
    says(capsys, "train", "--resume", folder, "--epochs", epochs)
    whole = ("--data", made / "images.npz", "--out", tmp_path / "whole", *SMALL[2:], "--epochs", epochs)
    says(capsys, "train", *whole)
    assert same(load(folder / "story.safetensors"), load(tmp_path / "whole" / "story.safetensors"))
    metrics = [(run / "metrics.jsonl").read_text().splitlines() for run in (folder, tmp_path / "whole")]
    elbos = [[json.loads(line)["train_elbo"] for line in lines] for lines in metrics]
    assert elbos[0] == elbos[1] and len(elbos[0]) == epochs


def _about(file):
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"]["about"]


class Interrupts(TwoLatents):
    """A story in the middle of whose tenth step the process is told so many times to stop."""

    def __init__(self, number, times):
        super().__init__()
        self.number, self.times, self.steps, self.finished = number, times, 0, 0

    def model(self, x=None, *, num_observations=1):
        self.steps += self.training
        if self.steps == 10:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0.01)
        told = super().model(x, num_observations=num_observations)
        self.finished += self.training
        return told


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("times", [1, 2])
def test_f12_one_signal_waits_for_the_step_and_a_second_does_not(times, number, leaves, tmp_path):
    story = Interrupts(number, times)
    with pytest.raises(leaves) as left:
        fit(story, rows(), epochs=100, batch_size=20, engine="svi", progress=False, checkpoints=tmp_path)
    if number == signal.SIGTERM:
        assert left.value.code == 143
    assert (story.steps, story.finished) == (10, 10 if times == 1 else 9)
    assert len(files_in(tmp_path)) == (1 if times == 1 else 0)


# F13: two at once -----------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from ppl_vae.locks import claimed
with claimed(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_f13_a_second_run_in_a_folder_is_refused_with_process_host_and_time_until_the_first_is_dead(run, capsys):
    before = sorted(run.iterdir())
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "holding\n"
        said = refusal(capsys, "train", "--resume", run, "--epochs", 3)
        assert re.search(rf"in use by process {first.pid} on {socket.gethostname()} since \d{{4}}-", said)
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
        first.kill()
    says(capsys, "train", "--resume", run, "--epochs", 3)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert {file.name for file in run.iterdir()} >= {file.name for file in before}
    assert not (run / "lock").exists()


@pytest.mark.slow
def test_f13_of_two_processes_that_train_in_one_folder_one_is_refused(made, tmp_path):
    command = [sys.executable, "-m", "ppl_vae", "train", "--data", str(made / "images.npz")]
    both = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "run"), *SMALL],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    refused = next(text for text, process in zip(said, both, strict=True) if process.returncode == 1)
    assert "in use by process" in refused or "already holds a run" in refused
    assert same(load(tmp_path / "run" / "story.safetensors"), load(made / "run" / "story.safetensors"))


# F14: older formats ---------------------------------------------------------------------------------------------------

FROZEN = Path(__file__).parent / "frozen"
TRAINING = FROZEN / "training-1.safetensors"


def test_f14_a_story_of_format_1_is_rebuilt_with_the_numbers_it_was_written_with():
    known = json.loads((FROZEN / "known.json").read_text())
    story = load(FROZEN / "story-1.safetensors")
    for name, total in known["story"].items():
        assert float(story.state_dict()[name].double().sum()) == pytest.approx(total, rel=1e-12)
    x = torch.tensor(known["x"])
    found = log_evidence(story, x, method="quadrature")
    assert found["estimate"].values == pytest.approx(known["log_evidence"], abs=1e-3)


def resumed_from_format_1(epochs):
    """What the frozen training has become after so many epochs in all."""
    x = ((torch.arange(40)[:, None] * torch.tensor([1, 3, 5, 7, 11]) % 13) > 5).float()
    story = build(StoryConfiguration(event_shape=(5,), network=Mlp((4,))))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The training goes on, but not bit for bit"
        )  # other versions, another machine
        history = fit(story, x, epochs=epochs, batch_size=16, progress=False, engine="svi", resume=TRAINING)
    return story, history


def test_f14_a_training_of_format_1_is_read_with_the_numbers_it_was_written_with():
    known = json.loads((FROZEN / "known.json").read_text())["training"]
    story, history = resumed_from_format_1(epochs=2)
    assert history["train_elbo"].tolist() == known["train_elbo"][:2]
    for name, total in known["weights"].items():
        assert float(story.state_dict()[name].double().sum()) == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_f14_a_training_of_format_1_goes_on():
    known = json.loads((FROZEN / "known.json").read_text())["training"]
    _, history = resumed_from_format_1(epochs=4)
    assert history["train_elbo"].tolist() == pytest.approx(known["train_elbo"], rel=1e-3)


@pytest.mark.parametrize("name", ["story-0.safetensors", "story-99.safetensors"])
def test_f14_a_story_of_another_format_is_refused_with_the_reason(name):
    number = name[len("story-") : -len(".safetensors")]
    words = (
        rf"{re.escape(name)}' has the format 'ppl_vae/checkpoint/{number}'; this version reads 'ppl_vae/checkpoint/1'"
    )
    with pytest.raises(ValueError, match=words):
        load(FROZEN / name)


# F15: from device to device -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_f15_a_training_from_one_device_goes_on_on_another(there, here, tmp_path):
    story, mine = vae(), vae()
    fit(story, images(), **FIT, device=there, checkpoints=tmp_path)
    assert same(load(files_in(tmp_path)[0], story=vae(), device=here).cpu(), story.cpu())
    with pytest.warns(UserWarning, match="not bit for bit: .*device"):
        fit(mine, images(), **FIT | {"epochs": 3}, device=here, resume=tmp_path)
    assert next(mine.parameters()).device.type == here


# F16: names that lead elsewhere ---------------------------------------------------------------------------------------

MARKUP = "<img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """The tags of a page, and the attributes that run something."""

    def __init__(self):
        super().__init__()
        self.found, self.running = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.running += [name for name, _ in attrs if name.startswith("on")]


def test_f16_markup_in_the_names_of_files_labels_and_runs_is_words_in_the_report(made, tmp_path, capsys):
    x = np.load(made / "images.npz")["x"]
    np.savez(tmp_path / f"{MARKUP}.npz", x=x, labels=[MARKUP, "</script><script>alert(2)</script>"] * 30)
    out = tmp_path / f"run {MARKUP}"
    says(capsys, "train", "--data", tmp_path / f"{MARKUP}.npz", "--out", out, *SMALL)
    says(capsys, "diagnose", out, "--sections", "atlas")
    says(capsys, "report", out)
    html = (out / "report.html").read_text()
    reader = Tags()
    reader.feed(html)
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert reader.running == []
    assert reader.found.count("script") == 2  # the atlas and its data
    assert "<script>alert" not in html and "<img src=x" not in html


OUTPUTS = {
    "train": [
        *("metrics.jsonl", "results.json", "evidence-test.nc", "report.html"),
        *("learning_curve.png", "samples.png", "reconstructions.png", "atlas.png"),
    ],
    "evidence": ["evidence-test.nc"],
    "diagnose": ["diagnosis/collapse.nc"],
    "report": ["report.html"],
    "sample": ["new-0.npz", "new-0.png"],
}


def words_of(command, run):
    """A command line that writes into a run."""
    if command == "train":
        return ["train", "--resume", run, "--epochs", "3"]
    return [command, run, *(["--sections", "collapse"] if command == "diagnose" else [])]


@pytest.mark.parametrize("command", OUTPUTS)
def test_f16_links_in_the_folder_of_a_run_are_not_written_through(command, run, tmp_path, capsys):
    """A run may come from somebody else. What its links lead to stays as it is, whether or not the command works."""
    precious = tmp_path / "precious"
    precious.write_text("written by its owner")
    for name in OUTPUTS[command]:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious)
    main([str(word) for word in words_of(command, run)])
    capsys.readouterr()
    assert precious.read_text() == "written by its owner"


def test_f16_a_link_in_the_place_of_the_lock_is_one_line(run, tmp_path, capsys):
    (tmp_path / "precious").write_text("written by its owner")
    (run / "lock").symlink_to(tmp_path / "precious")
    assert f"{run / 'lock'}" in refusal(capsys, *words_of("train", run))
    assert (tmp_path / "precious").read_text() == "written by its owner"


# F17: places that cannot be written to --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "FILE/run", "FILE"])
def test_f17_a_run_where_no_folder_can_be_made_is_one_line(place, made, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    place = place.replace("FILE", str(tmp_path / "file"))
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    said = refusal(capsys, "train", "--data", made / "images.npz", "--out", place, *SMALL)
    assert place.rsplit("/run")[0] in said
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize("command", ["evidence", "diagnose", "report", "sample", "train"])
def test_f17_a_run_in_a_read_only_place_is_one_line(command, run, mounted, capsys):
    place = mounted("size=8m")
    shutil.copytree(run, place / "run")
    mounted("ro")
    said = refusal(capsys, *words_of(command, place / "run"))
    assert "Read-only file system" in said
    assert str(place / "run") in said


@pytest.mark.parametrize("option", [["evidence", "--out", "PLACE/table.nc"], ["report", "--out", "PLACE/page.html"]])
def test_f17_a_result_for_a_folder_that_is_not_there_is_one_line(option, run, tmp_path, capsys):
    command, *options = [word.replace("PLACE", str(tmp_path / "nowhere")) for word in option]
    assert f"There is no folder '{tmp_path / 'nowhere'}'" in refusal(capsys, command, run, *options)


@pytest.mark.slow
def test_f17_the_parents_of_a_new_run_are_made(made, tmp_path, capsys):
    says(capsys, "train", "--data", made / "images.npz", "--out", tmp_path / "a" / "b" / "run", *SMALL)
    assert (tmp_path / "a" / "b" / "run" / "report.html").exists()


# F19, F20: stories that learn nothing, and stories with a defect ------------------------------------------------------


def test_f19_a_collapsed_posterior_is_a_line_in_the_report(run, capsys):
    story = load(run / "story.safetensors")
    with torch.no_grad():
        for parameter in story.encoder.parameters():
            parameter.zero_()
    save(story, run / "story.safetensors")
    says(capsys, "diagnose", run, "--sections", "collapse")
    says(capsys, "report", run)
    section = (run / "report.html").read_text().split('<section id="collapse">')[1].split("</section>")[0]
    assert re.search(r'class="finding warning">[^<]*(collapse|active|use)', section), section[:800]


class WithoutLatent(TwoLatents):
    def guide(self, x):
        with pyro.plate("observations", len(x)):
            pyro.sample("factors", dist.Normal(self.guess(x)[..., :2], 1.0).to_event(1))


class AnotherPlate(TwoLatents):
    def guide(self, x):
        loc, log_scale = self.guess(x).chunk(2, dim=-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("factors", dist.Normal(loc[..., :2], log_scale[..., :2].exp()).to_event(1))
            pyro.sample("size", dist.LogNormal(loc[..., 2], log_scale[..., 2].exp()))


class NoGradient(TwoLatents):
    def guide(self, x):
        with torch.no_grad():
            super().guide(x)

    def model(self, x=None, *, num_observations=1):
        with torch.no_grad():
            return super().model(x, num_observations=num_observations)


class Scaled(TwoLatents):
    def model(self, x=None, *, num_observations=1):
        with pyro.poutine.scale(scale=0.1):
            return super().model(x, num_observations=num_observations)


DEFECTS = {
    "a latent that the guide forgets": (WithoutLatent, "'size'.*guide|guide.*'size'"),
    "a plate of another name": (AnotherPlate, "'rows'|'observations'"),
    "nothing to learn by": (NoGradient, "gradient"),
    "a scale": (Scaled, "scale"),
}


@pytest.mark.parametrize(("make", "words"), DEFECTS.values(), ids=DEFECTS)
def test_f20_a_story_with_a_defect_is_explained_before_training(make, words, tmp_path):
    story = make()
    before = {name: tensor.clone() for name, tensor in story.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=words) as explained:
        check(story, rows())
    with pytest.raises(type(explained.value), match=words):
        fit(story, rows(), **FIT, checkpoints=tmp_path / "checkpoints")
    assert all(torch.equal(tensor, before[name]) for name, tensor in story.state_dict().items())
    assert list(tmp_path.iterdir()) == []
