"""Plain records of runs: what experiments and analyses write and what the report draws."""
