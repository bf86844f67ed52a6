"""What an owner does on request: the verbs, and the conversions that run on a node."""
