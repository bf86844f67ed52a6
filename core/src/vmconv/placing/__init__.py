"""What writers of block-allocating formats share: a disk in whole blocks, and where payload is placed."""
