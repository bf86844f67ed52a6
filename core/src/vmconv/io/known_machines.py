"""Our own machine formats, for hints what to install."""

DISTRIBUTIONS = {
    "hyperv": "vmconv-hyperv",
    "kubevirt": "vmconv-kubevirt",
    "libvirt": "vmconv-libvirt",
    "ova": "vmconv-ovf",
    "ovf": "vmconv-ovf",
    "proxmox": "vmconv-proxmox",
    "vbox": "vmconv-vbox",
    "vma": "vmconv-vma",
    "vmx": "vmconv-vmx",
    "xva": "vmconv-xva",
}
SUFFIXES = {
    ".conf": "proxmox",
    ".ova": "ova",
    ".ovf": "ovf",
    ".ps1": "hyperv",
    ".vbox": "vbox",
    ".vma": "vma",
    ".vma.gz": "vma",
    ".vma.lzo": "vma",
    ".vma.zst": "vma",
    ".vmcx": "hyperv",
    ".vmx": "vmx",
    ".xml": "libvirt",
    ".xva": "xva",
    ".xva.gz": "xva",
    ".xva.xz": "xva",
    ".xva.zst": "xva",
    ".yaml": "kubevirt",
}
"""Format names by the suffixes of configurations."""
