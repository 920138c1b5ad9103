"""The walk-through runs from the first section to the last, and its page has a number in every place."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def placeholders(text):
    return re.findall(r"\{[a-z_]+(?::[^}]*)?\}", text)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_quick_walk_draws_every_figure_and_fills_every_number(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    runpy.run_path(str(SCRIPTS / "walkthrough.py"))["main"](["--quick", "--out", str(tmp_path)])
    assert "wrote" in capsys.readouterr().out
    page = (tmp_path / "walkthrough.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert len(pictures) == 9 and placeholders(page) == []
    assert {tmp_path / name for name in pictures} == set((tmp_path / "walkthrough").iterdir())
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200


def test_the_page_is_the_template_with_its_numbers():
    """Between placeholders the committed page and the template say the same."""
    template = (SCRIPTS / "walkthrough_template.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    assert placeholders(template) and placeholders(page) == []
    between = map(re.escape, re.split(r"\{[a-z_]+(?::[^}]*)?\}", template))
    assert re.fullmatch(".+?".join(between), page, re.DOTALL)


def test_the_committed_figures_are_small():
    pictures = list((ROOT / "docs" / "walkthrough").glob("*.png"))
    assert len(pictures) == 9
    assert all(picture.stat().st_size < 120_000 for picture in pictures)
