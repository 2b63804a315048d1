"""The tests, benchmarks and oracles of bntool; torch runs with one thread in them and in all that they start.

With more, the order of sums depends on the load of the machine.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
