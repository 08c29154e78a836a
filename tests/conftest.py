"""One thread for every test: the networks are tiny, and threads that wait for each other stall on a busy machine."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)
