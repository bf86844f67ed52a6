"""What a plugin implements: formats, backends, commands, and the hooks that register them."""
