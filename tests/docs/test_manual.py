"""The manual pages: each command has one with all of its options, and other programs find no mistakes in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import generate
from support.requirements import oracle_program

PAGES = {folder / name: text for folder, texts in generate.manual().items() for name, text in texts.items()}


def shown(page: Path) -> str:
    """Returns a page as plain text."""
    command = [oracle_program("mandoc"), "-T", "ascii", "-O", "width=500", str(page)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Bold and underlined letters are printed over.
    return subprocess.run(["col", "-bx"], input=text, capture_output=True, text=True, check=True).stdout


def test_pages_equal_the_output_of_the_script() -> None:
    found = {path: path.read_text() for folder in generate.manual() for path in folder.iterdir()}
    assert found == PAGES, "run: python docs/generate.py"


def test_each_command_has_a_page() -> None:
    programs = {"vmconv.1", "vmconv-qemu-img.1"}
    assert {path.name for path in PAGES} == programs | {f"vmconv-{name}.1" for name in generate.own_commands()}


def test_the_front_ends_page_has_its_verbs_and_variables() -> None:
    from vmconv.cli.qemu_img import arguments, handing

    (page,) = (path for path in PAGES if path.name == "vmconv-qemu-img.1")
    text = shown(page)
    for name in (*arguments.GRAMMARS, handing.LOG, handing.REAL, handing.VERBS):
        assert re.search(rf"^\s+(?:\w+, )*{name}\b", text, re.MULTILINE), name
    for title in ("COMMANDS", "ENVIRONMENT", "DIFFERENCES THAT REMAIN", "SEE ALSO"):
        assert f"\n{title}\n" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_finds_no_mistake(page: Path) -> None:
    done = subprocess.run(
        [oracle_program("mandoc"), "-T", "lint", str(page)], capture_output=True, text=True, check=False
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("name", generate.own_commands())
def test_a_page_has_the_options_of_its_command(name: str) -> None:
    (page,) = (path for path in PAGES if path.name == f"vmconv-{name}.1")
    text = shown(page)
    for action in generate.own_commands()[name]._actions:
        for option in action.option_strings:
            assert option in text or option in ("-h", "--help"), option
    assert f"vmconv {name}" in text


def test_both_ways_to_call_convert_are_shown() -> None:
    (page,) = (path for path in PAGES if path.name == "vmconv-convert.1")
    way = "vmconv convert [OPTIONS] -O FMT --directory DIR SOURCE ..."
    assert way in shown(page)
    assert way in (generate.ROOT / "docs/reference/commands.md").read_text()


def test_what_groff_would_take_as_a_request_is_text(tmp_path: Path) -> None:
    """A dot at the beginning of a line, backslashes, quotes."""
    import argparse

    import manpages

    parser = argparse.ArgumentParser(description="First. 'quoted' \\fBnot bold\\fR .TH is text ~ ^ `x`")
    parser.add_argument("--dot", help=".SH here -- is no heading \\")
    commands = parser.add_subparsers()
    commands.add_parser("one", help=".one")
    pages = manpages.pages(parser, {"one": parser}, "1.0.0", "2026-01-01")
    page = tmp_path / "vmconv-one.1"
    page.write_text(pages[page.name])
    text = shown(page)
    assert "'quoted' \\fBnot bold\\fR .TH is text ~ ^ `x`" in " ".join(text.split())
    assert ".SH here -- is no heading \\" in text
