"""Other ways to play the same federated rounds, written as their own documentation suggests, for `simulate.py`."""
