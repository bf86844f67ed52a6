"""Options of the Parallels writer; names and values are those of `qemu-img create -o`."""

from __future__ import annotations

from dataclasses import dataclass

from vmconv.plugin import Size, option


@dataclass(frozen=True)
class Options:
    """The options of the Parallels writer. Raises `ValueError` for values that the format does not allow."""

    cluster_size: Size = option(1 << 20, "bytes of a cluster: a power of two from 512 to 1G")

    def __post_init__(self) -> None:
        if self.cluster_size not in (1 << bits for bits in range(9, 31)):
            raise ValueError("a cluster is a power of two from 512 to 1G")
