"""What clients keep between rounds: the newest before, whatever a killed round left."""

import torch

from anyrank.memory import Memory, folder_name
from federations import assert_same, one_layer


def kept(value: float):
    return one_layer([[value, 0]], [[1], [2], [3]])


def test_a_round_sees_what_was_kept_before_it_and_nothing_later(tmp_path):
    memory = Memory(tmp_path / "memory")
    assert memory.read("ann", before=(1, 0)) is None
    for round in (1, 3, 4):
        memory.write("ann", (round, 0), kept(round))
    assert_same(memory.read("ann", before=(4, 0)), kept(3))  # round 4 again, after a kill
    assert_same(memory.read("ann", before=(5, 0)), kept(4))
    assert memory.read("bob", before=(9, 0)) is None


def test_the_two_newest_rounds_are_kept_with_all_their_phases(tmp_path):
    memory = Memory(tmp_path)
    for round in range(1, 13):
        for phase in range(2):
            memory.write("ann", (round, phase), kept(round + phase / 2))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert_same(memory.read("ann", before=(12, 1)), kept(12))
    assert_same(memory.read("ann", before=(12, 0)), kept(11.5))


def test_a_long_name_keeps_its_beginning_and_stays_its_own(tmp_path):
    long = "Иван " * 12
    memory = Memory(tmp_path)
    for value, name in enumerate((long, long + "ы")):
        memory.write(name, (1, 0), kept(value))
    assert_same(memory.read(long, before=(2, 0)), kept(0))
    assert folder_name(long).startswith("%D0%98")
    assert len(folder_name("x" * 999)) < 128
    assert folder_name("x" * 100) == "x" * 100
    assert folder_name("ann.b/c d") == "ann%2Eb%2Fc d"


def test_a_clients_name_stays_one_folder(tmp_path):
    memory = Memory(tmp_path / "memory")
    for name in ("../../evil", "a/b", ".", "..", "ä b"):
        memory.write(name, (1, 0), kept(1))
        assert torch.equal(memory.read(name, before=(2, 0)).layers["q"].A, kept(1).layers["q"].A)
    assert len(list((tmp_path / "memory").iterdir())) == 5
    assert [child.name for child in tmp_path.iterdir()] == ["memory"]
