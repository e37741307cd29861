"""Contestants of `deploy.py`, as an app of Flower's."""
