"""The verbs of requests, and the conversions that run on a node."""
