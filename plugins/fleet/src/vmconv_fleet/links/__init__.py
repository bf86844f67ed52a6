"""Connections between nodes: Zenoh sessions over mutual TLS, and why a link is missing."""
