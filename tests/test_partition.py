import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from anyrank.data import PARTITIONS, held_out
from anyrank.errors import ConfigError
from anyrank.seeding import numpy_generator

RANDOM = {
    "iid": {},
    "dirichlet": {"alpha": 5.0, "min_examples": 1},
    "shards": {"per_client": 2},
    "quantity": {"alpha": 0.3, "min_examples": 2},
}


def examples(rows: int = 200, labels: int = 4) -> Dataset:
    return Dataset.from_dict({"label": [(7 * row) % labels for row in range(rows)]})


def deal(name: str, rows: Dataset, *, seed: int = 0, **arguments) -> dict[str, np.ndarray]:
    return PARTITIONS[name](rows, numpy_generator(seed, "partition"), **arguments)


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", RANDOM)
@given(rows=st.integers(40, 150), labels=st.integers(1, 5), clients=st.integers(1, 8), seed=st.integers(0, 99))
def test_every_example_goes_to_exactly_one_client(name, rows, labels, clients, seed):
    data = examples(rows, labels)
    parts = deal(name, data, seed=seed, clients=clients, **RANDOM[name])
    assert sorted(np.concatenate(list(parts.values()))) == list(range(rows))
    assert all(len(part) and np.all(np.diff(part) > 0) and part.dtype == np.int64 for part in parts.values())
    assert list(parts) == [f"client-{number:02}" for number in range(clients)]
    assert same(parts, deal(name, data, seed=seed, clients=clients, **RANDOM[name]))


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_deals_otherwise(name):
    first, second = (deal(name, examples(), seed=seed, clients=5, **RANDOM[name]) for seed in (0, 1))
    assert not same(first, second)


@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
@given(fewest=st.integers(1, 12), alpha=st.floats(0.3, 100), seed=st.integers(0, 99))
def test_every_client_gets_its_fewest_examples(name, fewest, alpha, seed):
    parts = deal(name, examples(), seed=seed, clients=4, alpha=alpha, min_examples=fewest)
    assert min(map(len, parts.values())) >= fewest


def test_client_names_sort_as_numbers():
    parts = deal("iid", examples(), clients=120)
    assert list(parts) == sorted(parts)
    assert (min(parts), max(parts)) == ("client-000", "client-119")


def test_iid_parts_are_equal():
    assert {len(part) for part in deal("iid", examples(10), clients=4).values()} == {2, 3}


def test_a_shard_client_sees_few_labels():
    data = examples(400, labels=10)
    labels = np.array(data["label"])
    parts = deal("shards", data, clients=20, per_client=2)
    assert {len(part) for part in parts.values()} == {10 * 2}
    assert all(len(set(labels[part])) <= 2 for part in parts.values())


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    data = examples(2000)
    labels = np.array(data["label"])

    def most(alpha: float) -> float:
        parts = deal("dirichlet", data, clients=5, alpha=alpha, min_examples=1)
        return np.mean([np.bincount(labels[part], minlength=4).max() / len(part) for part in parts.values()])

    assert most(0.1) > 0.6
    assert most(1e4) < 0.3


def test_a_small_alpha_skews_sizes_and_a_large_one_does_not():
    spread = [
        np.ptp([len(part) for part in deal("quantity", examples(), clients=5, alpha=alpha).values()])
        for alpha in (0.1, 1e6)
    ]
    assert spread[0] > 50
    assert spread[1] <= 2


def test_natural_clients_are_the_values_of_a_column(caplog):
    data = Dataset.from_dict({"label": [0] * 7, "who": ["bob", "ann", "bob", "cy", None, "ann", "ann"]})
    parts = deal("by_column", data, column="who")
    assert {name: part.tolist() for name, part in parts.items()} == {"ann": [1, 5, 6], "bob": [0, 2]}
    assert "1 clients with fewer than min_examples = 2, and 2 training examples in all" in caplog.text


def test_an_empty_name_is_none():
    data = Dataset.from_dict({"label": [0] * 4, "who": ["", "ann", "", "ann"]})
    assert list(deal("by_column", data, column="who")) == ["ann"]


def test_numbers_name_natural_clients_too():
    parts = deal("by_column", Dataset.from_dict({"label": [0] * 3, "who": [3, 20, 3]}), column="who", min_examples=1)
    assert list(parts) == ["20", "3"]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("iid", {"clients": 11}, r"clients = 11 needs 11 training examples, found 10"),
        ("iid", {"clients": 0}, r"partition\.clients: expected 1 or more, got 0"),
        ("shards", {"clients": 6}, r"clients = 6 x per_client = 2 needs 12 training examples, found 10"),
        ("quantity", {"clients": 4, "min_examples": 3}, r"needs 12 training examples, found 10"),
        ("quantity", {"clients": 2, "alpha": 0.0}, r"partition\.alpha: expected a number above 0, got 0.0"),
        ("dirichlet", {"clients": 2}, r"clients = 2 x min_examples = 10 needs 20"),
        ("dirichlet", {"clients": 5, "alpha": 0.001, "min_examples": 2}, r"1000 draws .*raise alpha, or lower"),
        (
            "by_column",
            {"column": "lable"},
            r"partition\.column: there is no column 'lable'; the columns are label; did you mean 'label'\?",
        ),
        ("by_column", {"column": "label", "min_examples": 9}, r"none of the 2 clients .*lower it"),
    ],
)
def test_what_cannot_be_dealt_is_said(name, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        deal(name, examples(10, labels=2), **arguments)


def test_all_mistakes_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        deal("dirichlet", examples(), clients=0, alpha=-1.0, min_examples=0)
    assert len(caught.value.problems) == 3


@given(count=st.integers(1, 60), share=st.floats(0, 0.99), seed=st.integers(0, 9), client=st.text(max_size=5))
def test_held_out_parts_a_client_in_two(count, share, seed, client):
    rows = np.arange(count, dtype=np.int64) * 3
    train, kept_back = held_out(rows, share=share, seed=seed, client=client)
    assert sorted([*train, *kept_back]) == rows.tolist()
    assert len(train) >= 1
    assert bool(len(kept_back)) == (share > 0 and count >= 2)
    assert abs(len(kept_back) - share * count) <= 1
    again = held_out(rows, share=share, seed=seed, client=client)
    assert np.array_equal(again[0], train)


def test_held_out_differs_between_seeds_and_clients():
    rows = np.arange(100)
    parts = [held_out(rows, share=0.2, seed=s, client=c)[1].tolist() for s, c in ((0, "a"), (1, "a"), (0, "b"))]
    assert parts[0] != parts[1] != parts[2] != parts[0]


def test_real_speakers_are_natural_clients():
    if "ANYRANK_DATA" not in os.environ:
        pytest.skip("ANYRANK_DATA does not name a folder with real data")
    file = Path(os.environ["ANYRANK_DATA"]) / "meld" / "train.parquet"
    parts = deal("by_column", Dataset.from_parquet(str(file)), column="client", min_examples=1)
    assert len(parts) == 260
