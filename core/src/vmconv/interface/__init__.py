"""Interfaces for plugins: formats, backends, commands, and the hooks that register them."""
