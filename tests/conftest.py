"""Hypothesis draws the same few examples every time, so that the suite is fast and a failure stays a failure."""

import os

from hypothesis import settings

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything asks: a test never waits for a hub

settings.register_profile("default suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("default suite")
