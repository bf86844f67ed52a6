"""volatility3's layers of physical memory, which need no symbols."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.requirements import oracle_module

# In a process of its own, because its layers leave their files open.
READER = """
import importlib, json, sys
from volatility3.framework import contexts
from volatility3.framework.layers.physical import FileLayer
path, meta, module, name = sys.argv[1:]
context = contexts.Context()
def add(config, location, layer):
    context.config[config + ".location"] = location
    context.add_layer(FileLayer(context, config, layer))
add("base", path, "base")
context.config["memory.base_layer"] = context.config["memory.meta_layer"] = "base"
if meta:
    add("meta", meta, "meta")
    context.config["memory.meta_layer"] = "meta"
kind = getattr(importlib.import_module("volatility3.framework.layers." + module), name)
layer = context.layers["base"] if name == "FileLayer" else kind(context, "memory", "memory")
asked = json.load(sys.stdin)
found = [layer.read(at, 16).hex() if layer.is_valid(at, 16) else None for at in asked]
json.dump([layer.maximum_address, found], sys.stdout)
"""


def volatility(path: Path, module: str, name: str, asked: list[int]) -> tuple[int, list[str | None]]:
    """Returns the last address of volatility3's layer, which needs no symbols, and 16 bytes at each address."""
    oracle_module("volatility3")
    beside = path.with_suffix(".vmem")
    where = (beside.as_uri(), path.as_uri()) if module == "vmware" else (path.as_uri(), "")
    command = [sys.executable, "-c", READER, *where, module, name]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last, found = json.loads(done.stdout)
    return last, found
