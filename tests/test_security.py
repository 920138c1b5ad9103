"""Nothing that is read is run, imported by its name, or believed in its size; what SECURITY.md promises."""

import ast
import contextlib
import io
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from example_stories import images, small_vae

from ppl_vae import Evidence, data, fit, load, tables
from ppl_vae.cli import main
from ppl_vae.diagnostics import diagnosis
from ppl_vae.training.checkpoints import files_in

ROOT = Path(__file__).parents[1]
SMALL = ("--epochs", "1", "--network.hidden-dims", "4", "--num-particles", "5", "--engine", "svi")

# What runs words ------------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("numpy.fromregex", "pandas.read_pickle", "pandas.eval"),
    *("os.system", "os.popen", "os.startfile", "tempfile.mktemp", "importlib.import_module"),
}
METHODS = {"exec_module", "load_module", "read_pickle"}

# What is known, and why it is no danger.
KNOWN = {
    ("ppl_vae/__init__.py", "importlib.import_module"): "of the package's own modules",
    ("ppl_vae/own.py", ".exec_module"): "of the file that the user names at the command line",
    ("scripts/benchmark_training.py", "importlib.import_module"): "of optional packages, named in the script",
}


def sources():
    return [*sorted((ROOT / "ppl_vae").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]


def dangers(source):
    """What in a source runs words: modules that it imports, functions that it calls, options that it passes."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from [node.module] if (node.module or "").split(".")[0] in MODULES else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _dangers_of_call(node, names)


def _dangers_of_call(call, names):
    first, *rest = ast.unparse(call.func).split(".")
    name = ".".join([names.get(first, first), *rest])
    if name in CALLS:
        yield name
    if rest and rest[-1] in METHODS:
        yield f".{rest[-1]}"
    for option in call.keywords:
        value = option.value.value if isinstance(option.value, ast.Constant) else "something"
        if (option.arg == "allow_pickle" and value is not False) or (option.arg == "shell" and value is not False):
            yield f"{option.arg}={value}"
        if option.arg == "weights_only" and value is not True:
            yield f"{option.arg}={value}"


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_runs_words(file):
    where = file.relative_to(ROOT).as_posix()
    found = {danger for danger in dangers(file.read_text(encoding="utf-8")) if (where, danger) not in KNOWN}
    assert found == set()


def test_every_known_exception_is_still_there():
    for where, danger in KNOWN:
        assert danger in set(dangers((ROOT / where).read_text(encoding="utf-8"))), (where, danger)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml\nyaml.load('x')",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('true')",
        "from os import system\nsystem('true')",
        "import torch as t\nt.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=wanted)",
        "import subprocess\nsubprocess.run('true', shell=True)",
        "import tempfile\ntempfile.mktemp()",
        "import importlib\nimportlib.import_module(name)",
        "spec.loader.exec_module(module)",
        "__import__(name)",
    ],
)
def test_what_runs_words_is_found(source):
    assert list(dangers(source))


def test_no_module_of_the_package_starts_a_program():
    started = [file.name for file in sources() if "ppl_vae" in file.parts and "subprocess" in file.read_text()]
    assert [name for name in started if (ROOT / "ppl_vae" / name).exists()] == []


# Pickles in the place of every file -----------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """A folder that is there when a trap has sprung."""
    return tmp_path / "sprung"


def pickled(mark):
    return pickle.dumps(Trap(mark))


def torch_pickled(mark):
    content = io.BytesIO()
    torch.save({"story": Trap(mark)}, content)
    return content.getvalue()


def array_pickled(mark):
    content = io.BytesIO()
    np.save(content, np.array([Trap(mark)] * 40, dtype=object), allow_pickle=True)
    return content.getvalue()


def archive_pickled(mark):
    content = io.BytesIO()
    np.savez(content, x=np.array([Trap(mark)] * 40, dtype=object), labels=np.zeros(40))
    return content.getvalue()


PICKLES = {"pickle": pickled, "torch": torch_pickled, "npy": array_pickled, "npz": archive_pickled}


@pytest.mark.parametrize("name", PICKLES)
def test_the_traps_spring_where_something_unpickles_them(name, mark):
    content = PICKLES[name](mark)
    if name == "pickle":
        pickle.loads(content)  # noqa: S301 (our own trap, sprung on purpose)
    elif name == "torch":
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        opened = np.load(io.BytesIO(content), allow_pickle=True)
        assert opened is not None and (name == "npy" or opened["x"] is not None)
    assert mark.exists()


def read_data(path):
    data.load(path)


def read_story(path):
    load(path)


def fill_story(path):
    load(path, story=small_vae())


def resume(path):
    fit(small_vae(), images(), epochs=1, progress=False, resume=path)


def read_evidence(path):
    Evidence.load(path)


def read_diagnosis(path):
    diagnosis.read(path.parent, small_vae())


DOORS = {
    "x.npy": [read_data],
    "x.npz": [read_data],
    "x.csv": [read_data],
    "x.parquet": [read_data],
    "story.safetensors": [read_story, fill_story, resume],
    "step-0000000001.safetensors": [resume],
    "evidence.nc": [read_evidence],
    "collapse.nc": [read_diagnosis],
}


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize(
    ("name", "door"),
    [(name, door) for name, doors in DOORS.items() for door in doors],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_a_pickle_at_a_door_is_refused_and_does_not_run(name, door, make, mark, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / name).write_bytes(make(mark))
    with pytest.raises(ValueError) as refused:
        door(tmp_path / "there" / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)
    assert not mark.exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data in a file, and a small run on them with everything that a run may hold."""
    folder = tmp_path_factory.mktemp("made")
    x = np.random.default_rng(0).random((60, 4)).round().astype(np.float32)
    np.save(folder / "x.npy", x)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "--data", str(folder / "x.npy"), "--out", str(folder / "run"), *SMALL]) == 0
        assert main(["diagnose", str(folder / "run"), "--sections", "collapse"]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


COMMANDS = {
    "evidence": ["evidence", "RUN", "--method", "importance"],
    "compare": ["compare", "RUN", "OTHER", "--method", "importance"],
    "diagnose": ["diagnose", "RUN", "--sections", "collapse"],
    "report": ["report", "RUN"],
    "sample": ["sample", "RUN"],
    "resume": ["train", "--resume", "RUN", "--epochs", "2"],
}
READ_BY = {
    "config.json": "evidence",
    "story.safetensors": "sample",
    "metrics.jsonl": "report",
    "results.json": "report",
    "evidence-test.nc": "diagnose",
    "diagnosis/collapse.nc": "report",
    "checkpoints": "resume",
}
PAIRS = [
    pytest.param(name, command, marks=[] if READ_BY[name] == command else pytest.mark.slow)
    for name in READ_BY
    for command in COMMANDS
]


def answer(command, run, other, capsys):
    """The status of a command and what it said on standard error."""
    words = {"RUN": str(run), "OTHER": str(other)}
    status = main([words.get(word, word) for word in COMMANDS[command]])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(("name", "command"), PAIRS)
def test_a_pickle_in_the_place_of_a_file_of_a_run_does_not_run(name, command, run, made, mark, capsys):
    planted = files_in(run / name)[0] if name == "checkpoints" else run / name
    planted.write_bytes(pickled(mark))
    status, said = answer(command, run, made / "run", capsys)
    assert not mark.exists()
    assert status in (0, 1) and said.count("\n") == status
    if READ_BY[name] == command:
        assert status == 1 and planted.name in said


# Words in the place of a story ----------------------------------------------------------------------------------------


def rewritten(run, change):
    """The run with other words in its configuration."""
    file = run / "config.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))
    return run


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["story"]["prior"].update(name="os.system"),
        lambda told: told["story"]["prior"].update(class_path="os.system"),
        lambda told: told["story"].update(__class__="os.system"),
        lambda told: told["story"].update(event_shape="__import__('os').system('true')"),
        lambda told: told["training"].update(objective={"name": "os.system"}),
        lambda told: told["training"].update(optimizer="os.system"),
    ],
    ids=["a name", "a class path", "a class", "an expression", "an objective", "an optimizer"],
)
@pytest.mark.parametrize("command", ["evidence", "resume"])
def test_a_configuration_cannot_name_what_is_run(command, change, run, made, capsys):
    status, said = answer(command, rewritten(run, change), made / "run", capsys)
    assert status == 1 and said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_that_names_a_file_does_not_run_it(command, run, made, mark, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    shape = [4]
    story = {"file": str(tmp_path / "mine.py"), "name": "Mine", "event_shape": shape}
    status, said = answer(command, rewritten(run, lambda told: told.update(story=story)), made / "run", capsys)
    assert status == 1 and said.count("\n") == 1
    assert not mark.exists()


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_a_table_that_claims_more_than_its_file_can_hold_is_refused(tmp_path):
    with h5netcdf.File(tmp_path / "huge.nc", "w") as file:
        file.dimensions = {"observation": 2**38}
        file.create_variable("estimate", ("observation",), float, chunks=(2**20,))
    assert (tmp_path / "huge.nc").stat().st_size < 100_000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"huge\.nc"):
        tables.load(tmp_path / "huge.nc")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kilobytes


def test_a_table_cannot_read_another_file(tmp_path):
    """HDF5 lets a data set lie in any other file."""
    (tmp_path / "secret").write_bytes(b"password" * 8)
    with h5py.File(tmp_path / "table.nc", "w") as file:
        file.create_dataset("observation", data=np.arange(64)).make_scale()
        outside = file.create_dataset("estimate", (64,), "u1", external=[(str(tmp_path / "secret"), 0, 64)])
        outside.dims[0].attach_scale(file["observation"])
    with pytest.raises(ValueError, match=r"table\.nc"):
        tables.load(tmp_path / "table.nc")


def sizes_in_heaps(content):
    """Where the heaps of an HDF5 file say how large something in them is, and whether that is free space."""
    start = content.find(b"GCOL")
    while start >= 0:
        place, end = start + 16, start + int.from_bytes(content[start + 8 : start + 16], "little")
        is_free = False
        while place < end and not is_free:
            is_free = content[place : place + 2] == b"\0\0"
            yield place + 8, is_free
            place += 16 + (int.from_bytes(content[place + 8 : place + 16], "little") + 7) // 8 * 8
        start = content.find(b"GCOL", start + 1)


@pytest.mark.parametrize("size", [0, 2**63, 2**64 - 1, 2**64 - 16, 2**64 - 4096], ids=hex)
def test_a_heap_without_an_end_is_refused(size, tmp_path):
    """HDF5 2.0 looks for its next object for ever, and no signal interrupts it."""
    words = np.array([f"word {number}" for number in range(1000)], dtype=object)
    tables.save(xr.Dataset({"words": ("observation", words)}), tmp_path / "table.nc")
    content = (tmp_path / "table.nc").read_bytes()
    assert tables.load(tmp_path / "table.nc")["words"].values.tolist() == words.tolist()
    places = [place for place, is_free in sizes_in_heaps(content) if is_free or size > 0]
    assert len(places) > (1000 if size else 0)
    for place in [*places[:3], *places[-3:]]:
        changed = content[:place] + size.to_bytes(8, "little") + content[place + 8 :]
        (tmp_path / "table.nc").write_bytes(changed)
        with pytest.raises(ValueError, match=r"table\.nc' is not a whole netCDF file: a heap of words has no end"):
            tables.load(tmp_path / "table.nc")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"words"', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"])
@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl"])
def test_other_json_in_the_place_of_a_file_is_one_line_that_names_it(name, text, run, made, capsys):
    (run / name).write_text(text)
    status, said = answer("report", run, made / "run", capsys)
    assert status == 1 and said.count("\n") == 1
    assert name in said


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["story"].update(latent_dim=2**40),
        lambda told: told["story"].update(event_shape=[2**40]),
        lambda told: told["story"]["network"].update(hidden_dims=[2**13, 2**13]),
    ],
    ids=["latent dimensions", "an event", "a network"],
)
def test_huge_sizes_in_the_configuration_of_a_run_cost_no_memory(change, run, made, capsys):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, said = answer("resume", rewritten(run, change), made / "run", capsys)
    assert status == 1 and said.count("\n") == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kilobytes
