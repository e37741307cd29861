"""Loading and tokenising, the embedded data set, partitions over clients, and trivial rules to compare with."""

from anyrank.data.load import Labelled, class_index, encode, labelled, labelled_texts, lacks_labels, load, with_texts
from anyrank.data.partition import PARTITIONS, held_out
from anyrank.data.read import Parts, absent_columns, fingerprint, parts, split_off, with_tokens
from anyrank.data.references import majority, overlap

__all__ = [
    "PARTITIONS",
    "Labelled",
    "Parts",
    "absent_columns",
    "class_index",
    "encode",
    "fingerprint",
    "held_out",
    "labelled",
    "labelled_texts",
    "lacks_labels",
    "load",
    "majority",
    "overlap",
    "parts",
    "split_off",
    "with_texts",
    "with_tokens",
]
