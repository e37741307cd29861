"""LoRA on convolutions: what is computed, alone and for many clients at once, and what stock PEFT makes of it."""

import copy
import json
import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from anyrank import hf
from anyrank.adapter import CHANGE, MAGNITUDE, Adapter, LowRank, Stack
from anyrank.errors import ConfigError
from anyrank.plain import PLAIN
from anyrank.pretrained import Pretrained
from anyrank.seeding import generator
from federations import assert_close, low_rank

SHAPE = (3, 8, 12)  # of the images: channels, height, width


def seeded(make, key="model"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator(key))))
        return make()


def images(count: int = 5, shape=SHAPE) -> torch.Tensor:
    return torch.randn(count, *shape, generator=generator("images", count))


def some_adapter(model: hf.AdaptedModel, ranks=(2, 3, 1, 5), key=("test",)) -> Adapter:
    layers = {
        layer.name: low_rank(rank=rank, d_in=layer.d_in, d_out=layer.d_out, key=(*key, layer.name))
        for layer, rank in zip(model.layers, [*ranks] * len(model.layers), strict=False)
    }
    return Adapter(layers, {name: tensor + 0.1 for name, tensor in model.dense.items()})


class Small(nn.Module):
    """A convolution, a norm, a convolution that is trained whole, and a linear layer; smooth, so that rounding stays small."""

    def __init__(self, **whole: Any):
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.whole = nn.Conv2d(6, 4, 3, **{"padding": 1, **whole})
        self.last = nn.Linear(4, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)
        self.norm.weight.data.normal_()

    def forward(self, x):
        return self.last(self.whole(self.norm(self.first(x)).tanh()).mean((2, 3)))


def stock(bare: nn.Module, folder: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(folder)).eval()


def save(folder, adapter: Adapter, model: hf.AdaptedModel, scale: float = 2.0) -> None:
    hf.write_adapter(
        folder,
        adapter,
        scale=scale,
        base=Pretrained("nowhere", "nothing"),
        modules_to_save=model.modules_to_save,
        label_names=(),
        card="A card.",
        patches=model.patches,
        task_type=None,
    )


# --- one client ---------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw) -> dict[str, Any]:
    """Any convolution that leaves something of an image of 8 x 12."""
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.sampled_from(["same", "valid", 0, 2, (0, 1)]))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, (2, 3)]))
    return {
        "kernel_size": kernel,
        "dilation": dilation,
        "padding": padding,
        "stride": stride,
        "bias": draw(st.booleans()),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(convolutions(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 7))
def test_a_convolution_has_its_product_added_to_its_weight(how, channels, out, rank):
    bare = seeded(lambda: nn.Sequential(nn.Conv2d(channels, out, **how)))
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0)
    (layer,) = model.layers
    assert (layer.d_out, layer.d_in) == (out, channels * how["kernel_size"][0] * how["kernel_size"][1])
    x = images(shape=(channels, 8, 12))
    adapter, frozen = some_adapter(model, ranks=(rank,)), some_adapter(model, ranks=(2,), key=("frozen",))
    live = model.load(adapter, frozen=frozen, scale=0.5)
    got = model.logits({"inputs": x})
    weight = bare[0].weight.detach().requires_grad_()
    product = 2.0 * (0.5 * adapter.layers["0"].product + frozen.layers["0"].product)
    usual = {key: value for key, value in how.items() if key not in ("bias", "kernel_size")}
    expected = F.conv2d(x, weight + product.view_as(weight), bare[0].bias, **usual)
    assert torch.allclose(got, expected, atol=1e-5)

    target = torch.randn(got.shape, generator=generator("target"))
    (got * target).sum().backward()
    (gradient,) = torch.autograd.grad((expected * target).sum(), weight)  # of the weight, so of the product
    part = live.layers["0"]
    assert_close(part.A.grad, part.B.detach().T @ gradient.flatten(1))
    assert_close(part.B.grad, gradient.flatten(1) @ part.A.detach().T)


def test_three_numbers_by_hand():
    bare = nn.Conv2d(1, 1, (1, 2), bias=False)
    bare.weight.data = torch.tensor([[[[1.0, 0.0]]]])
    model = hf.AdaptedModel(nn.Sequential(bare), scale=2.0)
    model.load(Adapter({"0": LowRank(torch.tensor([[1.0, 10.0]]), torch.tensor([[0.5]]))}))
    # To each number: itself once, and 2 * 0.5 times itself and ten times its right neighbour.
    assert model.logits({"inputs": torch.tensor([[[[1.0, 2.0, 3.0]]]])}).tolist() == [[[[22.0, 34.0]]]]


def test_switched_off_layers_answer_as_the_base_and_backward_stays_above_them():
    bare = seeded(lambda: PLAIN["cnn"](SHAPE, 4))
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0)
    assert [layer.block for layer in model.layers] == [0, 1, 2, 3]
    assert model.patches == {"conv1": (3, 5, 5), "conv2": (32, 5, 5)}
    whole = some_adapter(model)
    model.load(Adapter({}))
    assert torch.equal(model.logits({"inputs": images()}), bare(images()))
    live = model.load(Adapter({name: whole.layers[name] for name in ("conv2", "linear2")}))
    entered = []
    model.model.conv2.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].requires_grad))
    model.logits({"inputs": images()}).sum().backward()
    assert entered == [False]
    assert all(tensor.grad is not None for tensor in live.tensors().values())


# --- many clients at once -----------------------------------------------------------------------------------------


def alone_and_together(model: hf.AdaptedModel, parts: list[int], frozen: str, **told: Any):
    """Logits and gradients of clients with ranks of their own, trained one by one, and in one pass."""
    adapters = [some_adapter(model, ranks=(1 + i, 4 - i), key=("own", i)) for i in range(len(parts))]
    beside = [some_adapter(model, ranks=(2, 1 + i), key=("frozen", i)) for i in range(len(parts))]
    x = images(sum(parts))
    rngs = [[generator("drop", i) for i in range(len(parts))] for _ in range(2)]
    targets = torch.randn(sum(parts), 5, generator=generator("targets"))
    logits, gradients = [], []
    for i, (mine, rows) in enumerate(zip(adapters, x.split(parts), strict=True)):
        fixed = {"none": Adapter({}), "same": beside[0], "own": beside[i]}[frozen]
        live = model.load(mine, frozen=Adapter(fixed.layers))
        logits.append(model.logits({"inputs": rows}, rngs=rngs[0][i : i + 1] if told else ()))
        (logits[-1] * targets.split(parts)[i]).sum().backward()
        gradients.append({name: tensor.grad for name, tensor in live.tensors().items()})
        for tensor in live.dense.values():
            tensor.grad = None
    stack = Stack.of([mine.map(lambda t: t.clone().requires_grad_()) for mine in adapters])
    together = Stack.of([Adapter(each.layers) for each in beside])
    fixed = {"none": Adapter({}), "same": Adapter(beside[0].layers), "own": together}[frozen]
    model.load_together(stack, frozen=fixed)
    got = model.logits({"inputs": x}, parts, rngs=rngs[1] if told else ())
    own = {f"A/{n}": t for n, t in stack.A.items()} | {f"B/{n}": t for n, t in stack.B.items()}
    own |= {f"dense/{name}": tensor for name, tensor in stack.dense.items()}
    moved = torch.autograd.grad((got * targets).sum(), list(own.values()))
    return torch.cat(logits), gradients, got, dict(zip(own, moved, strict=True))


@pytest.mark.parametrize("parts", [[3, 3, 3], [4, 1, 2], [5]], ids=str)
@pytest.mark.parametrize("frozen", ["none", "same", "own"])
@pytest.mark.parametrize("whole", [{}, {"groups": 2}, {"padding_mode": "reflect"}, {"bias": False}], ids=str)
def test_clients_that_share_a_pass_get_their_own_answers_and_gradients(parts, frozen, whole):
    model = hf.AdaptedModel(seeded(lambda: Small(**whole)), scale=2.0, modules_to_save=["whole"])
    assert not model.unbatched
    logits, gradients, got, moved = alone_and_together(model, parts, frozen)
    assert torch.allclose(got, logits, atol=1e-5)
    for client, own in enumerate(gradients):
        for name, gradient in own.items():
            stacked = moved[name][client][tuple(slice(size) for size in gradient.shape)]
            assert (stacked - gradient).norm() <= 1e-5 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize("parts", [[3, 3], [4, 1]], ids=str)
def test_what_a_client_drops_does_not_depend_on_who_shares_its_pass(parts):
    model = hf.AdaptedModel(seeded(Small), scale=2.0, dropout=0.4)
    logits, _, got, _ = alone_and_together(model, parts, "none", drop=True)
    plain, *_ = alone_and_together(model, parts, "none")
    assert torch.allclose(got, logits, atol=1e-5)
    assert (got - plain).norm() > 0.1


def test_a_base_in_bfloat16_has_factors_in_float32():
    bare = seeded(lambda: PLAIN["cnn"](SHAPE, 5))
    full, half = (
        hf.AdaptedModel(copy.deepcopy(bare).to(dtype), scale=2.0) for dtype in (torch.float32, torch.bfloat16)
    )
    adapters = [some_adapter(full, key=("half", i)).map(lambda t: 0.2 * t) for i in range(2)]
    answers = []
    for model, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        live = model.load(adapters[0])
        assert {tensor.dtype for tensor in live.tensors().values()} == {torch.float32}
        model.load_together(Stack.of(adapters))
        answers.append(model.logits({"inputs": images(4).to(dtype)}, [2, 2]))
    assert (answers[1] - answers[0]).norm() < 0.05 * answers[0].norm()


# --- PEFT ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cnn", "small"])
def test_stock_peft_loads_what_we_save_and_gives_the_same_logits(kind, tmp_path):
    bare = seeded(Small if kind == "small" else lambda: PLAIN["cnn"](SHAPE, 4)).eval()
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0, modules_to_save=["whole"] if kind == "small" else [])
    adapter = some_adapter(model)
    save(tmp_path, adapter, model)
    saved = hf.read_adapter(tmp_path, scale=2.0).tensors()
    assert saved.keys() == adapter.tensors().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in adapter.tensors().items())
    model.load(adapter)
    ours, theirs = model.logits({"inputs": images()}), stock(bare, tmp_path)
    assert not torch.allclose(ours, bare(images()), atol=1e-2)
    assert torch.allclose(theirs(images()), ours, atol=1e-5)
    assert torch.allclose(theirs.merge_and_unload()(images()), ours, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@torch.no_grad()
def test_a_dilated_convolution_is_right_once_peft_has_merged_it(tmp_path):
    bare = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2, padding=2)))
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0)
    adapter = some_adapter(model)
    save(tmp_path, adapter, model)
    model.load(adapter)
    assert torch.allclose(
        stock(bare, tmp_path).merge_and_unload()(images()), model.logits({"inputs": images()}), atol=1e-5
    )


@torch.no_grad()
def test_a_layer_whose_name_ends_anothers_keeps_its_own_rank(tmp_path):
    """As in residual networks: `conv1` at the top, and another one in each block."""
    names = ("conv1", "block")
    bare = seeded(lambda: nn.Sequential())
    bare.add_module(names[0], seeded(lambda: nn.Conv2d(3, 3, 3)))
    bare.add_module(names[1], nn.Sequential())
    bare.block.add_module(names[0], seeded(lambda: nn.Conv2d(3, 3, 3)))
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0)
    adapter = some_adapter(model, ranks=(2, 5))
    save(tmp_path, adapter, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {"^conv1": 2}
    assert hf.read_adapter(tmp_path, scale=2.0).ranks == {"conv1": 2, "block.conv1": 5}
    model.load(adapter)
    assert torch.allclose(stock(bare, tmp_path)(images()), model.logits({"inputs": images()}), atol=1e-5)


@torch.no_grad()
def test_an_adapter_made_by_peft_means_the_same_here(tmp_path):
    bare = seeded(lambda: PLAIN["cnn"](SHAPE, 4))
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["conv1", "conv2"], use_rslora=True)
    theirs = peft.get_peft_model(copy.deepcopy(bare), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=generator("B"))
    theirs.save_pretrained(tmp_path)
    model = hf.AdaptedModel(bare, scale=2.0, target_modules=["conv1", "conv2"])
    model.load(hf.read_adapter(tmp_path, scale=2.0))
    assert torch.allclose(model.logits({"inputs": images()}), theirs(images()), atol=1e-4)


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), r"of a Conv2d with groups=1.*got \[2, 4, 3, 3\] and \[4, 1, 1, 1\]"),
        (nn.Conv1d(4, 4, 3), r"of a Conv2d with groups=1.*got \[2, 4, 3\] and \[4, 2, 1\]"),
        (nn.Embedding(4, 4), "lora_embedding_A is no factor of LoRA on a linear layer or a Conv2d"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_other_adapters_made_by_peft_are_refused(module, problem, tmp_path):
    model = peft.get_peft_model(nn.Sequential(module), peft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=problem):
        hf.read_adapter(tmp_path, scale=2.0)


# --- what becomes of the weight -----------------------------------------------------------------------------------


@torch.no_grad()
def test_magnitudes_of_a_convolution_are_those_of_stock_dora(tmp_path):
    bare = seeded(lambda: PLAIN["cnn"](SHAPE, 4))
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0, weights="dora")
    norms = bare.conv1.weight.flatten(1).norm(dim=1)
    assert_close(model.dense["conv1" + MAGNITUDE].flatten(), norms)
    adapter = some_adapter(model)
    save(tmp_path, adapter, model)
    read = hf.read_adapter(tmp_path, scale=2.0).tensors()
    assert all(torch.equal(read[name], tensor) for name, tensor in adapter.tensors().items())
    model.load(adapter)
    theirs = stock(bare, tmp_path)
    assert torch.allclose(theirs(images()), model.logits({"inputs": images()}), atol=1e-4)
    assert torch.allclose(theirs.merge_and_unload()(images()), model.logits({"inputs": images()}), atol=1e-4)


@torch.no_grad()
def test_the_change_of_a_convolutions_whole_weight_is_added_and_exported(tmp_path):
    bare = seeded(lambda: PLAIN["cnn"](SHAPE, 4))
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0, weights="whole")
    assert model.dense["conv2" + CHANGE].shape == (64, 800)
    dense = {name: 0.02 * torch.randn(t.shape, generator=generator(name)) for name, t in model.dense.items()}
    empty = {n.name: LowRank(torch.zeros(0, n.d_in), torch.zeros(n.d_out, 0)) for n in model.layers}
    model.load(Adapter(empty, dense))
    ours = model.logits({"inputs": images()})
    for name in empty:
        weight = bare.get_submodule(name).weight
        weight += dense[name + CHANGE].view_as(weight)
    assert torch.allclose(ours, bare(images()), atol=1e-5)
    save(tmp_path, hf.factored(Adapter(empty, dense), scale=2.0), model)
    base = seeded(lambda: PLAIN["cnn"](SHAPE, 4))
    assert torch.allclose(stock(base, tmp_path)(images()), ours, atol=1e-3)


def test_finished_adapters_cannot_be_mixed_in_a_convolution():
    expert = Adapter(some_adapter(hf.AdaptedModel(PLAIN["cnn"](SHAPE, 4), scale=2.0)).layers)
    with pytest.raises(ConfigError, match="conv1 is a Conv2d, and finished adapters can only be mixed in linear"):
        hf.AdaptedModel(PLAIN["cnn"](SHAPE, 4), scale=2.0, weights="mole", experts={"one": expert})


# --- what cannot be adapted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.Embedding(4, 4), "an? Embedding"),
        (nn.Conv1d(4, 4, 3), "a Conv1d"),
        (nn.Conv2d(4, 4, 3, groups=4), "a Conv2d with groups=4"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "a Conv2d with padding_mode='reflect'"),
        (nn.LSTM(4, 4), "an? LSTM"),
        (nn.MultiheadAttention(4, 2), "an? MultiheadAttention"),
        (nn.LayerNorm(4), "a LayerNorm"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named_with_its_type(module, what):
    model = nn.Sequential()
    model.add_module("odd", module)
    model.add_module("even", nn.Linear(4, 4))
    with pytest.raises(
        ConfigError,
        match=rf"lora.target_modules: odd matches odd, {what}\. What can be adapted: Linear, .*Conv2d with groups=1",
    ):
        hf.AdaptedModel(model, scale=2.0, target_modules=["odd", "even"])


def test_running_means_are_not_trained():
    with pytest.raises(ConfigError, match=r"lora.modules_to_save: norm.running_mean is kept beside what is trained"):
        hf.AdaptedModel(Small(), scale=2.0, modules_to_save=["norm"])


def test_models_of_ones_own_have_all_layers_adapted_that_can_be():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 4))
    assert [layer.name for layer in hf.AdaptedModel(model, scale=2.0).layers] == ["0", "3"]


def test_a_container_of_layers_is_no_layer():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4))})
    with pytest.raises(ConfigError, match="body matches no linear layer that can be adapted"):
        hf.AdaptedModel(model, scale=2.0, target_modules=["body"])
