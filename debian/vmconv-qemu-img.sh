#!/bin/sh
# As vmconv. The name under which it was called tells it from the real qemu-img.
code='import sys; sys.argv[0] = sys.argv.pop(1); from vmconv.__main__ import run_qemu_img; run_qemu_img()'
exec /usr/lib/vmconv/bin/python3 -I -c "$code" "$0" "$@"
