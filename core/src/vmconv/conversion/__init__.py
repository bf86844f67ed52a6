"""From a request to its result: containers, plan, execution, verification; streams and views."""
