"""What all tests share: as many processes as cores (pytest-xdist) must not each start as many threads."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
