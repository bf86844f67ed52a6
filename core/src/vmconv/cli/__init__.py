"""The command line: one module per verb, named as the verb. It calls the same functions as `vmconv.api`."""
