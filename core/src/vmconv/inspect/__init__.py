"""What reads images and makes none: info, map, check, compare, prove."""
