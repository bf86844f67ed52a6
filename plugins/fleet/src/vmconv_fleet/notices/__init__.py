"""Events of a node for other programs: webhooks and syslog."""
