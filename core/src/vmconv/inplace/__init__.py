"""Converting a disk inside its own file: payload stays where it lies, only the metadata around it is exchanged."""
