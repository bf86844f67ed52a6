"""What is inside a guest's filesystems, as far as it decides whether the guest starts: fstab, boot loader, drivers.

    facts = look(disks, Task(volumes, drivers, services))

A guest's filesystem is hostile input for the C libraries that read it. They run in a child process without any right:
it can neither open files nor sockets, and asks its parent for each byte of the disks. The libraries are the optional
extra `vmconv[guest]`.
"""

from __future__ import annotations

from vmconv.guest.facts import Device, Facts, Kernel, Problem, Service, System
from vmconv.guest.parent import MAX_READ, look
from vmconv.guest.protocol import Task, Volume

__all__ = ["MAX_READ", "Device", "Facts", "Kernel", "Problem", "Service", "System", "Task", "Volume", "look"]
