"""Whole runs on a tiny real model: what they leave behind, how they go on after a kill, what they refuse."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

import anyrank
from anyrank import api
from anyrank.engine import Progress
from anyrank.errors import ConfigError, RecordError, RoundFailed
from anyrank.job import prepare
from anyrank.local import LOCALS
from anyrank.record import RunFolder
from anyrank.train import evaluate
from tiny import recipe_toml, write_model, write_reviews


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model, a data file and a recipe."""
    folder = tmp_path_factory.mktemp("tiny")
    model = write_model(folder / "model")
    reviews = write_reviews(folder / "reviews.csv")
    (folder / "recipe.toml").write_text(recipe_toml(model, reviews))
    return folder


def recipe(tiny: Path, *overrides: str):
    return anyrank.load_recipe(tiny / "recipe.toml", overrides)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> RunFolder:
    return anyrank.run(recipe(tiny, 'compare=["centralised"]'), tmp_path_factory.mktemp("runs") / "run")


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    """Of the adapter, without the card, which tells of baselines that were compared too."""
    return {p.name: p.read_bytes() for p in sorted((folder / "adapter").iterdir()) if p.name != "README.md"}


def without_clock_time(folder: Path) -> list[dict]:
    records = RunFolder.open(folder).records()
    return [{key: value for key, value in record.items() if key != "real_seconds"} for record in records]


class StopsAfter(anyrank.Observer):
    """Ends the run as a kill would, once so many rounds are on disk."""

    def __init__(self, rounds: int):
        self.left = rounds

    def finished_round(self, record):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_run_learns_and_leaves_everything_behind(finished):
    records = finished.records()
    assert [record["round"] for record in records] == [1, 2, 3]
    assert records[-1]["score"] > 0.8 > finished.info["references"]["majority class"]
    assert records[-1]["class_scores"].keys() == {"1", "4"}
    assert records[-1]["federated"]["clients"] == 6
    assert sum(records[-1]["energy"].values()) == pytest.approx(1)
    assert finished.info["fleet"].keys() == {f"client-0{i}" for i in range(6)}
    assert finished.info["recipe"]["train"]["epochs"] == 4
    assert finished.info["versions"]["torch"] == torch.__version__
    assert (finished.path / "compare" / "centralised" / "adapter" / "adapter_config.json").exists()


def test_clients_train_at_the_ranks_of_their_devices(finished):
    for record in finished.records():
        assert record["planned_ranks"] == record["returned_ranks"]
        for client, rank in record["planned_ranks"].items():
            assert rank == finished.info["fleet"][client]["rank"]
            assert rank == {"weak": 1, "strong": 4}[finished.info["fleet"][client]["kind"]]


@torch.no_grad()
def test_stock_peft_gives_the_logits_and_the_accuracy_of_our_own_evaluation(finished, tiny):
    job = prepare(recipe(tiny))
    score = evaluate(job.model, finished.final_adapter(), job.problem.test, training=job.training)
    assert score.metrics["accuracy"] == finished.records()[-1]["score"]

    base = transformers.AutoModelForSequenceClassification.from_pretrained(job.base.location, num_labels=2)
    stock = peft.PeftModel.from_pretrained(base, str(finished.path / "adapter")).eval()
    batch = job.training.collate([job.problem.test[i] for i in range(len(job.problem.test))])
    job.model.load(finished.final_adapter())
    logits = stock(**batch).logits
    assert torch.allclose(logits, job.model.model(**batch).logits, atol=1e-5)
    assert float((logits.argmax(-1) == batch["labels"]).float().mean()) == pytest.approx(score.metrics["accuracy"])
    labels = json.loads((finished.path / "adapter" / "labels.json").read_text())
    assert labels == {"0": "kind", "1": "unkind"}


def test_the_same_recipe_gives_the_same_bytes(finished, tiny, tmp_path):
    again = anyrank.run(recipe(tiny), tmp_path / "again")
    assert adapter_bytes(again.path) == adapter_bytes(finished.path)
    assert without_clock_time(again.path) == without_clock_time(finished.path)


def test_threads_of_a_run_are_its_own(tiny, tmp_path):
    before = torch.get_num_threads()
    folder = anyrank.run(recipe(tiny, f"compute.threads={before + 1}", "rounds=1"), tmp_path / "run")
    assert folder.info["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_another_seed_gives_another_result(finished, tiny, tmp_path):
    other = anyrank.run(recipe(tiny, "seed=1"), tmp_path / "other")
    assert adapter_bytes(other.path) != adapter_bytes(finished.path)


@pytest.mark.parametrize("method", ["hlora", "hetlora", "local_only"])
@pytest.mark.parametrize("rounds_before", [1, 2])
def test_a_resumed_run_ends_with_the_same_bytes(tiny, tmp_path, method, rounds_before):
    chosen = recipe(tiny, f"method.name={method}", "server.momentum=0.5", "train.steps=2")
    whole = anyrank.run(chosen, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        anyrank.run(chosen, tmp_path / "cut", observer=StopsAfter(rounds_before))
    cut = tmp_path / "cut"
    assert not (cut / "adapter").exists()
    with (cut / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "accur')  # as a kill in the middle of a line leaves it
    anyrank.resume(cut)
    assert without_clock_time(cut) == without_clock_time(whole.path)
    checkpoint = Path("checkpoint") / "state.safetensors"
    assert (cut / checkpoint).read_bytes() == (whole.path / checkpoint).read_bytes()
    if method != "local_only":
        assert adapter_bytes(cut) == adapter_bytes(whole.path)
        assert (cut / "adapter" / "README.md").read_bytes() == (whole.path / "adapter" / "README.md").read_bytes()


def test_a_record_without_its_checkpoint_is_played_again(tiny, tmp_path, monkeypatch):
    chosen, cut = recipe(tiny, "train.steps=2"), tmp_path / "cut"
    whole = anyrank.run(chosen, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        anyrank.run(chosen, cut, observer=StopsAfter(2))
    with (cut / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(whole.records()[2]) + "\n")
    anyrank.resume(cut)
    assert without_clock_time(cut) == without_clock_time(whole.path)


def test_a_finished_run_can_be_extended(finished, tiny, tmp_path):
    short = anyrank.run(recipe(tiny, "rounds=2"), tmp_path / "short")
    extended = anyrank.resume(short.path, overrides=["rounds=3"])
    assert adapter_bytes(extended.path) == adapter_bytes(finished.path)
    assert extended.info["recipe"]["rounds"] == extended.info["rounds"] == 3
    assert anyrank.resume(short.path).records() == extended.records()


def test_a_resumed_run_stays_the_same_run(finished, tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    with pytest.raises(ConfigError, match=r"train.batch_size: a run that is resumed may change only rounds"):
        anyrank.resume(copy, overrides=["train.batch_size=4"])
    with pytest.raises(ConfigError, match="a run can only grow"):
        anyrank.resume(copy, overrides=["rounds=2"])
    RunFolder.open(copy).update_info(data={**finished.info["data"], "fingerprint": "0" * 64})
    with pytest.raises(RecordError, match="was started on other data"):
        anyrank.resume(copy)


class Counts(anyrank.Observer):
    """Counts the rounds that are played."""

    def __init__(self):
        self.rounds = 0

    def finished_round(self, record):
        self.rounds += 1


def test_a_finished_run_and_its_baselines_are_not_played_again(tiny, tmp_path):
    text = (tiny / "recipe.toml").read_text().replace("[compute]\nthreads = 1\n", "")
    (tmp_path / "recipe.toml").write_text(text)
    chosen = anyrank.load_recipe(tmp_path / "recipe.toml", ['compare=["centralised", "local_only"]', "train.steps=2"])
    anyrank.run(chosen, tmp_path / "run")
    counts = Counts()
    anyrank.resume(tmp_path / "run", observer=counts)
    assert counts.rounds == 0
    (tmp_path / "run" / "compare" / "local_only" / "run.json").unlink()  # as a kill while it was removed leaves it
    anyrank.resume(tmp_path / "run", observer=counts)
    assert counts.rounds == 3
    anyrank.resume(tmp_path / "run", overrides=["rounds=4"], observer=counts)
    assert counts.rounds == 3 + 1 + 1 + 4


def test_an_extended_run_has_no_result_until_it_is_finished_again(tiny, tmp_path):
    short = anyrank.run(recipe(tiny, "rounds=1"), tmp_path / "short")
    with pytest.raises(KeyboardInterrupt):
        anyrank.resume(short.path, overrides=["rounds=3"], observer=StopsAfter(1))
    with pytest.raises(RecordError, match="has no adapter yet"):
        anyrank.export(short.path, 1, tmp_path / "small")


def test_a_target_named_on_resuming_is_looked_up_in_the_records(tiny, tmp_path):
    run = anyrank.run(recipe(tiny, "evaluate.target=0.01", "rounds=2"), tmp_path / "run")
    assert run.records()[-1]["target_seconds"] == run.records()[0]["simulated_seconds"]
    later = anyrank.resume(run.path, overrides=["evaluate.target=1.0", "rounds=3"])
    assert later.records()[-1]["target_seconds"] is None or later.records()[-1]["score"] == 1.0


def test_server_settings_do_not_hold_back_the_centralised_baseline(tiny, tmp_path):
    plain = anyrank.run(recipe(tiny, "baseline=centralised"), tmp_path / "plain")
    other = recipe(tiny, "baseline=centralised", "server.learning_rate=0.1", "train.prox_mu=10", "clock.deadline=1e-9")
    held = anyrank.run(other, tmp_path / "held")
    assert held.records()[0]["score"] == plain.records()[0]["score"]


def test_names_of_clients_stay_inside_the_run_folder(tiny, tmp_path):
    rows = (tiny / "reviews.csv").read_text().replace("critic-0", "../../x").replace("critic-1", "[/b]").splitlines()
    (tmp_path / "odd.csv").write_text("\n".join(rows))
    partition = 'partition={name = "by_column", column = "critic"}'
    chosen = recipe(tiny, f"data.source={tmp_path / 'odd.csv'}", partition, "baseline=local_only", "fleet.per_round=6")
    folder = anyrank.run(chosen, tmp_path / "run")
    assert len(list((folder.path / "clients").iterdir())) == 6
    assert (folder.path / "clients" / "%2E%2E%2F%2E%2E%2Fx" / "adapter_config.json").exists()
    with pytest.raises(RecordError, match="no global adapter"):
        anyrank.export(folder.path, 1, tmp_path / "out")


def test_folders_that_are_no_runs_are_named(finished, tiny, tmp_path):
    with pytest.raises(RecordError, match="already holds a run"):
        anyrank.run(recipe(tiny), finished.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(RecordError, match="is not an empty folder"):
        anyrank.run(recipe(tiny), tmp_path / "full")
    with pytest.raises(RecordError, match="holds no run"):
        anyrank.resume(tmp_path)
    for content, said in [("[]", "format 2"), ('{"format": 7}', "says 7"), ("{", "cannot be read")]:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RecordError, match=said):
            anyrank.resume(tmp_path)


def test_records_and_checkpoint_belong_together(finished, tmp_path):
    for name in ("fewer", "without"):
        shutil.copytree(finished.path, tmp_path / name)
    records = tmp_path / "fewer" / "rounds.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(RecordError, match="does not hold rounds 1 to 3"):
        anyrank.resume(tmp_path / "fewer")
    shutil.rmtree(tmp_path / "without" / "checkpoint")
    with pytest.raises(RecordError, match="is missing, though 3 rounds are recorded"):
        anyrank.resume(tmp_path / "without")
    assert len(RunFolder.open(tmp_path / "without").records()) == 3


def test_the_head_is_always_saved_and_loads_in_stock_peft(tiny, tmp_path):
    run = anyrank.run(recipe(tiny, "lora.modules_to_save=['bert.pooler']", "rounds=1"), tmp_path / "run")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny / "model", num_labels=2)
    stock = peft.PeftModel.from_pretrained(base, str(run.path / "adapter"))
    head = run.final_adapter().dense["classifier.weight"]
    assert torch.equal(stock.get_submodule("base_model.model.classifier.modules_to_save.default").weight, head)


def test_a_truncated_checkpoint_is_refused(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    file = copy / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecordError, match="not a complete anyrank file"):
        anyrank.resume(copy)


def test_a_run_can_start_from_an_adapter(finished, tiny, tmp_path):
    start = finished.path / "adapter"
    job = prepare(recipe(tiny, f"lora.start={start}"))
    first = job.method.init(job.spec)
    for name, part in finished.final_adapter().layers.items():
        assert torch.allclose(first.adapter.layers[name].product, part.product, atol=1e-6)
    more = anyrank.run(recipe(tiny, f"lora.start={start}", "rounds=1"), tmp_path / "more")
    assert more.records()[-1]["score"] > 0.8
    with pytest.raises(ConfigError, match=r"adapts bert.*, which lora.target_modules does not"):
        prepare(recipe(tiny, f"lora.start={start}", 'lora.target_modules=["query"]'))
    with pytest.raises(ConfigError, match="no PEFT adapter can be read"):
        prepare(recipe(tiny, f"lora.start={tmp_path}"))


def test_export_gives_the_best_adapter_of_a_rank(finished, tmp_path):
    small = anyrank.export(finished.path, 2, tmp_path / "small")
    for name, part in finished.final_adapter().layers.items():
        U, S, Vt = torch.linalg.svd(part.product)
        best = U[:, :2] * S[:2] @ Vt[:2]
        assert torch.allclose(small.layers[name].product, best, atol=1e-5)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 2
    assert "This adapter was not scored." in (tmp_path / "small" / "README.md").read_text()
    anyrank.export(finished.path, 4, tmp_path / "whole")
    assert f"{finished.records()[-1]['score']:.4f}" in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(ConfigError, match="expected a rank from 1 to 4"):
        anyrank.export(finished.path, 5, tmp_path / "large")
    with pytest.raises(RecordError, match="not an empty folder"):
        anyrank.export(finished.path, 1, tmp_path / "small")


@pytest.mark.parametrize("method", sorted(anyrank.METHODS))
def test_every_method_runs(tiny, tmp_path, method):
    claims = anyrank.METHODS[method]().claims
    settings = [f"method.name={method}", "rounds=2", f"topology.name={claims.topologies[0]}", "train.steps=2"]
    folder = anyrank.run(recipe(tiny, *settings), tmp_path / method)
    ranks = {rank for record in folder.records() for rank in record["returned_ranks"].values()}
    assert (len(ranks) > 1) == claims.mixed_ranks
    assert folder.records()[-1]["score"] > 0.4
    if claims.personal:
        trained = {client for record in folder.records() for client in record["returned_ranks"]}
        assert {path.name for path in (folder.path / "clients").iterdir()} == trained
    else:
        adapted = folder.final_adapter()
        assert anyrank.export(folder.path, 1, tmp_path / "small").layers.keys() == adapted.layers.keys()


@pytest.mark.parametrize("local", [name for name in LOCALS if name not in ("lora", "mole")])  # the last needs adapters
def test_every_way_of_training_runs(tiny, tmp_path, local):
    folder = anyrank.run(recipe(tiny, f"local.name={local}", "rounds=2", "train.steps=4"), tmp_path / local)
    assert folder.records()[-1]["score"] > 0.4


@pytest.mark.parametrize("topology", ["hierarchy", "ring", "gossip"])
def test_every_topology_runs_and_resumes_to_the_same_bytes(tiny, tmp_path, topology):
    settings = [f"topology.name={topology}", "method.name=fedsa_lora", "train.steps=2"]
    whole = anyrank.run(recipe(tiny, *settings, "rounds=3"), tmp_path / "whole")
    part = anyrank.run(recipe(tiny, *settings, "rounds=2"), tmp_path / "part")
    anyrank.resume(part.path, overrides={"rounds": 3})
    for name in ("checkpoint/state.safetensors", "clients/client-01/adapter_model.safetensors"):
        assert (part.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize(
    ("baseline", "clients", "ranks"),
    [
        ("centralised", 1, {4}),
        ("local_only", 6, {1, 4}),
        ("homogeneous_smallest", 6, {1}),
        ("homogeneous_largest", 6, {4}),
        ("strong_only", 3, {4}),
    ],
)
def test_baselines_change_who_takes_part(tiny, tmp_path, baseline, clients, ranks):
    folder = anyrank.run(recipe(tiny, f"baseline={baseline}", "rounds=2"), tmp_path / baseline)
    assert len(folder.info["fleet"]) == clients
    assert {client["rank"] for client in folder.info["fleet"].values()} == ranks
    assert folder.records()[-1]["score"] is not None


def test_the_centralised_baseline_sees_as_many_examples_as_the_federation(finished):
    central = RunFolder.open(finished.path / "compare" / "centralised")
    steps = sum(record["steps"] for record in finished.records())
    (record,) = central.records()
    assert record["steps"] == pytest.approx(steps, rel=0.15)  # batches at the end of an epoch are smaller
    assert record["steps"] <= steps


def test_the_rank_policies_and_partitions_of_a_recipe_reach_the_fleet(tiny):
    job = prepare(recipe(tiny, "ranks.name=list", "ranks.values=[1,2,3,4,5,6]"))
    assert [device.rank for device in job.cohort.fleet.values()] == [1, 2, 3, 4, 5, 6]
    job = prepare(recipe(tiny, 'partition={name = "by_column", column = "critic"}'))
    assert set(job.cohort.fleet) == {f"critic-{i}" for i in range(6)}
    quantity = 'partition={name = "quantity", clients = 6, min_examples = 10}'
    job = prepare(recipe(tiny, quantity, "ranks.name=list", "ranks.values=[1,2,3,4,5,6]", "fleet.rank_order=with_data"))
    sizes = [device.num_examples for device in sorted(job.cohort.fleet.values(), key=lambda d: d.rank)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["problem.label=labl"], "labl"),
        (
            ["method.name=legend", "fleet.classes.weak.device=x", "fleet.classes.strong.device=x",
             "devices.x={forward_flops=1,backward_flops=1,memory_bytes=1000,up_bps=1,down_bps=1}"],
            "legend has no work that any of the devices can hold",
        ),
        (["method.name=hra_lora", "fleet.classes.strong.rank=40"], "rank 80 is above the larger side"),
        (["topology.name=ring", "method.name=flora"], "folds are numbered by one server"),
        (["method.name=hier_fedlora"], "Use hierarchy"),
        (["method.name=flora", "server.momentum=0.5"], "adds products to the base model"),
        (["method.name=anyrank", "local.name=dora"], "does not work with anyrank"),
        (["method.name=prelort", "local.name=lora_plus"], "brings its own way of training"),
        (["local.name=dora", "lora.dropout=0.1"], "of what goes into the factors of plain LoRA"),
        (["lora.dropout=1.0"], "lora.dropout"),
        (['clock.changes=[{round=2, kind="phones", slowdown=2.0}]'], "no device class 'phones'"),
        (["problem.text=['sentenc']"], "sentence"),
        (["partition.clients=1000"], "1000"),
        (["fleet.per_round=7"], "7 clients a round, but there are 6"),
        (["fleet.classes.strong.rank=49"], "above the larger side of bert.encoder.layer.0.attention.self.query"),
        (["fleet.classes.weak.device=toaster"], "there is no 'toaster'; there are: jetson-agx"),
        (["lora.target_modules=['q_proj']"], "linear layers of this model end in"),
        (["lora.target_modules=['classifier']"], "classifier matches no linear layer"),
        (["problem.max_length=33"], "33 tokens, but the model has 32 positions"),
        (["model.name=./nowhere"], "there is no folder ./nowhere"),
        (["devices.x={forward_flops=1,backward_flops=1,memory_bytes=0,up_bps=1,down_bps=1}"], "memory_bytes"),
        (
            ["devices.x={forward_flops=1,backward_flops=1,memory_bytes=1000,up_bps=1,down_bps=1}",
             "fleet.classes.weak.device=x"],
            "use a smaller batch",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_trained(tiny, tmp_path, overrides, said):
    with pytest.raises(ConfigError) as caught:
        anyrank.run(recipe(tiny, *overrides), tmp_path / "run")
    assert said.lower() in str(caught.value).lower()
    assert not (tmp_path / "run").exists()


def test_check_tells_what_each_device_class_is_asked_for(tiny):
    demands, remarks = anyrank.check(
        recipe(tiny, "fleet.classes.strong.rank=40", "lora.target_modules=['intermediate.dense']")
    )
    assert [(d.kind, d.rank, d.clients) for d in demands] == [("weak", 1, 3), ("strong", 40, 3)]
    weak, strong = demands
    assert weak.trainable == 2 * 80 + 66
    assert weak.bytes_down == weak.bytes_up < strong.bytes_down == strong.bytes_up
    assert weak.memory_bytes < strong.memory_bytes
    assert "rank 40 is above 32" in remarks[0]
    demands, remarks = anyrank.check(recipe(tiny, "method.name=fedavg"))
    assert {d.rank for d in demands} == {1}
    assert "everyone trains at rank 1, the smallest" in remarks[0]
    tight = "devices.x={forward_flops=1,backward_flops=1,memory_bytes=1000,up_bps=1,down_bps=1}"
    demands, remarks = anyrank.check(recipe(tiny, "method.name=legend", tight, "fleet.classes.weak.device=x"))
    assert [(d.kind, d.rank, d.clients) for d in demands] == [("strong", 4, 3)]
    assert "everyone trains at rank 4, the largest" in remarks[0]
    assert "3 of 6 clients can hold; they sit out: client-01" in remarks[1]


def test_a_client_that_diverges_is_left_out_by_name(tiny, tmp_path, monkeypatch):
    from anyrank import client, train

    original = train.train

    def diverging(*given, **arguments):
        adapter, loss = original(*given, **arguments)
        return adapter.map(lambda t: t * float("nan")), loss

    folder = tmp_path / "some"
    calls = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(client, "train", lambda *a, **k: (diverging if next(calls) % 4 == 1 else original)(*a, **k))
        run = anyrank.run(recipe(tiny, "compute.cohort=1"), folder)
    for record in run.records():
        (rejected,) = record["rejected"]
        assert rejected["stage"] == "rejected"
        assert "not finite" in rejected["reason"]
        assert rejected["client"] not in record["returned_ranks"]
    assert run.records()[-1]["score"] > 0.7

    with monkeypatch.context() as patch:
        patch.setattr(client, "train", diverging)
        with pytest.raises(RoundFailed, match="round 1: none of 4 clients returned a valid update: client-0"):
            anyrank.run(recipe(tiny, "compute.cohort=1"), tmp_path / "none")


@pytest.mark.parametrize("local", ["lora", "lora_rite", "lora_pro"])
def test_training_that_diverges_is_an_error_of_the_round(tiny, tmp_path, local):
    wild = recipe(tiny, f"local.name={local}", "train.learning_rate=1000", "train.steps=20")
    with pytest.raises(RoundFailed, match=r"client-0. \(rejected: "):
        anyrank.run(wild, tmp_path / "run")


def test_what_a_client_keeps_survives_a_round_in_which_it_diverges(tiny, tmp_path, monkeypatch):
    from anyrank import client, train

    original = train.train

    def diverging(model, task, *given, **arguments):
        adapter, metrics = original(model, task, *given, **arguments)
        return (
            adapter.map(lambda t: t * float("nan")) if task.round == 1 and task.plan.client == "client-01" else adapter
        ), metrics

    monkeypatch.setattr(client, "train", diverging)
    run = anyrank.run(recipe(tiny, "method.name=fedsa_lora", "fleet.per_round=6", "compute.cohort=1"), tmp_path / "run")
    assert [len(record["rejected"]) for record in run.records()] == [1, 0, 0]


def test_only_clients_that_were_heard_have_an_adapter_of_their_own(tiny, tmp_path):
    devices = "devices.slow={forward_flops=1,backward_flops=1,memory_bytes=1e9,up_bps=1e9,down_bps=1e9}"
    settings = ["clock.deadline=100", devices, "fleet.classes.weak.device=slow", "method.name=fedsa_lora"]
    run = anyrank.run(recipe(tiny, *settings, "fleet.per_round=6", "rounds=2"), tmp_path / "run")
    heard = {client for record in run.records() for client in record["returned_ranks"]}
    assert len(heard) == 3
    assert {path.name for path in (run.path / "clients").iterdir()} == heard


def test_a_baseline_that_fails_leaves_the_run_as_it_is(tiny, tmp_path):
    heard = []

    class Listener(anyrank.Observer):
        def noticed(self, remark):
            heard.append(remark)

    devices = "devices.slow={forward_flops=1,backward_flops=1,memory_bytes=1e9,up_bps=1e9,down_bps=1e9}"
    settings = ["clock.deadline=100", devices, "fleet.classes.strong.device=slow", "fleet.per_round=6", "rounds=1"]
    chosen = recipe(tiny, *settings, "compare=['strong_only', 'homogeneous_smallest']")
    run = anyrank.run(chosen, tmp_path / "run", observer=Listener())
    assert (run.path / "adapter").exists()
    assert [
        remark for remark in heard if remark.startswith("the baseline strong_only is not compared: round 1: none of 3")
    ]
    assert (run.path / "compare" / "homogeneous_smallest" / "adapter").exists()


def test_deadlines_dropouts_and_targets_are_simulated(tiny, tmp_path):
    slow = anyrank.run(recipe(tiny, "clock.dropout=0.3", "rounds=4", "seed=3"), tmp_path / "drop")
    stages = {failure["stage"] for record in slow.records() for failure in record["rejected"]}
    assert stages == {"dropped"}
    target = anyrank.run(
        recipe(tiny, "evaluate.target=0.6", "evaluate.stop_at_target=true", "rounds=9"), tmp_path / "target"
    )
    assert len(target.records()) < 9
    last = target.records()[-1]
    assert last["score"] >= 0.6
    assert last["target_seconds"] == last["simulated_seconds"]
    assert (target.path / "adapter").exists()


def test_other_versions_are_remarked_on_when_a_run_is_resumed(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    RunFolder.open(copy).update_info(versions={**finished.info["versions"], "torch": "1.0"})
    heard = []

    class Listener(anyrank.Observer):
        def noticed(self, remark):
            heard.append(remark)

    anyrank.resume(copy, observer=Listener())
    assert len(heard) == 1
    assert f"torch 1.0 is now {torch.__version__}" in heard[0]


def test_resuming_starts_from_the_checkpoint_and_not_from_the_start(finished, tiny):
    job = prepare(recipe(tiny))
    progress = finished.load(job.spec, job.cohort.fleet)
    assert isinstance(progress, Progress)
    assert progress.state.round == 3
    assert progress.seconds == finished.records()[-1]["simulated_seconds"]


def test_observers_hear_of_every_reply(tiny, tmp_path):
    heard = []

    class Listener(api.Observer):
        def started(self, job, folder, progress):
            heard.append("started")

        def replied(self, reply):
            heard.append(reply.client)

    anyrank.run(recipe(tiny, "rounds=1"), tmp_path / "run", observer=Listener())
    assert heard[0] == "started"
    assert len(heard) == 5


def test_depths_follow_a_device_that_slows_down_in_the_middle_of_a_run(tiny, tmp_path):
    settings = [
        "method.name=legend",
        "method.eps=0.0",
        "rounds=5",
        "fleet.per_round=6",
        'clock.changes=[{round = 3, kind = "strong", slowdown = 500.0}]',
    ]
    folder = anyrank.run(recipe(tiny, *settings), tmp_path / "run")
    kind = {client: member["kind"] for client, member in folder.info["fleet"].items()}

    def depths(record, wanted):
        return {blocks for client, blocks in record["planned_blocks"].items() if kind[client] == wanted}

    records = folder.records()
    # The server learns of it from the replies of round 3, and plans accordingly from round 4 on.
    assert depths(records[2], "strong") == depths(records[1], "strong") == {2}
    assert depths(records[3], "strong") == {1}
    assert depths(records[3], "weak") == {2}
