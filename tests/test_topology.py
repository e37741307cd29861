"""Who averages with whom: weights, phases, what travels, and that peers agree."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank.adapter import Adapter
from anyrank.engine import begin, rounds
from anyrank.federation import Device, Plan, Task, Update
from anyrank.methods import METHODS
from anyrank.seeding import generator
from anyrank.topology import TOPOLOGIES, Asked, combine, metropolis
from anyrank.wire import bytes_up, nbytes
from federations import Setup, assert_close, assert_same, device, devices_of, random_adapter, reply, spec_of, state_of
from toy import FLEET, SPEC, federation

SETUP = Setup(ranks=(1, 2, 3, 3, 2), sizes=(1, 2, 3, 4, 5))


@dataclass
class Fake:
    """A round whose clients answer with a function of their task."""

    answer: object = lambda task: task.start
    number: int = 1
    seed: int = 0
    asked: list[Task] = field(default_factory=list)
    neighbours: dict[str, list[str]] = field(default_factory=dict)
    carried: list[tuple[int, int]] = field(default_factory=list)

    def ask(self, tasks, *, neighbours=None, late=False):
        self.asked += tasks
        self.neighbours = dict(neighbours or {})
        inbox = [(task, reply(task, self.answer(task))) for task in tasks if self.answer(task)]
        return Asked(inbox, [1 / len(tasks)] * len(inbox), 2.0)

    def carry(self, down, up):
        self.carried.append((down, up))

    def held(self, client):
        return 0


def peers_of(method, rank=3):
    """Peers that have already gone different ways."""
    spec = replace(spec_of(SETUP), levels=(rank,))
    start = method.init(spec)
    names = [f"client {i}" for i in range(5)]
    return {n: start.with_adapter(random_adapter(spec, start.adapter.ranks, n)) for n in names}


DEVICES = [device(f"client {i}", 3, num_examples=i + 1) for i in range(5)]


# --- weights ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.floats(0.05, 1), st.integers(0, 99))
def test_metropolis_weights_are_doubly_stochastic_symmetric_and_count_oneself(count, probability, seed):
    meet = np.triu(np.random.default_rng(seed).random((count, count)) < probability, 1)
    weights = metropolis(meet | meet.T)
    assert np.allclose(weights.sum(axis=0), 1)
    assert np.allclose(weights, weights.T)
    assert (weights >= -1e-12).all()
    assert (np.diag(weights) > 0).all()
    assert ((weights > 0) == ((meet | meet.T) | np.eye(count, dtype=bool))).all()


def test_metropolis_by_hand():
    # A star of three: the middle has two neighbours.
    weights = metropolis(np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], dtype=bool))
    assert np.allclose(weights, [[1 / 3, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 0], [1 / 3, 0, 2 / 3]])


# --- peers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ring", "gossip"])
def test_without_training_peers_keep_their_mean_and_come_to_agree(name):
    method, topology = METHODS["fedavg"](), TOPOLOGIES[name]()
    peers = peers_of(method)
    state = next(iter(peers.values()))
    mean = {key: sum(p.adapter.tensors()[key] for p in peers.values()) / 5 for key in state.adapter.tensors()}
    for number in range(1, 40):
        state, peers, _ = topology.play(method, state, peers, DEVICES, Fake(number=number))
        if number == 1:
            spread = max(float((p.adapter.tensors()["dense/head"] - mean["dense/head"]).norm()) for p in peers.values())
            assert spread > 0.1  # not at once
    for peer in peers.values():
        assert peer.round == state.round == 39
        for key, tensor in peer.adapter.tensors().items():
            assert_close(tensor, mean[key], 1e-3)
    for key, tensor in state.adapter.tensors().items():
        assert_close(tensor, mean[key], 1e-5)


def test_a_peer_averages_with_its_neighbours_and_itself():
    method = METHODS["fedavg"]()
    peers = peers_of(method)
    round = Fake()
    _, after, _ = TOPOLOGIES["ring"]().play(method, peers["client 0"], peers, DEVICES, round)
    assert round.neighbours["client 0"] == ["client 1", "client 4"]
    assert {len(met) for met in round.neighbours.values()} == {2}
    for i in range(5):
        three = [peers[f"client {j % 5}"].adapter.dense["head"] for j in (i - 1, i, i + 1)]
        assert_close(after[f"client {i}"].adapter.dense["head"], sum(three) / 3)


def test_a_peer_that_does_not_reply_stays_as_it_is_and_is_not_heard():
    method = METHODS["fedavg"]()
    peers = peers_of(method)
    round = Fake(answer=lambda task: None if task.plan.client == "client 1" else task.start)
    _, after, _ = TOPOLOGIES["ring"]().play(method, peers["client 0"], peers, DEVICES, round)
    assert_same(after["client 1"].adapter, peers["client 1"].adapter)
    two = [peers[f"client {j}"].adapter.dense["head"] for j in (0, 4)]
    assert_close(after["client 0"].adapter.dense["head"], sum(two) / 2)


def test_a_lonely_peer_trains_alone():
    method = METHODS["rbla"]()
    peers = peers_of(method)
    round = Fake(answer=lambda task: task.start.map(lambda tensor: tensor + 1))
    _, after, _ = TOPOLOGIES["ring"]().play(method, peers["client 0"], peers, DEVICES[:1], round)
    assert round.neighbours == {"client 0": []}
    assert_close(after["client 0"].adapter.dense["head"], peers["client 0"].adapter.dense["head"] + 1)
    assert_same(after["client 3"].adapter, peers["client 3"].adapter)


def test_gossip_meets_anew_in_every_round_as_the_seed_says():
    def met(number, seed):
        round = Fake(number=number, seed=seed)
        peers = peers_of(METHODS["fedavg"]())
        TOPOLOGIES["gossip"](probability=0.4).play(METHODS["fedavg"](), peers["client 0"], peers, DEVICES, round)
        return round.neighbours

    assert met(1, 0) == met(1, 0)
    assert any(met(number, 0) != met(1, 0) for number in range(2, 8))
    assert any(met(1, seed) != met(1, 0) for seed in range(1, 8))


def test_peers_pay_for_what_they_send_to_each_other_and_for_no_task():
    run = federation(METHODS["rbla"](), TOPOLOGIES["ring"](), rounds=1)
    (after,) = rounds(run, begin(run, run.method.init(SPEC), FLEET))
    sent = sum(2 * nbytes(task.start) for task in run.transport.asked if task.kind == "train")
    assert after.record["bytes_up"] == after.record["bytes_down"] == sent


def test_all_peers_start_from_the_same_factors():
    run = federation(METHODS["rbla"](), TOPOLOGIES["gossip"]())
    start = begin(run, run.method.init(SPEC), FLEET)
    assert set(start.peers) == set(FLEET)
    assert len({id(peer.adapter) for peer in start.peers.values()}) == 1


# --- hierarchy ----------------------------------------------------------------------------------------------------


def test_one_edge_with_one_repeat_is_a_star():
    method = METHODS["rbla"]()
    state = state_of(method, SETUP)
    devices = devices_of(SETUP)

    def answer(task):
        rng = generator("answer", task.plan.client)
        return task.start.map(lambda tensor: tensor + torch.randn(tensor.shape, generator=rng))

    star, _, _ = TOPOLOGIES["star"]().play(method, state, {}, devices, Fake(answer))
    tree, _, _ = TOPOLOGIES["hierarchy"](edges=1).play(method, state, {}, devices, Fake(answer))
    for name, tensor in star.adapter.tensors().items():
        assert_close(tree.adapter.tensors()[name], tensor)


def test_edges_ask_their_clients_repeatedly_and_weigh_by_examples():
    method = METHODS["fedavg"]()
    state = state_of(method, Setup(ranks=(2, 2, 2), sizes=(1, 2, 3)))
    devices = devices_of(Setup(ranks=(2, 2, 2), sizes=(1, 2, 3)))
    round = Fake(answer=lambda task: task.start.map(lambda tensor: tensor + int(task.plan.client[-1])))
    after, _, seconds = TOPOLOGIES["hierarchy"](edges=2, repeats=3).play(method, state, {}, devices, round)
    assert [(t.plan.client, t.phase) for t in round.asked] == [
        *[(client, phase) for phase in range(3) for client in ("client 0", "client 2")],
        *[("client 1", phase) for phase in range(3)],
    ]
    # Edge 0 moves by (0 + 2) / 2 three times and speaks for 4 examples, edge 1 by 1 three times for 2.
    assert_close(after.adapter.dense["head"], state.adapter.dense["head"] + 3)
    assert seconds == 6.0  # edges work side by side
    size = nbytes(state.adapter)
    assert sorted(round.carried) == [(0, size), (0, size), (size, 0), (size, 0)]


def test_what_the_cloud_sends_to_a_lost_edge_counts():
    method, setup = METHODS["fedavg"](), Setup(ranks=(2, 2), sizes=(1, 1))
    state, round = (
        state_of(method, setup),
        Fake(answer=lambda task: task.start if task.plan.client == "client 0" else None),
    )
    TOPOLOGIES["hierarchy"](edges=2).play(method, state, {}, devices_of(setup), round)
    size = nbytes(state.adapter)
    assert sorted(round.carried) == [(0, size), (size, 0), (size, 0)]


def test_an_edge_speaks_only_for_the_slots_and_layers_of_its_clients():
    method = METHODS["rbla"]()
    state = state_of(method, Setup(ranks=(1, 3), sizes=(1, 1)))
    devices = devices_of(Setup(ranks=(1, 3), sizes=(1, 1)))
    round = Fake(
        answer=lambda task: task.start.map(lambda tensor: tensor * (2 if task.plan.client == "client 1" else 1))
    )
    after, _, _ = TOPOLOGIES["hierarchy"](edges=2).play(method, state, {}, devices, round)
    for name, part in after.adapter.layers.items():
        before = state.adapter.layers[name]
        assert_close(part.A[0], 1.5 * before.A[0])  # both hold the first slot
        assert_close(part.A[1:], 2 * before.A[1:])  # one holds the others


def test_an_edge_does_not_speak_for_clients_that_did_not_reply():
    method, setup = METHODS["rbla"](), Setup(ranks=(4, 4, 2), sizes=(1, 1, 1))
    state = state_of(method, setup)

    def answer(task):
        return None if task.plan.client == "client 0" else task.start.map(lambda tensor: 3 * tensor)

    # Edge 0 has clients 0, of rank 4, which is lost, and 2, of rank 2; edge 1 has client 1, of rank 4.
    after, _, _ = TOPOLOGIES["hierarchy"](edges=2).play(method, state, {}, devices_of(setup), Fake(answer))
    for name, part in after.adapter.layers.items():
        assert_close(part.A, 3 * state.adapter.layers[name].A)


def test_an_edge_that_is_lost_keeps_its_weight_where_changes_are_added():
    method, setup = METHODS["anyrank"](), Setup(ranks=(2, 2), sizes=(10, 90))
    state = state_of(method, setup)

    def answer(task):
        grown = task.start.map(lambda tensor: 1.5 * tensor)
        return (
            None
            if task.plan.client == "client 1"
            else Adapter(
                {n: replace(part, B=task.start.layers[n].B) for n, part in grown.layers.items()}, task.start.dense
            )
        )

    after, _, _ = TOPOLOGIES["hierarchy"](edges=2).play(method, state, {}, devices_of(setup), Fake(answer))
    for name, part in state.adapter.layers.items():
        assert_close(after.adapter.layers[name].product, 1.05 * part.product)


def test_groups_and_repeats_of_the_plans_come_first():
    base = METHODS["fedavg"]()

    def assign(state, devices):
        return [replace(p, group=f"site {i % 2}", repeats=1 + i % 2) for i, p in enumerate(base.assign(state, devices))]

    state = state_of(base, SETUP)
    round = Fake()
    TOPOLOGIES["hierarchy"](edges=4, repeats=9).play(base._replace(assign=assign), state, {}, devices_of(SETUP), round)
    assert [t.plan.client[-1] for t in round.asked] == [*"024", *"13", *"13"]


def test_repeats_draw_other_batches_and_count_in_all_books():
    run = federation(METHODS["rbla"](), TOPOLOGIES["hierarchy"](edges=2, repeats=2), rounds=1)
    (after,) = rounds(run, begin(run, run.method.init(SPEC), FLEET))
    trained = [task for task in run.transport.asked if task.kind == "train"]
    assert after.record["steps"] == sum(task.plan.steps for task in trained) == 2 * 4 * 4
    size = sum(nbytes(task.start) for task in trained)
    edges = 2 * nbytes(after.state.adapter)
    assert after.record["bytes_down"] == size + edges


def test_the_reducer_of_edges_leaves_the_servers_step_to_the_cloud():
    seen = []
    method = METHODS["rbla"]()._replace(step=lambda before, after: seen.append(1) or after)
    state = state_of(method, SETUP)
    TOPOLOGIES["hierarchy"](edges=3, repeats=2).play(method, state, {}, devices_of(SETUP), Fake())
    assert seen == [1]


def test_nobody_replies():
    method = METHODS["rbla"]()
    state = state_of(method, SETUP)
    peers = dict.fromkeys([f"client {i}" for i in range(5)], state)
    for name, topology in TOPOLOGIES.items():
        after, same, _ = topology().play(method, state, peers, devices_of(SETUP), Fake(answer=lambda task: None))
        assert after is state, name
        assert same in ({}, peers)


def test_what_an_update_weighs_is_what_travels():
    state = state_of(METHODS["rbla"](), SETUP)
    plan = Plan("a", dict.fromkeys(state.adapter.layers, 2), 1, up="B")
    task = Task("train", 1, plan, state.prefix(plan.ranks))
    update = Update("a", 1, task.start, 1, {})
    assert bytes_up(task, update) == nbytes(task.start, "B") < nbytes(task.start)
    assert isinstance(device("a", 1), Device)
    assert combine(METHODS["rbla"](), state, [(task, update)], [1.0]).round == state.round
    assert isinstance(task.applied, Adapter)
