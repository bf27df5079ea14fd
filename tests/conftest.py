"""One thread, here and in every process that a test starts: sums are then made in one order, so that what is promised bit
for bit can be compared bit for bit, whatever the number of cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"                                # before torch is imported
