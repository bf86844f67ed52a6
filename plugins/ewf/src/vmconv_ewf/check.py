"""The structural check of an E01: the table of each run of chunks, against its copy and the file."""

from __future__ import annotations

from vmconv.plugin import CheckReport, Findings, Image, ImageError
from vmconv_ewf.chunks import Table
from vmconv_ewf.reader import EwfImage


def check(image: Image) -> CheckReport:
    """Returns the report; the reader has checked all but the entries of tables. Chunks are not read."""
    findings = Findings()
    end = image.file.size
    assert isinstance(image, EwfImage)
    chunks = image.chunks
    for one in chunks.tables:
        _check_table(one, chunks.unit, findings)
    count = chunks.size // chunks.unit
    return findings.report(allocated=count, total=count, end=end)


def _check_table(table: Table, chunk: int, findings: Findings) -> None:
    try:
        table.places(chunk)
    except ImageError as exc:
        findings.corrupt(str(exc))
