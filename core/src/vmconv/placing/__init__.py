"""Shared parts of block-allocating writers: disks in whole blocks, and the placement of payload."""
