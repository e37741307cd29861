"""Operations and bytes of traced steps, against numbers worked by hand and against steps that are watched."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anyrank import footprint as module
from anyrank.device import memory_bytes, transformer_cost
from anyrank.federation import Layer, ModelCost, Plan
from anyrank.footprint import footprint, watched

BLOCKS, WIDTH, ROWS, TOKENS, VOCABULARY = 4, 64, 4, 32, 500


class Stack(nn.Module):
    """Blocks and a head, for `inputs`."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module):
        super().__init__()
        self.blocks, self.classifier = nn.ModuleList(blocks), head

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.classifier(inputs)


class Convolution(nn.Module):
    def __init__(self, d_in: int):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(d_in, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.relu(self.conv(x)).movedim(1, 3)).movedim(3, 1)


class Checkpointed(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(super().forward, input, use_reentrant=False)  # pyright: ignore[reportReturnType]


class Looking(nn.Linear):
    """A layer that looks at values, which a mixture of experts does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if float(input.detach().sum()) != 0 else input


def perceptron(block: type[nn.Sequential] = nn.Sequential, linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    blocks: list[nn.Module] = [block(linear(WIDTH, WIDTH), nn.GELU()) for _ in range(BLOCKS)]
    return Stack(blocks, nn.Linear(WIDTH, 5))


class Choosing(nn.Module):
    """A language model whose head sees only what is to be continued, as labels say; it looks at the mask besides."""

    def __init__(self, model: Any):
        super().__init__()
        self.inner = model

    def forward(self, labels: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        assert not attention_mask.all()
        hidden = self.inner.model(attention_mask=attention_mask, **inputs).last_hidden_state
        return self.inner.lm_head(hidden[:, :-1][labels[:, 1:] >= 0])


def convolutional() -> nn.Module:
    blocks: list[nn.Module] = [Convolution(d_in) for d_in in (3, 16, 16, 16)]
    return Stack(blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))


def llama(attention: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=172,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config)


def bert(attention: str = "sdpa") -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
    )
    config._attn_implementation = attention
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=4)
    )


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )


IDS = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % VOCABULARY
MASK = (torch.arange(TOKENS) < TOKENS - 1).long().expand(ROWS, TOKENS).contiguous()
CLASSES = torch.zeros(ROWS, dtype=torch.long)
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
FEATURES = torch.ones(ROWS * TOKENS, WIDTH)
# What makes the model, the last parts of the names of what is adapted, a batch, rows of an adapter's input.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, Mapping[str, Tensor], int]] = {
    "bert": (bert, "query|value", {**TEXTS, "labels": CLASSES}, ROWS * TOKENS),
    "llama": (llama, "q_proj|v_proj|down_proj", {**TEXTS, "labels": IDS}, ROWS * TOKENS),
    "llama, eager": (lambda: llama("eager"), "q_proj|o_proj", {**TEXTS, "labels": IDS}, ROWS * TOKENS),
    "choosing": (
        lambda: Choosing(llama()),
        "q_proj|v_proj",
        {**TEXTS, "labels": torch.where(torch.arange(TOKENS) < TOKENS // 2, -100, IDS)},
        ROWS * TOKENS,
    ),
    "gpt2": (gpt2, "c_attn", {**TEXTS, "labels": IDS}, ROWS * TOKENS),
    "vit": (vit, "q_proj|v_proj", {"pixel_values": torch.ones(ROWS, 3, 32, 32), "labels": CLASSES}, ROWS * 17),
    "perceptron": (perceptron, "0", {"inputs": FEATURES, "labels": CLASSES.repeat(TOKENS)}, ROWS * TOKENS),
    "checkpointed": (
        lambda: perceptron(Checkpointed),
        "0",
        {"inputs": FEATURES, "labels": CLASSES.repeat(TOKENS)},
        ROWS * TOKENS,
    ),
    "convolutional": (
        convolutional,
        "mix",
        {"inputs": torch.ones(ROWS, 3, 16, 16), "labels": CLASSES},
        ROWS * 16 * 16,
    ),
}


class Adapted:
    """A frozen model with adapters in some of its layers, and a head that is trained."""

    def __init__(self, model: nn.Module, targets: str):
        self.model: Any = model.requires_grad_(False).eval()
        found = {name: part for name, part in model.named_modules() if re.search(rf"\.(\d+)\..*\b({targets})$", name)}
        self.parts: Mapping[str, Any] = found or {f"blocks.{i}": part for i, part in enumerate(self.model.blocks)}
        self.layers = [
            Layer(name, part.weight.shape[1], part.weight.shape[0], int(re.findall(r"\.(\d+)", name)[0]))
            if not isinstance(part, transformers.pytorch_utils.Conv1D)
            else Layer(name, *part.weight.shape, int(re.findall(r"\.(\d+)", name)[0]))
            for name, part in self.parts.items()
        ]
        self.head = [p.requires_grad_() for p in getattr(model, "classifier", nn.Module()).parameters()]
        for part in self.parts.values():
            part.register_forward_hook(lambda part, x, y: y if part.A is None else y + x[0] @ part.A.T @ part.B.T)

    def train(self, depth: int, rank: int = 1) -> list[Tensor]:
        for layer in self.layers:
            part, on = self.parts[layer.name], layer.block >= BLOCKS - depth
            part.A = torch.zeros(rank, layer.d_in, requires_grad=True) if on else None
            part.B = torch.zeros(layer.d_out, rank, requires_grad=True) if on else None
        return [t for part in self.parts.values() for t in (part.A, part.B) if t is not None] + self.head

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        if isinstance(self.model, Choosing):
            logits, labels = self.model(**batch), batch["labels"][:, 1:]
            return F.cross_entropy(logits, labels[labels >= 0])
        out = self.model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        logits = out if isinstance(out, Tensor) else out.logits
        return F.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten())

    def cost(self, batch: Mapping[str, Tensor], *, depths=(1, BLOCKS), **changes: Any) -> ModelCost:
        return footprint(
            self.model,
            self.loss,
            batch=batch,
            train=self.train,
            depths=depths,
            num_blocks=BLOCKS,
            adapted=list(self.parts.values()),
            **changes,
        )


@pytest.fixture(params=FAMILIES)
def family(request):
    make, targets, batch, tokens = FAMILIES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Adapted(make(), targets), batch, tokens


def peak_of_training(adapted: Adapted, batch: Mapping[str, Tensor], *, depth: int, rank: int, passes: int = 1) -> int:
    """The most bytes of tensors that live at one time in the second of two steps: model, adapters, batch, step, AdamW."""
    trained = adapted.train(depth, rank)
    optimizer = torch.optim.AdamW(trained, fused=True)
    with module._Live() as live:
        for _ in range(2):
            live.peak = live.now
            optimizer.zero_grad()
            for _ in range(passes):
                adapted.loss(batch).backward()
            optimizer.step()
    before = sum(tensor.nbytes for tensor in [*batch.values(), *trained])
    return live.peak + module._frozen_bytes(adapted.model) + before


def predicted(adapted: Adapted, cost: ModelCost, *, depth: int, rank: int) -> int:
    ranks = {layer.name: rank for layer in adapted.layers if layer.block >= BLOCKS - depth}
    head = sum(parameter.numel() for parameter in adapted.head)
    return memory_bytes(Plan("ann", ranks, 1), model=cost, layers=adapted.layers, dense_parameters=head)


@pytest.mark.parametrize("rank", [1, 16])
def test_memory_is_what_training_takes_at_any_depth(family, rank):
    adapted, batch, tokens = family
    cost = adapted.cost(batch)
    assert cost.tokens_per_step == tokens
    for depth in range(1, BLOCKS + 1):
        real = peak_of_training(adapted, batch, depth=depth, rank=rank)
        assert predicted(adapted, cost, depth=depth, rank=rank) == pytest.approx(real, rel=0.15)
        of_model = cost.base_bytes
        activations = predicted(adapted, cost, depth=depth, rank=rank) - of_model
        assert activations == pytest.approx(real - of_model, rel=0.2)


def test_a_trace_counts_what_a_computed_step_does(family, monkeypatch):
    adapted, batch, _ = family
    computed = adapted.cost(batch)
    before = [tensor for _, _, tensor in module._tensors(adapted.model)]
    monkeypatch.setattr(module, "_SOON_DONE", 0)
    monkeypatch.setattr(Tensor, "backward", only_fake(Tensor.backward))
    assert adapted.cost(batch) == computed
    after = [tensor for _, _, tensor in module._tensors(adapted.model) if not tensor.requires_grad]
    assert all(any(one is other for other in before) for one in after)
    assert all(tensor.grad is None for _, _, tensor in module._tensors(adapted.model))


def only_fake(backward: Callable[..., None]) -> Callable[..., None]:
    def checked(loss: Tensor, *given: Any, **named: Any) -> None:
        assert type(loss).__name__ == "FakeTensor"
        backward(loss, *given, **named)

    return checked


def test_a_model_that_looks_at_values_is_computed(monkeypatch):
    batch = FAMILIES["perceptron"][2]
    plain, looking = (Adapted(perceptron(linear=linear), "0") for linear in (nn.Linear, Looking))
    expected = plain.cost(batch)
    monkeypatch.setattr(module, "_SOON_DONE", 0)
    found = looking.cost(batch)
    assert replace(found, working_bytes=expected.working_bytes) == expected
    assert found.working_bytes == pytest.approx(expected.working_bytes, rel=0.05)


def test_a_perceptron_by_hand():
    _, _, batch, tokens = FAMILIES["perceptron"]
    adapted = Adapted(perceptron(), "0")
    cost = adapted.cost(batch, depths=(2, 3))
    matrix, adapter, head = 2 * tokens * WIDTH**2, 2 * tokens * 2 * WIDTH, 2 * tokens * WIDTH * 5
    assert cost.forward_flops == BLOCKS * matrix + 3 * adapter + head
    assert cost.block_backward_flops == matrix + 2 * adapter
    assert cost.base_bytes == 4 * BLOCKS * (WIDTH**2 + WIDTH)
    # Kept of a block: what enters the adapter and its image, and what enters the non-linearity.
    assert cost.block_activation_bytes == pytest.approx(4 * tokens * (WIDTH + 1 + WIDTH), rel=0.01)
    assert cost.working_bytes >= FEATURES.nbytes
    assert (cost.num_blocks, cost.tokens_per_step) == (BLOCKS, tokens)


def test_a_block_that_is_checkpointed_keeps_what_enters_it():
    plain, saving = (Adapted(perceptron(kind), "0") for kind in (nn.Sequential, Checkpointed))
    batch, tokens = FAMILIES["perceptron"][2:]
    cheap, cost = (adapted.cost(batch, depths=(2, 3)) for adapted in (saving, plain))
    assert cheap.block_activation_bytes == pytest.approx(4 * tokens * WIDTH, rel=0.02)
    assert cheap.block_activation_bytes < 0.6 * cost.block_activation_bytes
    assert cheap.block_backward_flops == pytest.approx(2 * cost.block_backward_flops, rel=0.05)  # computed again


def test_passes_share_the_memory_and_add_up_in_time():
    adapted = Adapted(llama(), "q_proj|v_proj")
    batch = FAMILIES["llama"][2]
    half = {name: tensor[: ROWS // 2] for name, tensor in batch.items()}
    whole, halves = adapted.cost(batch), adapted.cost(half, passes=2)
    assert halves.forward_flops == pytest.approx(whole.forward_flops, rel=1e-3)
    assert halves.block_backward_flops == pytest.approx(whole.block_backward_flops, rel=1e-3)
    assert 2 * halves.block_activation_bytes == pytest.approx(whole.block_activation_bytes, rel=0.02)
    real = peak_of_training(adapted, half, depth=BLOCKS, rank=8, passes=2)
    assert predicted(adapted, halves, depth=BLOCKS, rank=8) == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_are_those_of_the_formula(attention):
    cost = Adapted(bert(attention), "query|value").cost(FAMILIES["bert"][2])
    formula = transformer_cost(
        matrix_parameters_per_block=12 * WIDTH**2,
        matrix_parameters_outside_blocks=0,
        num_blocks=BLOCKS,
        hidden=WIDTH,
        heads=4,
        intermediate=4 * WIDTH,
        batch_size=ROWS,
        tokens=TOKENS,
        base_bytes=0,
    )
    adapters = 2 * 2 * ROWS * TOKENS * 2 * WIDTH
    assert cost.forward_flops == pytest.approx(formula.forward_flops + BLOCKS * adapters, rel=0.002)
    again = (attention == "sdpa") * 2 * TOKENS * WIDTH * ROWS * TOKENS  # fused attention computes its scores twice
    assert cost.block_backward_flops == pytest.approx(formula.block_backward_flops + again + 2 * adapters, rel=0.002)


def test_the_logits_of_a_large_vocabulary_count():
    config = transformers.LlamaConfig(
        vocab_size=20_000,
        hidden_size=WIDTH,
        intermediate_size=172,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
    )
    adapted = Adapted(transformers.LlamaForCausalLM(config), "q_proj|v_proj")
    cost = adapted.cost({**TEXTS, "labels": IDS})
    assert cost.working_bytes >= 2 * 4 * ROWS * TOKENS * 20_000
    real = peak_of_training(adapted, {**TEXTS, "labels": IDS}, depth=2, rank=4)
    assert predicted(adapted, cost, depth=2, rank=4) == pytest.approx(real, rel=0.05)


def test_nothing_need_be_trained_at_depth_0():
    adapted = Adapted(gpt2(), "c_attn")  # no head is trained
    batch = FAMILIES["gpt2"][2]
    by_zero, usual = (adapted.cost(batch, depths=depths) for depths in ((0, BLOCKS), (1, BLOCKS)))
    assert by_zero.forward_flops == usual.forward_flops
    assert by_zero.block_backward_flops > 0
    whole = BLOCKS * by_zero.block_activation_bytes + by_zero.working_bytes
    assert whole == pytest.approx(BLOCKS * usual.block_activation_bytes + usual.working_bytes, rel=1e-3)


def test_finished_gradients_are_the_optimizers():
    layer = nn.Linear(1000, 1000)
    seen = watched(layer, lambda: layer(torch.ones(1, 1000)).sum())
    assert seen.peak_bytes < 1.1 * 4 * 1000 * 1000  # the one gradient, until it is finished
    assert layer.weight.grad is None
