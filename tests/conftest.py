"""One thread per process: the models are tiny, pytest-xdist fills the cores, and sums keep their order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
