"""Where requests come from: the request itself, workload files, generators, block hashes."""
