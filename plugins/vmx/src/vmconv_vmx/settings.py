"""The text of a VMX: one `key = "value"` in a line.

VMware publishes no specification. The rules here are those of files that VMware wrote: keys ignore case, values are
quoted, `|22` is the byte 0x22, `#` begins a comment line, and `.encoding` names the encoding of the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from vmconv.machine import config_bytes, config_text, number, quoted, refused
from vmconv.plugin import ImageError

if TYPE_CHECKING:
    from vmconv.plugin import File

MAX_SETTINGS = 20_000
"""Settings of a VMX. The largest machines, with 60 disks and 10 network cards, have about 1000."""

_LINE = re.compile(r'([^\s="|]+)[ \t]*=[ \t]*(?:"([^"]*)"|([^"\s]*))[ \t]*')
_ENCODING = re.compile(rb'(?im)^[ \t]*\.encoding[ \t]*=[ \t]*"?([^"\r\n]*)"?')
_ESCAPES = re.compile(r"(?:\|[0-9A-Fa-f]{2})+")
_ENCODINGS = re.compile(
    r"utf-?8|us-ascii|windows-(125[0-8]|874|932|936|949|950)|iso-8859-([1-9]|1[013-6])"
    r"|shift_?jis|gbk|gb2312|gb18030|big5|euc-(jp|kr)",
    re.IGNORECASE,
)
_CODECS = {"windows-874": "cp874", "windows-932": "cp932", "windows-936": "gbk", "windows-949": "cp949"} | {
    "windows-950": "cp950"
}


class Settings:
    """The settings of a VMX by lower-case key. A reader takes settings, and what remains is kept for round trips."""

    def __init__(self, file: File, pairs: Mapping[str, str], spelling: Mapping[str, str]) -> None:
        self.file = file
        self._left = dict(pairs)
        self._spelling = spelling

    def __contains__(self, key: str) -> bool:
        return key.lower() in self._left

    def __iter__(self) -> Iterator[str]:
        return iter(self._left)

    def take(self, key: str) -> str | None:
        """Removes a setting and returns its value without surrounding white space; None if absent or empty."""
        return self._left.pop(key.lower(), "").strip() or None

    def look(self, key: str) -> str:
        """Returns a value, lower case, without removing the setting; empty if absent."""
        return self._left.get(key.lower(), "").strip().lower()

    def flag(self, key: str) -> bool | None:
        """Removes a setting that is TRUE or FALSE; raises `ImageError` for any other value."""
        text = self.take(key)
        if text is None:
            return None
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise refused(self.file, key, f"{quoted(text)} is not TRUE or FALSE")
        return text.lower() in ("true", "yes", "1")

    def count(self, key: str, low: int, high: int) -> int | None:
        """Removes a setting that is a decimal number; raises `ImageError` for any other value."""
        text = self.take(key)
        return None if text is None else number(self.file, key, text, low, high)

    def drop(self, pattern: str) -> None:
        """Removes all settings whose lower-case key matches the pattern."""
        for key in [key for key in self._left if re.fullmatch(pattern, key)]:
            del self._left[key]

    def drop_same(self, pairs: Mapping[str, str]) -> None:
        """Removes settings that have these values."""
        for key, value in pairs.items():
            if self.look(key) == value.lower():
                self._left.pop(key.lower(), None)

    def remove(self, devices: Collection[str]) -> None:
        """Removes all settings of devices such as `scsi0:1`, and those that schedule them."""
        for key in [key for key in self._left if key.removeprefix("sched.").partition(".")[0] in devices]:
            del self._left[key]

    def rename(self, before: str, after: str) -> None:
        """Replaces the beginning of keys: `ethernet2.` by `ethernet1.`."""
        moved = {key: value for key, value in self._left.items() if key.startswith(before)}
        for key in moved:
            del self._left[key]
        self._left |= {after + key[len(before) :]: value for key, value in moved.items()}

    def rest(self) -> dict[str, str]:
        """Returns the settings that nobody took, in the spelling of the file."""
        return {self._spelling.get(key, key): value for key, value in self._left.items()}


def parse(file: File) -> Settings:
    """Returns the settings of a VMX.

    Raises `ImageError` with the line for text that is no setting, for more than `MAX_SETTINGS`, and for a key with two
    values: VMware refuses a repeated key. A repetition with the same value does no harm.
    """
    encoding = _encoding(file)
    pairs: dict[str, str] = {}
    spelling: dict[str, str] = {}
    for at, line in enumerate(re.split(r"\r\n|\r|\n", config_text(file, encoding=encoding)), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, value = _setting(file, at, line.strip(), encoding)
        if pairs.setdefault(key.lower(), value) != value:
            raise refused(file, f"line {at}: {key}", f"{quoted(value)} contradicts {quoted(pairs[key.lower()])} above")
        spelling[key.lower()] = key
        if len(pairs) > MAX_SETTINGS:
            raise refused(file, f"line {at}", f"has more than {MAX_SETTINGS} settings")
    return Settings(file, pairs, spelling)


def _setting(file: File, at: int, line: str, encoding: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if not match:
        raise refused(file, f"line {at}", f'{quoted(line)} is not a setting such as memsize = "1024"')
    key, value = match[1], match[2] if match[2] is not None else match[3]
    try:
        return key, _ESCAPES.sub(lambda run: _bytes_of(run[0]).decode(encoding), value)
    except UnicodeDecodeError as exc:
        raise refused(file, f"line {at}: {key}", f"{quoted(value)} is not {encoding}") from exc


def _bytes_of(escapes: str) -> bytes:
    return bytes.fromhex(escapes.replace("|", ""))


def _encoding(file: File) -> str:
    """Returns the codec that the file names, by default UTF-8."""
    match = _ENCODING.search(config_bytes(file))
    name = match[1].decode("latin-1").strip() if match else "utf-8"
    if not _ENCODINGS.fullmatch(name):
        raise ImageError(f"{file.name}: .encoding: {quoted(name)} is not an encoding of VMware")
    return _CODECS.get(name.lower(), name)


def text_of(pairs: Mapping[str, str]) -> bytes:
    """Returns the text of a VMX with these settings, in UTF-8."""
    lines = [f'{key} = "{escaped(value)}"\n' for key, value in pairs.items()]
    return "".join(lines).encode()


def escaped(value: str) -> str:
    """Returns a value with everything that ends it, or begins an escape, as an escape itself."""
    return re.sub('[\x00-\x1f"#|\x7f]', lambda found: f"|{ord(found[0]):02X}", value)
