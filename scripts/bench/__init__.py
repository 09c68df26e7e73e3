"""What things cost: one module per benchmark, run as `python3 scripts/dev.py bench NAME`.

A benchmark is a module with `SUMMARY`, `cases(full)` and `measure(case, folder, repeats)`; `__main__` knows
them by name. Nothing here is a test: figures depend on the machine, and are read by people.
"""
