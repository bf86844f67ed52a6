"""A machine format for the tests of core: JSON that carries a few fields."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Adapted, ConfigFile, MachineFormat, Substitution

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import File, Opener


class Toy(MachineFormat):
    name = "toy"
    title = "toy machines"
    suffixes = (".toy",)
    carries = frozenset(
        {"name", "cpu.count", "memory", "disks.file", "disks.format", "disks.capacity", "nics", "extra.toy"}
    )
    disk_format = "raw"

    def probe(self, file: File) -> bool:
        return file.size >= 6 and file.read(0, 6) == b'{"toy"'

    def read(self, file: File, opener: Opener) -> Machine:
        from pydantic import ValidationError

        from vmconv.machine import Machine, config_text, refused

        text = config_text(file)
        try:
            return Machine(**json.loads(text)["toy"])
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as exc:
            raise refused(file, "toy", " ".join(str(exc).split())) from exc

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        found = []
        nics = []
        for number, nic in enumerate(machine.nics):
            if nic.model not in (None, "virtio"):
                found.append(Substitution(f"nics[{number}].model", nic.model, "virtio", "toys have virtio only"))
            nics.append(nic.model_copy(update={"model": nic.model and "virtio"}))
        return Adapted(machine.model_copy(update={"nics": tuple(nics)}), tuple(found))

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv.machine import restricted

        kept = restricted(machine, self.carries).model_dump(mode="json", exclude_defaults=True)
        return (ConfigFile("", json.dumps({"toy": kept}).encode()),)
