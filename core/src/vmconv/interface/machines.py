"""The interface of machine formats: configurations of virtual machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vmconv.interface.format import NoOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmconv.interface.format import CheckReport
    from vmconv.io.opener import Opener
    from vmconv.machine.decoding import NewFile
    from vmconv.machine.model import Machine
    from vmconv.model.extents import Extents
    from vmconv.model.image import Image
    from vmconv.model.plan import Progress
    from vmconv.model.sources import File


class Substitution(NamedTuple):
    """A field whose value the target's format cannot express: `path` as in `vmconv.machine.paths`.

    `before` and `after` are the values in words; `after` is empty if the field is dropped for the given reason.
    """

    path: str
    before: str
    after: str
    reason: str


class Adapted(NamedTuple):
    """A machine in the terms of a format, and the differences to the original machine."""

    machine: Machine
    substitutions: tuple[Substitution, ...] = ()


class ConfigFile(NamedTuple):
    """A small file of a new machine, beside its disks."""

    name: str
    content: bytes


class Digest(NamedTuple):
    """The digest of a file in a package: `algorithm` by hashlib's name, `value` in lower-case hexadecimal."""

    file: str
    algorithm: str
    value: str


class Member(NamedTuple):
    """A file in a package: `table` maps its bytes to the package's file, or to the sources of a new package.

    `digest` is that of a file which stays as it was in the source's package, and whose manifest states it.
    """

    name: str
    table: Extents
    digest: Digest | None = None


class Manifest(NamedTuple):
    """What a package states of its files, besides its configuration. `certificate` is the file that signs it."""

    name: str
    digests: tuple[Digest, ...]
    certificate: str | None = None


class MachineFormat:
    """One format of machine configurations. A plugin subclasses it and overrides the supported operations.

    Keep the module of the subclass cheap to import. Import the model, the reader and the writer inside the methods.
    """

    name: str
    title: str
    suffixes: tuple[str, ...] = ()
    """Suffixes of configurations with their dot, lower case. New configurations get the first."""
    carries: frozenset[str] = frozenset()
    """Paths of the machine's fields that `write` stores and `read` returns; see `vmconv.machine.paths`.

    `disks.file`, `removables.file` and `firmware.nvram` are among them if the configuration names such files.
    """
    disk_format = "raw"
    """The format of the disks of new machines, unless the user names another."""
    disk_formats: frozenset[str] = frozenset()
    """All disk formats that the platform accepts; empty if it does not matter."""
    no_chains: str | None = "a disk is one image"
    """Why a disk cannot have layers below its file; None if it can, because the image names them."""
    nvram_kind: Literal["ovmf", "virtualbox"] | None = None
    """The kind of variable store that new UEFI machines get; None if the platform takes none that can be made."""
    tpm_kind: Literal["swtpm", "swtpm-linear", "virtualbox"] | None = None
    """Where new machines get the state of their TPM: a file of swtpm's, or with VirtualBox the store of variables."""
    can_read = True
    can_write = True
    is_package = False
    """True if one file holds the configuration and the disks, as an OVA does; see `members` and `pack`."""

    compressed_suffixes: tuple[str, ...] = ()
    """Those of `suffixes` that new packages of that name are compressed for while they are written:
    by Zstandard (`.zst`) or gzip (`.gz`)."""

    def disk_options(self, options: Any) -> Mapping[str, Any]:
        """Returns options for the writer of `disk_format` that the configuration states; users cannot change them."""
        return {}

    def options(self) -> type[Any]:
        """Returns the frozen dataclass of the writer's options; see `vmconv.model.options`."""
        return NoOptions

    def probe(self, file: File) -> bool:
        """True if the content is of this format. Reads little; never raises."""
        return False

    def read(self, file: File, opener: Opener) -> Machine:
        """Returns the machine of a configuration.

        Disks and other files stay references: nothing is opened but further parts of the configuration, by `opener`.
        Raises `ImageError` with the element and the value if the configuration is damaged or not supported.
        """
        raise NotImplementedError(f"{self.name} has no reader")

    def members(self, file: File) -> Sequence[Member]:
        """Returns the files in a package, which the machine's disks refer to by name."""
        return ()

    def manifest(self, file: File, opener: Opener) -> Manifest | None:
        """Returns the digests that a package has of its files, by names that `members` or the directory has.

        None if it has none. Reads no payload. Raises `ImageError` if the manifest is malformed, or states another
        digest of the configuration.
        """
        return None

    def compression(self, file: File) -> str | None:
        """Returns the name of the compression of a package, such as `gzip`; None if its members are ranges of it.

        The members of a compressed package are tables of `Decoded`, with all that may be payload.
        """
        return None

    def decode(self, file: File, create: Callable[[str, int], NewFile], progress: Progress | None) -> Sequence[Member]:
        """Returns the members of a compressed package, decoded once.

        `create(name, size)` makes a new sparse file for a large member, whose table then consists of windows onto it.
        `progress` is called with bytes of the package: read, and all.
        """
        raise NotImplementedError(f"{self.name} has no compressed packages")

    def check_payload(
        self, file: File, progress: Progress | None = None, *, sample: bool = False
    ) -> CheckReport | None:
        """Compares payload in a package with the checksums that lie beside it: all of it, or random parts.

        The report counts parts with the right checksum as allocated. None if packages of this format have none.
        `progress` is called with bytes of the package: read, and all.
        """
        return None

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        """Returns the machine in terms that this format can express, with a reason for each changed field.

        A field that is not in `carries` needs no substitution: it is reported as lost. Raises `PlanError` if the
        machine cannot exist on the platform.
        """
        return Adapted(machine)

    def directory(self, machine: Machine, options: Any) -> str:
        """Returns the subdirectory of the target directory for all files of an adapted machine, or an empty string."""
        return ""

    def disk_name(self, machine: Machine, number: int, suffix: str, options: Any) -> str:
        """Returns the file name of disk `number`, counted from 0, with the suffix of its format."""
        return f"{machine.name or 'machine'}-disk{number + 1}{suffix}"

    def nvram_name(self, machine: Machine, options: Any) -> str:
        """Returns the file name of the variable store of an adapted machine."""
        return f"{machine.name or 'machine'}{'_VARS.fd' if self.nvram_kind == 'ovmf' else '.nvram'}"

    def nvram_template(self, options: Any) -> str | None:
        """Returns the path of a store of the platform's own that the variables are written into, if the user names one.

        For platforms whose store cannot be created. It is then of the kind `vmware`.
        """
        return None

    def tpm_name(self, machine: Machine, options: Any) -> str:
        """Returns the file name of the state of a TPM, for a machine whose other files have their names."""
        return f"{machine.name or 'machine'}-tpm2-00.permall"

    def tpm_note(self, machine: Machine, file: str) -> str:
        """Returns what the user has to do with the state of the TPM; empty if nothing."""
        return ""

    def config_name(self, machine: Machine, options: Any) -> str:
        """Returns the file name of the configuration if the user names only a directory."""
        return f"{machine.name or 'machine'}{self.suffixes[0]}"

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        """Returns the files that configure an adapted machine; the configuration comes last, with an empty name.

        A pure function. The disks have their new names, formats and sizes. Every string is escaped for the format.
        `read` of the result returns the machine restricted to `carries`.
        """
        raise NotImplementedError(f"{self.name} has no writer")

    def pack(self, configs: Sequence[ConfigFile], members: Sequence[Member], modulus: int, options: Any) -> Extents:
        """Returns the table of a package with these files.

        Each of `members` begins at a multiple of `modulus` bytes, so that its payload can be shared.
        """
        raise NotImplementedError(f"{self.name} is no package")

    def keeps(self, image: Image, options: Any) -> bool:
        """True if the image may go into a new package with all its bytes as they are, its ids too."""
        return False

    def digested(self, members: Sequence[Member], options: Any) -> int:
        """Returns the bytes of `members` that `pack` makes the conversion read, such as for digests of them."""
        return 0
