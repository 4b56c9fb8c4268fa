"""Bad inputs by the thousand: each ends in success with finite numbers, or in an error that says what to do.

    python -m tests.fuzz --n 20000 --seed 1       # longer than the suite's test; --kind table for one kind
    python -m tests.fuzz --again table 0 417      # one case again, with its traceback

`odd.py` makes values and damage, `kinds*.py` the inputs of each reader, `harness.py` runs and judges them.
"""
