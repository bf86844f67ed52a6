"""`vmconv node` and `vmconv fleet`."""
