"""Columns on disk: rows are those of the file, no column is ever read whole, and damaged files are refused by name."""

import gc
import operator
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ppl_vae import VAE, check, data, likelihoods, posteriors, priors
from ppl_vae.cli import main
from ppl_vae.networks import mlp
from ppl_vae.stored import BYTES_AT_ONCE, Stored, pieces, row_slices

NUM_ROWS = 60
FAR = BYTES_AT_ONCE // 20 + 100  # a row of five numbers beyond the first slice


@pytest.fixture
def values():
    """Sixty rows of two by three numbers, all different."""
    return torch.from_numpy(np.random.default_rng(0).random((NUM_ROWS, 2, 3)).astype(np.float32))


@pytest.fixture
def folder(tmp_path, values):
    """The same rows in three shards, the second of which is empty."""
    (tmp_path / "shards").mkdir()
    for name, rows in (("a", values[:25]), ("b", values[25:25]), ("c", values[25:])):
        np.save(tmp_path / "shards" / f"{name}.npy", rows.numpy())
    return tmp_path / "shards"


@pytest.fixture
def x(folder):
    return data.stored(folder)


def saved(path, array):
    np.save(path, array)
    return path


def refusal(error, action, *arguments, **options):
    """The one-line message of an error."""
    with pytest.raises(error) as refused:
        action(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Rows -----------------------------------------------------------------------------------------------------------------

SELECTIONS = [
    3,
    -1,
    slice(10, 42),
    slice(None, 1000),
    slice(0, NUM_ROWS),
    slice(-5, None),
    slice(1, 50, 7),
    slice(20, 10),
    [5, 5, 2, -60],
    [],
    np.arange(30, 20, -1),
    torch.tensor(7),
    torch.arange(NUM_ROWS).flip(0),
    torch.tensor([[24, 25], [0, 59]]),
    torch.tensor([3, 1], dtype=torch.int32),
    torch.arange(NUM_ROWS) % 3 == 0,
]


@pytest.mark.parametrize("key", SELECTIONS, ids=str)
def test_selected_rows_are_those_of_the_tensor(x, values, key):
    read = x[key]
    assert type(read) is torch.Tensor
    assert torch.equal(read, values[key])


def test_rows_come_from_shards_in_the_order_of_their_names(x, values):
    order = torch.randperm(NUM_ROWS)
    assert torch.equal(x.index_select(0, order), values[order])
    assert torch.equal(torch.index_select(x, 0, order), values[order])


@pytest.mark.parametrize("key", [60, -61, [0, 60], torch.tensor([-61])])
def test_a_row_that_is_not_there_is_an_index_error(x, key):
    assert "of 60 rows" in refusal(IndexError, lambda: x[key])


def test_keys_that_are_no_rows_are_refused(x):
    assert "float32" in refusal(IndexError, lambda: x[[1.5]])
    assert "expected 60" in refusal(IndexError, lambda: x[torch.ones(3, dtype=torch.bool)])
    assert "step" in refusal(ValueError, lambda: x[10:0:-1])


def test_a_column_is_a_tensor_in_all_but_its_numbers(x, values):
    assert isinstance(x, torch.Tensor) and isinstance(x, Stored)
    for about in (len, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.size, torch.is_floating_point):
        assert about(x) == about(values)
    for name in ("shape", "dtype", "device", "ndim", "layout", "nbytes", "requires_grad", "is_cuda"):
        assert getattr(x, name) == getattr(values, name)
    assert f"{x}" == repr(x) == "Stored('shards', shape (60, 2, 3), torch.float32)"


def test_some_rows_stay_on_disk(x, values):
    order = torch.randperm(NUM_ROWS)
    some = x.rows(order).narrow(0, 10, 30)
    assert isinstance(some, Stored) and len(some) == 30
    assert torch.equal(some[0:30], values[order][10:40])
    assert torch.equal(some.rows([3, 1])[0:2], values[order][[13, 11]])
    assert torch.equal(some.all_rows()[0:60], values)
    assert torch.equal(some.in_file_order()[0:30], values[order[10:40].sort().values])
    assert torch.equal(torch.narrow(x, 0, 30, 4)[0:4], values[30:34])


def test_all_rows_at_once_stay_on_disk(x):
    assert isinstance(x[:], Stored) and isinstance(x[:None], Stored)


@pytest.mark.parametrize("arguments", [(0, 50, 11), (0, 61, 0), (0, -61, 1)])
def test_a_part_beyond_the_end_is_refused(x, arguments):
    assert "60 rows" in refusal(IndexError, x.narrow, *arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_rows_come_in_the_type_that_was_asked_for(x, values, dtype):
    column = x.to(dtype)
    assert column.dtype == dtype
    assert torch.equal(column[20:30], values[20:30].to(dtype))


def test_a_type_through_a_smaller_one_is_rounded_as_in_memory(x, values):
    assert torch.equal(x.half().double()[0:60], values.half().double())


def test_rows_come_to_the_device_that_was_asked_for(x):
    column = x.to("meta")
    assert isinstance(column, Stored) and column.device.type == "meta"
    assert column[3:5].device.type == "meta" and column[3].device.type == "meta"


def test_what_is_not_read_cannot_fail(tmp_path, values):
    path = saved(tmp_path / "x.npy", values.numpy())
    x = data.stored(path)
    os.truncate(path, 130)
    for column in (x.to(torch.float64), x.cpu().detach().double(), x[:], x.rows([1, 2]), x.narrow(0, 0, 5)):
        assert "cut short" in refusal(ValueError, lambda column=column: column[0])


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "<i4", ">i4", "i8", "u2", "u8", "f2", "<f4", ">f4", "<f8", ">f8", "g", "?"]
)
def test_numbers_of_every_type_are_as_in_memory(tmp_path, dtype):
    array = np.random.default_rng(1).integers(0, 100, (50, 4)).astype(dtype)
    path = saved(tmp_path / "x.npy", array)
    memory = data.load(path, validation=10, test=10)
    x = data.stored(path)
    assert x.dtype == memory.train.x.dtype
    assert torch.equal(x[memory.indices["train"]], memory.train.x)
    assert torch.equal(data.stored(path, dtype=torch.int64)[0:50], torch.from_numpy(array.astype(np.int64)))


def test_single_numbers_are_rows_too(tmp_path):
    x = data.stored(saved(tmp_path / "x.npy", np.arange(7)), dtype=torch.int64)
    assert x.shape == (7,) and x[[6, 2]].tolist() == [6, 2] and x[3].item() == 3


def test_many_threads_read_the_same_column(x, values):
    orders = [torch.randperm(NUM_ROWS) for _ in range(200)]
    with ThreadPoolExecutor(8) as threads:
        for order, read in zip(orders, threads.map(x.__getitem__, orders), strict=True):
            assert torch.equal(read, values[order])


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path, values):
    path = saved(tmp_path / "x.npy", values.numpy())
    x = data.stored(path)
    saved(tmp_path / "other.npy", values.numpy() + 1)
    os.replace(tmp_path / "other.npy", path)
    assert torch.equal(x[0:60], values)


def test_files_are_closed_with_the_last_column(folder):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    x = data.stored(folder)
    part = x.narrow(0, 0, 3).double()
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del x
    assert part[0].dtype == torch.float64
    del part
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# What needs all rows --------------------------------------------------------------------------------------------------

WHOLE = {
    "mean": lambda x: x.mean(),
    "torch.cat": lambda x: torch.cat([torch.zeros(1, 2, 3), x]),
    "torch.equal": lambda x: torch.equal(x, torch.zeros(60, 2, 3)),
    "numpy": lambda x: x.numpy(),
    "__array__": np.asarray,
    "unbind": list,
    "tolist": lambda x: x.tolist(),
    "clone": lambda x: x.clone(),
    "reshape": lambda x: x.reshape(-1),
    "T": lambda x: x.T,
    "data": lambda x: x.data,
    "linear": lambda x: torch.nn.functional.linear(x, torch.zeros(4, 3)),
    "copy_": lambda x: torch.zeros(60, 2, 3).copy_(x),
    "__setitem__": lambda x: operator.setitem(x, 0, 1.0),
    "__reduce_ex__": lambda x: torch.save(x, os.devnull),
    "an index of more than rows": lambda x: x[:, 0],
    "index_select along dimension 1": lambda x: x.index_select(1, torch.tensor([0])),
    "narrow along dimension 2": lambda x: x.narrow(2, 0, 1),
    "eq": lambda x: x == torch.zeros(60, 2, 3),
    "ne": lambda x: torch.zeros(60, 2, 3) != x,
    "add": lambda x: x + 1,
    "rsub": lambda x: 1 - x,
    "matmul": lambda x: x @ torch.zeros(3, 1),
}


@pytest.mark.parametrize("operation", WHOLE)
def test_an_operation_on_all_rows_is_refused_by_name(x, operation):
    message = refusal(TypeError, WHOLE[operation], x)
    assert operation in message and "all 60 rows of 'shards'" in message and "Take rows first" in message


# Maps -----------------------------------------------------------------------------------------------------------------


def test_a_map_is_given_values_and_their_numbers_in_the_source(x, values):
    numbers = torch.arange(NUM_ROWS).reshape(-1, 1, 1)
    order = torch.randperm(NUM_ROWS)
    column = x.map(lambda values, numbers: values + numbers.reshape(-1, 1, 1)).rows(order)
    assert torch.equal(column[10:40], (values + numbers)[order][10:40])


def test_a_map_decides_shape_and_type(x, values):
    column = x.map(lambda values, _: values.flatten(1).double())
    assert column.shape == (60, 6) and column.dtype == torch.float64
    assert torch.equal(column.float().map(lambda values, _: values * 2)[0:60], values.flatten(1) * 2)


@pytest.mark.parametrize("function", [lambda values, _: values.sum(), lambda values, _: [values]])
def test_a_map_that_makes_no_rows_is_refused(x, function):
    assert "expected a tensor of one row" in refusal(ValueError, x.map, function)


# Reading into memory that is there ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [torch.arange(20, 30), torch.tensor([40, 3, 3, 25]), torch.tensor([], dtype=torch.int64)]
)
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.double(), lambda x: x.rows(torch.arange(60).flip(0))])
def test_rows_are_read_into_given_memory_in_the_order_asked_for(x, rows, change):
    column = change(x)
    out = torch.full((len(rows), 2, 3), torch.nan, dtype=column.dtype)
    memory = out.data_ptr()
    assert column.read_into(rows, out) is out and out.data_ptr() == memory
    assert torch.equal(out, column[rows])


@pytest.mark.parametrize(
    "out",
    [torch.zeros(3, 2, 3), torch.zeros(2, 2, 3).double(), torch.zeros(2, 3, 2).mT, torch.zeros(2, 2, 3).to("meta")],
)
def test_memory_that_does_not_fit_is_refused(x, out):
    assert "out must be contiguous, on the CPU, of shape (2, 2, 3)" in refusal(
        ValueError, x.read_into, torch.arange(2), out
    )


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_slices_cover_all_rows_and_hold_few_bytes():
    columns = torch.zeros(1000, 700), torch.zeros(1000, dtype=torch.int64)
    slices = list(row_slices(*columns))
    assert torch.equal(torch.cat([torch.arange(1000)[rows] for rows in slices]), torch.arange(1000))
    assert all(columns[0][rows].nbytes + columns[1][rows].nbytes <= BYTES_AT_ONCE for rows in slices)
    assert max(rows.stop - rows.start for rows in row_slices(*columns, most_rows=7)) == 7
    assert len(list(row_slices(torch.zeros(2, BYTES_AT_ONCE)))) == 2


def test_pieces_hold_each_row_once_beside_its_number(x, values):
    order = torch.randperm(NUM_ROWS)
    column, numbers = x.rows(order), []
    for rows, (read, beside) in pieces(column, values[order], most_rows=7):
        assert torch.equal(read, values[order][rows]) and torch.equal(beside, read)
        assert bool((order[rows].diff() > 0).all())  # forwards on disk
        numbers.append(rows)
    assert torch.cat(numbers).sort().values.tolist() == list(range(NUM_ROWS))


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_short_while_open_is_refused_by_name(tmp_path, values):
    path = saved(tmp_path / "x.npy", values.numpy())
    x = data.stored(path)
    os.truncate(path, path.stat().st_size - 30)
    assert torch.equal(x[0:58], values[0:58])
    for key in (59, slice(0, 60), [59, 3]):
        message = refusal(ValueError, lambda key=key: x[key])
        assert str(path) in message and "has been cut short since it was opened" in message


@pytest.mark.parametrize("change", [-30, 30])
def test_a_file_that_claims_other_than_it_holds_is_refused(tmp_path, values, change):
    path = saved(tmp_path / "x.npy", values.numpy())
    os.truncate(path, path.stat().st_size + change)
    message = refusal(ValueError, data.stored, path)
    assert str(path) in message and f"{60 * 24 + change} bytes of values, expected {60 * 24}" in message


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([{}, []], dtype=object), "never unpickled"),
        (np.asfortranarray(np.zeros((5, 3))), "Fortran order"),
        (np.zeros((5, 3), complex), "must be real numbers; found complex128"),
        (np.array(["a", "b"]), "must be real numbers; found <U1"),
        (np.zeros(3, "M8[s]"), "must be real numbers; found datetime64"),
        (np.array(3.0), "holds no observations: its shape is ()"),
        (np.zeros((0, 3)), "holds no observations: its shape is (0, 3)"),
        (np.zeros((3, 0)), "holds no observations: its shape is (3, 0)"),
    ],
)
def test_an_array_that_is_no_rows_of_numbers_is_refused(tmp_path, array, words):
    message = refusal(ValueError, data.stored, saved(tmp_path / "x.npy", array))
    assert "x.npy" in message and words in message


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_a_file_that_is_no_array_is_refused(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    assert "is not a .npy array" in refusal(ValueError, data.stored, tmp_path / "x.npy")


@pytest.mark.parametrize("other", [np.zeros((4, 3, 2), np.float32), np.zeros((4, 2, 3)), np.zeros((4, 2), np.float32)])
def test_shards_that_differ_are_refused_by_name(folder, other):
    path = saved(folder / "d.npy", other)
    message = refusal(ValueError, data.stored, folder)
    assert str(path) in message and "expected (2, 3) and float32" in message


def test_a_shard_that_leads_out_of_the_folder_is_refused(folder, tmp_path, values):
    (folder / "d.npy").symlink_to(saved(tmp_path / "secret.npy", values.numpy()))
    assert "leads out of" in refusal(ValueError, data.stored, folder)


def test_a_shard_that_is_no_file_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "d.npy")
    assert "is no file" in refusal(ValueError, data.stored, folder)


def test_a_folder_without_shards_is_refused(tmp_path):
    (tmp_path / "image.png").touch()
    saved(tmp_path / "labels.npy", np.zeros(3))
    assert "holds no .npy files" in refusal(ValueError, data.stored, tmp_path)
    assert "holds no .npy files" in refusal(ValueError, data.load, tmp_path, stream=True)


@pytest.mark.parametrize("name", ["x.npz", "x.csv", "x.parquet"])
def test_what_cannot_stay_on_disk_is_refused_with_what_can(tmp_path, name):
    (tmp_path / name).touch()
    message = refusal(ValueError, data.load, tmp_path / name, stream=True)
    assert "only a .npy file, or a folder of them" in message and name in message and "--stream" in message


def test_named_sets_and_memory_cannot_stay_on_disk(values):
    assert "found 'digits'" in refusal(ValueError, data.load, "digits", stream=True)
    assert "found 'digits'" in refusal(ValueError, data.stored, "digits")
    assert "found a ndarray" in refusal(ValueError, data.load, values.numpy(), stream=True)


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    refusal(FileNotFoundError, data.stored, tmp_path / "x.npy")
    refusal(FileNotFoundError, data.load, tmp_path / "x.npy", stream=True)


# The dry run ----------------------------------------------------------------------------------------------------------


def story(likelihood=likelihoods.Bernoulli):
    return VAE(priors.StandardNormal(2), likelihood(mlp(2, 8, 5)), posteriors.DiagonalNormal(mlp(5, 8, 4)))


@pytest.fixture
def binary():
    return np.random.default_rng(2).integers(0, 2, (FAR + 50, 5)).astype(np.float32)


def test_check_passes_what_is_right_on_disk(tmp_path, binary):
    check(story(), data.stored(saved(tmp_path / "x.npy", binary)))
    grey = data.stored(saved(tmp_path / "grey.npy", binary / 2))
    check(story(), grey, transform=torch.bernoulli)


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, "x has values between 0 and 1"), (np.nan, "x is nan in"), (2, "0 and 2")]
)
def test_check_finds_a_defect_far_down_and_names_its_row(tmp_path, binary, value, words):
    binary[FAR, 3] = value
    x = data.stored(saved(tmp_path / "x.npy", binary))
    message = refusal(ValueError, check, story(), x)
    assert words in message and f"row {FAR}, column 3" in message
    backwards = x.rows(torch.arange(len(x) - 1, -1, -1))
    assert f"row {len(x) - 1 - FAR}, column 3" in refusal(ValueError, check, story(), backwards)


class Missing(VAE):
    """Tells of what is there: the rest is filled with zeros."""

    def model(self, x, mask):
        return super().model(torch.where(mask, x, 0.0))

    def guide(self, x, mask):
        return super().guide(torch.where(mask, x, 0.0))


class Careless(Missing):
    """Scores what is missing."""

    def model(self, x, mask):
        return VAE.model(self, x)


def test_check_reads_a_mask_beside_its_column(tmp_path, binary):
    binary[FAR, 3] = np.nan
    x = data.stored(saved(tmp_path / "x.npy", binary))
    mask = data.stored(saved(tmp_path / "mask.npy", ~np.isnan(binary)), dtype=torch.bool)
    parts = priors.StandardNormal(2), likelihoods.Bernoulli(mlp(2, 8, 5)), posteriors.DiagonalNormal(mlp(5, 8, 4))
    check(Missing(*parts), x, mask)
    everywhere = mask.map(lambda values, _: torch.ones_like(values))
    assert f"row {FAR}, column 3 (1 of" in refusal(ValueError, check, Missing(*parts), x, everywhere)
    assert f"row {FAR}, column 3, where the model scores it" in refusal(ValueError, check, Careless(*parts), x, mask)


# The command line -----------------------------------------------------------------------------------------------------


def test_train_names_a_bad_row_on_disk_by_its_number_in_the_source(tmp_path, values, capsys):
    rows = values.flatten(1).numpy()
    rows[31, 2] = np.nan
    path = saved(tmp_path / "x.npy", rows)
    arguments = ["--likelihood", "normal", "--stream", "--out", str(tmp_path / "run")]
    assert main(["train", "--data", str(path), *arguments]) != 0
    said = capsys.readouterr().err
    assert "x is nan in row 31, column 2 (1 of 60 rows" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_train_refuses_to_stream_a_named_set(tmp_path, capsys):
    assert main(["train", "--data", "digits", "--stream", "--out", str(tmp_path / "run")]) != 0
    assert "only a .npy file, or a folder of them, can stay on disk; found 'digits'" in capsys.readouterr().err


# Memory ---------------------------------------------------------------------------------------------------------------

LIMITED = """
import sys, resource
from pathlib import Path
import torch
from ppl_vae import VAE, check, data, fit, likelihoods, log_evidence, posteriors, priors
from ppl_vae.networks import mlp
from ppl_vae.stored import row_slices

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

task, small, big, allowed = *sys.argv[1:4], int(sys.argv[4]) * 2**20
width = data.stored(small).shape[1]
story = VAE(
    priors.StandardNormal(2), likelihoods.Bernoulli(mlp(2, 8, width)), posteriors.DiagonalNormal(mlp(width, 8, 4))
)

def read(path, stream):
    grey = data.load(path, binarization="dynamic", stream=stream)
    check(story, grey.train.x, transform=torch.bernoulli)
    check(story, grey.test.x)
    table = data.load(path, standardize=[0, 1], stream=stream)
    assert len(table.fingerprint) == 64
    return sum(len(split.x[rows]) for split in table.splits.values() for rows in row_slices(split.x))

def learn(path, stream):
    bits = data.load(path, binarization="static", stream=stream)
    settings = {"batch_size": 64, "engine": "captured", "compile": False, "progress": False}
    history = fit(story, bits.train.x, validation=bits.validation.x, epochs=1, **settings)
    elbos = [log_evidence(story, split.x, method="elbo", num_particles=5) for split in bits.splits.values()]
    first = log_evidence(story, bits.test.x.rows(torch.arange(256) % 60), method="importance", num_particles=50)
    assert history.engine == "captured"
    assert all(evidence["estimate"].notnull().all() for evidence in [first, *elbos])
    return sum(len(evidence["estimate"]) for evidence in elbos)

work = {"read": read, "learn": learn}[task]
work(small, True)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
resource.setrlimit(resource.RLIMIT_DATA, (kilobytes("VmData") * 1024 + allowed, -1))
print(work(big, True))
print((kilobytes("VmHWM") - before) / 1024)
try:
    work(big, False)
except MemoryError as error:
    print(error)
"""


def run_within(folder, megabytes, allowed, task="read", width=512):
    """What a process says of a large file that may use so many megabytes more than it needs for a small one."""
    small = saved(folder / "small.npy", np.random.default_rng(0).random((400, width)).astype(np.float32))
    rows = 2**18 // width  # of a megabyte
    with (folder / "big.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (megabytes * rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        megabyte = np.random.default_rng(1).random((rows, width)).astype(np.float32).tobytes()
        for _ in range(megabytes):
            file.write(megabyte)
    command = [sys.executable, "-W", "error", "-c", LIMITED, task, small, folder / "big.npy", str(allowed)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    num_rows, growth, refused = ran.stdout.splitlines()
    return int(num_rows), float(growth), refused


@pytest.fixture(scope="module")
def within_a_quarter(tmp_path_factory):
    """A file of 64 megabytes, 16 of which fit in memory."""
    return run_within(tmp_path_factory.mktemp("limited"), 64, 16)


def test_a_file_four_times_the_memory_is_loaded_checked_and_read(within_a_quarter):
    num_rows, growth, _ = within_a_quarter
    assert num_rows == 64 * 512 and growth < 16


def test_a_file_that_does_not_fit_in_memory_is_refused_with_the_remedy(within_a_quarter):
    assert "big.npy' does not fit in memory; leave it on disk by stream=True (--stream)" in within_a_quarter[2]


@pytest.mark.slow
def test_a_file_sixteen_times_the_memory_is_loaded_checked_and_read(tmp_path):
    num_rows, growth, _ = run_within(tmp_path, 256, 16)
    assert num_rows == 256 * 512 and growth < 16


@pytest.mark.slow
def test_a_file_four_times_the_memory_is_trained_on_and_scored(tmp_path):
    num_rows, _, refused = run_within(tmp_path, 384, 96, task="learn", width=2048)
    assert num_rows == 384 * 128
    assert "does not fit in memory" in refused
