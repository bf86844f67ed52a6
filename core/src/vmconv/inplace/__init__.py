"""Converting a disk inside its own file: payload stays in place, only the metadata around it is replaced."""
