"""What a test run has tried, which `conftest` prints at its end."""

from collections import Counter

TRIED: Counter[str] = Counter()
"""How many ways to be stopped, by kind."""
