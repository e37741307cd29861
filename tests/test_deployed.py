"""The two halves of a run on several machines, with letters handed over in this process."""

import io
import shutil
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

import anyrank
from anyrank.config import Recipe
from anyrank.display import summary
from anyrank.errors import RecordError, RoundFailed, TransportError
from anyrank.federation import Profile, Times
from anyrank.flower import server
from anyrank.flower.letter import Letter
from anyrank.flower.server import Clients, play
from anyrank.flower.site import Site
from anyrank.record import RunFolder
from anyrank.wire import decode
from tiny import recipe_toml, write_model, write_reviews

NAMES = ("bay", "cove", "dune")


@dataclass
class ByHand:
    """Carries letters to sites in this process."""

    sites: dict[int, Site]
    gone: set[int] = field(default_factory=set)
    deaf: dict[int, list[tuple[str, Letter]]] = field(default_factory=dict)
    asked: list[tuple[int, str]] = field(default_factory=list)
    answers: dict[str, Letter] = field(default_factory=dict)
    before: Callable[[int, Letter], Letter | None] = lambda node, letter: None

    def nodes(self) -> Set[int]:
        return self.sites.keys() - self.gone

    def send(self, letters: Mapping[int, Letter]) -> Mapping[str, int]:
        numbers = {}
        for node, letter in letters.items():
            number = str(len(self.asked))
            numbers[number] = node
            self.asked.append((node, letter.values["ask"]))
            answer = self.before(node, letter)
            if node in self.deaf:
                self.deaf[node].append((number, letter))
            elif node not in self.gone:
                answer = answer or self.sites[node].answer(Letter.unpacked(letter.packed()))
                self.answers[number] = Letter.unpacked(answer.packed())
        return numbers

    def hear(self, node: int) -> None:
        """A node that has been deaf answers all that it was sent."""
        for number, letter in self.deaf.pop(node):
            self.answers[number] = self.sites[node].answer(letter)

    def collect(self, numbers: Collection[str]) -> Mapping[str, Letter]:
        return {number: self.answers.pop(number) for number in [*numbers] if number in self.answers}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A model, the files of three clients, and a test file."""
    folder = tmp_path_factory.mktemp("deployed")
    write_model(folder / "model")
    (folder / "clients").mkdir()
    for i, name in enumerate(NAMES):
        write_reviews(folder / "clients" / f"{name}.csv", rows=30 + 10 * i, seed=i)
    write_reviews(folder / "test.csv", rows=60, seed=9)
    return folder


def recipe_of(material: Path, method: str = "hetlora", **changes: Any) -> Recipe:
    text = recipe_toml(material / "model", material / "clients", method=method)
    file = material / f"{method}.toml"
    file.write_text(text)
    settings = {
        "partition": {"name": "by_column", "column": "file"},
        "data.test": str(material / "test.csv"),
        "fleet.per_round": 3,
        "train": {"learning_rate": 1e-2, "batch_size": 8, "steps": 3},
        "evaluate.every": 2,
    }
    return anyrank.load_recipe(file, settings | changes)


def sites_of(material: Path, folder: Path, kinds: Mapping[str, str]) -> dict[int, Site]:
    return {
        100 + i: Site(name, str(material / "clients" / f"{name}.csv"), folder / name / "runs", kind=kinds[name])
        for i, name in enumerate(NAMES)
    }


def deployed(recipe: Recipe, post: ByHand, out: Path, **settings: Any) -> tuple[RunFolder, Clients, list[str]]:
    remarks: list[str] = []
    clients = Clients(
        post,
        recipe,
        run="a-run",
        deadline=0.2 if post.gone else None,
        patience=20.0,
        noticed=remarks.append,
        **settings,
    )
    return play(recipe, out, clients, count=3 - len(post.gone)), clients, remarks


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "real_seconds"}


def assert_alike(found: Any, expected: Any) -> None:
    """Integers and texts equal, floats to 1e-5."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-5, abs=1e-6) if isinstance(expected, float) else expected)


KINDS = {"bay": "weak", "cove": "strong", "dune": "weak"}


def kinds_in(run: RunFolder) -> dict[str, str]:
    return {client: told["kind"] for client, told in run.info["fleet"].items()}


@pytest.mark.parametrize(
    "method", ["hetlora", "flora", "legend", "ffa_lora", "fedsa_lora", "fedex_lora", "anyrank", "galore"]
)
def test_a_deployed_run_is_the_run_in_one_process(material, tmp_path, method):
    """With the same records in every field but the real seconds, and the same adapters."""
    personal = method == "fedsa_lora"  # there is no global adapter that a server could score
    recipe = recipe_of(material, method, **{"compute.cohort": 1})
    whole = anyrank.run(recipe, tmp_path / "whole")
    sites = sites_of(material, tmp_path / "sites", kinds_in(whole))
    run, _, remarks = deployed(recipe, ByHand(sites), tmp_path / "run")
    assert not [remark for remark in remarks if "not let in" in remark]
    assert len(run.records()) == len(whole.records()) == recipe.rounds
    dropped = {"score", "loss", "metrics"} if personal else set()
    for found, expected in zip(run.records(), whole.records(), strict=True):
        assert_alike(
            {k: v for k, v in without_times(found).items() if k not in dropped},
            {k: v for k, v in without_times(expected).items() if k not in dropped},
        )
    if personal:  # each has its own, and nobody else does
        for name in NAMES:
            mine = load_file(tmp_path / "sites" / name / "adapters" / "a-run" / "adapter_model.safetensors")
            expected = load_file(whole.path / "clients" / name / "adapter_model.safetensors")
            assert mine.keys() == expected.keys()
            assert all(mine[key].allclose(expected[key], atol=1e-5) for key in mine)
    else:
        for name in ("adapter", "classes/rank-1") if method not in ("galore",) else ("adapter",):
            one, other = (load_file(r.path / name / "adapter_model.safetensors") for r in (run, whole))
            assert one.keys() == other.keys()
            assert all(one[key].allclose(other[key], atol=1e-5) for key in one)


def test_without_a_test_set_the_score_is_that_of_the_clients_own_examples(material, tmp_path):
    recipe = recipe_of(material, **{"data.test": None})
    run, _, _ = deployed(recipe, ByHand(sites_of(material, tmp_path, KINDS)), tmp_path / "run")
    last = run.records()[-1]
    assert last["score"] == last["federated"]["score"]
    assert last["loss"] is last["metrics"] is last["class_scores"] is None
    assert run.info["data"]["test"] == 0
    assert (run.path / "classes" / "rank-4" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("compression", "least"), [("fp16", 1.6), ("int8", 2.2)])
def test_compressed_letters_are_smaller_and_learn_as_well(material, tmp_path, compression, least):
    wide = {"fleet.classes.weak.rank": 24, "fleet.classes.strong.rank": 32}
    recipe = recipe_of(material, "rbla", rounds=4, **wide)
    plain, sent, _ = deployed(recipe, ByHand(sites_of(material, tmp_path / "a", KINDS)), tmp_path / "plain")
    packed, fewer, _ = deployed(
        recipe, ByHand(sites_of(material, tmp_path / "b", KINDS)), tmp_path / "packed", compression=compression
    )
    assert sent.up > least * fewer.up
    assert sent.down > 1.2 * fewer.down
    one, other = (run.records()[-1]["loss"] for run in (plain, packed))
    assert other == pytest.approx(one, abs=0.02)


def test_who_is_gone_costs_the_deadline_and_comes_back(material, tmp_path):
    post = ByHand(sites_of(material, tmp_path / "sites", KINDS))
    recipe = recipe_of(material, "flora", rounds=4)

    def loses_cove_in_round_2(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 2 and letter.values.get("kind") == "train":
            post.gone.add(101)
        elif letter.values.get("round") == 4:
            post.gone.clear()

    post.before = loses_cove_in_round_2
    clients = Clients(post, recipe, run="r", deadline=0.3)
    run = play(recipe, tmp_path / "run", clients, count=3)
    second, third, fourth = run.records()[1:]
    assert [(f["client"], f["stage"]) for f in second["rejected"]] == [("cove", "late")]
    assert "0.3 s" in second["rejected"][0]["reason"]
    assert third["planned_ranks"].keys() == {"bay", "dune"}
    assert not fourth["rejected"]


def test_who_misses_a_deadline_is_not_waited_for_until_it_answers(material, tmp_path):
    """Flower takes a minute to notice that a node is gone."""
    post = ByHand(sites_of(material, tmp_path / "sites", KINDS))
    recipe = recipe_of(material, "flora", rounds=5, **{"evaluate.every": 1})

    def deaf_from_2_to_3(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 2 and letter.values.get("kind") == "train":
            post.deaf.setdefault(101, [])
        elif letter.values.get("round") == 3 and letter.values.get("kind") == "evaluate" and 101 in post.deaf:
            assert [letter.values["ask"] for _, letter in post.deaf[101]] == ["task", "hello"]
            post.hear(101)

    post.before = deaf_from_2_to_3
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r", deadline=0.5), count=3)
    records = run.records()
    assert [(f["client"], f["stage"]) for f in records[1]["rejected"]] == [("cove", "late")]
    assert [sorted(record["planned_ranks"]) for record in records[2:]] == [["bay", "dune"], [*NAMES], [*NAMES]]
    assert [record["federated"]["clients"] for record in records] == [3, 2, 2, 3, 3]
    assert sum(f["stage"] == "late" for record in records for f in record["rejected"]) == 1


def test_a_client_that_comes_late_takes_part_and_nobody_waits_for_it(material, tmp_path):
    sites = sites_of(material, tmp_path / "sites", KINDS)
    post, late = ByHand({node: site for node, site in sites.items() if node != 102}), sites[102]

    def comes_in_2_and_is_ready_in_4(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 2 and 102 not in post.sites:
            post.sites[102], post.deaf[102] = late, []
        elif letter.values.get("round") == 4 and 102 in post.deaf:
            assert [letter.values["ask"] for _, letter in post.deaf[102]] == ["hello"]
            post.hear(102)

    post.before = comes_in_2_and_is_ready_in_4
    recipe = recipe_of(material, "flora", rounds=6)
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r"), count=2)
    assert [sorted(record["planned_ranks"]) for record in run.records()] == [["bay", "cove"]] * 4 + [[*NAMES]] * 2
    assert RunFolder.open(run.path).info["fleet"]["dune"] == {"kind": "weak", "rank": 1, "num_examples": 45}


def test_a_question_that_was_lost_is_asked_again(material, tmp_path, monkeypatch):
    """With a SuperNode that was killed and is back before Flower notices."""
    sites = sites_of(material, tmp_path / "sites", KINDS)
    post, late = ByHand({node: site for node, site in sites.items() if node != 102}), sites[102]
    lost: list[tuple[str, Letter]] = []

    def loses_the_first(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 1:
            post.sites[102], post.deaf[102] = late, lost
        elif lost:
            post.deaf.clear()
            monkeypatch.setattr(server, "_QUESTION", 0.0)

    post.before = loses_the_first
    recipe = recipe_of(material, "flora", rounds=5)
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r"), count=2)
    assert [letter.values["ask"] for _, letter in lost] == ["hello"]
    assert "dune" in run.records()[-1]["planned_ranks"]


def test_whose_worker_was_started_anew_is_sent_only_the_folds_that_it_lacks(material, tmp_path):
    sites = sites_of(material, tmp_path / "sites", KINDS)
    del sites[102]  # so that there are too few slots for folds to become one
    recipe = recipe_of(material, "flora", rounds=5, **{"fleet.classes.strong.rank": 1})
    post, sent = ByHand(sites), dict[int, int]()

    def new_worker_in_round_3(node: int, letter: Letter) -> None:
        if node == 101 and letter.values.get("kind") == "train":
            sent[letter.values["round"]] = len(letter.payload)
            if letter.values["round"] == 3:
                old = sites[101]
                sites[101] = Site(old.client, old.source, old.folder, kind=old.kind)

    post.before = new_worker_in_round_3
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r"), count=2)
    (rejected,) = run.records()[2]["rejected"]
    assert "started anew" in rejected["reason"]
    assert [sorted(record["planned_ranks"]) for record in run.records()] == [["bay", "cove"]] * 5
    assert sent[1] < sent[4] < sent[2]  # one fold, of one client only: those before are on its disk


def garbage(node: int, letter: Letter) -> Letter | None:
    return Letter({}, b"\x00" * 100) if node == 101 and letter.values["ask"] == "task" else None


def out_of_memory(node: int, letter: Letter) -> Letter | None:
    too_much = node == 101 and letter.values.get("kind") == "train" and letter.values["round"] == 1
    return Letter({"error": "out of memory", "too_large": True}) if too_much else None


def test_garbage_is_rejected_by_name_and_the_round_goes_on(material, tmp_path):
    post = ByHand(sites_of(material, tmp_path / "sites", KINDS), before=garbage)
    run, _, _ = deployed(recipe_of(material), post, tmp_path / "run")
    assert all([f["client"] for f in record["rejected"]] == ["cove"] for record in run.records())
    assert "not a complete" in run.records()[0]["rejected"][0]["reason"]


def test_who_cannot_hold_its_work_gets_less_next_round(material, tmp_path):
    post = ByHand(sites_of(material, tmp_path / "sites", KINDS), before=out_of_memory)
    run, _, remarks = deployed(recipe_of(material), post, tmp_path / "run")
    assert [record["planned_ranks"]["cove"] for record in run.records()] == [4, 2, 2]
    assert any("its rank is 2" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("version", "it has anyrank 0.0.1, the server"),
        ("base", "base hash"),
        ("column", "sentence"),
        ("kind", "'huge'; the recipe has: weak, strong"),
        ("name", "another client of this name"),
        ("junk", "cannot be read"),
    ],
)
def test_who_does_not_fit_is_not_let_in_and_the_others_play(material, tmp_path, spoil, said):
    sites = sites_of(material, tmp_path / "sites", KINDS)
    odd, before = sites[102], lambda node, letter: None
    if spoil == "column":
        (tmp_path / "odd.csv").write_text("text,label\na,kind\nb,unkind\n")
        odd.source = str(tmp_path / "odd.csv")
    elif spoil == "kind":
        odd.kind = "huge"
    elif spoil == "name":
        odd.client = "cove"
    else:

        def before(node: int, letter: Letter) -> Letter | None:
            if node != 102 or letter.values["ask"] not in ("hello", "agree"):
                return None
            if spoil == "junk":
                return Letter({"client": 5})
            answer = odd.answer(letter)
            values = dict(answer.values)
            if spoil == "version":
                values["anyrank"] = "0.0.1"
            elif "outline" in values:
                values["outline"] = {**values["outline"], "base_hash": "0" * 64}
            return Letter(values, answer.payload)

    post, recipe, remarks = ByHand(sites, before=before), recipe_of(material, rounds=2), list[str]()
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r", noticed=remarks.append), count=2)
    assert sum(said in remark for remark in remarks) == 1, remarks
    assert [sorted(record["planned_ranks"]) for record in run.records()] == [["bay", "cove"]] * 2


def test_a_profile_of_its_own_stands_for_a_device_class(material, tmp_path):
    sites = sites_of(material, tmp_path / "sites", dict.fromkeys(NAMES, ""))
    for node, site in sites.items():
        site.profile = Profile(1e10, 1e10, 1e9 if node == 100 else 2e5, 1e6, 1e6)
    recipe = recipe_of(material, "hlora", **{"ranks.name": "auto", "ranks.largest": 8})
    run, _, _ = deployed(recipe, ByHand(sites), tmp_path / "run")
    ranks = {client: told["rank"] for client, told in run.info["fleet"].items()}
    assert ranks["bay"] == 8 > ranks["cove"]


def test_a_server_that_was_killed_goes_on(material, tmp_path):
    """To the same adapter, with clients that have stayed, and one that was started anew."""
    recipe = recipe_of(material, "fedex_lora", rounds=4)
    whole, _, _ = deployed(recipe, ByHand(sites_of(material, tmp_path / "a", KINDS)), tmp_path / "whole")
    sites = sites_of(material, tmp_path / "b", KINDS)
    post = ByHand(sites)

    def killed(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 3 and letter.values["kind"] == "train" and node == 101:
            raise KeyboardInterrupt

    post.before = killed
    with pytest.raises(KeyboardInterrupt):
        deployed(recipe, post, tmp_path / "run")
    assert len(RunFolder.open(tmp_path / "run").records()) == 2
    again = sites_of(material, tmp_path / "b", KINDS)
    shutil.rmtree(tmp_path / "b" / "dune" / "runs")  # all that it held is lost
    run, _, _ = deployed(recipe, ByHand({100: sites[100], 101: again[101], 102: again[102]}), tmp_path / "run")
    for found, expected in zip(run.records(), whole.records(), strict=True):
        # In round 3 the folds are sent once more, which takes time.
        differ = {"bytes_down"} if found["round"] == 3 else set()
        differ |= {"simulated_seconds"} if found["round"] >= 3 else set()
        assert_alike(
            {k: v for k, v in without_times(found).items() if k not in differ},
            {k: v for k, v in without_times(expected).items() if k not in differ},
        )


def test_a_folder_of_another_recipe_or_model_is_not_gone_on_with(material, tmp_path):
    recipe = recipe_of(material, rounds=1)
    deployed(recipe, ByHand(sites_of(material, tmp_path / "a", KINDS)), tmp_path / "run")
    other = recipe_of(material, rounds=2)
    with pytest.raises(RecordError, match="another recipe"):
        deployed(other, ByHand(sites_of(material, tmp_path / "b", KINDS)), tmp_path / "run")


def test_a_run_that_is_done_needs_nobody(material, tmp_path):
    recipe = recipe_of(material, rounds=1)
    done, _, _ = deployed(recipe, ByHand(sites_of(material, tmp_path / "a", KINDS)), tmp_path / "run")
    again, clients, _ = deployed(recipe, ByHand({}), tmp_path / "run")
    assert again.records() == done.records()
    assert not clients.post.asked


def test_nobody_comes(material, tmp_path):
    recipe = recipe_of(material)
    with pytest.raises(TransportError, match=r"0 of 3 clients came within 0\.2 s"):
        play(recipe, tmp_path / "run", Clients(ByHand({}), recipe, run="r", patience=0.2), count=3)


def test_nobody_answers_and_nobody_comes_back(material, tmp_path):
    post = ByHand(sites_of(material, tmp_path / "sites", KINDS))
    post.before = lambda node, letter: post.gone.add(node) if letter.values["ask"] == "task" else None
    recipe, remarks = recipe_of(material), list[str]()
    with pytest.raises(TransportError, match=r"0 of 1 clients came within 0\.3 s"):
        play(
            recipe,
            tmp_path / "run",
            Clients(post, recipe, run="r", deadline=0.2, patience=0.3, noticed=remarks.append),
            count=3,
        )
    assert any("round 1: none of 3 clients" in said and "no reply within 0.2 s" in said for said in remarks)


def test_a_round_below_the_quorum_is_played_again(material, tmp_path):
    """With those who are there then, as if it had never been played before."""
    recipe = recipe_of(material, "fedex_lora", rounds=3, **{"server.quorum": 3})
    whole, _, _ = deployed(recipe, ByHand(sites_of(material, tmp_path / "a", KINDS)), tmp_path / "whole")
    post, away = ByHand(sites_of(material, tmp_path / "b", KINDS)), list[int]()

    def loses_one_once(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 2 and letter.values["kind"] == "train" and node == 101 and not away:
            away.append(node)
            post.gone.add(node)
        elif post.gone and letter.values["ask"] == "hello":
            post.gone.clear()

    post.before = loses_one_once
    remarks = list[str]()
    clients = Clients(post, recipe, run="r", deadline=0.3, patience=20.0, noticed=remarks.append)
    run = play(recipe, tmp_path / "run", clients, count=3)
    assert any("2 of 3 clients returned a valid update, and server.quorum asks for 3" in said for said in remarks)
    assert away
    for found, expected in zip(run.records(), whole.records(), strict=True):
        differ = (
            {"bytes_down", "simulated_seconds"} if found["round"] >= 2 else set()
        )  # the folds have been sent before
        assert_alike(
            {k: v for k, v in without_times(found).items() if k not in differ},
            {k: v for k, v in without_times(expected).items() if k not in differ},
        )


def test_a_round_that_never_has_a_quorum_ends_the_run(material, tmp_path):
    post = ByHand(sites_of(material, tmp_path / "sites", KINDS), before=garbage)
    recipe = recipe_of(material, **{"server.quorum": 3})
    with pytest.raises(RoundFailed, match="2 of 3 clients returned a valid update, and server"):
        play(recipe, tmp_path / "run", Clients(post, recipe, run="r"), count=3)
    assert sum(asked == "hello" for _, asked in post.asked) == 9  # it was tried three times


def test_measured_times_are_those_that_allocation_goes_by(material, tmp_path):
    def slow(node: int, letter: Letter) -> Letter | None:
        if letter.values["ask"] != "task":
            return None
        answer = post.sites[node].answer(letter)
        return Letter({**answer.values, "seconds": 100.0 if node == 100 else 1.0}, answer.payload)

    post = ByHand(sites_of(material, tmp_path / "sites", dict.fromkeys(NAMES, "weak")), before=slow)
    recipe = recipe_of(material, "legend", rounds=1)
    run, _, _ = deployed(recipe, post, tmp_path / "run", measured=True)
    _, header = decode((run.path / "checkpoint" / "state.safetensors").read_bytes())
    times = {client: Times(**learned["times"]) for client, learned in header["fleet"].items()}
    assert times["bay"].forward == pytest.approx(100 * times["cove"].forward)
    assert times["bay"].backward == pytest.approx(100 * times["cove"].backward)
    assert times["bay"].up == times["cove"].up


# --- what strangers and accidents do ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "spoilt"),
    [
        ("hello", {"client": 5}),
        ("hello", {"client": "../x"}),
        ("hello", {"client": "a\x1b[2Jb"}),
        ("hello", {"num_examples": "many"}),
        ("hello", {"num_examples": -200}),
        ("hello", {"num_examples": float("nan")}),
        ("hello", {"num_examples": 10**12}),
        ("hello", {"folds": float("inf")}),
        ("hello", {"kind": ["weak"]}),
        ("hello", {"label_names": 5}),
        ("hello", {"label_names": [["a"]]}),
        ("hello", {"label_names": [str(i) for i in range(2000)]}),
        ("hello", {"label_names": ["a\ud800"]}),
        ("hello", {"profile": {"x": 1}}),
        ("hello", {"profile": dict.fromkeys(vars(Profile(1.0, 1.0, 1.0, 1.0, 1.0)), 0.0)}),
        ("agree", {"labels": 5}),
        ("agree", {"labels": [-1]}),
        ("agree", {"layers": [{"name": "x"}]}),
        ("agree", {"outline": None}),
        ("agree", {"cost": []}),
    ],
)
def test_a_stranger_is_not_let_in_and_the_others_play(material, tmp_path, ask, spoilt):
    sites = sites_of(material, tmp_path / "sites", KINDS)

    def spoil(node: int, letter: Letter) -> Letter | None:
        if node != 102 or letter.values["ask"] != ask:
            return None
        answer = sites[102].answer(letter)
        return Letter({**answer.values, **spoilt}, answer.payload)

    post, recipe, remarks = ByHand(sites, before=spoil), recipe_of(material, rounds=1), list[str]()
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r", noticed=remarks.append), count=2)
    assert sorted(run.records()[0]["returned_ranks"]) == ["bay", "cove"]
    assert sum("is not let in: its answer cannot be read" in remark for remark in remarks) == 1
    assert all(remark.isprintable() for remark in remarks)


def test_the_labels_are_those_of_all_whoever_comes_first(material, tmp_path):
    """And a run that is gone on with keeps them, also when who had one of them is away."""
    file = tmp_path / "more.csv"
    file.write_text((material / "clients" / "dune.csv").read_text() + "critic-0,the film was fine,unsure\n" * 5)
    recipe = recipe_of(material, rounds=3)

    def sites(folder: str) -> dict[int, Site]:
        found = sites_of(material, tmp_path / folder, KINDS)
        found[102].source = str(file)
        return found

    whole, _, _ = deployed(recipe, ByHand(sites("a")), tmp_path / "whole")
    assert whole.info["data"]["label_names"] == ["kind", "unkind", "unsure"]
    post = ByHand(sites("b"))

    def killed(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 2 and node == 101:
            raise KeyboardInterrupt

    post.before = killed
    with pytest.raises(KeyboardInterrupt):
        deployed(recipe, post, tmp_path / "run")
    again = ByHand({node: site for node, site in sites("c").items() if node != 102})
    run = play(recipe, tmp_path / "run", Clients(again, recipe, run="a-run"), count=2)
    assert run.info["data"]["label_names"] == ["kind", "unkind", "unsure"]
    assert [sorted(record["returned_ranks"]) for record in run.records()[1:]] == [["bay", "cove"]] * 2


def test_a_client_that_is_new_when_a_run_is_gone_on_with_is_part_of_it(material, tmp_path):
    recipe, sites = recipe_of(material, rounds=3), sites_of(material, tmp_path / "a", KINDS)
    two = ByHand({node: site for node, site in sites.items() if node != 102})

    def killed(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 2 and node == 101:
            raise KeyboardInterrupt

    two.before = killed
    with pytest.raises(KeyboardInterrupt):
        play(recipe, tmp_path / "run", Clients(two, recipe, run="r"), count=2)
    run = play(recipe, tmp_path / "run", Clients(ByHand(sites), recipe, run="r"), count=3)
    assert sorted(run.info["fleet"]) == [*NAMES]
    assert "dune" in run.records()[-1]["returned_ranks"]
    assert "".join(map(str, summary(RunFolder.open(run.path))))


def test_two_servers_do_not_play_into_one_folder(material, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_LEFT_OVER", 0.3)
    recipe = recipe_of(material, rounds=1)
    post = ByHand(sites_of(material, tmp_path / "a", KINDS))

    def second(node: int, letter: Letter) -> None:
        if letter.values["ask"] == "task" and node == 100:
            with pytest.raises(RecordError, match="is being played into by another server"):
                play(recipe, tmp_path / "run", Clients(ByHand({}), recipe, run="r", patience=0.1), count=1)

    post.before = second
    deployed(recipe, post, tmp_path / "run")


def test_who_was_refused_is_let_in_when_it_is_mended(material, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_REFUSED", 0.0)
    sites = sites_of(material, tmp_path / "a", KINDS)
    sites[102].kind = "huge"
    post, recipe, remarks = ByHand(sites), recipe_of(material, rounds=4), list[str]()

    def mend(node: int, letter: Letter) -> None:
        if letter.values.get("round") == 2:
            sites[102].kind = "weak"

    post.before = mend
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r", noticed=remarks.append), count=2)
    assert sum("dune is not let in" in remark for remark in remarks) == 1  # and not at every try
    assert [len(record["returned_ranks"]) for record in run.records()] == [2, 2, 2, 3]


def test_a_name_belongs_to_its_key_and_a_node_has_one_name(material, tmp_path):
    sites = sites_of(material, tmp_path / "a", KINDS)
    sites[100].client = "cove"  # it comes first
    post, recipe, remarks = ByHand(sites), recipe_of(material, rounds=1), list[str]()
    names = {100 + i: name for i, name in enumerate(NAMES)}
    clients = Clients(post, recipe, run="r", noticed=remarks.append, name_of=names.get)
    run = play(recipe, tmp_path / "run", clients, count=2)
    assert sorted(run.records()[0]["returned_ranks"]) == ["cove", "dune"]
    assert any("its key is that of bay" in remark for remark in remarks)
    assert clients.node_of == {"cove": 101, "dune": 102}


def test_a_method_without_less_for_whoever_runs_out_of_memory_goes_on_without_it(material, tmp_path):
    def too_large(node: int, letter: Letter) -> Letter | None:
        return (
            Letter({"error": "out of memory", "too_large": True}) if node == 101 and "round" in letter.values else None
        )

    post, remarks = ByHand(sites_of(material, tmp_path / "a", KINDS), before=too_large), list[str]()
    recipe = recipe_of(material, "fedavg", rounds=4)
    run = play(recipe, tmp_path / "run", Clients(post, recipe, run="r", noticed=remarks.append), count=3)
    assert "cove" not in run.records()[-1]["planned_ranks"]
    assert any("runs out of memory at rank" in remark for remark in remarks)


def test_a_profile_without_a_device_class_is_shown(material, tmp_path):
    sites = sites_of(material, tmp_path / "sites", KINDS)
    sites[102].kind, sites[102].profile = "", Profile(1e10, 1e10, 1e9, 1e6, 1e6)
    recipe = recipe_of(material, "hlora", **{"ranks.name": "auto", "ranks.largest": 8, "rounds": 1})
    run, _, _ = deployed(recipe, ByHand(sites), tmp_path / "run")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*summary(run))
    assert "of its own" in console.export_text()
