"""Profiles from steps that are timed: by a clock that counts what a model does, and once by the real one."""

import time
import tomllib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anyrank import probe as module
from anyrank.errors import ConfigError
from anyrank.federation import ModelCost, Profile
from anyrank.probe import Probed, as_toml, free_bytes, matrix_flops, probe

COST = ModelCost(
    forward_flops=1000,
    block_backward_flops=60,
    num_blocks=4,
    base_bytes=10_000,
    block_activation_bytes=0,
    working_bytes=0,
    tokens_per_step=1,
)
BATCH = {"inputs": torch.ones(8, 16), "labels": torch.zeros(8, dtype=torch.long)}
PROBED = Probed(Profile(1.23456e11, 2e11, 3e9, 1e6, 5e6), "some CPU", 1.5e11, (1, 4), (0.5, 0.75), 9)


class Clock:
    """Goes on by what steps take, `forward + depth * backward` seconds and now and then more."""

    def __init__(self, *, forward: float, backward: float):
        self.forward, self.backward = forward, backward
        self.now, self.depth, self.steps = 0.0, 0, 0

    def loss(self, batch):
        self.steps += 1
        slow = 50.0 if self.steps <= 2 or self.steps % 9 == 0 else 0.0  # the first ones, and disturbances
        self.now += self.forward + self.depth * self.backward + slow
        return torch.zeros(())

    def train(self, depth):
        self.depth = depth


@pytest.fixture
def timed(monkeypatch):
    def timed(clock: Clock, **changes) -> Probed:
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        monkeypatch.setattr(module, "matrix_flops", lambda device: 1e9)
        monkeypatch.setattr(module, "free_bytes", lambda device: 5_000)
        arguments = {"batch": BATCH, "train": clock.train, "depths": (1, 4), "cost": COST, **changes}
        return probe(nn.Linear(1, 1), clock.loss, **arguments)

    return timed


def test_both_speeds_follow_from_two_depths(timed):
    clock = Clock(forward=5.0, backward=2.0)
    found = timed(clock, seconds=1e9, up_bps=7.0, down_bps=8.0)
    assert found.seconds == (5 + 2, 5 + 4 * 2)
    assert found.profile == Profile(1000 / 5, 60 / 2, 15_000.0, 7.0, 8.0)
    assert clock.steps == 2 * (found.repeats + 1) == 2 * 22


def test_timing_ends_when_its_time_is_over(timed):
    clock = Clock(forward=5.0, backward=2.0)
    assert timed(clock, seconds=300.0).repeats >= 5
    assert clock.now <= 300
    clock = Clock(forward=5.0, backward=2.0)
    assert timed(clock, seconds=1.0).repeats == 1
    assert clock.steps == 4


@pytest.mark.parametrize(("forward", "backward"), [(5.0, 0.0), (5.0, -0.1), (0.0, 2.0)])
def test_what_is_lost_in_noise_is_shared_out_by_operations(timed, forward, backward):
    found = timed(Clock(forward=forward, backward=backward), seconds=1e9)
    speed = (1000 + 4 * 60) / (forward + 4 * backward)
    assert found.profile.forward_flops == pytest.approx(speed)
    assert found.profile.backward_flops == pytest.approx(speed)


def test_a_real_model_is_timed_and_left_without_gradients():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    began = time.perf_counter()
    found = probe(
        model,
        lambda batch: F.cross_entropy(model(batch["inputs"]), batch["labels"]),
        batch=BATCH,
        train=lambda depth: model[0].requires_grad_(depth == 2),
        depths=(1, 2),
        cost=COST,
        seconds=0.2,
    )
    assert time.perf_counter() - began < 5
    assert min(vars(found.profile).values()) > 0
    assert min(found.seconds) > 0
    assert found.matrix_flops > 1e8
    assert all(parameter.grad is None for parameter in model.parameters())


def test_matrices_are_multiplied_at_some_speed_and_some_memory_is_free():
    cpu = torch.device("cpu")
    assert 1e8 < matrix_flops(cpu) < 1e14
    assert 1e7 < free_bytes(cpu) < 1e14


def test_a_table_for_a_recipe():
    text = as_toml("my-box_2", PROBED)
    assert tomllib.loads(text) == {
        "devices": {
            "my-box_2": {
                "forward_flops": 1.235e11,
                "backward_flops": 2e11,
                "memory_bytes": 3e9,
                "up_bps": 1e6,
                "down_bps": 5e6,
            }
        }
    }
    for part in ("some CPU: 150 GFLOP/s", "0.5 s at depth 1", "0.75 s at depth 4", "medians of 9"):
        assert part in text


def test_numbers_are_those_of_toml_at_any_size():
    extreme = Probed(Profile(1e20, 1e-7, 123.0, 1.0, 1.0), "x", 1.0, (1, 2), (1.0, 2.0), 1)
    assert tomllib.loads(as_toml("x", extreme))["devices"]["x"]["forward_flops"] == 1e20


@pytest.mark.parametrize("name", ["", "my box", "a.b", 'a"'])
def test_a_name_that_would_have_to_be_quoted_is_refused(name):
    with pytest.raises(ConfigError, match="letters, digits"):
        as_toml(name, PROBED)
