"""Options of the qcow2 writer; names and values are those of `qemu-img create -o`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmconv.plugin import Size, option

if TYPE_CHECKING:
    from vmconv.plugin import Allocation

Subformat = Literal["standard", "reference"]
Compression = Literal["zlib", "zstd"]
Preallocation = Literal["off", "metadata", "falloc", "full"]
Compat = Literal["1.1", "0.10", "v3", "v2"]


@dataclass(frozen=True)
class Options:
    """The options of the qcow2 writer. Raises `ValueError` for values that the format does not allow."""

    cluster_size: Size | None = option(
        None, "bytes of a cluster, a power of two from 512 to 2M; by default 64K, or less to share misaligned payload"
    )
    compat: Compat = option("1.1", "version: 1.1 (v3) or 0.10 (v2)")
    refcount_bits: int = option(16, "bits of a reference count: 1, 2, 4, 8, 16, 32 or 64")
    extended_l2: bool = option(False, "on: allocate by 32nds of a cluster (clusters of 16K and more)")
    lazy_refcounts: bool = option(False, "on: later writers may postpone updates of reference counts")
    compress: bool = option(False, "on: compress clusters, as convert -c; those that are compressed so are kept")
    compression_type: Compression = option("zlib", "how clusters are compressed: zlib or zstd")
    compression_level: int | None = option(None, "1 to 9 for zlib, 1 to 19 for zstd; by default fast and small enough")
    subformat: Subformat = option("standard", "reference: payload stays in SOURCE, which becomes the backing file")
    data_file: str | None = option(None, "SOURCE as its data file: payload stays in it, and guests write into it")
    data_file_raw: bool = option(False, "on: the data file is the disk and remains so, readable without the image")

    preallocation: Preallocation = option(
        "off", "metadata: map all clusters; falloc: and allocate their space; full: and write zeros into it"
    )

    def __post_init__(self) -> None:
        if self.cluster_size is not None and self.cluster_size not in (1 << bits for bits in range(9, 22)):
            raise ValueError("a cluster is a power of two from 512 to 2M")
        if self.refcount_bits not in (1 << order for order in range(7)):
            raise ValueError("refcount_bits is 1, 2, 4, 8, 16, 32 or 64")
        if self.extended_l2 and self.cluster_size is not None and self.cluster_size < 1 << 14:
            raise ValueError("extended_l2 needs clusters of at least 16K")
        if self.data_file == "":
            raise ValueError("data_file is the name of a file")
        if self.data_file_raw and not self.data_file:
            raise ValueError("data_file_raw needs data_file")
        if self.data_file and self.subformat == "reference":
            raise ValueError("data_file and subformat=reference exclude each other")
        if self.preallocation != "off" and (self.data_file or self.subformat == "reference"):
            raise ValueError("preallocation is for payload in the image itself")
        self._refuse_compression()
        if self.version == 2:
            newer = [name for name in ("extended_l2", "lazy_refcounts", "data_file") if getattr(self, name)]
            newer += ["refcount_bits"] if self.refcount_bits != 16 else []
            newer += ["compression_type=zstd"] if self.compression_type == "zstd" else []
            if newer:
                raise ValueError(f"{newer[0]} needs compat=1.1")

    def _refuse_compression(self) -> None:
        most = 19 if self.compression_type == "zstd" else 9
        if self.compression_level is not None and not self.compress:
            raise ValueError("compression_level needs compress=on (convert -c)")
        if self.compression_level is not None and not 1 <= self.compression_level <= most:
            raise ValueError(f"compression_level of {self.compression_type} is 1 to {most}")
        if self.compress and self.preallocation != "off":
            raise ValueError("preallocation is for clusters that are not compressed")
        if self.compress and (self.data_file or self.subformat == "reference"):
            given = "data_file" if self.data_file else "subformat=reference"
            raise ValueError(f"{given} keeps payload in SOURCE, which cannot be compressed there")

    @property
    def allocation(self) -> Allocation:
        return {"falloc": "space", "full": "zeros"}.get(self.preallocation, "holes")  # type: ignore[return-value]

    @property
    def version(self) -> int:
        return 2 if self.compat in ("0.10", "v2") else 3
