"""Fuzzing: `run.py` is the program, `targets.py` what it is run on."""
