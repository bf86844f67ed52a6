"""The command line: one module for each verb, named as the verb. It calls the same functions as `vmconv.api`."""
