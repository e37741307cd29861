"""Loading and tokenising, the embedded data set, partitions over clients, and trivial rules to compare with."""

from anyrank.data.load import Labelled, encode, load
from anyrank.data.partition import PARTITIONS, held_out
from anyrank.data.references import majority, overlap

__all__ = ["PARTITIONS", "Labelled", "encode", "held_out", "load", "majority", "overlap"]
