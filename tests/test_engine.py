"""The round loop, with clients that answer from a function: no model, no data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from anyrank import engine, lowrank, spool
from anyrank.adapter import Adapter
from anyrank.clock import Clock
from anyrank.engine import Evaluation, Federation, Progress, begin, rounds, sample
from anyrank.errors import RoundFailed
from anyrank.federation import Device, Failure, Task, Update
from anyrank.methods import METHODS, server_optimizer
from anyrank.record import RunFolder
from anyrank.seeding import generator
from anyrank.topology import TOPOLOGIES
from anyrank.train import Score
from anyrank.wire import nbytes
from federations import Setup, assert_close, assert_same, device, spec_of

RANKS = {"ann": 1, "bob": 2, "cat": 4, "dan": 4}
SIZES = {"ann": 10, "bob": 20, "cat": 30, "dan": 40}
SETUP = Setup(shapes=((4, 6), (5, 3)), ranks=tuple(RANKS.values()), sizes=tuple(SIZES.values()))
SPEC = spec_of(SETUP)
FLEET = {client: device(client, rank, num_examples=SIZES[client]) for client, rank in RANKS.items()}


def moved(task: Task) -> Adapter:
    """What a client makes of its task: a function of the round, the client and what it was sent."""
    rng = generator("client", task.round, task.plan.client)
    return task.start.map(lambda tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=rng))


def answer(task: Task) -> Update | Failure:
    client = task.plan.client
    if task.kind != "train":
        return Update(client, task.round, None, SIZES[client], {"loss": 1.0, "accuracy": RANKS[client] / 4})
    return Update(client, task.round, moved(task), 1, {"loss": float(RANKS[client])})


@dataclass
class Clients:
    """A transport whose clients answer at once; some in their own way. Remembers whom it was asked for."""

    special: Mapping[str, object] = field(default_factory=dict)
    backwards: bool = False
    asked: list[Task] = field(default_factory=list)

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        self.asked += tasks
        for task in reversed(tasks) if self.backwards else tasks:
            special = self.special.get(task.plan.client) if task.kind == "train" else None
            yield special(task) if special else answer(task)

    def trained(self, round: int) -> list[str]:
        return [task.plan.client for task in self.asked if task.kind == "train" and task.round == round]


def ranks_of(fleet: Mapping[str, Device]) -> dict[str, int]:
    return {client: device.rank for client, device in fleet.items()}


def federation(clients: Clients | None = None, **changes) -> Federation:
    settings = {
        "method": METHODS["rbla"](),
        "transport": clients or Clients(),
        "topology": TOPOLOGIES["star"](),
        "clock": Clock(seed=0),
        "score": lambda adapter, at_end: Score(1.0, {"accuracy": float(adapter.num_parameters)}, 7),
        "per_round": 4,
        "rounds": 3,
        "norm_limit": 1000.0,
        "evaluation": Evaluation(),
        "seed": 5,
    }
    return Federation(**(settings | changes))


def beginning(run: Federation, fleet: Mapping[str, Device] = FLEET) -> Progress:
    return begin(run, run.method.init(SPEC), fleet)


def play(run: Federation, start: Progress | None = None) -> list[Progress]:
    return list(rounds(run, start or beginning(run)))


def assert_equal(found: Progress, expected: Progress) -> None:
    """Equal in all that the next round depends on, and in the record."""
    assert_same(found.state.adapter, expected.state.adapter)
    assert list(found.state.extra) == list(expected.state.extra)
    for name, adapter in found.state.extra.items():
        assert_same(adapter, expected.state.extra[name])
    assert found.state.round == expected.state.round
    assert found.fleet == expected.fleet
    assert (found.seconds, found.target_seconds) == (expected.seconds, expected.target_seconds)
    assert found.record == expected.record
    assert [late.task.plan for late in found.late] == [late.task.plan for late in expected.late]


# --- the record ---------------------------------------------------------------------------------------------------


def test_the_record_of_a_round():
    run = federation(rounds=1)
    (after,) = play(run)
    sent = [run.transport.asked[i].start for i in range(4)]
    size = sum(nbytes(adapter) for adapter in sent)
    seconds = 2.0 + 2 * nbytes(sent[3]) / 1000  # the largest adapter, down and up at 1000 bytes a second
    record = dict(after.record)
    energy = record.pop("energy")
    assert record == {
        "round": 1,
        "truncation_error": None,
        "score": float(after.state.adapter.num_parameters),
        "loss": 1.0,
        "metrics": {"accuracy": float(after.state.adapter.num_parameters)},
        "class_scores": {str(rank): float(rank * (4 + 6 + 5 + 3) + 6) for rank in (1, 2, 4)},
        "federated": {
            "score": pytest.approx(0.1 * 0.25 + 0.2 * 0.5 + 0.7),
            "std": pytest.approx(0.32476, abs=1e-4),
            "min": 0.25,
            "max": 1.0,
            "clients": 4,
        },
        "train_loss": (1 + 2 + 4 + 4) / 4,
        "bytes_down": size,
        "bytes_up": size,
        "simulated_seconds": pytest.approx(seconds),
        "target_seconds": None,
        "steps": 8,
        "examples": 0,  # the fake clients do not say
        "planned_ranks": RANKS,
        "planned_blocks": dict.fromkeys(RANKS, 2),
        "returned_ranks": RANKS,
        "late_replies": {},
        "rejected": [],
    }
    assert list(energy) == ["1-1", "2-2", "3-4"]
    assert sum(energy.values()) == pytest.approx(1)


def test_energy_is_the_share_of_squared_singular_values_between_class_ranks():
    run = federation(rounds=1)
    (after,) = play(run)
    squares = [torch.linalg.svdvals(part.product).square() for part in after.state.adapter.layers.values()]
    total = sum(float(s.sum()) for s in squares)
    shares = [sum(float(s[low:high].sum()) for s in squares) / total for low, high in ((0, 1), (1, 2), (2, 4))]
    assert list(after.record["energy"].values()) == pytest.approx(shares, abs=1e-5)


def test_energy_of_no_product_is_empty():
    idle = {client: lambda task: replace(answer(task), adapter=task.start) for client in RANKS}
    (after,) = play(federation(Clients(idle), rounds=1))
    assert after.record["energy"] == {}


def test_time_and_rounds_add_up():
    found = play(federation())
    assert [after.record["round"] for after in found] == [after.state.round for after in found] == [1, 2, 3]
    first = found[0].seconds
    assert [after.seconds for after in found] == pytest.approx([first, 2 * first, 3 * first])


@pytest.mark.parametrize(("every", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (10, [5])])
def test_evaluation_every_few_rounds_and_in_the_last(every, evaluated):
    found = play(federation(rounds=5, evaluation=Evaluation(every=every)))
    assert [after.state.round for after in found if after.record["score"] is not None] == evaluated
    assert [after.state.round for after in found if after.record["class_scores"] is not None] == [5]


def test_the_last_round_asks_every_client_to_evaluate_and_the_others_only_the_sampled():
    run = federation(per_round=2)
    play(run)
    evaluated = {
        r: [t.plan.client for t in run.transport.asked if t.kind == "evaluate" and t.round == r] for r in (1, 3)
    }
    assert evaluated[1] == run.transport.trained(1)
    assert evaluated[3] == list(RANKS)


@pytest.mark.parametrize("name", ["rbla", "local_only"])
def test_a_large_fleet_is_evaluated_in_parts(monkeypatch, name):
    (expected,) = play(federation(method=METHODS[name](), rounds=1))
    monkeypatch.setattr(engine, "_TOGETHER", 3)
    clients, calls = Clients(), []
    parts = SimpleNamespace(run=lambda tasks: (calls.append([t.plan.client for t in tasks]), clients.run(tasks))[1])
    (found,) = play(federation(parts, method=METHODS[name](), rounds=1))
    assert calls[-2:] == [["ann", "bob", "cat"], ["dan"]]
    assert found.record == expected.record


def test_how_often_is_evaluated_changes_nothing_else():
    often = play(federation(evaluation=Evaluation(classes="always")))
    never = play(federation(evaluation=Evaluation(every=10)))
    for one, other in zip(often, never, strict=True):
        assert_same(one.state.adapter, other.state.adapter)


def test_a_personal_method_is_scored_client_by_client():
    run = federation(method=METHODS["local_only"](), rounds=1)
    (after,) = play(run)
    assert after.record["score"] == sum(RANKS.values()) / 4 / 4  # what the clients' own models got
    assert [task.plan.client for task in run.transport.asked if task.kind == "test"] == list(RANKS)
    assert after.record["class_scores"] is None


def test_replies_are_announced_as_they_come():
    seen = []
    play(federation(Clients(backwards=True), rounds=1, notify=seen.append))
    assert [reply.client for reply in seen] == list(RANKS)[::-1]


# --- sampling -----------------------------------------------------------------------------------------------------

CROWD = {f"client {i:02}": device(f"client {i:02}", 1) for i in range(40)}


def names(per_round, seed, round):
    return [member.client for member in sample(CROWD, per_round=per_round, seed=seed, round=round)]


def test_sampling_is_a_function_of_seed_and_round():
    assert names(10, 0, 1) == names(10, 0, 1)
    assert names(10, 0, 1) != names(10, 0, 2)
    assert names(10, 0, 1) != names(10, 1, 1)


def test_a_sample_has_no_client_twice_and_keeps_the_fleets_order():
    for round in range(1, 20):
        found = names(10, 0, round)
        assert len(found) == 10
        assert found == sorted(set(found))


def test_more_clients_than_there_are_means_all():
    assert names(99, 0, 1) == list(CROWD)


def test_every_client_is_sampled_about_equally_often():
    counts = dict.fromkeys(CROWD, 0)
    for round in range(400):
        for client in names(10, 0, round):
            counts[client] += 1
    assert min(counts.values()) > 60  # 100 expected, standard deviation 9
    assert max(counts.values()) < 140


def test_the_ranks_of_the_fleet_do_not_change_who_is_sampled():
    run = federation(per_round=2)
    play(run)
    pruned = {client: replace(member, rank=1) for client, member in FLEET.items()}
    other = federation(per_round=2)
    play(other, beginning(other, pruned))
    assert [run.transport.trained(r) for r in (1, 2, 3)] == [other.transport.trained(r) for r in (1, 2, 3)]


# --- weights ------------------------------------------------------------------------------------------------------


def spying(seen):
    """RBLA that writes down the weights that it is given."""
    method = METHODS["rbla"]()

    def aggregate(state, inbox, weights):
        seen.append({update.client: weight for (_, update), weight in zip(inbox, weights, strict=True)})
        return method.aggregate(state, inbox, weights)

    return method._replace(aggregate=aggregate)


def test_weights_are_data_sizes_over_all_who_were_asked():
    seen = []
    silent = {"cat": lambda task: Failure("cat", task.round, "train", "out of battery")}
    play(federation(Clients(silent), method=spying(seen), rounds=1))
    assert seen == [{"ann": 0.1, "bob": 0.2, "dan": 0.4}]


def test_a_client_cannot_give_itself_more_weight():
    seen = []
    greedy = {"ann": lambda task: replace(answer(task), num_examples=10**9)}
    play(federation(Clients(greedy), method=spying(seen), rounds=1))
    assert seen == [{"ann": 0.1, "bob": 0.2, "cat": 0.3, "dan": 0.4}]


@pytest.mark.parametrize("name", METHODS)
def test_dense_tensors_are_averaged_by_data_size_by_every_method(name):
    silent = {"cat": lambda task: Failure("cat", task.round, "train", "out of battery")}
    run = federation(Clients(silent), method=METHODS[name](), rounds=1)
    (after,) = play(run)
    heads = {t.plan.client: moved(t).dense["head"] for t in run.transport.asked if t.kind == "train"}
    mean = (10 * heads["ann"] + 20 * heads["bob"] + 40 * heads["dan"]) / 70
    if run.method.claims.change:  # cat has changed nothing
        mean = 0.7 * mean + 0.3 * SPEC.start.dense["head"]
    assert_close(after.state.adapter.dense["head"], mean, 1e-6)


def test_dense_tensors_take_the_servers_step():
    run = federation(method=server_optimizer(METHODS["hlora"](), learning_rate=0.5, momentum=0.0), rounds=1)
    (after,) = play(run)
    heads = {t.plan.client: moved(t).dense["head"] for t in run.transport.asked if t.kind == "train"}
    mean = sum(SIZES[client] / 100 * head for client, head in heads.items())
    assert_close(after.state.adapter.dense["head"], 0.5 * mean + 0.5 * SPEC.start.dense["head"], 1e-6)


UNSOUND = {
    "no metric": (10, {"loss": 1.0}),
    "a metric without bounds": (10, {"loss": 1.0, "accuracy": 1.7e308}),
    "an infinite metric": (10, {"loss": 1.0, "accuracy": float("inf")}),
    "another one that is no number": (10, {"loss": float("nan"), "accuracy": 1.0}),
    "less than nothing": (-10, {"loss": 1.0, "accuracy": 1.0}),
    "more examples than there can be": (10**400, {"loss": 1.0, "accuracy": 1.0}),
}


@dataclass
class Unsound(Clients):
    """One of the clients, or all, answer evaluations in their own way."""

    who: Sequence[str] = ()
    answered: tuple[int, Mapping[str, float]] = (1, {})

    def run(self, tasks: Sequence[Task]) -> Iterator[Update | Failure]:
        for reply in super().run(tasks):
            odd = isinstance(reply, Update) and reply.adapter is None and reply.client in self.who
            yield replace(reply, num_examples=self.answered[0], metrics=self.answered[1]) if odd else reply


@pytest.mark.parametrize("score", [None, lambda adapter, at_end: Score(1.0, {"accuracy": 0.5}, 7)])
@pytest.mark.parametrize("answered", UNSOUND.values(), ids=UNSOUND.keys())
def test_an_answer_that_cannot_enter_the_mean_is_left_out(answered, score):
    (found,) = play(federation(Unsound(who=["dan"], answered=answered), rounds=1, score=score))
    federated = found.record["federated"]
    assert federated["clients"] == 3
    assert federated["score"] == pytest.approx((10 * 1 + 20 * 2 + 30 * 4) / 4 / 60)
    (found,) = play(federation(Unsound(who=list(RANKS), answered=answered), rounds=1, score=score))
    assert found.record["federated"] is None


@pytest.mark.parametrize("name", ["ring", "gossip"])
def test_a_peer_that_comes_late_starts_from_the_mean_of_the_others(name):
    clients, fleet = Clients(), {client: replace(device, rank=2) for client, device in FLEET.items()}
    run = federation(clients, topology=TOPOLOGIES[name](), method=METHODS["fedavg"]())
    run = replace(run, meet=lambda known: (fleet, fleet) if clients.asked else (known, known))
    after = play(run, beginning(run, {client: fleet[client] for client in ("ann", "bob", "cat")}))
    assert list(after[0].peers) == ["ann", "bob", "cat"]
    assert list(after[-1].peers) == list(RANKS)
    (first,) = [task for task in clients.asked if (task.plan.client, task.round, task.kind) == ("dan", 2, "train")]
    assert_same(first.start, after[0].state.adapter)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def with_nan(task: Task) -> Update:
    return replace(answer(task), adapter=moved(task).map(lambda tensor: tensor * float("nan")))


def too_large(task: Task) -> Update:
    return replace(answer(task), adapter=moved(task).map(lambda tensor: tensor * 1e6))


def with_head(value: float) -> Callable[[Task], Update]:
    return lambda task: replace(answer(task), adapter=Adapter(moved(task).layers, {"head": torch.full((2, 3), value)}))


WRONG = {
    "a failure": (lambda task: Failure("cat", task.round, "train", "out of battery"), "train", "out of battery"),
    "NaN": (with_nan, "rejected", "A/layer 0: holds a number that is not finite"),
    "a NaN loss": (
        lambda task: replace(answer(task), metrics={"loss": float("nan")}),
        "rejected",
        "loss: is nan; expected a finite number",
    ),
    "no loss": (lambda task: replace(answer(task), metrics={}), "rejected", "loss: is missing from the metrics"),
    "no adapter": (
        lambda task: replace(answer(task), adapter=None),
        "rejected",
        "A/layer 0: is missing from the update",
    ),
    "a reply to an earlier round": (
        lambda task: replace(answer(task), round=0),
        "rejected",
        "round: is 0; the task's is 1",
    ),
    "a norm far above the others": (too_large, "rejected", "layer 0: the norm of its product"),
    "a head far above the others": (with_head(1e5), "rejected", "dense/head: its norm, 2.45e+05, is over 1000 times"),
    "a head without bounds": (with_head(3e38), "rejected", "dense/head: its norm is not finite"),
    "a loss without bounds": (
        lambda task: replace(answer(task), metrics={"loss": 1.7e308}),
        "rejected",
        "loss: is 1.7e+308; expected a finite number below 1e+30",
    ),
}


@pytest.mark.parametrize(("special", "stage", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_bad_reply_is_named_and_the_round_goes_on_with_the_others(special, stage, reason):
    (found,) = play(federation(Clients({"cat": special}), rounds=1))
    (rejected,) = found.record["rejected"]
    assert (rejected["client"], rejected["stage"]) == ("cat", stage)
    assert rejected["reason"].startswith(reason)
    assert list(found.record["returned_ranks"]) == ["ann", "bob", "dan"]
    assert list(found.record["planned_ranks"]) == list(RANKS)
    assert found.record["steps"] == 6
    assert found.record["train_loss"] == pytest.approx((1 + 2 + 4) / 3)
    silent = {"cat": lambda task: Failure("cat", task.round, "train", "away")}
    (expected,) = play(federation(Clients(silent), rounds=1))
    assert_same(found.state.adapter, expected.state.adapter)


def test_a_round_without_a_valid_update_ends_the_run_and_names_everyone():
    bad = dict.fromkeys(RANKS, with_nan) | {"bob": lambda task: Failure("bob", task.round, "upload", "no network")}
    run = federation(Clients(bad))
    with pytest.raises(RoundFailed, match="round 1: none of 4 clients") as caught:
        play(run)
    assert "bob (upload: no network)" in str(caught.value)
    assert "ann (rejected: A/layer 0" in str(caught.value)


def test_rounds_before_a_failed_one_are_kept():
    bad = dict.fromkeys(RANKS, lambda task: with_nan(task) if task.round == 3 else answer(task))
    run = federation(Clients(bad))
    steps = rounds(run, beginning(run))
    assert [next(steps).state.round, next(steps).state.round] == [1, 2]
    with pytest.raises(RoundFailed):
        next(steps)


def test_a_client_that_is_late_or_drops_out_is_not_trained():
    run = federation(clock=Clock(dropout=0.25, deadline=30.0, seed=3), rounds=8)
    slow = {**FLEET, "cat": replace(FLEET["cat"], steps=100)}
    found = play(run, beginning(run, slow))
    reasons = set()
    for after in found:
        missing = {rejected["client"]: rejected["stage"] for rejected in after.record["rejected"]}
        assert set(run.transport.trained(after.state.round)) == set(RANKS) - set(missing)
        assert list(after.record["returned_ranks"]) == [client for client in RANKS if client not in missing]
        assert missing["cat"] in {"late", "dropped"}
        reasons |= set(missing.values())
    assert reasons == {"late", "dropped"}
    assert found[-1].seconds == pytest.approx(8 * 30.0)  # cat never comes, so the server always waits


def test_a_late_reply_counts_when_it_comes_where_changes_are_added():
    method = METHODS["anyrank"](weights="asked")
    run = federation(method=method, clock=Clock(deadline=30.0, seed=3), rounds=4)
    slow = {**FLEET, "cat": replace(FLEET["cat"], steps=34)}  # 35.7 s: from round 1, 30 s long, into round 3
    found = play(run, beginning(run, slow))
    assert [list(after.record["planned_ranks"]) for after in found] == [
        ["ann", "bob", "cat", "dan"],
        ["ann", "bob", "dan"],  # cat is busy
        ["ann", "bob", "dan"],
        ["ann", "bob", "cat", "dan"],
    ]
    assert [after.record["late_replies"] for after in found] == [{}, {}, {"cat": 1}, {}]
    assert [[late.task.round for late in after.late] for after in found] == [[1], [1], [], [4]]
    assert [[r["stage"] for r in after.record["rejected"]] for after in found] == [["late"], [], [], ["late"]]

    # Round 3 adds what the three changed now, and what cat changed to what it was sent in round 1.
    tasks = {(task.round, task.plan.client): task for task in run.transport.asked if task.kind == "train"}
    members = [(tasks[3, "ann"], 10 / 70), (tasks[3, "bob"], 20 / 70), (tasks[3, "dan"], 40 / 70)]
    members.append((tasks[1, "cat"], 30 / 100))
    before, after = found[1].state.adapter, found[2].state.adapter
    for name, part in before.layers.items():
        changes = [w * (moved(task).layers[name].product - task.start.layers[name].product) for task, w in members]
        exact = part.product + sum(changes)
        U, s, Vh = torch.linalg.svd(exact, full_matrices=False)
        rank = part.rank
        assert_close(after.layers[name].product, U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank])
    for name, tensor in before.dense.items():
        assert_close(
            after.dense[name], tensor + sum(w * (moved(t).dense[name] - t.start.dense[name]) for t, w in members)
        )


def test_a_round_does_not_last_longer_for_replies_to_earlier_ones():
    run = federation(method=METHODS["anyrank"](), clock=Clock(deadline=30.0, seed=3), rounds=3)
    slow = {**FLEET, "cat": replace(FLEET["cat"], steps=600)}
    found = play(run, beginning(run, slow))
    usual = play(federation(method=METHODS["anyrank"](), rounds=1))[-1].seconds
    assert found[0].seconds == 30.0
    assert found[2].seconds == pytest.approx(30.0 + 2 * usual, rel=0.2)
    assert [late.task.round for late in found[2].late] == [1]


def test_a_round_without_a_reply_in_time_waits_for_the_first_late_one():
    run = federation(method=METHODS["anyrank"](), clock=Clock(deadline=1.0, seed=3), rounds=2)
    first, second = play(run)
    assert list(first.record["returned_ranks"]) == ["cat", "dan"]  # both after 3.7 s, ann and bob later
    assert first.seconds == pytest.approx(3.7, abs=0.01)
    assert [late.task.plan.client for late in first.late] == ["ann", "bob"]
    assert second.record["late_replies"] == {"ann": 1, "bob": 1}
    assert list(second.record["planned_ranks"]) == ["cat", "dan"]


def test_awaited_replies_survive_the_checkpoint(tmp_path):
    def run():
        return federation(method=METHODS["anyrank"](), clock=Clock(deadline=30.0, seed=3), rounds=4)

    slow = {**FLEET, "cat": replace(FLEET["cat"], steps=34)}
    whole = play(run(), beginning(run(), slow))
    info = dict.fromkeys(["recipe", "rounds", "method", "versions", "data", "fleet", "modules_to_save"])
    folder = RunFolder.create(tmp_path / "run", info)
    for after in whole[:2]:
        folder.save(after, real_seconds=0.0)
    loaded = folder.load(SPEC, slow)
    for found, expected in zip(play(run(), loaded), whole[2:], strict=True):
        assert_equal(found, expected)


# --- order, targets, pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_replies_in_any_order_give_identical_states(name):
    one, other = (play(federation(Clients(backwards=order), method=METHODS[name]())) for order in (False, True))
    for found, expected in zip(one, other, strict=True):
        assert_equal(found, expected)


PAIRS = [(name, topology) for name, method in METHODS.items() for topology in method().claims.topologies]


@pytest.mark.parametrize(("name", "topology"), PAIRS)
def test_updates_on_disk_give_the_same_bytes(monkeypatch, name, topology):
    silent = {"cat": lambda task: Failure("cat", task.round, "train", "away") if task.round == 2 else too_large(task)}
    runs = [federation(Clients(silent), method=METHODS[name](), topology=TOPOLOGIES[topology]()) for _ in range(2)]
    in_memory = play(runs[0])
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    on_disk = play(runs[1])
    for found, expected in zip(on_disk, in_memory, strict=True):
        assert_equal(found, expected)


def test_with_updates_on_disk_a_method_can_keep_what_a_client_returned(monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    rbla = METHODS["rbla"]()

    def best(state, inbox, weights):
        _, update = inbox[-1]
        return state.with_layers(update.adapter.layers).with_extra({"best": update.adapter})

    run = federation(method=rbla._replace(aggregate=best), rounds=1)
    (after,) = play(run)
    task = next(task for task in run.transport.asked if task.plan.client == "dan")
    assert_same(after.state.extra["best"], moved(task))
    for name, part in after.state.adapter.layers.items():
        assert torch.equal(part.A, moved(task).layers[name].A)


def cut(update: Update, rank: int) -> Update:
    layers = {name: lowrank.truncate(part, rank) for name, part in update.adapter.layers.items()}
    return replace(update, adapter=Adapter(layers, update.adapter.dense))


def test_a_client_that_pruned_is_planned_at_its_new_rank():
    special = {"cat": lambda task: cut(answer(task), 2 if task.round == 2 else 4)}
    found = play(federation(Clients(special), method=METHODS["hetlora"](), rounds=4))
    assert [after.record["planned_ranks"]["cat"] for after in found] == [4, 4, 2, 2]
    assert [after.record["returned_ranks"]["cat"] for after in found] == [4, 2, 2, 2]
    assert [after.fleet["cat"].rank for after in found] == [4, 2, 2, 2]
    assert [after.record["planned_ranks"]["dan"] for after in found] == [4, 4, 4, 4]
    assert found[-1].state.adapter.ranks == {"layer 0": 4, "layer 1": 4}


def test_a_rejected_update_does_not_shrink_its_client():
    found = play(federation(Clients({"cat": lambda task: cut(with_nan(task), 1)}), method=METHODS["hetlora"]()))
    assert ranks_of(found[-1].fleet) == RANKS


def test_a_method_that_does_not_prune_refuses_smaller_updates():
    found = play(federation(Clients({"cat": lambda task: cut(answer(task), 1)})))
    assert found[0].record["rejected"][0]["reason"] == "A/layer 0: has rank 1; planned was 4"
    assert ranks_of(found[-1].fleet) == RANKS


def rising(accuracies):
    """Scores the global adapter of each round in turn."""
    return iter(accuracies).__next__


def test_a_run_stops_at_its_target():
    scores = rising([0.1, 0.6, *[0.5] * 2])  # the global adapter in each round, at the end its two smaller classes
    run = federation(
        rounds=5,
        score=lambda adapter, at_end: Score(1.0, {"accuracy": scores()}, 7),
        evaluation=Evaluation(target=0.5, stop_at_target=True),
    )
    found = play(run)
    assert [after.record["target_seconds"] for after in found] == [None, found[1].seconds]
    assert found[0].record["class_scores"] is None
    assert found[1].record["class_scores"] == {"1": 0.5, "2": 0.5, "4": 0.6}
    assert play(run, found[-1]) == []  # also when it is resumed


def test_a_run_that_goes_on_remembers_when_it_first_reached_its_target():
    scores = rising([0.1, 0.6, 0.2, *[0.9] * 3])
    run = federation(
        rounds=4, score=lambda adapter, at_end: Score(1.0, {"accuracy": scores()}, 7), evaluation=Evaluation(target=0.5)
    )
    found = play(run)
    assert [after.target_seconds for after in found] == [None, *[found[1].seconds] * 3]


# --- going on -----------------------------------------------------------------------------------------------------

RESUMED = {
    **{name: method() for name, method in METHODS.items()},
    "hetlora that prunes": METHODS["hetlora"](gamma=0.5),
    "hlora with momentum": server_optimizer(METHODS["hlora"](), learning_rate=0.7, momentum=0.5),
    "rbla with momentum": server_optimizer(METHODS["rbla"](), learning_rate=0.7, momentum=0.5),
}


@pytest.mark.parametrize("method", RESUMED.values(), ids=RESUMED.keys())
def test_going_on_from_any_round_is_the_uninterrupted_run(method):
    def leaves(task):
        return replace(answer(task), adapter=method.leave(moved(task).map(lambda tensor: 0.3 * tensor), task.start))

    def run():
        clock = Clock(dropout=0.2, straggler=0.3, seed=2)
        return federation(Clients(dict.fromkeys(RANKS, leaves)), method=method, clock=clock, per_round=3, rounds=5)

    whole = play(run())
    for stop in range(5):
        rest = play(run(), replace(whole[stop], record={}))
        assert len(rest) == 4 - stop
        for found, expected in zip(rest, whole[stop + 1 :], strict=True):
            assert_equal(found, expected)
    assert (ranks_of(whole[-1].fleet) != ranks_of(FLEET)) == method.claims.prunes


def test_more_rounds_continue_a_finished_run():
    short, long = play(federation(rounds=2)), play(federation(rounds=4))
    for found, expected in zip(play(federation(rounds=4), short[-1]), long[2:], strict=True):
        assert_equal(found, expected)
