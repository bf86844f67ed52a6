"""Linux system calls that Python lacks, a bounded thread pool, deferred signals; imports only errors."""
