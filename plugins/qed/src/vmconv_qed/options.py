"""Options of the QED writer; names and values are those of `qemu-img create -o`."""

from __future__ import annotations

from dataclasses import dataclass

from vmconv.plugin import Size, option


@dataclass(frozen=True)
class Options:
    """The options of the QED writer. Raises `ValueError` for values that the format does not allow."""

    cluster_size: Size = option(65536, "bytes of a cluster: a power of two from 4K to 64M")
    table_size: int = option(4, "clusters of a table: 2, 4, 8 or 16")

    def __post_init__(self) -> None:
        if self.cluster_size not in (1 << bits for bits in range(12, 27)):
            raise ValueError("a cluster is a power of two from 4K to 64M")
        # The format allows tables of one cluster, but QEMU (7.2) cannot open such images.
        if self.table_size not in (2, 4, 8, 16):
            raise ValueError("table_size is 2, 4, 8 or 16")
