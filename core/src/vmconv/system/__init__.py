"""What Linux offers and Python does not: system calls, bounded threads, delayed signals; imports only errors."""
