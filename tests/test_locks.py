"""A folder belongs to one process at a time; whoever comes second is told who was first; the dead hold nothing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from ppl_vae.locks import claimed

HOLDER = """
import sys, time
from pathlib import Path
from ppl_vae.locks import claimed
with claimed(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the folder until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def refusal(folder):
    with pytest.raises(BlockingIOError) as error, claimed(folder):
        pass
    return str(error.value)


def test_a_folder_can_be_claimed_and_nothing_stays_behind(tmp_path):
    with claimed(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_the_lock_says_who_holds_it(tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    with claimed(tmp_path):
        said = json.loads((tmp_path / "lock").read_text())
    assert (said["process"], said["host"]) == (os.getpid(), socket.gethostname())
    since = datetime.strptime(said["since"], "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
    assert before <= since <= datetime.now(UTC) + timedelta(seconds=1)


def test_another_process_is_refused_with_process_host_and_time(holder, tmp_path):
    said = refusal(tmp_path)
    assert f"'{tmp_path}' is in use by process {holder.pid} on {socket.gethostname()} since " in said
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\. Choose another folder, or wait\.$", said)


def test_the_same_process_is_refused_while_it_holds_the_folder(tmp_path):
    with claimed(tmp_path):
        assert f"by process {os.getpid()}" in refusal(tmp_path)


def test_being_refused_takes_nothing_away_from_the_holder(holder, tmp_path):
    before = (tmp_path / "lock").read_bytes()
    refusal(tmp_path)
    refusal(tmp_path)
    assert (tmp_path / "lock").read_bytes() == before
    assert holder.poll() is None


def test_other_folders_stay_free(holder, tmp_path):
    (tmp_path / "other").mkdir()
    with claimed(tmp_path / "other"):
        pass


def test_a_holder_that_ends_lets_go(holder, tmp_path):
    holder.communicate()
    assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_stale(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["process"] == holder.pid  # it could not clean up
    with claimed(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_lets_go(error, tmp_path):
    with pytest.raises(error), claimed(tmp_path):
        raise error
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path):
        pass


def test_a_folder_can_be_claimed_again_and_again(tmp_path):
    for _ in range(5):
        with claimed(tmp_path):
            assert refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not json", b"[]", b"{}", b"3", b'{"process": 1}', b"[" * 5000, b"\xff\xfe\x00"]
)
def test_a_lock_that_holds_something_else_still_refuses_and_names_the_folder(content, holder, tmp_path):
    (tmp_path / "lock").write_bytes(content)
    assert f"'{tmp_path}' is in use. Choose another folder" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff\xfe\x00"], ids=["nothing", "words", "bytes"])
def test_a_file_that_nobody_holds_is_no_lock_whatever_is_in_it(content, tmp_path):
    (tmp_path / "lock").write_bytes(content)
    with claimed(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_link_in_the_place_of_the_lock_leads_nowhere(tmp_path):
    """The folder of a run may come from somebody else: what it links to is not written over."""
    (tmp_path / "run").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("written by its owner")
    (tmp_path / "run" / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="lock"), claimed(tmp_path / "run"):
        pass
    assert precious.read_text() == "written by its owner"


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), claimed(tmp_path / "nowhere"):
        pass


@pytest.mark.slow
def test_of_many_processes_one_at_a_time_is_inside(tmp_path):
    program = """
import os, sys, time
from pathlib import Path
from ppl_vae.locks import claimed
folder, entered = Path(sys.argv[1]), 0
while entered < 50:
    try:
        with claimed(folder):
            alone = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            time.sleep(0.0005)
            os.close(alone)
            os.unlink(folder / "inside")
            entered += 1
    except BlockingIOError:
        time.sleep(0.0002)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    several = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in several:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
    assert list(tmp_path.iterdir()) == []
