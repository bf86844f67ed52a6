"""The documentation says what the code does: signatures, options, exit codes, modules, and the output of examples."""

from __future__ import annotations

import ast
import doctest
import inspect
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import generate
import vmconv
from support import malformed_page, ways
from support.disks import QemuImg
from support.mounts import Mounts
from vmconv import errors
from vmconv.cli.parser import make_parser
from vmconv.cli.plugin import files as skeleton
from vmconv.cli.stops import EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED
from vmconv.errors import ImageError
from vmconv.interface import hooks
from vmconv.testing import image_file, sample_disk, sample_images

ROOT = Path(__file__).parents[2]
README, PLUGINS, ARCHITECTURE = (ROOT / name for name in ("README.md", "docs/plugins.md", "docs/architecture.md"))
THREATS = ROOT / "docs/threat-model.md"
EXIT_CODES, PYTHON = ROOT / "docs/reference/exit-codes.md", ROOT / "docs/guide/python.md"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "core/*.md", "plugins/*/*.md", "benchmarks/*.md", "changelog.d/*.md")
    for page in ROOT.glob(pattern)
)
RUN = [page for page in PAGES if "\n<!-- run:" in page.read_text()]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    title: str | None
    text: str


def blocks(text: str) -> list[Block]:
    return [Block(*match.groups()) for match in FENCE.finditer(text)]


def section(page: Path, heading: str) -> str:
    """Returns the text under a heading, up to the next one of its level or above."""
    text = page.read_text()
    match = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert match, f"{page.name} has no heading {heading!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def cells(text: str) -> list[list[str]]:
    """Returns the rows of all tables of a text, without their headings."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-| ")]


COMMANDS = generate.own_commands()


# Hooks, formats, backends


HOOKS = [name for name in vars(hooks) if name.startswith("vmconv_")]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_has_a_heading_with_its_signature(name: str) -> None:
    signature = str(inspect.signature(getattr(hooks, name))).replace("'", "")
    assert section(PLUGINS, f"`{name}{signature}`").strip()


def test_no_hook_is_documented_that_does_not_exist() -> None:
    assert set(re.findall(r"^### `(vmconv_\w+)", PLUGINS.read_text(), re.MULTILINE)) == set(HOOKS)


@pytest.mark.parametrize("module", ["format", "backend"])
def test_the_methods_of_an_interface_have_headings_with_their_signatures(module: str) -> None:
    path = ROOT / "core/src/vmconv/interface" / f"{module}.py"
    name = {"format": "Format", "backend": "Backend"}[module]
    (interface,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    methods = [node for node in interface.body if isinstance(node, ast.FunctionDef)]
    assert methods
    for method in methods:
        assert method.returns
        # The syntax tree is printed with defaults that have no spaces around them.
        arguments = ast.unparse(method.args).replace("=", " = ")
        assert section(PLUGINS, f"`{method.name}({arguments}) -> {ast.unparse(method.returns)}`").strip()


# Malformed images


def test_the_page_on_malformed_images_lists_all_cases() -> None:
    page = ROOT / "docs/malformed.md"
    assert page.read_text() == malformed_page.render(), "python tests/support/malformed_page.py > docs/malformed.md"


# Threat model


def names_of_tests(path: Path) -> set[str]:
    """Returns the names of the tests in a file, those of a class with its name before them."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def test_each_rule_of_the_threat_model_has_tests_that_exist() -> None:
    rules = [row for row in cells(section(THREATS, "Rules")) if row[0] != "rule"]
    assert len(rules) > 20
    for rule, tests in rules:
        named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", tests)
        assert named, f"no test shows: {rule}"
        assert len(named) == tests.count("`") // 2, tests
        for path, name in named:
            assert name in names_of_tests(ROOT / path), f"{path} has no {name}"


def test_each_attacker_is_stopped_by_a_rule() -> None:
    for row in cells(section(THREATS, "Attackers"))[1:]:
        assert re.search(r"\]\(|the same", row[3]), row[0]


# Commands


GENERATED = {
    "commands.md": (generate.COMMANDS, generate.commands_page),
    "formats.md": (generate.FORMATS, generate.formats_page),
    "machines.md": (generate.MACHINES, generate.machines_page),
    "CHANGELOG.md": (generate.CHANGELOG, lambda: generate.changelog(generate.CHANGELOG.read_text())),
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_equals_the_output_of_the_script(name: str) -> None:
    path, render = GENERATED[name]
    assert path.read_text() == render(), "run: python docs/generate.py"


def test_the_reference_has_every_command_and_option() -> None:
    """The page is compared with the script elsewhere; this compares the script with the parsers."""
    for command, parser in COMMANDS.items():
        text = section(generate.COMMANDS, f"vmconv {command}")
        named = {word for row in cells(text) for name in re.findall(r"`([^`]+)`", row[0]) for word in name.split()}
        expected = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        assert expected <= named, command


def test_the_guide_names_every_command() -> None:
    guide = "".join(page.read_text() for page in (ROOT / "docs/guide").glob("*.md"))
    for command in set(COMMANDS) - {"fleet", "node"}:
        assert re.search(rf"`?vmconv {command}\b", guide), command


def test_the_page_on_python_lists_every_function() -> None:
    functions = {name for name in vmconv.__all__ if inspect.isroutine(inspect.unwrap(getattr(vmconv, name)))}
    listed = {name for row in cells(PYTHON.read_text()) for name in re.findall(r"^`(\w+)\(", row[0])}
    assert listed == functions


def error_classes() -> list[type[errors.VmconvError]]:
    found = [errors.VmconvError]
    for one in found:
        found.extend(one.__subclasses__())
    return [one for one in found if one.__module__ == errors.__name__]


def test_each_error_is_in_the_table_with_its_exit_code() -> None:
    table = {row[0]: row[1] for row in cells(EXIT_CODES.read_text())}
    for one in error_classes():
        assert table[f"`{one.__name__}`"] == str(one.exit_code)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_exit_code_of_a_command_is_in_the_table(command: str) -> None:
    documented = {
        int(row[0])
        for row in cells(EXIT_CODES.read_text())
        if row[0].isdigit() and (row[1].startswith("all") or f"`{command}`" in row[1])
    }
    _, _, status = (COMMANDS[command].epilog or "").partition("exit status")
    stated = {int(code) for code in re.findall(r"^  (\d+)  ", status, re.MULTILINE)}
    error_code = COMMANDS[command].get_default("error_code")
    assert stated | {0, EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED} | ({error_code} - {None}) <= documented


# The tree


def test_the_module_map_is_complete() -> None:
    source = ROOT / "core/src/vmconv"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    listed = [row[0].strip("`") for row in cells(section(ARCHITECTURE, "Modules")) if row[0].endswith(".py`")]
    assert sorted(listed) == sorted(modules)


WALKS = ("The walk of a conversion", "The walk of a conversion in place", "A fleet request")
SCREEN = 60
"""Lines of a screen."""


def defined() -> set[str]:
    """Returns the names of core and the fleet: of modules' and classes' own names, alone and as `owner.name`."""
    found: set[str] = set()
    for top in ("core/src/vmconv", "plugins/fleet/src"):
        for path in (ROOT / top).rglob("*.py"):
            tree = ast.parse(path.read_text())
            owners: dict[str, ast.Module | ast.ClassDef] = {path.stem: tree}
            owners |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
            for owner, node in owners.items():
                for child in node.body:
                    names = [getattr(child, "name", ""), ast.unparse(getattr(child, "target", child)).split(" = ")[0]]
                    found |= {name for name in names if name} | {f"{owner}.{name}" for name in names if name}
    return found


def test_the_walks_name_what_the_code_has_each_value_once_on_a_screen() -> None:
    known = defined()
    for heading in WALKS:
        text = section(ARCHITECTURE, heading).partition("`inplace/change.py` is the protocol")[0]
        assert len(text.splitlines()) <= SCREEN, heading
        values = [row[0].strip("`") for row in cells(text)[1:]]
        assert len(values) == len(set(values)) >= 6, heading
        names = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)`", "\n".join(" ".join(row) for row in cells(text)[1:]))
        modules = [name for name in names if name.endswith(".py")]
        assert [name for name in names if name not in known and name not in modules] == [], heading
        files = [
            name for name in re.findall(r"`([\w/]+\.py)`", text) if not (ROOT / "core/src/vmconv" / name).is_file()
        ]
        assert files == [], heading


def test_the_set_up_line_of_the_readme_installs_all_but_what_brings_servers_and_clients() -> None:
    distributions = [ROOT / "core", *(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
    line = next(b.text for b in blocks(section(README, "Set-up")) if "vmconv demo" in b.text)
    named = {path for word in line.split() if word.startswith("./") for path in ROOT.glob(word)}
    assert set(distributions) - named == {ROOT / f"plugins/{name}" for name in ("fleet", "s3", "swift")}


def test_a_changelog_fragment_names_an_issue_and_a_kind() -> None:
    kinds = re.findall(r"`(\w+)`", (ROOT / "changelog.d/README.md").read_text().splitlines()[1])
    for path in (ROOT / "changelog.d").iterdir():
        assert path.name == "README.md" or re.fullmatch(rf"\d+\.({'|'.join(kinds)})\.md", path.name), path.name


def anchor(heading: str) -> str:
    """Returns the anchor that a heading has in rendered Markdown."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    for target, fragment in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose):
        if re.match(r"https?:", target):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", there.read_text()), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name}: {target}#{fragment}"


# Examples


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each `$ ` command of a text with the lines that it prints."""
    for block in blocks(text):
        if block.language == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                command, *output = part.splitlines()
                yield command, output


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_pages_with_examples_are_found() -> None:
    assert README in RUN
    assert len(RUN) > 10


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_commands_that_are_shown_can_be_parsed(page: Path) -> None:
    parser = make_parser()
    shown = [shlex.split(line) for line, _ in commands_of(page.read_text()) if line.startswith("vmconv ")]
    for words in shown:
        end = next((i for i, word in enumerate(words) if word in ("|", ">", "2>/dev/null")), len(words))
        assert parser.parse_args(words[1:end]).command == words[1]


def marked(page: Path) -> str:
    """Returns the part of a page whose examples are run."""
    return page.read_text().partition("<!-- run:")[2].partition("<!-- end of run -->")[0]


def run(command: str, directory: Path, before: int = 0, path: Path | None = None) -> tuple[int, str]:
    """Returns the exit code of a shell command, and what it prints on a terminal; `$?` is `before` in it."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(path or ""),
    }
    done = subprocess.run(
        ["bash", "-c", f"(exit {before}); {command}"],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def comparable(lines: list[str], directory: Path) -> list[str]:
    """Returns the lines without what differs from run to run: times, places on storage, the directory."""
    result = []
    for line in lines:
        # Where the filesystem puts a file, and in how many pieces, is its own business.
        if re.match(r"0x\w+ +0x\w+ +(0x\w+|unknown) +(0x\w+|unknown) +(same|NOT SHARED)", line):
            continue
        words = line.replace(str(directory), "/srv/images")
        words = re.sub(r"\b\d+\.\d{3,}\b", "TIME", words)
        words = re.sub(r"on xfs at .*", "on xfs", words)
        words = re.sub(r"^disk size: .*", "disk size", words)
        result.append(" ".join(words.split()))
    return result


def matches(expected: list[str], got: list[str]) -> bool:
    """True when the lines are equal; a line `...` stands for any number of lines."""
    if not expected:
        return not got
    if expected[0] == "...":
        return any(matches(expected[1:], got[skip:]) for skip in range(len(got) + 1))
    return bool(got) and expected[0] == got[0] and matches(expected[1:], got[1:])


def assert_examples(text: str, directory: Path, path: Path | None = None) -> None:
    code = 0
    for command, output in commands_of(text):
        code, printed = run(command, directory, code, path)
        expected, got = comparable(output, directory), comparable(printed.splitlines(), directory)
        assert matches(expected, got), f"$ {command}\n{printed}"


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_examples_print_the_shown_output(
    page: Path, xfs_dir: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_examples(marked(page), xfs_dir)
    monkeypatch.chdir(xfs_dir)
    for block in blocks(marked(page)):
        if block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, {}, page.name, str(page), 0)
            assert doctest.DocTestRunner().run(test).failed == 0


# The example of a plugin


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The example plugin, laid out as pip would install it; its tests lie beside it."""
    site = tmp_path / "site"
    files = {block.title: block.text for block in blocks(PLUGINS.read_text()) if block.title}
    for name, text in files.items():
        path = site / name.removeprefix("src/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    information = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["vmconv"].items())
    (information / "entry_points.txt").write_text(f"[vmconv]\n{points}")
    (site / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return site


def test_the_skeleton_of_a_plugin_is_the_example() -> None:
    shown = {block.title: block.text for block in blocks(PLUGINS.read_text()) if block.title}
    assert dict(skeleton("toy")) == shown


def test_the_example_plugin_passes_the_conformance_kit(toy: Path) -> None:
    code, printed = run("python -m pytest -q -p no:cacheprovider tests", toy, path=toy)
    assert code == 0, printed
    assert "passed" in printed


def test_the_example_plugin_converts(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(os.urandom(1 << 20))
    for command in (
        "vmconv convert disk.raw disk.qcow2",
        "vmconv convert disk.qcow2 disk.toy",
        "vmconv check disk.toy",
        "vmconv convert disk.toy back.raw",
        "cmp disk.raw back.raw",
    ):
        code, printed = run(command, tmp_path, path=toy)
        assert code == 0, f"$ {command}\n{printed}"


def test_the_example_plugin_prints_the_shown_output(toy: Path, xfs_dir: Path) -> None:
    disk = [line for line, _ in commands_of(README.read_text()) if line.startswith(("truncate", "dd "))]
    assert run(" && ".join(disk), xfs_dir)[0] == 0
    assert_examples(section(PLUGINS, "A complete format plugin"), xfs_dir, toy)


def test_the_example_of_an_allocation_table_reads_and_writes_what_qemu_does() -> None:
    (code,) = [block.text for block in blocks(section(PLUGINS, "An allocation table")) if block.language == "python"]
    shown: dict[str, Any] = {}
    exec(compile(code, "docs/plugins.md", "exec", dont_inherit=True), shown)
    (image,) = [one for one in sample_images("vdi") if one.name == "dynamic.vdi"]
    file = image_file(image.data)
    table = shown["table_of"](file)
    assert table.read(0, table.size) == sample_disk()
    at, _ = struct.unpack_from("<II", image.data, 340)
    # QEMU wrote the blocks in the disk's order, too.
    assert shown["map_of"](table, 1 << 20) == image.data[at : at + 16]
    file.write(at + 4, struct.pack("<I", 77))
    with pytest.raises(ImageError, match=rf"block map entry 1 at {at + 4:#x}: block at 0x\w+ is past the end"):
        shown["table_of"](file)


# Which way


def test_the_tables_of_ways_are_what_the_code_decides(mounts: Mounts, qemu_img: QemuImg) -> None:
    directories = {}
    for kind in ways.FILESYSTEMS:
        directories[kind] = mounts.get(kind) / "ways"
        directories[kind].mkdir()
    try:
        decided = ways.tables(directories)
    finally:
        for directory in directories.values():
            shutil.rmtree(directory)
    page = ways.PAGE.read_text()
    assert ways.written(page) == decided, "python tests/support/ways.py rewrites the page"
    letters = {row[0] for row in cells(page.partition(ways.BEGIN)[0])} - {"letter"}
    used = {letter for row in cells(decided) for cell in row[1:] for letter in cell if row[0] != "from \\ to"}
    assert used == letters


# Decisions


def test_the_index_lists_each_decision_once_under_its_title() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    titles = {page.name: page.read_text().partition("\n")[0].removeprefix("# ") for page in pages}
    rows = re.findall(r"^\| (\d+) \| .* \| \[(.*)\]\((.*)\) \|$", (ROOT / "docs/decisions/index.md").read_text(), re.M)
    assert [(name[:4], title, name) for name, title in titles.items()] == rows
    assert len({page.name[:4] for page in pages}) == len(pages)
