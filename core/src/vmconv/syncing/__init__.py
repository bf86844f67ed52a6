"""A target made earlier is brought up to date with its source: what changed, and on what evidence."""
