"""Files and what is installed: directories, locks, the opener and its rules, the registry of plugins."""
