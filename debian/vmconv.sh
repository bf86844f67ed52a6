#!/bin/sh
# -I: neither PYTHONPATH nor a module in the current directory replaces one of the package.
exec /usr/lib/vmconv/bin/python3 -I -m vmconv "$@"
