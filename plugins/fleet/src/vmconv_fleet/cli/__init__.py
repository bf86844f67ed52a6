"""`vmconv fleet`: what administrators do, through the node on this machine or another one's API."""
