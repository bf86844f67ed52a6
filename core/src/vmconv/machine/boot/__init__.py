"""What a guest needs to start, read from its disks: partitions, boot code and headers, a few kilobytes of each disk."""
