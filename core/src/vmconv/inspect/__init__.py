"""Functions that only read images: info, map, check, compare, prove."""
