"""`python -m vmconv` is `vmconv`."""

import sys

from vmconv.cli import main

sys.exit(main())
