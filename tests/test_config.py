"""Recipes: everything that is wrong is said at once, with what would be right."""

import pytest

from anyrank.config import parse_overrides
from anyrank.errors import ConfigError
from anyrank.job import CHOICES, QUICKSTART, load_recipe


def problems(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, overrides)
    return caught.value.problems


def test_the_embedded_default_is_complete_and_valid():
    recipe = load_recipe()
    assert recipe.method == {"name": "hlora", "oversample": None}
    assert recipe.train.epochs == 1
    assert recipe.compare == ["centralised"]


def test_overrides_are_read_as_toml_or_else_as_strings():
    assert parse_overrides(["a.b=3", "c=[1, 2]", "d=true", "e=rbla", 'f="x=y"', "g=x=y"]) == {
        "a.b": 3,
        "c": [1, 2],
        "d": True,
        "e": "rbla",
        "f": "x=y",
        "g": "x=y",
    }


def test_an_override_without_a_value_is_explained():
    assert "expected key=value" in problems("rounds")[0]


def test_all_problems_come_at_once():
    found = problems("rouns=3", "method.gama=1", "train.batch_size=0", "fleet.classes.weak.rnk=2", "partition.alpha=1")
    text = "\n".join(found)
    assert len(found) == 5
    assert "rouns: unknown key (did you mean rounds?); accepted here: seed, rounds" in text
    assert "method.gama: unknown key; accepted by hlora: name, oversample." in text
    assert "train.batch_size: input should be greater than or equal to 1, got 0." in text
    assert "fleet.classes.weak.rnk: unknown key (did you mean rank?); accepted here: device, share, rank." in text
    assert "partition.alpha: unknown key; accepted by by_column: name, column, min_examples." in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.name=hetlra", "there is no 'hetlra' (did you mean hetlora?)"),
        ("method.name=3", "there is no 3"),
        ("method=hlora", "expected a table with a name"),
        ("fleet.classes.weak.rank=0", "fleet.classes.weak.rank: input should be greater than or equal to 1, got 0"),
        ("baseline=centralized", "baseline: input should be 'centralised'"),
        ("rounds.x=1", "rounds is a value, not a table"),
        ("evaluate.stop_at_target=true", "stop_at_target needs a target"),
        ("train.learning_rate=nan", "train.learning_rate: input should be"),
        ("server.norm_limit=inf", "server.norm_limit: input should be a finite number, got inf"),
        ("local={name='lora_rite', clip=inf}", "local.clip: input should be a finite number, got inf"),
        ("partition={name='iid', clients=true}", "partition.clients: input should be a valid integer, got True"),
        ("partition={name='iid', clients=2.0}", "partition.clients: input should be a valid integer, got 2.0"),
        ("rounds=true", "rounds: input should be a valid integer, got True"),
        ("clock.dropout=true", "clock.dropout: input should be a valid number, got True"),
        ("evaluate.target=true", "evaluate.target: input should be a valid number, got True"),
        ("topology.edges=2", "topology.edges: unknown key; accepted by star: name."),
        ("local.foo=3", "local.foo: unknown key; accepted by lora: name."),
        ("method={}", "method.name: is missing; there are: fedavg"),
        (
            "clock.changes=[{round=2, kind='weak', slowdown=-1.0}]",
            "clock.changes.0.slowdown: input should be greater than 0",
        ),
        ("clock.changes=[{round=2, kind='weak', slowdown=inf}]", "clock.changes.0.slowdown: input should be a finite"),
        (
            "clock.changes=[{round=-2, kind='weak', slowdown=2}]",
            "clock.changes.0.round: input should be greater than or",
        ),
        (
            "clock.changes=[{round=2, kind='weak', slowdown=2, knd='x'}]",
            "clock.changes.0.knd: unknown key (did you mean kind?); accepted here: round, kind, slowdown.",
        ),
    ],
)
def test_a_wrong_value_says_what_is_accepted(override, said):
    assert said in "\n".join(problems(override))


def test_hyperparameters_are_the_arguments_of_the_method():
    recipe = load_recipe(None, ["method.name=hetlora", "method.gamma=0.85"])
    assert recipe.method == {"name": "hetlora", "gamma": 0.85, "lam": 0.01, "rank_min": 1}
    assert "gamma" in problems("method.name=hetlora", "method.gamma=1.5")[0]


def test_another_choice_takes_the_place_of_the_old_one_and_its_arguments(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(QUICKSTART.read_text().replace('name = "hlora"', 'name = "hetlora"\ngamma = 0.9'))
    assert load_recipe(file).method["gamma"] == 0.9
    assert load_recipe(file, ["method.name=rbla"]).method == {"name": "rbla"}
    assert load_recipe(file, ["partition.name=iid", "partition.clients=12"]).partition["clients"] == 12


def test_a_table_that_may_be_left_out_may_leave_out_its_name():
    assert load_recipe(None, {"topology": {}, "local": {}}).topology == {"name": "star"}


def test_a_whole_number_is_a_number():
    recipe = load_recipe(None, ["lora.scale=3", "method={name='hetlora', gamma=1}"])
    assert (recipe.lora.scale, recipe.method["gamma"]) == (3.0, 1.0)


def test_steps_and_epochs_exclude_each_other_and_an_override_replaces_the_other():
    assert load_recipe(None, ["train.steps=3"]).train.epochs is None
    assert "epochs and steps are both given" in "\n".join(problems("train={steps = 3, epochs = 1}"))


def test_every_device_profile_can_be_named_or_defined():
    profile = "{forward_flops=1e11, backward_flops=1e11, memory_bytes=2e9, up_bps=1e5, down_bps=1000000}"
    recipe = load_recipe(None, [f"devices.toaster={profile}", "fleet.classes.weak.device=toaster"])
    assert recipe.devices["toaster"].down_bps == 1e6


def test_a_recipe_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_recipe(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = = 3")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_recipe(broken)


def test_a_resolved_recipe_resolves_to_itself():
    from anyrank.config import resolve

    recipe = load_recipe(QUICKSTART, ["method.name=hetlora", "evaluate.target=0.8"])
    assert resolve(recipe.model_dump(mode="json"), {}, CHOICES) == recipe
