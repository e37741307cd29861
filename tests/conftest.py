"""Hypothesis draws the same few examples every time, so that the suite is fast and a failure stays a failure.

Tests have one thread: sums in several differ in their last digits, and suites run in as many processes as there are cores.
"""

import os

import torch
from hypothesis import settings

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything asks: a test never waits for a hub
torch.set_num_threads(1)

settings.register_profile("default suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("default suite")
