"""docs/qemu-img.md has every command and option of qemu-img, and names nothing that vmconv does not have."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import generate

PAGE = (Path(__file__).parents[2] / "docs/qemu-img.md").read_text().partition("\n## A front end")[0]
COMMANDS = generate.own_commands()
COMMON = {"-h", "--help", "-V", "--version", "--trace"}


def usage() -> dict[str, set[str]]:
    """Returns the options of each command of qemu-img, from its help."""
    help_text = subprocess.run(["qemu-img", "--help"], capture_output=True, text=True, check=True).stdout
    lines = help_text.partition("Command syntax:\n")[2].partition("\n\n")[0].splitlines()
    commands = {line.split()[0]: line for line in lines}
    return {name: set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", line)) - COMMON for name, line in commands.items()}


def column(number: int) -> str:
    return "\n".join(line.split(" | ")[number].strip("| ") for line in PAGE.splitlines() if line.startswith("| `"))


def named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", text))


def test_every_command_of_qemu_img_is_in_the_table() -> None:
    first = {line.split("`")[1].split()[0] for line in PAGE.splitlines() if line.startswith("| `")}
    assert {name for name in usage() if name not in first} == set()


@pytest.mark.parametrize("command", sorted(usage()))
def test_every_option_is_in_the_table(command: str) -> None:
    besides = {"bench": usage()["bench"], "bitmap": usage()["bitmap"]}.get(command, set())
    assert usage()[command] - besides - named(column(0)) == set()


def test_what_the_table_names_is_there() -> None:
    for cell in column(1).splitlines():
        words = re.findall(r"`([^`]+)`", cell)
        command = next((word.split()[0] for word in words if word.split()[0] in COMMANDS), None)
        options = named(" ".join(words))
        known = set().union(*(COMMANDS[command]._option_string_actions,)) if command else every_option()
        assert options <= set(known), cell


def test_no_row_is_there_twice() -> None:
    rows = column(0).splitlines()
    assert sorted(rows) == sorted(set(rows))


def every_option() -> set[str]:
    return {option for parser in COMMANDS.values() for option in parser._option_string_actions}
