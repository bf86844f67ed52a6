"""KubeVirt's words, and the paths of settings that are kept from one object to another.

kubevirt.io/api/core/v1, "schema.go"; the limits are those of its admission webhook.
"""

from __future__ import annotations

import re

NICS = {
    "virtio": "virtio",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "pcnet32": "pcnet",
    "ne2k": "ne2k_pci",
    "rtl8139": "rtl8139",
}
SOUNDS = {"hda": "ich9", "ac97": "ac97"}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
BUSES = ("virtio", "sata", "scsi", "usb")

OS = "vm.kubevirt.io/os"
DESCRIPTION = "description"
FILE = "vmconv/file"
FORMAT = "vmconv/format"
DEVICE = "vmconv/device."
"""Annotations. The last one is followed by the name of a volume."""

SERIAL = re.compile(r"[A-Za-z0-9_.+-]{1,256}")
NETWORK = re.compile(r"([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/)?[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
CPU_MODEL = re.compile(r"host-model|host-passthrough|(?!max$|host$|x86-64-)[A-Za-z0-9][A-Za-z0-9_-]{0,62}")

KEPT = (
    *("metadata.namespace", "metadata.labels", "spec.runStrategy", "spec.running", "spec.updateVolumesStrategy"),
    "spec.template.metadata.labels",
    *(f"spec.template.spec.{name}" for name in ("affinity", "evictionStrategy", "hostname", "nodeSelector")),
    *(f"spec.template.spec.{name}" for name in ("subdomain", "terminationGracePeriodSeconds", "tolerations")),
    *(f"spec.template.spec.domain.{name}" for name in ("features", "ioThreadsPolicy", "rebootPolicy", "resources")),
)
"""Settings without a neutral meaning that the writer takes over, as JSON."""

MAX_NAME = 50
"""Letters of a machine's name: labels have 63, and the names of its disks begin with it."""


def label(text: str, limit: int = 63) -> str:
    """Returns text as a label of DNS (RFC 1123): lower case letters, digits and hyphens; empty if none are left."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].rstrip("-")
