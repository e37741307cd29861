"""The boundary to PEFT: what stock PEFT loads is what we meant, and nothing but the adapter changes."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from anyrank import hf, lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.errors import ConfigError
from anyrank.federation import ModelCost
from anyrank.pretrained import Pretrained, resolve
from anyrank.problem import CLASSIFICATION
from anyrank.seeding import generator
from causal import of_bytes, write_causal
from tiny import BERT, WORDS, bare_model, write_model

TARGETS = ["query", "value", "intermediate.dense"]
LABELS = ["kind", "unkind", "unsure"]
FAMILIES = {  # how their layers store a weight: as it is, and transposed
    "bert": ("bert.encoder.layer", TARGETS),
    "gpt2": ("transformer.h", ["c_attn", "c_fc", "mlp.c_proj"]),
}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return resolve(str(write_model(tmp_path_factory.mktemp("models") / "tiny")))


def adapted(base, scale=2.0) -> hf.AdaptedModel:
    model = hf.load_classifier(base, label_names=LABELS, seed=0)
    return hf.AdaptedModel(model, scale=scale, target_modules=TARGETS)


def some_adapter(model: hf.AdaptedModel, ranks=(1, 3, 40), key="test") -> Adapter:
    """Different ranks in different layers, one above the smaller side, nothing zero."""
    layers = {}
    for layer, rank in zip(model.layers, [*ranks, *ranks], strict=True):
        rng = generator(key, layer.name)
        part = lowrank.fresh(rank, d_in=layer.d_in, d_out=layer.d_out, rng=rng)
        layers[layer.name] = part.map(lambda t, rng=rng: t + 0.1 * torch.randn(t.shape, generator=rng))
    dense = {name: t + 0.1 for name, t in model.dense.items()}
    return Adapter(layers, dense)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 5 + len(WORDS), (4, 9), generator=generator("ids"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def same(one: Adapter, other: Adapter) -> bool:
    a, b = one.tensors(), other.tensors()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def save(folder, adapter, model, base=None, scale=2.0):
    hf.write_adapter(
        folder,
        adapter,
        scale=scale,
        base=base or Pretrained("any", "nowhere"),
        modules_to_save=model.modules_to_save,
        label_names=LABELS,
        card="A card.",
    )


def test_layers_are_found_from_input_to_output_with_their_shapes(base):
    layers = adapted(base).layers
    assert [layer.block for layer in layers] == [0, 0, 0, 1, 1, 1]
    assert {(layer.d_in, layer.d_out) for layer in layers} == {(32, 32), (32, 48)}
    assert layers[0].name == "bert.encoder.layer.0.attention.self.query"


@torch.no_grad()
def test_stock_peft_loads_what_we_save_and_gives_the_same_logits(base, tmp_path):
    model = adapted(base)
    adapter = some_adapter(model)
    save(tmp_path / "adapter", adapter, model, base)
    model.load(adapter)
    ours = model.model(**batch()).logits

    stock = transformers.AutoModelForSequenceClassification.from_pretrained(base.location, num_labels=3)
    stock = peft.PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    assert torch.allclose(stock(**batch()).logits, ours, atol=1e-5)
    merged = stock.merge_and_unload()
    assert torch.allclose(merged(**batch()).logits, ours, atol=1e-4)


def test_reading_gives_back_what_was_written(base, tmp_path):
    model = adapted(base)
    adapter = some_adapter(model)
    save(tmp_path, adapter, model, base)
    assert same(hf.read_adapter(tmp_path, scale=2.0), adapter)


def test_another_scale_is_folded_into_B(base, tmp_path):
    model = adapted(base)
    adapter = some_adapter(model)
    save(tmp_path, adapter, model, base, scale=3.0)
    read = hf.read_adapter(tmp_path, scale=2.0)
    for name, part in adapter.layers.items():
        assert torch.allclose(3.0 * part.product, 2.0 * read.layers[name].product, atol=1e-5)


@torch.no_grad()
def test_an_adapter_made_by_peft_means_the_same_here(base, tmp_path):
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(base.location, num_labels=3)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query"], task_type="SEQ_CLS", use_rslora=True)
    stock = peft.get_peft_model(stock, config).eval()
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator("B"))
    stock.save_pretrained(tmp_path)

    model = hf.AdaptedModel(hf.load_classifier(base, label_names=LABELS, seed=0), scale=2.0, target_modules=["query"])
    start = hf.read_adapter(tmp_path, scale=2.0)
    model.load(Adapter(start.layers, {**model.dense, **start.dense}))
    assert torch.allclose(model.model(**batch()).logits, stock(**batch()).logits, atol=1e-5)


def test_the_same_adapter_gives_the_same_files(base, tmp_path):
    model = adapted(base)
    for folder in ("one", "two"):
        save(tmp_path / folder, some_adapter(model), model, base)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])


def test_training_changes_nothing_but_the_adapter(base):
    model = adapted(base)
    before = {name: t.clone() for name, t in model.model.state_dict().items()}
    live = model.load(some_adapter(model))
    optimizer = torch.optim.SGD(live.tensors().values(), lr=0.1)
    model.model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    changed = {name for name, t in model.model.state_dict().items() if before[name].shape != t.shape}
    changed |= {
        name for name, t in model.model.state_dict().items() if name not in changed and (before[name] != t).any()
    }
    assert changed
    assert all("lora_" in name or name.startswith("classifier.") for name in changed)


def test_a_layer_without_a_part_is_the_base_and_backward_does_not_reach_below(base):
    model = adapted(base)
    whole = some_adapter(model)
    top = {name: part for name, part in whole.layers.items() if ".layer.1." in name}
    live = model.load(Adapter(top, whole.dense))
    seen = []
    lower = model.model.get_submodule("bert.encoder.layer.0.output")
    lower.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model.model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert seen == [False]
    assert all(t.grad is not None for t in live.tensors().values())

    zero = {name: part.map(torch.zeros_like) for name, part in whole.layers.items() if name not in top}
    with torch.no_grad():
        model.load(Adapter(top, whole.dense))
        shallow = model.model(**batch()).logits
        model.load(Adapter({**zero, **top}, whole.dense))
        assert torch.equal(shallow, model.model(**batch()).logits)


# Frozen parts, and layers that store their weights transposed


def merged(model: Any, products: dict[str, torch.Tensor]) -> Any:
    """A copy of a bare model with products added to its weights by hand."""
    model = copy.deepcopy(model)
    for name, product in products.items():
        module = model.get_submodule(name)
        module.weight.data += product if isinstance(module, torch.nn.Linear) else product.T
    return model


def split(adapter: Adapter, *, keep) -> Adapter:
    names = list(adapter.layers)
    return Adapter({name: adapter.layers[name] for i, name in enumerate(names) if i in keep}, adapter.dense)


@families
@torch.no_grad()
def test_what_is_trained_and_what_is_frozen_are_both_added(family):
    bare = bare_model(family)
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0, target_modules=FAMILIES[family][1])
    whole, other = some_adapter(model), some_adapter(model, ranks=(2, 5, 1), key="frozen")
    adapter, frozen = split(whole, keep=(0, 1, 4)), split(other, keep=(1, 2, 4))
    for name, tensor in adapter.dense.items():
        bare.get_parameter(name).copy_(tensor)
    for scale in (1.0, 0.75):
        products = {
            name: torch.zeros(layer.d_out, layer.d_in) for name, layer in zip(whole.layers, model.layers, strict=True)
        }
        for name, part in adapter.layers.items():
            products[name] += 2.0 * scale * part.product
        for name, part in frozen.layers.items():
            products[name] += 2.0 * part.product
        model.load(adapter, frozen=frozen, scale=scale)
        expected = merged(bare, products)(**batch()).logits
        assert torch.allclose(model.model(**batch()).logits, expected, atol=1e-5)
    model.load(adapter)  # nothing of the frozen part is left behind
    products = {name: 2.0 * part.product for name, part in adapter.layers.items()}
    assert torch.allclose(model.model(**batch()).logits, merged(bare, products)(**batch()).logits, atol=1e-5)


@families
@pytest.mark.parametrize("below", ["absent", "frozen", "loaded before"])
def test_backward_stops_at_the_first_trained_layer(family, below):
    blocks, targets = FAMILIES[family]
    model = hf.AdaptedModel(bare_model(family), scale=2.0, target_modules=targets)
    whole = some_adapter(model)
    upper, lower = split(whole, keep=(3, 4, 5)), split(whole, keep=(0, 1, 2))
    if below == "loaded before":
        model.load(whole)
    live = model.load(upper, frozen=lower if below == "frozen" else Adapter({}))
    entered = {}
    for number, block in enumerate(model.model.get_submodule(blocks)):
        block.register_forward_pre_hook(lambda _, inputs, number=number: entered.update({number: inputs[0]}))
    model.model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for hidden in entered.values():  # neither block's input is part of a graph
        assert not hidden.requires_grad
        assert hidden.grad_fn is None
    assert all(tensor.grad is not None for tensor in live.tensors().values())
    inside = [p for name, p in model.model.named_parameters() if name.startswith(f"{blocks}.0.")]
    assert not any(p.grad is not None for p in inside)
    if below == "frozen":
        assert not any(p.requires_grad for p in inside)


@families
def test_only_the_factors_that_are_asked_for_are_trained(family):
    model = hf.AdaptedModel(bare_model(family), scale=2.0, target_modules=FAMILIES[family][1])
    for train in ("A", "B", "AB", ""):
        live = model.load(some_adapter(model), train=train)
        for part in live.layers.values():
            assert (part.A.requires_grad, part.B.requires_grad) == ("A" in train, "B" in train)


@torch.no_grad()
def test_transposed_layers_are_saved_so_that_stock_peft_loads_them(tmp_path):
    bare = bare_model("gpt2")
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0, target_modules=FAMILIES["gpt2"][1])
    assert [(layer.d_out, layer.d_in, layer.block) for layer in model.layers[:3]] == [
        (96, 32, 0),
        (48, 32, 0),
        (32, 48, 0),
    ]
    adapter = some_adapter(model)
    save(tmp_path, adapter, model)
    assert same(hf.read_adapter(tmp_path, scale=2.0), adapter)
    model.load(adapter)
    with warnings.catch_warnings():  # PEFT sees that these layers are transposed, and says so
        warnings.simplefilter("ignore")
        stock = peft.PeftModel.from_pretrained(bare, str(tmp_path)).eval()
    assert torch.allclose(stock(**batch()).logits, model.model(**batch()).logits, atol=1e-5)
    assert torch.allclose(stock.merge_and_unload()(**batch()).logits, model.model(**batch()).logits, atol=1e-4)


@families
@torch.no_grad()
def test_formed_factors_are_used_and_can_be_replaced_by_stored_ones(family):
    model = hf.AdaptedModel(bare_model(family), scale=2.0, target_modules=FAMILIES[family][1])
    adapter = some_adapter(model)
    model.load(adapter)
    plain = model.model(**batch()).logits
    model.form({name: LowRank(part.A, 2 * part.B) for name, part in adapter.layers.items()})
    assert not torch.allclose(model.model(**batch()).logits, plain, atol=1e-3)
    model.form({name: LowRank(2 * part.A, part.B / 2) for name, part in adapter.layers.items()})
    assert torch.allclose(model.model(**batch()).logits, plain, atol=1e-5)
    model.load(adapter)
    assert torch.equal(model.model(**batch()).logits, plain)


def test_the_head_is_a_function_of_the_seed_and_global_randomness_is_left_alone(base):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = adapted(base).dense, adapted(base).dense
    assert torch.equal(torch.rand(1), expected)
    assert one.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_targets_that_match_nothing_are_answered_with_the_names_there_are(base):
    model = hf.load_classifier(base, label_names=LABELS, seed=0)
    with pytest.raises(
        ConfigError, match=r"q_proj matches no linear layer that can be adapted.*dense, key, query, value"
    ):
        hf.AdaptedModel(model, scale=2.0, target_modules=["query", "q_proj"])
    with pytest.raises(ConfigError, match=r"modules_to_save: head names no module.*bert, classifier"):
        hf.AdaptedModel(model, scale=2.0, target_modules=["query"], modules_to_save=["head"])


@pytest.mark.parametrize(
    "content", [None, "{}", '{"peft_type": "LORA", "lora_alpha": 2, "use_dora": true}', "not json"]
)
def test_what_is_neither_lora_nor_dora_is_refused(base, tmp_path, content):
    model = adapted(base)
    save(tmp_path, some_adapter(model), model, base)
    if content is None:
        (tmp_path / "adapter_model.safetensors").write_bytes(b"rubbish")
    else:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no PEFT adapter can be read|got another kind|there is no lora_alpha"):
        hf.read_adapter(tmp_path, scale=2.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_alpha": "x"}, r"lora_alpha: expected a finite number; got 'x'"),
        ({"lora_alpha": float("nan")}, r"lora_alpha: expected a finite number; got nan"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern: expected regular expressions; got '\('"),
        ({"alpha_pattern": {"query": None}}, r"query: expected a finite number; got None"),
        ({"alpha_pattern": [3]}, r"alpha_pattern: expected a number for each layer's pattern; got \[3\]"),
    ],
)
def test_a_configuration_without_a_true_scale_is_refused(base, tmp_path, changes, said):
    model = adapted(base)
    save(tmp_path, some_adapter(model), model, base)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {said}"):
        hf.read_adapter(tmp_path, scale=2.0)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_without_its_partner_is_refused(base, tmp_path, factor):
    model = adapted(base)
    save(tmp_path, some_adapter(model), model, base)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if factor in name)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=rf"is there without {lost}, so the adapter is not whole"):
        hf.read_adapter(tmp_path, scale=2.0)


def test_half_precision_is_read_as_float32(base, tmp_path):
    model = adapted(base)
    save(tmp_path, some_adapter(model).map(lambda t: t.half()), model, base)
    read = hf.read_adapter(tmp_path, scale=2.0)
    assert {tensor.dtype for tensor in read.tensors().values()} == {torch.float32}


def cost(model: hf.AdaptedModel) -> ModelCost:
    return model.cost(
        {**batch(), "labels": torch.zeros(len(batch()["input_ids"]), dtype=torch.long)}, CLASSIFICATION.loss
    )


def test_a_pooler_belongs_to_the_last_block(base):
    every = cost(adapted(base))
    pooled = hf.AdaptedModel(
        hf.load_classifier(base, label_names=LABELS, seed=0), scale=2.0, target_modules=["query", "pooler.dense"]
    )
    assert [layer.block for layer in pooled.layers] == [0, 1, 1]
    assert (
        (cost(pooled).num_blocks, cost(pooled).base_bytes)
        == (every.num_blocks, every.base_bytes)
        == (2, every.base_bytes)
    )
    model = hf.load_classifier(base, label_names=LABELS, seed=0)
    (pooler,) = hf.AdaptedModel(model, scale=2.0, target_modules=["pooler.dense"]).layers
    assert pooler.block == 1


def test_a_damaged_model_is_explained(base, tmp_path):
    shutil.copytree(base.location, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.name: model could not be loaded"):
        hf.load_classifier(resolve(str(tmp_path / "model")), label_names=LABELS, seed=0)


# Models that are not whole, or not what is asked of them

CAUSAL = "AutoModelForCausalLM"


@pytest.fixture
def writer(tmp_path) -> Path:
    return write_causal(tmp_path / "writer", of_bytes())


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("model.layers.1.self_attn.q_proj.weight", None, "is missing"),
        ("model.layers.1.self_attn.q_proj.weight", 3, r"is \[3, 16\], not \[16, 16\]"),
        ("model.embed_tokens.weight", 50, r"is \[50, 16\], not \[261, 16\]"),
        ("lm_head.weight", None, "is missing"),
    ],
)
def test_a_language_model_that_is_not_whole_is_refused(writer, name, rows, said):
    def change(tensors):
        tensor = tensors.pop(name)
        if rows:
            tensors[name] = tensor[:rows].clone()

    assert hf.load_model(resolve(str(writer)), CAUSAL, hf.Loading())
    change_tensors(writer, change)
    with pytest.raises(
        ConfigError, match=rf"model\.name: the weights of writer are not whole: {name} {said}\. Expected"
    ):
        hf.load_model(resolve(str(writer)), CAUSAL, hf.Loading())


def test_of_a_classifier_only_the_head_and_the_pooler_may_be_new(base, tmp_path):
    shutil.copytree(base.location, tmp_path / "model")
    found = resolve(str(tmp_path / "model"))
    change_tensors(tmp_path / "model", lambda tensors: [tensors.pop(name) for name in [*tensors] if "pooler" in name])
    assert hf.load_classifier(found, label_names=LABELS, seed=0)
    hf.load_classifier(found, label_names=LABELS, seed=0).save_pretrained(tmp_path / "model")
    assert hf.load_classifier(found, label_names=LABELS[:2], seed=0).num_labels == 2
    lost = "bert.encoder.layer.0.attention.self.query"
    change_tensors(tmp_path / "model", lambda tensors: [tensors.pop(f"{lost}.{part}") for part in ("bias", "weight")])
    with pytest.raises(ConfigError, match=rf"not whole: {lost}\.bias is missing, {lost}\.weight is missing\. Expected"):
        hf.load_classifier(found, label_names=LABELS, seed=0)


def write_bare(folder: Path, name: str, **config: Any) -> Path:
    made = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made(made.config_class(**config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("initializer_range", "dtype"), [(0.02, torch.float32), (0.2, torch.float32), (0.2, torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_an_encoder_is_no_language_model(tmp_path, name, initializer_range, dtype):
    folder = write_bare(tmp_path / "model", name, **BERT | {"initializer_range": initializer_range})
    with pytest.raises(ConfigError, match=rf"model \({name}\) sees the tokens that it is to predict.*Take a decoder"):
        hf.load_model(resolve(str(folder)), CAUSAL, hf.Loading(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BertLMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM", "BloomForCausalLM"])
def test_a_decoder_is_a_language_model_whatever_its_configuration_says(tmp_path, name, dtype):
    further = {"BertLMHeadModel": {"is_decoder": True}, "MixtralForCausalLM": {"num_key_value_heads": 2}}
    folder = write_bare(tmp_path / "model", name, **BERT, **further.get(name, {}))
    assert hf.load_model(resolve(str(folder)), CAUSAL, hf.Loading(dtype))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(writer):
    def cut(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:50].clone()

    assert hf.load_tokenizer(resolve(str(writer)))
    change_tensors(writer, cut)
    about = json.loads((writer / "config.json").read_text())
    (writer / "config.json").write_text(json.dumps(about | {"vocab_size": 50}))
    with pytest.raises(
        ConfigError, match=r"tokens up to number 260, but .* has 50 rows.*resize_token_embeddings\(261\)"
    ):
        hf.load_tokenizer(resolve(str(writer)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device_map": "nonsense"}, r'model\.device_map: expected one of "auto".* got \'nonsense\''),
        ({"device_map": "cuda:77"}, r"model\.device_map: cuda:77 is not there, as this machine has \d+ GPUs"),
        ({"attention": "nope"}, r"model\.attention: nope is not to be had .*Leave it out"),
        ({"attention": "flex_attention"}, r"model\.attention: what a step costs cannot be counted with flex_attention"),
    ],
)
def test_what_this_machine_cannot_do_is_said_of_its_key(writer, asked, said):
    with pytest.raises(ConfigError, match=said):
        hf.load_model(resolve(str(writer)), CAUSAL, hf.Loading(**asked))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_file_of_another_kind_is_explained(writer, file):
    (writer / file).write_text("[]")
    with pytest.raises(
        ConfigError, match=r"writer could not be loaded \(one of its \.json files is not as transformers"
    ):
        hf.load_tokenizer(resolve(str(writer)))


def test_a_model_that_is_nowhere_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ConfigError, match="there is no folder"):
        resolve("./nowhere")
    with pytest.raises(ConfigError, match=r"nobody/nothing could not be loaded"):
        hf.load_classifier(resolve("nobody/nothing"), label_names=LABELS, seed=0)


def test_the_packaged_model_is_checked_against_pinned_hashes(monkeypatch, tmp_path):
    from anyrank import pretrained

    found = resolve("all-MiniLM-L6-v2")
    assert found.name == "sentence-transformers/all-MiniLM-L6-v2"
    assert resolve("sentence-transformers/all-MiniLM-L6-v2") == found

    package = pretrained._PACKAGES["all-MiniLM-L6-v2"]
    (tmp_path / "fake_model" / "model").mkdir(parents=True)
    (tmp_path / "fake_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    fake = {**vars(package), "module": "fake_model"}
    monkeypatch.setitem(pretrained._PACKAGES, "all-MiniLM-L6-v2", type(package)(**fake))
    with pytest.raises(ConfigError, match=r"is not the pinned file.*found no such file"):
        resolve("all-MiniLM-L6-v2")
    fake["module"] = "no_such_package_here"
    monkeypatch.setitem(pretrained._PACKAGES, "all-MiniLM-L6-v2", type(package)(**fake))
    with pytest.raises(ConfigError, match=r"pip install 'anyrank\[demo\]'"):
        resolve("all-MiniLM-L6-v2")


def test_dropout_acts_in_training_alone_and_keeps_the_mean(base):
    model = hf.AdaptedModel(
        hf.load_classifier(base, label_names=LABELS, seed=0), scale=2.0, target_modules=["query"], dropout=0.25
    )
    drop = next(module for module in model.model.modules() if isinstance(module, hf.layers.Dropout))
    x, drop.attended = torch.ones(8, 50, 32), torch.ones(8, 50)
    assert torch.equal(drop(x), x)
    drop.rngs = [torch.Generator().manual_seed(0)]
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.02)  # of 12,800 draws: five standard errors


def test_padding_does_not_change_what_is_dropped(base):
    def dropped(width: int, beside: int) -> torch.Tensor:
        """Of a client with two texts of 3 and 5 tokens, padded to a width, beside one with other texts."""
        drop = hf.layers.Dropout(0.5)
        drop.parts, drop.rngs = (2, beside), [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        drop.attended = torch.ones(2 + beside, width)
        drop.attended[0, 3:], drop.attended[1, 5:] = 0, 0
        return drop(torch.ones(2 + beside, width, 4))[:2, :5]

    alone = dropped(5, 1)
    assert 0 < float(alone[1].mean()) < 2
    assert torch.equal(alone, dropped(9, 3))
