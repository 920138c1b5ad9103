"""Processes that share a task: the same numbers as one process, and an end to all when one of them dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import shared_task
import torch

from ppl_vae import fit, ranks
from ppl_vae.ranks import Ranks
from ppl_vae.training.checkpoints import Checkpoints, files_in
from ppl_vae.training.steps import Notice

TASK = Path(shared_task.__file__)


def started(number: int, task: str, folder: Path) -> list[subprocess.Popen]:
    """So many processes as torchrun starts them, but with nobody who looks after them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, TASK, task, folder],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(number)
    ]


def finished(processes: list[subprocess.Popen]) -> list[str]:
    """What each said on standard error, once all have ended well."""
    said = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


@pytest.fixture(scope="module")
def alone():
    return shared_task.everything()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def shared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"shared-by-{request.param}")
    finished(started(request.param, "everything", folder))
    return folder


def test_evidence_draws_and_diagnoses_are_those_of_one_process_bit_for_bit(shared, alone):
    found = safetensors.torch.load_file(shared / "found.safetensors")
    assert found.keys() == alone.keys()
    for name in found:
        if not name.startswith(("weights", "history")):
            assert torch.equal(found[name].nan_to_num(7.0), alone[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("engine", ["svi", "captured"])
def test_training_is_that_of_one_process_but_for_rounding(shared, alone, engine):
    found = safetensors.torch.load_file(shared / "found.safetensors")
    for name in [name for name in found if name.startswith((f"weights {engine}", f"history {engine}"))]:
        torch.testing.assert_close(found[name], alone[name], rtol=1e-11, atol=1e-12)


def test_all_processes_end_with_the_same_numbers(shared):
    assert len({file.read_text() for file in shared.glob("*.txt")}) == 1


def test_processes_that_are_asked_for_different_things_are_refused(shared):
    said = [file.read_text() for file in shared.glob("*.refusal")]
    assert all("The processes of a run do the same together. Of training, process" in words for words in said)


def test_a_training_of_several_processes_goes_on_in_one(shared, alone):
    with pytest.warns(UserWarning, match="not bit for bit: processes . there and 1 here"):
        story, _ = shared_task.trained("captured", shards=None, resume=shared / "checkpoints")
    for name, tensor in story.state_dict().items():
        torch.testing.assert_close(tensor, alone[f"weights captured {name}"], rtol=1e-11, atol=1e-12)


def test_the_noise_of_a_batch_is_that_of_its_parts(alone):
    story, _ = shared_task.trained("captured", shards=2)
    weights = {name: tensor for name, tensor in story.state_dict().items() if "weight" in name}
    assert not any(torch.allclose(tensor, alone[f"weights captured {name}"]) for name, tensor in weights.items())


def test_parts_may_be_more_than_observations():
    story, x = shared_task.story_of(2), shared_task.binary_images(5)
    history = fit(story, x, epochs=3, batch_size=3, shards=4, progress=False)
    assert torch.tensor(history["train_elbo"]).isfinite().all()


def test_a_process_by_itself_is_the_first_of_one():
    assert ranks.here() == Ranks(0, 1)
    assert Ranks().gather(b"words") == [b"words"]
    assert Ranks().said_by_first("words") == "words"
    assert list(Ranks(1, 3).mine(range(7))) == [1, 4]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_f18_when_a_rank_dies_the_others_stop_with_an_error_and_the_run_goes_on(victim, tmp_path):
    processes = started(2, "endless", tmp_path)
    while len(files_in(tmp_path / "checkpoints")) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    os.kill(int((tmp_path / f"{victim}.pid").read_text()), signal.SIGKILL)
    said = processes[1 - victim].communicate(timeout=60)[1].decode()
    processes[victim].communicate()
    assert processes[1 - victim].returncode != 0 and "RuntimeError" in said
    step = int(files_in(tmp_path / "checkpoints")[0].stem.partition("-")[2])
    epochs = step // 4 + 2
    with pytest.warns(UserWarning, match="processes 2 there and 1 here"):
        folder = tmp_path / "checkpoints"
        story, history = shared_task.trained("svi", epochs=epochs, resume=folder, checkpoints=folder)
    whole, unbroken = shared_task.trained("svi", epochs=epochs)
    torch.testing.assert_close(history, unbroken, rtol=1e-9, atol=1e-10)
    for name, tensor in story.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-9, atol=1e-10)


class Alone(Ranks):
    """One of two processes, the other of which does not come."""

    def wait(self):
        raise AssertionError("waits for a process that goes on")


def test_a_signal_that_only_one_process_knows_of_while_all_write_ends_nothing_yet(tmp_path):
    task = SimpleNamespace(ranks=Alone(1, 2), notice=Notice())
    keeper = Checkpoints(tmp_path, 60.0, SimpleNamespace(task=task))
    task.notice.of_all = [1.0, 0.0, 0.0]  # the first process finds it time for a checkpoint
    assert keeper.are_due
    keeper._heard(signal.SIGINT, None)
    keeper.write(None)
    task.notice.of_all = [0.0, 0.0, 0.0]
    assert not keeper.are_due and task.notice.own == [0.0, 1.0, 0.0]  # told with the next step
    task.notice.of_all = task.notice.own
    assert keeper.are_due
    with pytest.raises(AssertionError, match="waits"):
        keeper.write(None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_ends_all_after_the_same_step(number, tmp_path):
    processes = started(2, "endless", tmp_path)
    while len(files_in(tmp_path / "checkpoints")) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    os.kill(int((tmp_path / "1.pid").read_text()), number)
    said = [process.communicate(timeout=60)[1].decode() for process in processes]
    ended = (-number, 130) if number == signal.SIGINT else (128 + number,)
    assert all(process.returncode in ended for process in processes), said
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_torchrun_trains_scores_and_diagnoses_a_run(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ppl_vae"]
    run = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train = ["train", "--data", "digits", "--epochs", "2", "--out", run]
    said = subprocess.run([*torchrun, *train], env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("trained 2 epochs") == 1
    assert (run / "report.html").exists() and not (run / "evidence-test.blocks").exists()
    diagnose = ["diagnose", run, "--limit", "64", "--sections", "guide,collapse"]
    said = subprocess.run([*torchrun, *diagnose], env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert {file.stem for file in (run / "diagnosis").glob("*.nc")} == {"guide", "collapse"}
    said = subprocess.run([*torchrun, *train], env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode != 0 and "already holds a run" in said.stderr
