"""The web console of a node: pages made on the node, for browsers with or without JavaScript."""
