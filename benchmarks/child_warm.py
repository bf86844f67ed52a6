"""Child: times one call of `vmconv.api.convert` in a process that has already converted something alike.

Arguments: SOURCE TARGET TINY-SOURCE TINY-TARGET. Prints what it measured as json.
"""

from __future__ import annotations

import json
import sys
import time

from vmconv.api import convert

source, target, tiny_source, tiny_target = sys.argv[1:]
convert(tiny_source, tiny_target, force=True)
began = time.perf_counter()
convert(source, target)
print(json.dumps({"inner_seconds": time.perf_counter() - began}))
