"""What tests of several rooms use; no test imports another test."""

import pytest

# Before anything imports it.
pytest.register_assert_rewrite("vmconv.testing")
