"""The structural check of an E01: the table of each run of chunks, against its copy and the file."""

from __future__ import annotations

from vmconv.plugin import CheckReport, Findings, Image, ImageError
from vmconv_ewf.chunks import Chunks, Table


def check(image: Image) -> CheckReport:
    """Returns the report; the reader has checked all but the entries of tables. Chunks are not read."""
    findings = Findings()
    table = image.guest
    chunks = next((source for source in table.sources if isinstance(source, Chunks)), None)
    end = image.file.size
    if chunks is None:
        return findings.report(allocated=0, total=0, end=end)
    for one in chunks.tables:
        _check_table(one, chunks.unit, findings)
    count = chunks.size // chunks.unit
    return findings.report(allocated=count, total=count, end=end)


def _check_table(table: Table, chunk: int, findings: Findings) -> None:
    try:
        table.places(chunk)
    except ImageError as exc:
        findings.corrupt(str(exc))
