"""What things cost: one module per benchmark, run as `python3 scripts/dev.py bench NAME`.

A benchmark is a module with `cases(options)`, `measure(case, folder)`, which gives results, and
`report(results)`, which gives the lines of a table; `__main__` knows them by name. Nothing here is a
test: figures depend on the machine, and are read by people.
"""
