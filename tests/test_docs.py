"""What the pages say against what is there: links, paths, symbols, settings and commands."""

import re
import subprocess
import sys

import pytest

from tests.fixtures.pages import ROOT, definitions, linked_symbols, links
from tinyflux.cli.cache import COMMANDS as CACHE_COMMANDS
from tinyflux.cli.main import COMMANDS
from tinyflux.config import setting_names

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SECTIONS = "data|zoo|cache|model|trainer|workers|sample|serve|cluster"
SETTINGS = setting_names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_path_leads_somewhere(page):
    for text, target in links(page):
        assert target.exists(), f"[{text}] leads to {target}"
    folders = "tinyflux|benchmarks|tests|cluster|configs|docs|ray_jobs"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_symbol_is_defined_in_the_module_that_it_links_to(page):
    symbols = linked_symbols(page)
    for module, name in symbols:
        assert name in definitions(module), f"{module.name} defines no {name}"
    assert len(symbols) > 30 or page.name != "journey.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_and_command_exists(page):
    text = page.read_text()
    for name in re.findall(rf"(?:`|--)((?:{SECTIONS})\.[a-z_0-9]+)(?![\w(]|\.[a-z])", text):
        # A file's name looks the same: `cache.py`, `model.safetensors`.
        assert name in SETTINGS or name.endswith((".py", ".safetensors")), name
    for command, rest in re.findall(
        r"(?:^|bin/|`)tinyflux ([a-z]+)(?: ([a-z]+))?", text, re.MULTILINE
    ):
        assert command in COMMANDS, command
        assert command != "cache" or not rest or rest in CACHE_COMMANDS, rest
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target


def test_the_index_of_benchmarks_names_each_script():
    targets = {target.name for _, target in links(ROOT / "benchmarks" / "README.md")}
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} <= targets


def test_tables_of_figures_are_those_of_the_records():
    pages = "".join(page.read_text() for page in PAGES)
    assert len(re.findall("<!-- figures: ", pages)) == len(re.findall("<!-- end of", pages)) > 0
    command = [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
