"""Copies a file, and makes the copy and its name durable: what moving the same bytes costs at least, in this
interpreter.
"""

import os
import sys


def main() -> None:
    source, target = sys.argv[1:3]
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while piece := reading.read(4 << 20):
            writing.write(piece)
        os.fsync(writing.fileno())
    os.fsync(os.open(os.path.dirname(target), os.O_RDONLY))


main()
