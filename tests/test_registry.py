"""Plugins of all kinds in one environment: broken ones are reported by distribution and never stop the others."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qcow2_images
from vmconv import api, cli
from vmconv.errors import UsageError
from vmconv.registry import Registry, installed

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
from vmconv.cli.command import Command
from vmconv.formats import Format
from vmconv.hooks import hookimpl
from vmconv.backends.memory import MemoryBackend

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
        "which is no Format",
    ),
    "an object that is no format": (
        PRELUDE + FORMATS + "return [42]",
        "42, which is no Format",
    ),
    "an object that is no backend": (
        PRELUDE + "@hookimpl\ndef vmconv_register_backends():\n    return ['s3']",
        "'s3', which is no Backend",
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


def test_a_misspelt_hook_is_reported_with_the_name_that_was_meant(install: Install) -> None:
    registry = install(PRELUDE + "@hookimpl\ndef vmconv_register_format():\n    return [Acme()]")
    assert problem(registry) == "unknown hook vmconv_register_format, did you mean vmconv_register_formats"


def test_a_hook_that_resembles_none_is_reported_without_a_guess(install: Install) -> None:
    assert problem(install(PRELUDE + "@hookimpl\ndef zzz():\n    return []")) == "unknown hook zzz"


def test_what_a_plugin_registers_before_its_hook_fails_is_still_there(install: Install) -> None:
    registry = install(PRELUDE + FORMATS + "yield Acme()\n    raise OSError('disk full')")
    assert "disk full" in problem(registry)
    assert "acme" in registry.formats


def test_a_hook_that_fails_does_not_stop_the_plugin_s_other_hooks(install: Install) -> None:
    registry = install(GOOD.replace("return [Acme()]", "raise OSError('disk full')"))
    assert "acmestore" in registry.backends
    assert "acme-hello" in registry.commands


def test_using_a_format_of_a_broken_plugin_says_what_is_wrong_with_it(install: Install) -> None:
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


def test_using_a_name_that_two_claim_says_so(clash: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        clash.format("acme")
    assert "is claimed by" in (caught.value.hint or "")


def test_using_a_backend_that_two_claim_says_so(clash: Registry) -> None:
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


@pytest.mark.parametrize("name", ["vhdx", "vmdk", "vhd", "vdi", "parallels", "qed", "qcow2", "raw"])
def test_a_known_format_that_is_missing_says_what_to_install(name: str) -> None:
    with pytest.raises(UsageError, match=f"format '{name}' is not installed") as caught:
        Registry().format(name)
    assert caught.value.hint == f"pip install vmconv-{name}"


def test_a_known_format_that_has_no_plugin_says_so(install: Install) -> None:
    with pytest.raises(UsageError) as caught:
        installed().format("luks")
    assert "no plugin is known to read it" in (caught.value.hint or "")


def test_a_format_is_found_by_the_name_that_qemu_has_for_it() -> None:
    assert installed().format("vpc") is installed().formats["vhd"]
    with pytest.raises(UsageError, match="format 'vpc' is not installed") as caught:
        Registry().format("vpc")
    assert caught.value.hint == "pip install vmconv-vhd"


def test_an_unknown_format_lists_what_is_installed() -> None:
    with pytest.raises(UsageError) as caught:
        installed().format("floppy")
    assert ", ".join(sorted(installed().formats)) in (caught.value.hint or "")


def test_an_unknown_backend_lists_what_is_installed() -> None:
    with pytest.raises(UsageError) as caught:
        installed().backend("tape")
    assert "copy" in (caught.value.hint or "")


def test_the_formats_that_ship_are_from_their_own_distributions() -> None:
    owners = installed().owners
    assert (owners["format", "raw"], owners["format", "qcow2"]) == ("vmconv-raw", "vmconv-qcow2")
