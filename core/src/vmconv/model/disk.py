"""The format-independent description of a virtual disk, as a pydantic schema.

Readers and writers exchange the same fields as `DiskFacts`, which is cheap. Import this module late: importing pydantic
takes longer than converting a disk.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from vmconv.model.extents import MAX_SIZE
from vmconv.model.facts import DiskFacts

MAX_REFERENCE = 4096
"""Longest name of a parent, in characters."""

SectorSize = Literal[512, 4096]


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class GeometrySchema(_Schema):
    """CHS geometry for the guest's firmware: cylinders, heads, sectors per track."""

    cylinders: Annotated[int, Field(ge=0, lt=1 << 32)]
    heads: Annotated[int, Field(ge=0, lt=1 << 16)]
    sectors: Annotated[int, Field(ge=0, lt=1 << 16)]


class Parent(_Schema):
    """The parent as the image names it, neither checked nor opened."""

    reference: Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]
    format: str | None = None
    identity: UUID | None = None


class Disk(_Schema):
    """A virtual disk without its content: size, parent and `DiskFacts`, bounded. None means not stated."""

    size: Annotated[int, Field(ge=0, le=MAX_SIZE)]
    logical_sector_size: SectorSize = 512
    physical_sector_size: SectorSize | None = None
    identity: UUID | None = None
    geometry: GeometrySchema | None = None
    adapter_type: Annotated[str, Field(max_length=64)] | None = None
    creator: Annotated[str, Field(max_length=64)] | None = None
    parent: Parent | None = None

    @classmethod
    def of(cls, size: int, facts: DiskFacts, parent: Parent | None = None) -> Self:
        """Returns the description of a disk; raises pydantic's `ValidationError` for facts that cannot be."""
        stated = dict(facts.stated())
        if facts.geometry is not None:
            stated["geometry"] = facts.geometry._asdict()
        return cls.model_validate({"size": size, "parent": parent, **stated})
