"""Plugins of all kinds in one environment: broken ones are reported by distribution and never stop the others."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import qcow2_images
from vmconv import api
from vmconv.cli import main as cli
from vmconv.errors import ImageError, UsageError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed

Install = Callable[..., Registry]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution with one module of the given source, and returns the registry of the new environment."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules = []

    def make(
        source: str, name: str = "vmconv-acme", *, entry_points: str | None = None, metadata: bool = True
    ) -> Registry:
        module = name.replace("-", "_") + "_plugin"
        modules.append(module)
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        information = site / f"{name.replace('-', '_')}-1.5.dist-info"
        information.mkdir()
        if metadata:
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        if entry_points is None:
            entry_points = f"[vmconv]\nplugin = {module}\n"
        (information / "entry_points.txt").write_text(entry_points)
        installed.cache_clear()
        return installed()

    yield make
    installed.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


def problem(registry: Registry, distribution: str = "vmconv-acme") -> str:
    """Returns the reason of the one problem that this distribution has."""
    (reason,) = [found.reason for found in registry.problems if found.distribution == distribution]
    assert len(reason.splitlines()) == 1
    return reason


def works(registry: Registry) -> bool:
    """True when everything that vmconv needs for a conversion is there."""
    return {"raw", "qcow2"} <= registry.formats.keys() and {"reflink", "copy"} <= registry.backends.keys()


PRELUDE = """
from vmconv.interface.command import Command
from vmconv.interface.format import Format
from vmconv.interface.hooks import hookimpl
from vmconv.testing.memory import MemoryBackend

class Acme(Format):
    name = "acme"
    title = "Acme disk"
    suffixes = (".acme",)

class AcmeBackend(MemoryBackend):
    name = "acmestore"
"""
GOOD = (
    PRELUDE
    + """
def run(options):
    print("hello from acme")
    return 7

@hookimpl
def vmconv_register_formats():
    return [Acme()]

@hookimpl
def vmconv_register_backends():
    return [AcmeBackend()]

@hookimpl
def vmconv_register_commands():
    return [Command("acme-hello", "greet the user", "Greets.", lambda parser: None, run)]
"""
)

FORMATS = "@hookimpl\ndef vmconv_register_formats():\n    "

BROKEN = {
    "a missing import": ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
    "a syntax error": ("def broken(:", "SyntaxError"),
    "an exit at import": ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
    "an error at import": ("raise RuntimeError('half\\ninstalled')", "RuntimeError"),
    "a newer interface": (
        "VMCONV_INTERFACE = 99\n" + GOOD,
        "needs version 99 of the plugin interface, this vmconv has 1: upgrade vmconv",
    ),
    "an older interface": (
        "VMCONV_INTERFACE = 0\n" + GOOD,
        "was written for version 0 of the plugin interface, this vmconv has 1: upgrade the plugin",
    ),
    "an interface that cannot be printed": ("VMCONV_INTERFACE = 10**5000\n" + GOOD, "VMCONV_INTERFACE: ValueError"),
    "an interface whose attributes fail": (
        GOOD + "\ndef __getattr__(name):\n    raise RuntimeError(name)\n",
        "VMCONV_INTERFACE: RuntimeError",
    ),
    "an interface that is no number": (
        "VMCONV_INTERFACE = '1.0'\n" + GOOD,
        "VMCONV_INTERFACE is '1.0', which is not an interface version",
    ),
    "a name that the interface has not": (
        "from vmconv.plugin import Telepathy",
        "cannot import name 'Telepathy' from 'vmconv.plugin'",
    ),
    "an error in the hook": (PRELUDE + FORMATS + "raise KeyError('x')", "KeyError"),
    "an error of two lines in the hook": (
        PRELUDE + FORMATS + "raise ValueError('one\\ntwo')",
        "ValueError",
    ),
    "an exit in the hook": (
        PRELUDE + "import sys\n" + FORMATS + "sys.exit('no licence')",
        "SystemExit",
    ),
    "a hook that wants arguments": (
        PRELUDE + "@hookimpl\ndef vmconv_register_formats(config):\n    return []",
        "config",
    ),
    "a hook that returns nothing": (PRELUDE + FORMATS + "pass", "NoneType"),
    "a hook that returns one format": (
        PRELUDE + FORMATS + "return Acme()",
        "not iterable",
    ),
    "a class instead of a format": (
        PRELUDE + FORMATS + "return [Acme]",
        "which is not a Format",
    ),
    "an object that is no format": (
        PRELUDE + FORMATS + "return [42]",
        "42, which is not a Format",
    ),
    "an object that is no backend": (
        PRELUDE + "@hookimpl\ndef vmconv_register_backends():\n    return ['s3']",
        "'s3', which is not a Backend",
    ),
    "an object that is no command": (
        PRELUDE
        + "class Impostor:\n    name = 'acme'\n@hookimpl\ndef vmconv_register_commands():\n    return [Impostor()]",
        "Command",
    ),
    "a format without a name": (
        PRELUDE + "class Nameless(Format):\n    title = ''\n" + FORMATS + "return [Nameless()]",
        "format name None",
    ),
    "a format without a title": (
        PRELUDE + "class Bare(Format):\n    name = 'bare'\n" + FORMATS + "return [Bare()]",
        "title",
    ),
    "a name with a line break": (
        PRELUDE + "Acme.name = 'acme\\n'\n" + FORMATS + "return [Acme()]",
        "'acme\\n'",
    ),
    "a name in capitals": (
        PRELUDE + "Acme.name = 'ACME'\n" + FORMATS + "return [Acme()]",
        "'ACME' is not lower case",
    ),
    "a name that is no text": (
        PRELUDE + "Acme.name = 5\n" + FORMATS + "return [Acme()]",
        "vmconv_register_formats",
    ),
}
broken = pytest.mark.parametrize("case", BROKEN)


# Broken plugins


@broken
def test_a_broken_plugin_is_reported_with_its_distribution_and_reason(install: Install, case: str) -> None:
    source, reason = BROKEN[case]
    assert reason in problem(install(source))


@broken
def test_a_broken_plugin_leaves_the_others_working(install: Install, case: str) -> None:
    install(GOOD, "vmconv-good")
    registry = install(BROKEN[case][0], "vmconv-broken")
    assert works(registry)
    assert registry.owners["format", "acme"] == "vmconv-good"


@broken
def test_a_broken_plugin_is_listed_by_formats(install: Install, capsys: pytest.CaptureFixture[str], case: str) -> None:
    install(BROKEN[case][0])
    assert cli.main(["formats"]) == 0
    shown = capsys.readouterr().out
    problems = shown.partition("Problems:\n")[2]
    assert "vmconv-acme" in problems


def test_an_entry_point_that_names_nothing_is_a_problem(install: Install) -> None:
    registry = install("", entry_points="[vmconv]\nplugin = vmconv_acme_plugin:missing\n")
    assert "missing" in problem(registry)
    assert works(registry)


def test_an_entry_point_that_cannot_be_parsed_leaves_the_others_working(install: Install) -> None:
    assert works(install("", entry_points="[vmconv]\nthis is no entry point\n"))


def test_a_distribution_without_metadata_leaves_the_others_working(install: Install) -> None:
    assert works(install(GOOD, metadata=False))


def test_entry_points_of_other_groups_are_not_imported(install: Install) -> None:
    registry = install("raise SystemExit", entry_points="[vmconvert]\nplugin = vmconv_acme_plugin\n")
    assert not registry.problems
    assert "vmconv_acme_plugin" not in sys.modules


def test_a_plugin_of_another_interface_adds_nothing(install: Install) -> None:
    found = install("VMCONV_INTERFACE = 99\n" + GOOD)
    assert "acme" not in found.formats
    assert "acmestore" not in found.backends
    assert "acme-hello" not in found.commands
    assert len([one for one in found.problems if "version 99" in one.reason]) == 1


def test_a_plugin_of_this_interface_is_used(install: Install) -> None:
    assert "acme" in install("VMCONV_INTERFACE = 1\n" + GOOD).formats


def test_a_misspelt_hook_is_reported_with_the_name_that_was_meant(install: Install) -> None:
    registry = install(PRELUDE + "@hookimpl\ndef vmconv_register_format():\n    return [Acme()]")
    assert problem(registry) == "unknown hook vmconv_register_format, did you mean vmconv_register_formats"


def test_an_unknown_hook_is_reported_without_a_guess(install: Install) -> None:
    assert problem(install(PRELUDE + "@hookimpl\ndef zzz():\n    return []")) == "unknown hook zzz"


def test_registrations_before_a_failing_hook_are_kept(install: Install) -> None:
    registry = install(PRELUDE + FORMATS + "yield Acme()\n    raise OSError('disk full')")
    assert "disk full" in problem(registry)
    assert "acme" in registry.formats


def test_a_hook_that_fails_does_not_stop_the_plugin_s_other_hooks(install: Install) -> None:
    registry = install(GOOD.replace("return [Acme()]", "raise OSError('disk full')"))
    assert "acmestore" in registry.backends
    assert "acme-hello" in registry.commands


def test_using_a_format_of_a_broken_plugin_reports_its_problem(install: Install) -> None:
    registry = install("import a_module_that_is_not_there")
    with pytest.raises(UsageError, match="format 'acme' is not installed") as caught:
        registry.format("acme")
    assert "vmconv-acme" in (caught.value.hint or "")
    assert "a_module_that_is_not_there" in (caught.value.hint or "")


# Plugins that load and then misbehave


def test_a_probe_that_raises_does_not_stop_the_reading_of_other_formats(install: Install, tmp_path: Path) -> None:
    probe = "def probe(self, file):\n    raise IndexError('short file')\nAcme.probe = probe\n"
    install(PRELUDE + probe + FORMATS + "return [Acme()]")
    image = tmp_path / "disk.qcow2"
    image.write_bytes(qcow2_images.image())
    assert api.info(str(image))["format"] == "qcow2"


def test_suffixes_that_are_no_tuple_do_not_stop_the_reading_of_other_formats(install: Install, tmp_path: Path) -> None:
    install(PRELUDE + "Acme.suffixes = ['.acme']\n" + FORMATS + "return [Acme()]")
    image = tmp_path / "disk.qcow2"
    image.write_bytes(qcow2_images.image())
    assert api.map_disk(str(image))


def test_a_command_that_cannot_be_configured_does_not_stop_the_other_commands(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(GOOD.replace("lambda parser: None", "lambda parser: 1 / 0"))
    assert cli.main(["formats"]) == 0


def test_options_that_cannot_be_described_do_not_stop_formats(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "def options(self):\n    raise ImportError('no pydantic')\nAcme.options = options\n"
    install(PRELUDE + options + FORMATS + "return [Acme()]")
    assert cli.main(["formats"]) == 0
    assert "qcow2" in capsys.readouterr().out


PROBES = {
    "says yes to everything": "return True",
    "says yes to whatever is not empty": "return file.size > 0",
    "says yes to what has a boot sector": "return file.read(510, 2) == b'\\x55\\xaa'",
    "says yes to another format": "return file.read(0, 4) == b'QFI\\xfb'",
    "says yes to what is not zero": "return any(file.read(0, 512))",
    "raises": "raise IndexError('short file')",
    "exits": "raise SystemExit('no licence')",
    "returns what has no truth": "import numpy; return numpy.arange(3)",
}


def probing(body: str) -> str:
    return PRELUDE + f"def probe(self, file):\n    {body}\nAcme.probe = probe\n" + FORMATS + "return [Acme()]"


@pytest.mark.parametrize("case", PROBES)
def test_a_probe_that_misbehaves_does_not_stop_the_others(install: Install, tmp_path: Path, case: str) -> None:
    registry = install(probing(PROBES[case]))
    image, disk = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    image.write_bytes(qcow2_images.image())
    disk.write_bytes(bytes(510) + b"\x55\xaa" + bytes(512))
    assert api.map_disk(str(image))
    assert api.map_disk(str(disk))
    registry.examine()
    assert "probe of 'acme'" in problem(registry)


@pytest.mark.parametrize("case", PROBES)
def test_a_probe_that_misbehaves_is_listed_by_formats(
    install: Install, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    install(probing(PROBES[case]))
    assert cli.main(["formats"]) == 0
    (line,) = [line for line in capsys.readouterr().out.partition("Problems:\n")[2].splitlines() if line]
    assert "vmconv-acme" in line
    assert "probe of 'acme'" in line


def test_a_matching_probe_is_believed(install: Install, tmp_path: Path) -> None:
    registry = install(probing("return file.size >= 4 and file.read(0, 4) == b'ACME'"))
    registry.examine()
    assert not registry.problems
    with Opener(registry) as opener:
        (tmp_path / "disk.acme").write_bytes(b"ACME" + bytes(508))
        assert registry.probe(opener.file(str(tmp_path / "disk.acme"))) == "acme"


def test_no_shipped_probe_claims_other_content() -> None:
    installed().examine()
    assert not installed().problems


def test_content_that_two_formats_claim_is_refused(install: Install, tmp_path: Path) -> None:
    probe = probing("return file.size >= 4 and file.read(0, 4) == b'ACME'")
    install(probe, "vmconv-one")
    install(probe.replace('"acme"', '"acme2"').replace('".acme"', '".acme2"'), "vmconv-two")
    (tmp_path / "disk.acme").write_bytes(b"ACME" + bytes(508))
    with pytest.raises(ImageError, match="signatures of acme and acme2") as caught:
        api.map_disk(str(tmp_path / "disk.acme"))
    assert caught.value.hint == "use -f acme or -f acme2"


@pytest.mark.parametrize("suffix", ["", ".", "acme", ".ACME", ". acme", ".a/b", "\\n"])
def test_an_invalid_suffix_is_reported(install: Install, suffix: str) -> None:
    registry = install(PRELUDE + f"Acme.suffixes = ('{suffix}',)\n" + FORMATS + "return [Acme()]")
    assert "is not a dot and lower case letters or digits" in problem(registry)
    assert registry.format_by_suffix("disk") is None


@pytest.mark.parametrize(("suffix", "name"), [(".qcow2", "qcow2"), (".img", "raw"), (".vmdk", "vmdk"), (".dmg", "dmg")])
def test_a_suffix_of_a_known_format_stays_with_it(install: Install, suffix: str, name: str) -> None:
    registry = install(PRELUDE + f"Acme.suffixes = ('.acme', '{suffix}')\n" + FORMATS + "return [Acme()]")
    assert registry.format_by_suffix(f"disk{suffix}") == name
    assert registry.format_by_suffix("disk.acme") == "acme"
    assert f"claims the suffix {suffix} of {name}" in problem(registry)


def test_a_suffix_that_two_claim_speaks_of_neither(install: Install) -> None:
    install(GOOD, "vmconv-one")
    registry = install(PRELUDE + "Acme.name = 'acme2'\n" + FORMATS + "return [Acme()]", "vmconv-two")
    assert registry.format_by_suffix("disk.acme") is None
    for distribution in ("vmconv-one", "vmconv-two"):
        assert problem(registry, distribution) == "suffix .acme is claimed by acme and acme2: neither gets it"


def test_of_two_that_claim_a_suffix_the_content_decides(install: Install, tmp_path: Path) -> None:
    install(GOOD, "vmconv-one")
    registry = install(probing("return file.read(0, 4) == b'ACM2'").replace('"acme"', '"acme2"'), "vmconv-two")
    (tmp_path / "disk.acme").write_bytes(b"ACM2" + bytes(508))
    with Opener(registry) as opener:
        assert registry.identify(opener.file(str(tmp_path / "disk.acme"))).name == "acme2"


def test_a_hook_that_is_not_marked_is_reported(install: Install) -> None:
    registry = install(PRELUDE + "def vmconv_register_formats():\n    return [Acme()]")
    assert problem(registry) == "vmconv_register_formats is not marked with hookimpl"


def test_a_misspelt_hook_that_is_not_marked_is_reported(install: Install) -> None:
    registry = install(PRELUDE + "def vmconv_register_format():\n    return [Acme()]")
    assert problem(registry) == "unknown hook vmconv_register_format, did you mean vmconv_register_formats"


def test_a_plugin_without_a_hook_is_reported(install: Install) -> None:
    assert problem(install("x = 1")) == "vmconv_acme_plugin registers nothing"


def test_a_hook_that_never_ends_does_not_stop_the_others(install: Install) -> None:
    registry = install(PRELUDE + FORMATS + "while True:\n        yield Acme()")
    assert works(registry)


def test_one_bad_format_does_not_take_the_plugin_s_other_ones(install: Install) -> None:
    registry = install(PRELUDE + FORMATS + "return [42, Acme()]")
    assert "42" in problem(registry)
    assert "acme" in registry.formats


@pytest.mark.parametrize("name", ["formats", "convert"])
def test_a_command_of_vmconv_itself_cannot_be_taken_away(
    install: Install, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    registry = install(GOOD.replace("acme-hello", name))
    assert registry.owners["command", name] == "vmconv"
    assert f"command '{name}' is claimed by" in problem(registry)
    assert cli.main(["formats"]) == 0
    assert "is claimed by" in capsys.readouterr().out


METHODS = {
    "read raises": "def read(self, file, opener, *, snapshot=None):\n    return {}['x']\nAcme.read = read",
    "read asserts": "def read(self, file, opener, *, snapshot=None):\n    assert 0\nAcme.read = read",
    "read exits": "def read(self, file, opener, *, snapshot=None):\n    raise SystemExit('bye')\nAcme.read = read",
    "read takes other": "def read(self, path):\n    return None\nread.__qualname__ = 'Acme.read'\nAcme.read = read",
    "read returns nothing": "def read(self, file, opener, *, snapshot=None):\n    pass\nAcme.read = read",
    "the table fails": (
        "from vmconv.model.image import Image\n"
        "def read(self, file, opener, *, snapshot=None):\n"
        "    return Image('acme', file, 512, lambda: 1 // 0)\n"
        "Acme.read = read"
    ),
    "the table has another size": (
        "from vmconv.model.extents import Extents\nfrom vmconv.model.image import Image\n"
        "def read(self, file, opener, *, snapshot=None):\n"
        "    return Image('acme', file, 512, lambda: Extents.filled(1024))\n"
        "Acme.read = read"
    ),
    "the table is no mapping": (
        "from vmconv.model.image import Image\n"
        "def read(self, file, opener, *, snapshot=None):\n"
        "    return Image('acme', file, 512, lambda: None)\n"
        "Acme.read = read"
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_reader_that_fails_is_named_in_one_line(
    install: Install, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    install(PRELUDE + METHODS[case] + "\n" + FORMATS + "return [Acme()]")
    (tmp_path / "disk.acme").write_bytes(bytes(512))
    assert cli.main(["convert", "-f", "acme", str(tmp_path / "disk.acme"), str(tmp_path / "disk.qcow2")]) == 1
    shown = capfd.readouterr().err.splitlines()
    assert "vmconv-acme" in shown[0]
    assert [line[:8] for line in shown[1:]] == ["  hint: "]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["disk.acme"]


WRITE = "def write(self, image, options, placement, *, backing=None):\n    "
WRITERS = {
    "write raises": WRITE + "return {}['x']\nAcme.write = write",
    "write returns nothing": WRITE + "pass\nAcme.write = write",
    "options raises": "def options(self):\n    raise ImportError('no pydantic')\nAcme.options = options",
    "options are no dataclass": "def options(self):\n    return dict\nAcme.options = options",
    "options are nothing": "def options(self):\n    return None\nAcme.options = options",
}


@pytest.mark.parametrize("case", WRITERS)
@pytest.mark.parametrize("given", [[], ["-o", "x=1"]], ids=["no options", "options"])
def test_a_writer_that_fails_is_named_in_one_line(
    install: Install, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str, given: list[str]
) -> None:
    install(PRELUDE + WRITERS[case] + "\n" + FORMATS + "return [Acme()]")
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    code = cli.main(["convert", *given, str(tmp_path / "disk.raw"), str(tmp_path / "disk.acme")])
    shown = capfd.readouterr().err.splitlines()
    if not (case.startswith("write") and given):
        assert code == 1
        assert "vmconv-acme" in shown[0]
    assert code
    assert all(line.startswith("  hint: ") for line in shown[1:])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["disk.raw"]


def test_a_command_that_fails_is_named_in_one_line(install: Install, capfd: pytest.CaptureFixture[str]) -> None:
    install(GOOD.replace('print("hello from acme")', "raise KeyError('x')"))
    assert cli.main(["acme-hello"]) == 1
    assert capfd.readouterr().err.startswith("vmconv: vmconv-acme: failed with KeyError: 'x'\n")


def test_debug_prints_the_traceback_with_the_distribution(
    install: Install, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    install(PRELUDE + METHODS["the table fails"] + "\n" + FORMATS + "return [Acme()]")
    (tmp_path / "disk.acme").write_bytes(bytes(512))
    command = ["map", "-f", "acme", str(tmp_path / "disk.acme")]
    assert cli.main(command) == 1
    short = capfd.readouterr().err
    assert "Traceback" not in short
    assert "report it there, with what vmconv --debug prints" in short
    assert cli.main(["--debug", *command]) == 1
    shown = capfd.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "ZeroDivisionError" in shown
    assert "\nin this traceback: vmconv_acme_plugin of vmconv-acme 1.5\n" in shown
    assert shown.endswith(short)


def test_debug_prints_the_traceback_of_an_error_of_the_system(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--debug", "info", "/nowhere/disk.raw"]) == 1
    assert "Traceback (most recent call last):" in capfd.readouterr().err


# Names that two plugins claim

CLASHING = {"formats": "acme", "backends": "acmestore", "commands": "acme-hello"}


@pytest.fixture
def clash(install: Install) -> Registry:
    install(GOOD, "vmconv-one")
    return install(GOOD, "vmconv-two")


@pytest.mark.parametrize(("things", "name"), list(CLASHING.items()))
def test_a_name_that_two_distributions_claim_is_given_to_neither(clash: Registry, things: str, name: str) -> None:
    assert name not in getattr(clash, things)


def test_a_clash_is_a_problem_of_both_distributions(clash: Registry) -> None:
    reasons = {p.distribution for p in clash.problems if "format 'acme'" in p.reason}
    assert reasons == {"vmconv-one", "vmconv-two"}


def test_a_clash_names_both_classes_and_distributions(clash: Registry) -> None:
    reason = next(p.reason for p in clash.problems if "format 'acme'" in p.reason)
    assert "vmconv_one_plugin.Acme of vmconv-one" in reason
    assert "vmconv_two_plugin.Acme of vmconv-two" in reason


def test_using_a_contested_name_is_refused(clash: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        clash.format("acme")
    assert "is claimed by" in (caught.value.hint or "")


def test_using_a_contested_backend_is_refused(clash: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        clash.backend("acmestore")
    assert "is claimed by" in (caught.value.hint or "")


def test_a_plugin_cannot_take_the_name_of_one_that_ships_with_vmconv(install: Install) -> None:
    registry = install(GOOD.replace('"acme"', '"qcow2"'))
    assert "vmconv-qcow2" in problem(registry)
    assert not isinstance(registry.formats.get("qcow2"), sys.modules["vmconv_acme_plugin"].Acme)


def test_one_distribution_that_claims_a_name_twice_has_one_problem(install: Install) -> None:
    registry = install(PRELUDE + FORMATS + "return [Acme(), Acme()]")
    assert "claimed by" in problem(registry)


def test_a_clash_leaves_all_other_names_working(clash: Registry) -> None:
    assert works(clash)


# A good plugin of a third party


def test_a_third_party_s_format_is_found_by_its_suffix(install: Install) -> None:
    assert install(GOOD).format_by_suffix("disk.ACME") == "acme"


def test_a_third_party_s_backend_is_there(install: Install) -> None:
    assert install(GOOD).backend("acmestore").name == "acmestore"


def test_a_third_party_s_things_have_an_owner(install: Install) -> None:
    registry = install(GOOD)
    owned = {("format", "acme"), ("backend", "acmestore"), ("command", "acme-hello")}
    assert {registry.owners[thing] for thing in owned} == {"vmconv-acme"}


def test_a_good_plugin_has_no_problem(install: Install) -> None:
    assert not install(GOOD).problems


def test_a_third_party_s_command_is_in_the_help(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(GOOD)
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert "greet the user" in capsys.readouterr().out


def test_a_third_party_s_command_runs_and_gives_the_exit_code(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(GOOD)
    assert cli.main(["acme-hello"]) == 7
    assert capsys.readouterr().out == "hello from acme\n"


def test_formats_lists_a_third_party_s_distribution_and_version(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(GOOD)
    assert cli.main(["formats", "--output", "json"]) == 0
    (acme,) = [one for one in json.loads(capsys.readouterr().out)["formats"] if one["name"] == "acme"]
    assert (acme["distribution"], acme["version"]) == ("vmconv-acme", "1.5")


def test_formats_gives_problems_by_distribution_as_json(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("import a_module_that_is_not_there")
    assert cli.main(["formats", "--output", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["problems"]
    assert found["distribution"] == "vmconv-acme"
    assert "a_module_that_is_not_there" in found["reason"]


# What is not installed


@pytest.mark.parametrize("name", ["vhdx", "vmdk", "vhd", "vdi", "parallels", "qed", "luks", "qcow2", "raw"])
def test_a_known_format_that_is_missing_says_what_to_install(name: str) -> None:
    with pytest.raises(UsageError, match=f"format '{name}' is not installed") as caught:
        Registry().format(name)
    assert caught.value.hint == f"pip install vmconv-{name}"


def test_a_known_format_without_a_plugin_is_reported(install: Install) -> None:
    with pytest.raises(UsageError) as caught:
        installed().format("sparseimage")
    assert "no plugin is known to read it" in (caught.value.hint or "")


def test_a_format_is_found_by_the_name_that_qemu_has_for_it() -> None:
    assert installed().format("vpc") is installed().formats["vhd"]
    with pytest.raises(UsageError, match="format 'vpc' is not installed") as caught:
        Registry().format("vpc")
    assert caught.value.hint == "pip install vmconv-vhd"


def test_an_unknown_format_lists_the_installed_ones() -> None:
    with pytest.raises(UsageError) as caught:
        installed().format("floppy")
    assert ", ".join(sorted(installed().formats)) in (caught.value.hint or "")


def test_an_unknown_backend_lists_the_installed_ones() -> None:
    with pytest.raises(UsageError) as caught:
        installed().backend("tape")
    assert "copy" in (caught.value.hint or "")


def test_the_formats_that_ship_are_from_their_own_distributions() -> None:
    owners = installed().owners
    assert (owners["format", "raw"], owners["format", "qcow2"]) == ("vmconv-raw", "vmconv-qcow2")
