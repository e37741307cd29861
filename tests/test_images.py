"""Images: every form in which data sets have them, the models that look at them, and whole runs."""

import copy
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import ConvNextConfig, ConvNextModel, ViTConfig, ViTModel

import anyrank
from anyrank import hf
from anyrank.adapter import Adapter
from anyrank.data import Parts
from anyrank.errors import ConfigError
from anyrank.hf import Loading
from anyrank.job import load_recipe, prepare
from anyrank.plain import PLAIN
from anyrank.pretrained import resolve
from anyrank.problem import Answers, Problem
from anyrank.problems.given import Given
from anyrank.problems.images import image_classification
from anyrank.seeding import numpy_generator, seed_of
from federations import low_rank

NAMES = ["dark", "light"]


def grey(count: int = 20, side: int = 6) -> np.ndarray:
    """Dark and light images in turn, `[count, side, side]`."""
    rng = numpy_generator("grey")
    light = np.arange(count)[:, None, None] % 2 * 120
    return (light + rng.integers(0, 130, (count, side, side))).astype(np.uint8)


def coloured(count: int = 20) -> np.ndarray:
    """The same in colour and not square, `[count, 5, 7, 3]`."""
    rng = numpy_generator("coloured")
    light = np.arange(count)[:, None, None, None] % 2 * 120
    return (light + rng.integers(0, 130, (count, 5, 7, 3))).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def labels(count: int) -> list[str]:
    return [NAMES[i % 2] for i in range(count)]


def parquet(folder: Path, images: list, feature: Any, **further: list) -> Path:
    """A file of images of some kind, with their labels."""
    folder.mkdir(exist_ok=True)
    features = {"image": feature, "label": Value("string"), **{name: Value("string") for name in further}}
    data = Dataset.from_dict({"image": images, "label": labels(len(images)), **further}, Features(features))
    data.to_parquet(folder / "train.parquet")
    return folder


def files(folder: Path, pixels: np.ndarray) -> list[str]:
    (folder / "pictures").mkdir(parents=True)
    for i, each in enumerate(pixels):
        (folder / "pictures" / f"{i}.png").write_bytes(encoded(each))
    return [f"pictures/{i}.png" for i in range(len(pixels))]


def as_csv(folder: Path, pixels: np.ndarray) -> Path:
    names = files(folder, pixels)
    with (folder / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "label"), *zip(names, labels(len(names)), strict=True)])
    return folder / "train.csv"


def as_json(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir()
    rows = [{"image": image, "label": label} for image, label in zip(pixels.tolist(), labels(len(pixels)), strict=True)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def as_folders(folder: Path, pixels: np.ndarray, part: str = ".") -> Path:
    for name in NAMES:
        (folder / part / name).mkdir(parents=True)
    for i, each in enumerate(pixels):
        (folder / part / NAMES[i % 2] / f"{i:02}.png").write_bytes(encoded(each))
    return folder


SQUARE = {
    "raw bytes": lambda to, x: parquet(to, [each.tobytes() for each in x], Value("binary")),
    "flat lists": lambda to, x: as_json(to, x.reshape(len(x), -1)),
}
FORMS = {
    "images": lambda to, x: parquet(to, [Image.fromarray(each) for each in x], datasets.Image()),
    "encoded bytes": lambda to, x: parquet(to, [encoded(each) for each in x], Value("binary")),
    "lists": as_json,
    "lists from 0 to 1": lambda to, x: as_json(to, x / 255),
    "arrays": lambda to, x: parquet(to, list(x), (Array2D if x.ndim == 3 else Array3D)(x.shape[1:], "uint8")),
    "paths": as_csv,
}
CHANNELS_FIRST = {"channels first": lambda to, x: as_json(to, x.transpose(0, 3, 1, 2))}


def given_of(source: Path | str, *, model: str = "mlp", **further: Any) -> Given:
    usual = {"loading": Loading(), "test": None, "test_share": 0.25, "seed": 0}
    return Given(base=resolve(model), source=str(source), **{**usual, **further})


def pixels_of(problem: Problem) -> np.ndarray:
    """What the model is given of all examples, `[examples, channels, height, width]`, as whole numbers again."""
    inputs = torch.stack([part[i]["inputs"] for part in (problem.train, problem.test) for i in range(len(part))])
    assert inputs.dtype == torch.float32
    return torch.round(127.5 * (inputs + 1)).to(torch.uint8).numpy()


# --- every form of an image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, *SQUARE])
def test_grey_images_are_the_same_in_every_form(form, tmp_path):
    pixels = grey()
    problem = image_classification(given_of({**FORMS, **SQUARE}[form](tmp_path / "data", pixels)))
    found = {each.tobytes() for each in pixels_of(problem)}
    assert found == {each.tobytes() for each in pixels}
    assert pixels_of(problem).shape == (20, 1, 6, 6)
    assert (len(problem.train), len(problem.test)) == (15, 5)
    assert problem.label_names == ("dark", "light")
    for part in (problem.train, problem.test):
        assert all((part[i]["inputs"].mean() > 0) == (part[i]["labels"] == 1) for i in range(len(part)))
    assert problem.columns["label"] == [problem.train[i]["labels"] for i in range(15)]


@pytest.mark.parametrize("form", [*FORMS, *CHANNELS_FIRST])
def test_coloured_images_are_the_same_in_every_form(form, tmp_path):
    pixels = coloured()
    problem = image_classification(given_of({**FORMS, **CHANNELS_FIRST}[form](tmp_path / "data", pixels)))
    found = {each.tobytes() for each in pixels_of(problem)}
    assert found == {each.transpose(2, 0, 1).tobytes() for each in pixels}


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_folder_for_each_class(shuffled, tmp_path):
    pixels = grey()
    as_folders(tmp_path / "data", pixels, "train" if shuffled else ".")
    if shuffled:
        as_folders(tmp_path / "data", pixels[:6], "test")
    problem = image_classification(given_of(tmp_path / "data"))
    assert problem.label_names == ("dark", "light")
    assert len(problem.test) == (6 if shuffled else 5)
    found = {each.tobytes() for each in pixels_of(problem)}
    assert found == {each.tobytes() for each in pixels}


def test_other_kinds_of_encoded_images(tmp_path):
    pictures = [Image.fromarray(each) for each in coloured(6)]
    modes = ["RGB", "RGBA", "P", "CMYK", "YCbCr", "RGB"]
    stored = []
    for picture, mode in zip(pictures, modes, strict=True):
        stream = io.BytesIO()
        picture.convert(mode).save(stream, {"P": "gif", "CMYK": "tiff", "YCbCr": "jpeg"}.get(mode, "png"))
        stored.append({"bytes": stream.getvalue(), "path": None})
    problem = image_classification(given_of(parquet(tmp_path / "data", stored, datasets.Image())))
    assert pixels_of(problem).shape == (6, 3, 5, 7)


def test_a_photograph_is_turned_as_its_camera_noted(tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(coloured(1)[0]).save(stream, "png", exif=orientation)
    problem = image_classification(given_of(parquet(tmp_path / "data", [stream.getvalue()] * 4, Value("binary"))))
    assert problem.train[0]["inputs"].shape == (3, 7, 5)
    upright = np.rot90(coloured(1)[0], -1).transpose(2, 0, 1)
    assert np.array_equal(pixels_of(problem)[0], upright)


def test_columns_are_kept_for_partitions_and_the_fingerprint_follows_the_content(tmp_path):
    pixels = grey()
    critics = [f"critic-{i % 3}" for i in range(20)]
    plain = [
        image_classification(
            given_of(parquet(tmp_path / "a", [x.tobytes() for x in pixels], Value("binary"), critic=critics))
        )
    ]
    pixels[3, 0, 0] ^= 1
    plain.append(
        image_classification(given_of(parquet(tmp_path / "b", [x.tobytes() for x in pixels], Value("binary"))))
    )
    assert plain[0].columns.keys() == {"label", "critic"}
    assert len(plain[0].columns["critic"]) == len(plain[0].train)
    prints = {problem.fingerprint for problem in plain}
    assert len(prints) == 2
    assert image_classification(given_of(tmp_path / "b")).fingerprint in prints


def test_answers_are_judged_by_accuracy_and_macro_f1_beside_the_majority(tmp_path):
    problem = image_classification(given_of(parquet(tmp_path / "data", [x.tobytes() for x in grey()], Value("binary"))))
    assert [metric.name for metric in problem.objective.metrics] == ["accuracy", "macro_f1"]
    held = [problem.test[i]["labels"] for i in range(len(problem.test))]
    most = np.bincount([problem.train[i]["labels"] for i in range(len(problem.train))]).argmax()
    assert problem.references == {"majority class": pytest.approx(np.mean(np.array(held) == most))}
    answers = Answers(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]), loss=0.0)
    assert problem.objective.metrics[1].of(answers) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


# --- what is wrong with them --------------------------------------------------------------------------------------


def broken(to: Path, row: int, stored: Any) -> Path:
    images = [encoded(each) for each in grey()]
    images[row] = stored
    return parquet(to, images, Value("binary"))


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        (b"\x89PNG and no more", r"cannot be read \(cannot identify image file\); mend or remove it"),
        (encoded(grey(1)[0])[:60], "row 8, column 'image': the image cannot be read"),
        (b"thirteen byte", "13 bytes are no encoded image"),
        (b"", "0 bytes are no encoded image"),
        (None, "there is none"),
        (encoded(grey(1, side=5)[0]), r"the image is 1 x 5 x 5 .* and the first one 1 x 6 x 6; model.name: mlp takes"),
        (encoded(coloured(1)[0]), "the image is 3 x 5 x 7"),
        (encoded(np.full((6, 6), 7000, np.uint16)), "its mode is I.*; expected 8 bits for each channel"),
    ],
    ids=["no PNG", "cut off", "not square", "empty", "none", "smaller", "coloured", "16 bits"],
)
def test_a_bad_image_is_named_with_its_row_and_what_is_wrong(stored, problem, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"data: row 8, column 'image': .*{problem}" if "row 8" not in problem else problem
    ):
        image_classification(given_of(broken(tmp_path / "data", 7, stored)))


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ([[1, 2], [3, 256]], "whole numbers from 0 to 255"),
        ([[1, 2], [3, -1]], "whole numbers from 0 to 255"),
        ([[1.0, 2.0], [3.0, 0.0]], "with a point from 0 to 1"),
        ([[[[1]]]], r"its shape is \[1, 1, 1, 1\]"),
        ([1, 2, 3], r"its shape is \[3\]"),
        ([[[1, 2], [3, 4]], [[1, 2], [3, 4]]], r"its shape is \[2, 2, 2\]; expected height x width, and one or three"),
    ],
)
def test_a_bad_array_is_named_with_its_row_and_what_is_wrong(image, problem, tmp_path):
    rows = [{"image": image, "label": label} for label in labels(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=f"data: row [12], column 'image': the image cannot be read .*{problem}"):
        image_classification(given_of(tmp_path))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
@pytest.mark.parametrize("model", ["mlp", "vit"])
def test_half_a_file_is_found_before_anything_is_trained(kind, model, tmp_path):
    base = "mlp" if model == "mlp" else str(write_vision_model(tmp_path / "model"))
    whole = [encoded(each, kind) for each in grey(side=64)]
    assert image_classification(given_of(parquet(tmp_path / "whole", whole, Value("binary")), model=base))
    half = [*whole[:7], whole[7][: len(whole[7]) // 2], *whole[8:]]
    with pytest.raises(ConfigError, match=r"data: row 8, column 'image': the image cannot be read"):
        image_classification(given_of(parquet(tmp_path / "half", half, Value("binary")), model=base))


def test_half_a_file_in_a_folder_is_named(tmp_path):
    source, base = as_folders(tmp_path / "data", grey()), str(write_vision_model(tmp_path / "model"))
    file = source / "light" / "03.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ConfigError, match=rf"the image {file} cannot be read \(.*truncated"):
        image_classification(given_of(source, model=base))


def test_an_image_too_large_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    source = parquet(tmp_path / "data", [encoded(each) for each in grey()], Value("binary"))
    with pytest.raises(
        ConfigError, match=r"row \d+, column 'image': the image cannot be read .*exceeds limit of 20 pixels"
    ):
        image_classification(given_of(source))


@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_class_that_only_the_test_folder_has(part, tmp_path):
    source = as_folders(tmp_path / "data", grey(), "train")
    as_folders(source, grey(4), part)
    (source / part / "dark").rename(source / part / "dim")
    with pytest.raises(
        ConfigError, match=r"00\.png is of a class without training images; expected one of dark, light"
    ):
        image_classification(given_of(source))


def test_a_folder_to_be_scored_may_lack_a_class(tmp_path):
    source = as_folders(tmp_path / "data", grey(4))
    for file in (source / "dark").iterdir():
        file.unlink()
    known = given_of(source, label_names=NAMES, only="test")
    assert [image_classification(known).test[i]["labels"] for i in range(2)] == [1, 1]


def test_a_missing_file_is_named_with_its_row(tmp_path):
    source = as_csv(tmp_path / "data", grey())
    (tmp_path / "data" / "pictures" / "4.png").unlink()
    with pytest.raises(ConfigError, match=r"row 5, column 'image': .*No such file.*4.png"):
        image_classification(given_of(source))


def test_columns_and_labels_are_checked(tmp_path, monkeypatch):
    source = parquet(tmp_path / "data", [each.tobytes() for each in grey()], Value("binary"))
    with pytest.raises(ConfigError, match=r"training data: there is no column 'images'.*did you mean 'image'"):
        image_classification(given_of(source), image="images")
    with pytest.raises(ConfigError, match="there is no column 'class'"):
        image_classification(given_of(source), label="class")
    with pytest.raises(ConfigError, match=r"problem.image: expected neither the label column"):
        image_classification(given_of(source), image="label")
    data = Dataset.from_dict({"image": [x.tobytes() for x in grey(4)], "label": ["one"] * 4})
    data.to_parquet(tmp_path / "one.parquet")
    with pytest.raises(ConfigError, match="expected two labels or more, found only 'one'"):
        image_classification(given_of(tmp_path / "one.parquet"))
    features = Features({"image": Value("binary"), "label": ClassLabel(names=NAMES)})
    none = Dataset.from_dict({"image": [], "label": []}, features)
    monkeypatch.setattr(Given, "parts", lambda *columns, **usable: Parts(none, none))
    with pytest.raises(ConfigError, match=r"training data: there are no rows\ntest data: there are no rows"):
        image_classification(given_of(source))


def test_only_encoded_images_need_pillow(tmp_path, monkeypatch):
    raw = parquet(tmp_path / "raw", [each.tobytes() for each in grey()], Value("binary"))
    files = as_folders(tmp_path / "files", grey())
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(datasets.config, "PIL_AVAILABLE", False)
    assert len(image_classification(given_of(raw)).train) == 15
    with pytest.raises(ConfigError, match=r"need Pillow, which is not installed: `pip install 'anyrank\[images\]'`"):
        image_classification(given_of(files))


def test_small_models_are_not_quantised(tmp_path):
    source = parquet(tmp_path / "data", [each.tobytes() for each in grey()], Value("binary"))
    with pytest.raises(ConfigError, match=r"model.quantize: mlp is too small"):
        image_classification(given_of(source, loading=Loading(quantize="4bit")))
    problem = image_classification(given_of(source, loading=Loading(torch.bfloat16)))
    assert problem.model()(problem.train[0]["inputs"][None]).dtype == torch.bfloat16


# --- models of our own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 5, 7)])
def test_images_of_any_shape_get_a_logit_for_each_class(name, shape):
    model = PLAIN[name](shape, 4)
    assert model(torch.zeros(2, *shape)).shape == (2, 4)
    layers = [layer.name for layer in hf.AdaptedModel(model, scale=2.0).layers]
    assert layers == (["linear1", "linear2", "linear3"] if name == "mlp" else ["conv1", "conv2", "linear1", "linear2"])


def test_the_models_are_those_of_the_papers():
    sizes = {name: [tuple(p.shape) for p in PLAIN[name]((1, 28, 28), 10).parameters()] for name in PLAIN}
    assert sizes["mlp"][::2] == [(200, 784), (200, 200), (10, 200)]
    assert sum(int(np.prod(size)) for size in sizes["cnn"]) == 1_663_370  # as McMahan et al. count
    with pytest.raises(ConfigError, match="cnn halves an image twice, and these are 3 x 8"):
        PLAIN["cnn"]((1, 3, 8), 10)


# --- models of transformers ---------------------------------------------------------------------------------------

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_rescale": True,
    "do_normalize": True,
}


def write_vision_model(folder: Path, channels: int = 3, family: str = "vit") -> Path:
    """A model without a head, and its image processor."""
    usual = {"num_channels": channels, "patch_size": 4, "initializer_range": 0.2, "image_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "vit":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
            ViTModel(ViTConfig(**usual, **sizes)).save_pretrained(folder)
        else:
            sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
            ConvNextModel(ConvNextConfig(**{**usual, "patch_size": 2}, **sizes)).save_pretrained(folder)
    means = {"image_mean": [0.4] * channels, "image_std": [0.3] * channels}
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **means}))
    return folder


@pytest.mark.parametrize(
    ("family", "channels", "targets"),
    [
        ("vit", 3, ["q_proj", "fc1", "projection"]),
        ("vit", 1, ["fc2"]),
        ("convnext", 3, ["pwconv1", "downsampling_layer.1"]),
    ],
)
@torch.no_grad()
def test_a_vision_model_is_adapted_and_stock_peft_loads_what_is_written(family, channels, targets, tmp_path):
    base = write_vision_model(tmp_path / "model", channels, family)
    source = parquet(tmp_path / "data", [Image.fromarray(each) for each in coloured()], datasets.Image())
    problem = image_classification(given_of(source, model=str(base)))
    assert problem.auto_class == "AutoModelForImageClassification"
    batch = problem.collate([problem.train[i] for i in range(6)])
    assert batch["pixel_values"].shape == (6, channels, 8, 8)
    bare = problem.model()
    assert bare.config.id2label == {0: "dark", 1: "light"}
    model = hf.AdaptedModel(copy.deepcopy(bare), scale=2.0, target_modules=targets)
    assert model.modules_to_save == ["classifier"]
    assert bool(model.patches) == (targets != ["fc2"])
    layers = {
        layer.name: low_rank(rank=1 + i % 3, d_in=layer.d_in, d_out=layer.d_out, key=("vision", layer.name)).map(
            lambda tensor: 0.3 * tensor
        )
        for i, layer in enumerate(model.layers)
    }
    adapter = Adapter(layers, {name: tensor + 0.1 for name, tensor in model.dense.items()})
    hf.write_adapter(
        tmp_path / "adapter",
        adapter,
        scale=2.0,
        base=resolve(str(base)),
        modules_to_save=model.modules_to_save,
        label_names=problem.label_names,
        card="A card.",
        patches=model.patches,
        task_type=problem.task_type,
    )
    model.load(adapter)
    ours = model.logits(batch)
    stock = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=2)
    stock = peft.PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    assert torch.allclose(stock(pixel_values=batch["pixel_values"]).logits, ours, atol=1e-4)
    assert not torch.allclose(bare(pixel_values=batch["pixel_values"]).logits, ours, atol=1e-2)


def test_pixels_are_those_of_the_image_processor(tmp_path):
    base = write_vision_model(tmp_path / "model")
    pixels = np.repeat(np.repeat(coloured(4)[:, :4, :4], 2, axis=1), 2, axis=2)  # 8 x 8, so that nothing is resized
    source = parquet(tmp_path / "data", [encoded(each) for each in pixels], Value("binary"))
    problem = image_classification(given_of(source, model=str(base)))
    expected = {((each.transpose(2, 0, 1) / 255 - 0.4) / 0.3).round(3).astype(np.float32).tobytes() for each in pixels}
    found = {
        part[i]["pixel_values"].numpy().round(3).tobytes()
        for part in (problem.train, problem.test)
        for i in range(len(part))
    }
    assert found == expected


def test_a_model_without_an_image_processor_is_refused(tmp_path):
    base = write_vision_model(tmp_path / "model")
    (base / "preprocessor_config.json").unlink()
    source = parquet(tmp_path / "data", [encoded(each) for each in grey()], Value("binary"))
    with pytest.raises(ConfigError, match=r"model.name: model could not be loaded"):
        image_classification(given_of(source, model=str(base)))


# --- whole runs ---------------------------------------------------------------------------------------------------


def recipe(folder: Path, model: str, source: Path, **changes: Any) -> Any:
    file = folder / "recipe.toml"
    file.write_text(f"""
rounds = 2
[method]
name = "rbla"
[ranks]
name = "ratios"
values = [0.25, 0.5, 1.0]
of = 4
[model]
name = "{model}"
[problem]
name = "image_classification"
[data]
source = "{source}"
held_out = 0.0
[partition]
name = "iid"
clients = 3
[train]
learning_rate = 1e-2
batch_size = 4
epochs = 4
[fleet]
per_round = 3
[fleet.classes.phones]
device = "phone"
[compute]
threads = 1
""")
    return load_recipe(file, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("name", [*PLAIN, "vit"])
def test_a_run_learns_and_its_adapter_means_the_same_to_stock_peft(name, tmp_path):
    source = parquet(tmp_path / "data", [encoded(each) for each in grey(40, side=8)], Value("binary"))
    model, targets = (name, None) if name in PLAIN else (str(write_vision_model(tmp_path / "model")), ["q_proj", "fc1"])
    chosen = recipe(tmp_path, model, source, lora__target_modules=targets)
    folder = anyrank.run(chosen, tmp_path / "run")
    first, last = folder.records()[0], folder.records()[-1]
    assert last["metrics"]["accuracy"] >= 0.9
    assert last["metrics"].keys() == {"accuracy", "macro_f1"}
    assert last["train_loss"] < first["train_loss"]
    assert set(last["returned_ranks"].values()) == {1, 2, 4}
    job = prepare(chosen)
    batch = job.problem.collate([job.problem.test[i] for i in range(4)])
    job.model.load(folder.final_adapter())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(chosen.seed, "head"))
        bare = job.problem.model()
    stock: Any = peft.PeftModel.from_pretrained(bare, str(folder.path / "adapter")).eval()
    answer = stock(batch["inputs"]) if name in PLAIN else stock(pixel_values=batch["pixel_values"]).logits
    assert torch.allclose(answer, job.model.logits(batch), atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_clients_that_share_a_pass_end_as_if_each_had_trained_alone(name, tmp_path):
    source = parquet(tmp_path / "data", [each.tobytes() for each in grey(40, side=8)], Value("binary"))
    adapters = []
    for cohort in (1, 3):
        chosen = recipe(tmp_path, name, source, compute__cohort=cohort, compute__workers=1)
        adapters.append(anyrank.run(chosen, tmp_path / f"run-{cohort}").final_adapter().tensors())
    for key, tensor in adapters[0].items():
        assert (adapters[1][key] - tensor).norm() <= 1e-4 * max(1.0, float(tensor.norm())), key
