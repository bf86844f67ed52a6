"""The Python API takes what its types say and nothing else, whatever an application hands to it."""

from __future__ import annotations

import inspect
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import pytest

import vmconv
from support import qcow2_images
from support.disks import MIB, make_disk
from vmconv import errors
from vmconv.cli.options import durability
from vmconv.cli.parser import make_parser
from vmconv.cli.requests import request_of as _request
from vmconv.conversion.request import Request
from vmconv.interface import arguments
from vmconv.interface.arguments import checked

ANY: Any = vmconv
"""The module without its types: what is wrong here is what a type checker would find."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", MIB)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Values of the wrong type


WRONG: dict[str, tuple[Mapping[str, Any], str]] = {
    "in place is no bool": ({"in_place": "no"}, "argument in_place: 'no' is neither True nor False"),
    "a number for a bool": ({"force": 1}, "argument force: 1 is neither True nor False"),
    "none for a bool": ({"chain": None}, "argument chain: None is neither True nor False"),
    "a string for a list": ({"allow_external": "/srv"}, "argument allow_external: '/srv' is not a list of paths"),
    "bytes for a list": ({"allow_external": b"/srv"}, "argument allow_external: b'/srv' is not a list of paths"),
    "a path for a list": ({"allow_external": Path("/srv")}, "is not a list of paths"),
    "a list of something else": ({"allow_external": [1]}, "argument allow_external: [1] is not a path"),
    "an empty tree": ({"allow_external": [""]}, "argument allow_external: [''] is empty"),
    "a misspelt value": ({"zero_copy": "requier"}, "argument zero_copy: 'requier' is not 'auto' or 'require'"),
    "a bool for a literal": ({"zero_copy": True}, "argument zero_copy: True is not 'auto' or 'require'"),
    "another misspelt value": ({"cache": "none"}, "argument cache: 'none' is not 'writeback' or 'unsafe'"),
    "a number for a string": ({"source_format": 5}, "argument source_format: 5 is not a string"),
    "bytes for a string": ({"target_format": b"raw"}, "argument target_format: b'raw' is not a string"),
    "a path for a name": ({"snapshot": Path("x")}, "is not a string"),
    "options that are a string": ({"options": "cluster_size=1M"}, "is not a mapping"),
    "options that are pairs": ({"options": [("cluster_size", "1M")]}, "is not a mapping"),
    "options named by numbers": ({"options": {1: 2}}, "is not a string"),
    "an option that is a list": (
        {"options": {"cluster_size": [1]}},
        "argument options.cluster_size: [1] is not a string",
    ),
    "an option that is a float": ({"options": {"cluster_size": 65536.0}}, "argument options.cluster_size: 65536.0"),
    "a bool for a size": ({"options": {"cluster_size": True}}, "option cluster_size: True has the wrong type"),
    "a number for a flag": ({"options": {"lazy_refcounts": 1}}, "option lazy_refcounts: 1 has the wrong type"),
    "a negative size": ({"options": {"cluster_size": -65536}}, "cluster_size=-65536"),
    "a backing file that is no path": ({"backing_file": 3}, "argument backing_file: 3 is not a path"),
    "a verification that is a word": (
        {"verify": "no"},
        "argument verify: 'no' is not True, False, 'metadata', 'sample', 'bytes' or 'qemu'",
    ),
    "a progress that is no function": ({"progress": 5}, "argument progress: 5 is not callable"),
    "an announcement that is no function": ({"announce": "print"}, "argument announce: 'print' is not callable"),
    "a misspelt keyword": ({"forse": True}, "there is no argument 'forse'"),
    "an old name": ({"fmt": "raw"}, "there is no argument 'fmt'"),
}


def test_an_error_names_the_argument_of_the_function(tmp_path: Path) -> None:
    with pytest.raises(vmconv.UsageError, match="argument size: '1G' is not an integer"):
        ANY.create(tmp_path / "new.raw", "1G")


@pytest.mark.parametrize("case", WRONG)
def test_an_invalid_request_is_refused_and_touches_nothing(disk: Path, case: str) -> None:
    given, words = WRONG[case]
    before = disk.read_bytes()
    with pytest.raises(vmconv.UsageError) as caught:
        ANY.convert(disk, disk.with_name("target.qcow2"), **given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(disk.parent) == ["disk.raw"]
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    ("function", "arguments", "keyword", "meant"),
    [
        ("convert", ["disk.raw", "x.qcow2"], "forse", "force"),
        ("plan", ["disk.raw", "x.qcow2"], "inplace", "in_place"),
        ("fanout", ["disk.raw", ["qcow2"]], "zerocopy", "zero_copy"),
        ("stream", ["disk.raw", 1, "raw"], "snapshots", "snapshot"),
        ("info", ["disk.raw"], "format_nam", "format_name"),
        ("map_disk", ["disk.raw"], "force_shar", "force_share"),
        ("check", ["disk.raw"], "allow_externals", "allow_external"),
        ("compare", ["disk.raw", "other.raw"], "strikt", "strict"),
        ("prove", ["disk.raw", "other.raw"], "lef_format", "left_format"),
    ],
)
def test_a_misspelt_keyword_is_refused_with_a_suggestion(
    function: str, arguments: list[Any], keyword: str, meant: str
) -> None:
    with pytest.raises(vmconv.UsageError) as caught:
        getattr(vmconv, function)(*arguments, **{keyword: "x"})
    assert caught.value.hint == f"did you mean {meant}"


def test_a_long_value_is_shown_in_part_and_a_broken_one_by_its_type(disk: Path) -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value, words in (("x" * 5000, "xxx..."), (Broken(), "a Broken")):
        with pytest.raises(vmconv.UsageError) as caught:
            ANY.convert(disk, "x.qcow2", force=value)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 200


# Paths


BAD_PATHS: dict[str, tuple[Any, str]] = {
    "empty": ("", "is empty"),
    "empty bytes": (b"", "is empty"),
    "a NUL": ("a\0b", "has a NUL byte"),
    "half a character": ("\ud800", "cannot be encoded as a file name"),
    "a number": (3, "is not a path"),
    "nothing": (None, "is not a path"),
    "a bool": (True, "is not a path"),
    "a list": (["disk.raw"], "is not a path"),
}
BAD = object()
GOOD = object()
FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "convert from": ("convert", {"source": BAD, "target": "target.qcow2"}),
    "convert to": ("convert", {"source": GOOD, "target": BAD, "target_format": "qcow2"}),
    "plan": ("plan", {"source": GOOD, "target": BAD, "target_format": "qcow2"}),
    "fanout": ("fanout", {"source": BAD, "formats": ["qcow2"]}),
    "fanout into": ("fanout", {"source": GOOD, "formats": ["qcow2"], "directory": BAD}),
    "stream": ("stream", {"source": BAD, "descriptor": 1, "target_format": "qcow2"}),
    "info": ("info", {"path": BAD}),
    "map_disk": ("map_disk", {"path": BAD}),
    "check": ("check", {"path": BAD}),
    "compare": ("compare", {"left": BAD, "right": GOOD}),
    "compare with": ("compare", {"left": GOOD, "right": BAD}),
    "prove": ("prove", {"left": GOOD, "right": BAD}),
    "undo": ("undo", {"path": BAD}),
    "recover": ("recover", {"path": BAD}),
}


@pytest.mark.parametrize("case", BAD_PATHS)
@pytest.mark.parametrize("way", FUNCTIONS)
def test_an_invalid_path_is_refused(disk: Path, way: str, case: str) -> None:
    function, given = FUNCTIONS[way]
    bad, words = BAD_PATHS[case]
    values = {name: bad if value is BAD else disk if value is GOOD else value for name, value in given.items()}
    with pytest.raises(vmconv.UsageError) as caught:
        getattr(vmconv, function)(**values)
    (name,) = [name for name, value in given.items() if value is BAD]
    assert f"argument {name}: " in str(caught.value)
    assert words in str(caught.value)
    assert names(disk.parent) == ["disk.raw"]


class Foreign(os.PathLike[str]):
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


KINDS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "bytes": os.fsencode,
    "Path": lambda path: path,
    "PurePath": pathlib.PurePosixPath,
    "another": Foreign,
}


@pytest.mark.parametrize("kind", KINDS)
def test_paths_of_every_kind_are_taken_everywhere(tmp_path: Path, kind: str) -> None:
    as_given = KINDS[kind]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "base.raw").write_bytes(bytes(1024))
    overlay = tmp_path / "overlay.qcow2"
    overlay.write_bytes(qcow2_images.empty_overlay("../outside/base.raw"))
    inner = tmp_path / "inner"
    inner.mkdir()
    overlay = overlay.rename(inner / "overlay.qcow2")
    external = [as_given(outside)]
    source, target = as_given(overlay), as_given(tmp_path / "made.qcow2")

    assert vmconv.plan(source, target, allow_external=external).files
    assert vmconv.convert(source, target, allow_external=external).target == str(tmp_path / "made.qcow2")
    kept = tmp_path / "kept.qcow2"
    vmconv.convert(source, as_given(kept), allow_external=external, backing_file=as_given(outside / "base.raw"))
    assert vmconv.info(as_given(kept))["backing-filename"] == str(outside / "base.raw")
    made = vmconv.fanout(source, ["raw", "vdi"], directory=as_given(inner), allow_external=external)
    assert [Path(one.target).name for one in made] == ["overlay.raw", "overlay.vdi"]
    assert vmconv.compare(source, target, allow_external=external)
    assert vmconv.map_disk(source, allow_external=external)
    assert vmconv.check(source, allow_external=external)
    assert vmconv.prove(source, target, allow_external=external) is not None
    with (tmp_path / "streamed").open("wb") as file:
        vmconv.stream(source, file.fileno(), "raw", allow_external=iter(external))
    assert (tmp_path / "streamed").stat().st_size == vmconv.info(source)["virtual-size"]


def test_a_string_of_formats_is_no_list_of_formats(disk: Path) -> None:
    with pytest.raises(vmconv.UsageError, match="argument formats: 'raw' is not a list of names"):
        vmconv.fanout(disk, "raw", directory=disk.parent)


def test_options_may_be_any_mapping_with_values_of_their_own_types(disk: Path) -> None:
    options: Mapping[str, vmconv.OptionValue] = MappingProxyType(
        {"cluster_size": 4096, "lazy_refcounts": True, "compat": "1.1"}
    )
    vmconv.convert(disk, disk.with_name("a.qcow2"), options=options)
    facts = vmconv.info(disk.with_name("a.qcow2"))
    assert facts["cluster-size"] == 4096
    assert facts["format-specific"]["data"]["lazy-refcounts"] is True
    vmconv.fanout(disk, ("qcow2",), directory=disk.parent, options={"qcow2": {"cluster_size": "8K"}})
    assert vmconv.info(disk.with_name("disk.qcow2"))["cluster-size"] == 8192


def test_fanout_refuses_no_formats_and_options_of_other_formats(disk: Path) -> None:
    with pytest.raises(vmconv.UsageError, match="fan-out to no format"):
        vmconv.fanout(disk, [])
    with pytest.raises(vmconv.UsageError, match="options for vdi"):
        vmconv.fanout(disk, ["raw"], options={"vdi": {}})
    with pytest.raises(vmconv.UsageError, match=r"argument options\.vdi: 'x' is not a mapping"):
        ANY.fanout(disk, ["vdi"], options={"vdi": "x"})


# Descriptors


@pytest.fixture
def closed() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    return writer


@pytest.fixture
def read_only(disk: Path) -> Iterator[int]:
    descriptor = os.open(disk, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_a_descriptor_that_cannot_be_written_to_is_refused(disk: Path, closed: int, read_only: int) -> None:
    for descriptor, words in (
        (closed, f"argument descriptor: {closed} is not open"),
        (-1, "argument descriptor: -1 is not open"),
        (1 << 70, f"argument descriptor: {1 << 70} is not open"),
        (read_only, f"argument descriptor: {read_only} is not open for writing"),
        ("1", "argument descriptor: '1' is not an integer"),
        (True, "argument descriptor: True is not an integer"),
        (sys.stdout, "is not an integer"),
        (1.0, "argument descriptor: 1.0 is not an integer"),
    ):
        with pytest.raises(vmconv.UsageError) as caught:
            ANY.stream(disk, descriptor, "qcow2")
        assert words in str(caught.value)


def test_a_stream_without_a_format_is_refused(disk: Path) -> None:
    for given in (None, ""):
        with pytest.raises(vmconv.UsageError):
            ANY.stream(disk, 1, given)


# Errors


def test_every_error_is_exported() -> None:
    raised = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)}
    assert raised <= set(vmconv.__all__)
    assert vmconv.__all__ == sorted(vmconv.__all__)
    assert all(getattr(vmconv, name) is not None for name in vmconv.__all__)


@pytest.mark.parametrize("what", ["nothing", "a loop of links", "a long name", "a directory", "below a file"])
def test_errors_of_the_system_are_errors_of_vmconv(disk: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "loop.raw").symlink_to("loop.raw")
    path = {
        "nothing": tmp_path / "none.raw",
        "a loop of links": tmp_path / "loop.raw",
        "a long name": tmp_path / f"{'x' * 300}.raw",
        "a directory": tmp_path,
        "below a file": disk / "inside.raw",
    }[what]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("info", {"path": path}),
        ("map_disk", {"path": path}),
        ("convert", {"source": path, "target": tmp_path / "target.qcow2"}),
        ("undo", {"path": path}),
    ]
    if what != "a directory":
        calls.append(("fanout", {"source": disk, "formats": ["qcow2"], "directory": path}))
    if what != "nothing":
        calls.append(("convert", {"source": disk, "target": path, "target_format": "qcow2"}))
    for function, given in calls:
        with pytest.raises(vmconv.VmconvError) as caught:
            getattr(vmconv, function)(**given)
        assert "\n" not in str(caught.value)


# One definition


COMMAND_LINE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "nothing": ([], {}),
    "formats": (["-f", "raw", "-O", "qcow2"], {"source_format": "raw", "target_format": "qcow2"}),
    "options": (["-o", "a=1,b=on"], {"options": {"a": "1", "b": "on"}}),
    "a snapshot": (["-l", "s"], {"snapshot": "s"}),
    "flags": (
        ["--chain", "--force", "--in-place", "--keep-undo", "-U"],
        dict.fromkeys(("chain", "force", "in_place", "keep_undo", "force_share"), True),
    ),
    "a backing file": (["-B", "b", "-F", "raw"], {"backing_file": Path("b"), "backing_format": "raw"}),
    "another's backing file": (["--backing-format", "raw"], {"source_backing_format": "raw"}),
    "storage": (
        ["--zero-copy", "require", "-t", "unsafe", "--backend", "copy"],
        {"zero_copy": "require", "cache": "unsafe", "backend": "copy"},
    ),
    "secrets": (["--secret", "a", "--secret", "-"], {"secrets": (Path("a"), "-")}),
    "a new passphrase": (["--target-secret", "a"], {"target_secret": Path("a")}),
    "parents": (["--parent", "a", "--parent", "b"], {"parents": [Path("a"), "b"]}),
    "trees": (["--allow-external", "/a", "--allow-external", "/b"], {"allow_external": (b"/a", Path("/b"))}),
}


@pytest.mark.parametrize("case", COMMAND_LINE)
def test_the_command_line_and_the_api_make_the_same_request(case: str) -> None:
    given, keywords = COMMAND_LINE[case]
    options = make_parser("convert").parse_args(["convert", *given, "source", "target"])
    by_line = _request(options, *options.names)
    by_api = checked(Request, source=Path("source"), target="target", **keywords)
    paths = {name: getattr(by_api, name) for name in ("allow_external", "secrets", "parents")}
    assert by_api == by_line._replace(**paths)
    for name, found in paths.items():
        assert list(found) == list(getattr(by_line, name))


def test_requests_of_the_command_line_pass_the_check_unchanged() -> None:
    for given, _ in COMMAND_LINE.values():
        options = make_parser("convert").parse_args(["convert", *given, "source", "target"])
        request = _request(options, *options.names)
        again = checked(Request, **request._asdict())
        changed = {"options": dict(request.options), "more_sources": list(request.more_sources)}
        assert again._asdict() == request._asdict() | changed


def test_the_choices_of_the_command_line_are_those_of_the_api() -> None:
    parser = make_parser("convert")
    (commands,) = [action for action in parser._actions if action.dest == "command"]
    assert isinstance(commands.choices, dict)
    choices = {action.dest: action.choices for action in commands.choices["convert"]._actions if action.choices}
    # The command line takes the cache modes of qemu-img, too.
    given = {"zero_copy": set(choices["zero_copy"]), "cache": {durability(each) for each in choices["cache"]}}
    for name, values in given.items():
        assert values == set(getattr(get_type_hints(Request)[name], "__args__", ()))


def keywords_of(function: str) -> dict[str, Any]:
    """Returns the keywords of a function of the API, and their defaults."""
    parameters = inspect.signature(getattr(vmconv, function)).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


INTERNAL = {"descriptor", "facts", "blank", "size", "spared", "storage"}
"""Fields of a request that other functions of the API set."""
FILE = {"no_create", "target_is_zero", "target_secret"}
"""Fields for one target: a block device, or a file that is encrypted."""


@pytest.mark.parametrize(
    ("function", "kinds", "besides"),
    [
        ("convert", (Request, arguments.RunOptions), INTERNAL),
        ("plan", (Request,), INTERNAL),
        ("stream", (Request, arguments.RunOptions), {"target_format", "created", "confined", *FILE, *INTERNAL}),
        ("fanout", (Request, arguments.RunOptions), {"target_format", *FILE, *INTERNAL}),
        ("info", (arguments.Reading,), set()),
        ("map_disk", (arguments.Reading, arguments.MapOptions), set()),
        ("measure", (arguments.Measuring,), {"source"}),
        ("check", (arguments.Reading, arguments.CheckOptions), set()),
        ("compare", (arguments.ImagePair,), set()),
        ("prove", (arguments.ImagePair,), {"strict"}),
        ("recover", (arguments.RestoreOptions,), set()),
        ("undo", (arguments.RestoreOptions,), set()),
    ],
)
def test_keywords_and_defaults_are_the_fields_of_the_request(
    function: str, kinds: tuple[Any, ...], besides: set[str]
) -> None:
    wanted = {name: value for kind in kinds for name, value in kind._field_defaults.items() if name not in besides}
    found = keywords_of(function)
    if function == "fanout":
        assert found.pop("directory") == "."
    assert found == wanted


# What a type checker finds


SNIPPETS = {
    "right": ("vmconv.convert(Path('a'), b'b', force=True, options={'x': 1}, allow_external=['/srv'])", None),
    "a misspelt keyword": ("vmconv.convert('a', 'b', forse=True)", '"forse"'),
    "a misspelt value": ("vmconv.convert('a', 'b', zero_copy='requier')", "zero_copy"),
    "a string for a bool": ("vmconv.convert('a', 'b', in_place='no')", "in_place"),
    "of info": ("vmconv.info('a', format='raw')", '"format"'),
    "of compare": ("vmconv.compare('a', 'b', strict=1)", "strict"),
    "of fanout": ("vmconv.fanout('a', ['raw'], target_format='raw')", '"target_format"'),
    "of stream": ("vmconv.stream('a', 1, 'raw', target_format='raw')", "target_format"),
    "an error": ("try:\n    pass\nexcept vmconv.ZeroCopyError as exc:\n    print(exc.hint)", None),
    "a literal": ("mode: vmconv.ZeroCopy = 'auto'\nvmconv.plan('a', 'b', zero_copy=mode).totals.copied", None),
}


def test_mypy_finds_what_would_be_refused(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    for number, (text, _) in enumerate(SNIPPETS.values()):
        (tmp_path / f"snippet{number}.py").write_text(f"from pathlib import Path\nimport vmconv\n{text}\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        os.devnull,
        "--cache-dir",
        str(tmp_path / "c"),
    ]
    files = [f"snippet{number}.py" for number in range(len(SNIPPETS))]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600)
    for number, (case, (_, words)) in enumerate(SNIPPETS.items()):
        found = [line for line in done.stdout.splitlines() if line.startswith(f"snippet{number}.py")]
        assert bool(found) == (words is not None), (case, done.stdout, done.stderr)
        assert words is None or words in "".join(found), (case, found)


def test_a_mapping_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * 512)
    with pytest.raises(vmconv.UsageError, match="is not a list of paths"):
        vmconv.info(tmp_path / "disk.raw", allow_external={"/": True})


# Events


def test_outputs_are_announced_before_they_have_their_names(disk: Path) -> None:
    seen: list[tuple[str, int, bool]] = []
    inodes: list[int] = []
    target = disk.with_name("target.vmdk")

    def created(name: str, descriptor: int) -> None:
        seen.append((name, len(seen), target.exists()))
        inodes.append(os.fstat(descriptor).st_ino)

    options = {"subformat": "monolithicFlat"}
    vmconv.convert(
        disk, target, options=options, created=created, announce=lambda plan: seen.append((plan.way, 0, False))
    )
    assert seen == [("copy", 0, False), ("target-flat.vmdk", 1, False), ("target.vmdk", 2, False)]
    assert inodes == [target.with_name(name).stat().st_ino for name in ("target-flat.vmdk", "target.vmdk")]


def test_the_plan_names_the_files_that_were_opened(disk: Path) -> None:
    overlay = disk.with_name("overlay.qcow2")
    vmconv.convert(disk, overlay, options={})
    assert vmconv.plan(overlay, disk.with_name("x.raw")).opened == (str(overlay.resolve()),)


def test_a_target_of_the_api_is_always_a_file(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk.parent)
    assert vmconv.plan(disk, "-", target_format="qcow2").files[0].name == "-"
    vmconv.convert(disk, "-", target_format="qcow2")
    assert names(disk.parent) == ["-", "disk.raw"]
