"""Replication: signed records, the replica of all of them, requests, and the engine that runs a replica."""
