"""UperNet against the published implementation's numbers and against PyTorch, and its options."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, fill_model, images
from flax import nnx
from model_goldens import filled, official_names, relative

import tlvit
from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.torch_names import from_torch, identify, official_shapes, to_torch
from tlvit.models.functional import count_parameters, functionalize
from tlvit.models.segmentation_heads import average_pool, drop_channels
from tlvit.models.upernet import Upsample
from tlvit.ops.resize import resize_bilinear
from tlvit.ops.segmentation import pixel_cross_entropy, slide_logits

with gzip.open(GOLDEN / "seg_state_dicts.jsonl.gz", "rt") as lines:
    OFFICIAL = {record["model"]: record["tensors"] for record in map(json.loads, lines)}
PARAMETERS = {
    "upernet_lvvit_s": 44_452_076, "upernet_lvvit_m": 77_274_988, "upernet_lvvit_l": 208_554_156,
}  # fmt: skip
LARGER = ("upernet_lvvit_m", "upernet_lvvit_l")
SMALL = {
    "dim": 32, "depth": 2, "num_heads": 2, "stem_width": 8, "out_indices": (0, 0, 1, 1), "channels": 8,
    "image_size": 64, "num_classes": 5,
}  # fmt: skip
TINY = {"depth": 1, "out_indices": (0, 0, 0, 0), "head": "fcn"}  # few layers to initialize


def small(name="upernet_lvvit_s", **options):
    return tlvit.create_model(name, **{**SMALL, **options})


def abstract(name="upernet_lvvit_s", **options):
    return nnx.eval_shape(lambda: small(name, **options))


def case(golden, name):
    """The arrays of a golden case and its configuration."""
    values = golden("seg_visible.npz")
    arrays = {k.removeprefix(f"{name}/"): values[k] for k in values.files if k.startswith(f"{name}/")}
    return arrays, json.loads(str(arrays["config"]))


@functools.cache
def golden_model(image_size):
    """The goldens' S with 7 classes and 64 channels, as (net, params, stats)."""
    return functionalize(filled("upernet_lvvit_s", image_size=image_size, num_classes=7, channels=64))


def golden_images(seed, batch, size):
    """Normalized images as NHWC; `conftest.golden_images` of any shape."""
    x = np.random.RandomState(seed).standard_normal((batch, 3, *size)).astype(np.float32)
    return x.transpose(0, 2, 3, 1)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def sub_sampled(x, sub):
    r0, r_step, c0, c_step = sub
    return x[:, r0::r_step, c0::c_step]


def same_classes(found, expected):
    """At most 0.1 % of the pixels differ."""
    return np.mean(np.asarray(found) != expected) <= 1e-3


@functools.cache
def compiled(image_size):
    """The logits of the same model, as a function of images."""
    net, params, stats = golden_model(image_size)
    return jax.jit(lambda x: net.apply(params, stats, x)[0].logits)


# Names


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in PARAMETERS])
def test_published_state_dicts_load_and_are_written_back(name):
    """With names, shapes and types in the published order."""
    tensors = {k: np.zeros(shape, dtype) for k, shape, dtype in OFFICIAL[name]}
    for i, tensor in enumerate(tensors.values()):
        tensor.fill(0 if tensor.dtype == np.int64 else i)
    info = identify(tensors)
    assert (info.model, info.num_classes) == (name, 150)
    assert info.image_size == ((448, 448) if name == "upernet_lvvit_l" else (512, 512))
    model = nnx.eval_shape(lambda: tlvit.create_model(name, num_classes=150))
    assert count_parameters(functionalize(model)[1]) == PARAMETERS[name]
    report = from_torch(model, tensors)
    assert (report.reinitialized, report.unexpected, report.resized) == ((), (), ())
    written = to_torch(model)
    assert list(written) == list(tensors)
    assert list(official_shapes(model)) == [k for k in tensors if not k.endswith("num_batches_tracked")]
    for key, tensor in tensors.items():
        assert (written[key].dtype, written[key].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)


@pytest.mark.parametrize("options", [{}, {"head": "fcn", "auxiliary": False, "last_width": 48}])
def test_classes_channels_and_heads_are_recognized(options):
    build = lambda: tlvit.create_model(
        "upernet_lvvit_s", num_classes=11, image_size=96, channels=24, **options
    )
    shapes = official_shapes(nnx.eval_shape(build))
    info = identify({k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()})
    assert (info.model, info.num_classes, info.image_size) == ("upernet_lvvit_s", 11, (96, 96))
    assert info.options == {"channels": 24, **options}
    without = {k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items() if "side_layer4" not in k}
    with pytest.raises(ValueError, match="No model has exactly these"):
        identify(without)


@pytest.mark.slow
def test_an_exported_model_is_opened_with_other_positions_and_classes(tmp_path):
    options = {k: v for k, v in {**SMALL, **TINY}.items() if k not in ("image_size", "num_classes")}
    info = tlvit.ModelInfo("upernet_lvvit_s", 5, (64, 64), options)
    model = info.build(seed=1)
    tlvit.export(model, tmp_path / "seg.safetensors", info=info)
    loaded, _ = tlvit.load(tmp_path / "seg.safetensors")
    jax.tree.map(np.testing.assert_array_equal, to_torch(loaded), to_torch(model))
    opened = open_checkpoint(tmp_path / "seg.safetensors", image_size=96, num_classes=3, drop_heads=True)
    assert opened.report.resized == ("backbone.pos_embed",)
    assert {k.split(".")[1] for k in opened.report.reinitialized} == {"conv_seg"}
    assert opened.model.grid == (6, 6)
    assert to_torch(opened.model)["auxiliary_head.conv_seg.bias"].shape == (3,)


@pytest.mark.slow
def test_the_backbone_takes_the_weights_of_a_classifier():
    options = {k: SMALL[k] for k in ("dim", "num_heads", "stem_width")}
    classifier = tlvit.create_model("lvvit_s", num_classes=9, image_size=32, depth=1, **options)
    model = small(**TINY)
    allow = ("pos_embed", "side_layer", "norm.", "head", "aux_head")
    report = from_torch(model.backbone, to_torch(classifier), allow=allow)
    assert report.resized == ("pos_embed",)
    assert {k.split(".")[0] for k in report.reinitialized} == {"side_layer3", "side_layer4"}
    assert {k.split(".")[0] for k in report.unexpected} == {"norm", "head", "aux_head"}
    expected = to_torch(classifier)["blocks.0.mlp.fc2.weight"]
    np.testing.assert_array_equal(to_torch(model)["backbone.blocks.0.mlp.fc2.weight"], expected)


# Values


@pytest.mark.slow
def test_evaluation_equals_the_published_one(golden):
    z, config = case(golden, "s_128_7")
    net, params, stats = golden_model(128)
    x = golden_images(config["eval_seed"], config["eval_batch"], config["image"])

    def run(x):
        return net.apply(params, stats, x)[0], net.bind(params, stats).feature_maps(x)

    output, features = jax.jit(run)(x)
    assert relative(output.logits, nhwc(z["eval_decode"])) < 1e-4
    assert relative(output.aux, nhwc(z["eval_aux"])) < 1e-4
    for i, feature in enumerate(features):
        assert nhwc(np.empty(z[f"feature{i}_shape"])).shape == feature.shape
        assert relative(feature.mean((1, 2)), z[f"feature{i}_mean"]) < 1e-4
    full = np.asarray(resize_bilinear(output.logits, tuple(config["image"])))
    assert relative(sub_sampled(full, config["sub"]), nhwc(z["eval_full_sub"])) < 1e-4
    assert relative(full.mean((1, 2)), z["eval_full_mean"]) < 1e-4
    assert relative(np.abs(full).max((1, 2)), z["eval_full_absmax"]) < 1e-4
    assert same_classes(full.argmax(-1), z["eval_class"])


@pytest.mark.slow
def test_a_training_step_equals_the_published_one(golden):
    """Losses, accuracies, outputs, the gradient of every tensor and the running statistics."""
    z, config = case(golden, "s_128_7")
    net, params, stats = golden_model(128)
    batch, size, classes = config["train_batch"], config["image"], config["classes"]
    x = golden_images(config["train_seed"], batch, size)
    labels = np.random.RandomState(config["label_seed"]).randint(0, classes + 1, (batch, *size))
    labels = np.where(labels == classes, 255, labels).astype(np.int32)
    assert (labels == 255).sum() == config["ignored"]

    def loss(params):
        output, new = net.apply(params, stats, x, train=True)
        entropy = {
            (head, normalize): pixel_cross_entropy(logits, labels, normalize=normalize)
            for head, logits in (("decode", output.logits), ("aux", output.aux))
            for normalize in ("all", "valid")
        }
        return tlvit.segmentation_loss(output, labels), (output, new, entropy)

    (total, (output, new, entropy)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert abs(float(total) - z["train_loss"]) < 1e-5
    for (head, normalize), value in entropy.items():
        key = f"train_loss_{head}{'_valid' if normalize == 'valid' else ''}"
        assert abs(float(value) * (0.4 if head == "aux" else 1.0) - z[key]) < 1e-5, key
    for head, logits in (("decode", output.logits), ("aux", output.aux)):
        assert relative(logits.mean((1, 2)), z[f"train_{head}_mean"]) < 1e-4
        pred = resize_bilinear(logits, tuple(size)).argmax(-1)
        hits = np.trace(tlvit.confusion_matrix(pred, labels, classes))
        assert abs(100 * hits / labels.size - z[f"train_acc_{head}"]) < 0.1
    check_norms(grads, z, config["zero_gradient"])
    statistics = official_names(new)
    names = [k.removeprefix("after/") for k in z if k.startswith("after/")]
    assert len(names) == 24
    for name in names:
        assert relative(statistics[name], z[f"after/{name}"]) < 1e-5, name


def check_norms(grads, z, zero):
    """Gradient norms within 3e-3 relative, and a millionth of the largest norm absolute."""
    ours = {k: float(np.linalg.norm(np.asarray(v).ravel())) for k, v in official_names(grads).items()}
    theirs = dict(zip(z["grad_names"].tolist(), z["grad_norms_f64"].tolist(), strict=True))
    assert ours.keys() == theirs.keys()
    largest = max(theirs.values())
    assert all(ours[name] < 1e-6 * largest for name in zero)
    for name, norm in theirs.items():
        assert abs(ours[name] - norm) <= 3e-3 * norm + 1e-6 * largest, name


@pytest.mark.slow
def test_the_sliding_window_equals_the_published_one(golden):
    z, config = case(golden, "slide")
    x = golden_images(config["seed"], 1, config["image"])
    crop, stride = (tuple(config[k]) for k in ("crop", "stride"))
    logits = slide_logits(compiled(64), x, crop=crop, stride=stride)
    assert relative(sub_sampled(logits, config["sub"]), nhwc(z["logits_sub"])) < 1e-4
    assert relative(logits.mean((1, 2)), z["logits_mean"]) < 1e-4
    assert same_classes(logits.argmax(-1), z["class"])
    probs = jax.nn.softmax(resize_bilinear(logits, tuple(config["ori_shape"])), axis=-1)
    assert np.abs(sub_sampled(probs, config["sub"]) - nhwc(z["prob_ori_sub"])).max() < 1e-5
    assert np.abs(probs.mean((1, 2)) - z["prob_ori_mean"]).max() < 1e-5
    assert same_classes(probs.argmax(-1), z["class_ori"])


@pytest.mark.slow
def test_multi_scale_inference_equals_the_published_one(golden):
    z, config = case(golden, "aug")
    x = golden_images(config["seed"], 1, config["image"])
    slide = functools.partial(
        slide_logits, compiled(64), crop=tuple(config["crop"]), stride=tuple(config["stride"])
    )
    known = {}

    def predict(images):
        key = np.asarray(images).tobytes()
        if key not in known:
            known[key] = slide(images)
        return known[key]

    probs_of = functools.partial(tlvit.multi_scale_probs, predict, x, scale=tuple(config["img_scale_wh"]))
    parts = []
    for ratio in config["ratios"]:
        plain, both = probs_of(ratios=[ratio], flip=False), probs_of(ratios=[ratio])
        parts += [plain, 2 * both - plain]
    for part, mean, corner in zip(parts, z["part_mean"], z["part_corner"], strict=True):
        assert np.abs(part.mean((0, 1, 2)) - mean).max() < 1e-5
        assert (
            np.abs(part[0, :: part.shape[1] - 1, :: part.shape[2] - 1] - np.moveaxis(corner, 0, -1)).max()
            < 1e-5
        )
    probs = probs_of(ratios=config["ratios"])
    assert np.abs(sub_sampled(probs, config["sub"]) - nhwc(z["prob_sub"])).max() < 1e-5
    assert np.abs(probs.mean((1, 2)) - z["prob_mean"]).max() < 1e-5
    assert np.abs(probs.max((1, 2)) - z["prob_max"]).max() < 1e-5
    assert same_classes(probs.argmax(-1), z["class"])


@pytest.mark.parametrize("size", [(8, 8), (8, 10), (4, 4), (3, 4), (32, 32), (7, 9)])
def test_pooling_equals_the_published_one(golden, size):
    x = np.random.RandomState(5).standard_normal((1, 2, *size)).astype(np.float32)
    for bins in (1, 2, 3, 6):
        expected = nhwc(golden("seg_visible.npz")[f"ops/pool/{size[0]}x{size[1]}_{bins}"])
        np.testing.assert_allclose(average_pool(nhwc(x), bins), expected, atol=1e-6)


# PyTorch


@pytest.mark.parametrize(
    ("size", "shape"),
    [((50, 66), (12, 16)), pytest.param((128, 96), (32, 24), marks=pytest.mark.slow)],
)
def test_images_of_any_size_equal_torch(size, shape):
    """Position embeddings are resized; rows and columns that do not fill a patch are cut."""
    torch = pytest.importorskip("torch")
    from torch_models.upernet import UperNet

    model = small()
    fill_model(model)
    theirs = UperNet(
        width=32,
        depth=2,
        heads=2,
        stem=8,
        residual=2.0,
        grid=(4, 4),
        classes=5,
        channels=8,
        blocks=(0, 0, 1, 1),
    )
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in to_torch(model).items()}, strict=True)
    x = golden_images(0, 2, size)
    with torch.inference_mode():
        logits, aux = theirs.eval().forward_all(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))))
    output = jax.jit(lambda x: model(x))(x)
    assert output.logits.shape == (2, *shape, 5)
    assert relative(output.logits, logits.numpy()) < 1e-4
    assert relative(output.aux, aux.numpy()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_larger_models_equal_torch(name):
    """L with the position embeddings of 448 pixels at 512, as in the published recipe."""
    torch = pytest.importorskip("torch")
    from torch_models.upernet import UperNet

    sizes = {
        "upernet_lvvit_m": {
            "width": 512,
            "depth": 20,
            "heads": 8,
            "stem": 64,
            "residual": 2.0,
            "grid": (32, 32),
            "blocks": (10, 13, 16, 19),
            "channels": 256,
        },
        "upernet_lvvit_l": {
            "width": 768,
            "depth": 24,
            "heads": 12,
            "stem": 128,
            "residual": 1.0,
            "grid": (28, 28),
            "blocks": (14, 17, 20, 23),
            "channels": 512,
        },
    }[name]
    model = filled(name, num_classes=150)
    theirs = UperNet(classes=150, **sizes)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in to_torch(model).items()}, strict=True)
    size = (512, 512) if name == "upernet_lvvit_l" else (128, 160)
    x = golden_images(0, 1, size)
    with torch.inference_mode():
        logits, _ = theirs.eval().forward_all(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))))
    net, params, stats = functionalize(model)
    assert relative(jax.jit(net.apply)(params, stats, x)[0].logits, logits.numpy()) < 1e-4


# Options


@pytest.mark.parametrize(
    ("backbone", "options", "widths"),
    [
        ("vit", {"dim": 16, "depth": 3, "num_heads": 2}, (16, 16, 16)),
        pytest.param(
            "deit_tiny_distilled_patch16_224",
            {"dim": 16, "depth": 4, "num_heads": 2},
            (16, 16, 16),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "t2t_vit_7", {"dim": 16, "depth": 4, "num_heads": 2}, (16, 16, 16), marks=pytest.mark.slow
        ),
        ("t2t_vit_dense", {"dim": 16, "depth": (1, 2), "num_heads": 2, "growth": 8}, (24, 12, 20)),
    ],
)
def test_every_token_model_can_be_the_backbone(backbone, options, widths):
    """Also for images that its position embeddings are not for."""
    model = nnx.eval_shape(
        lambda: tlvit.create_model(
            "upernet", backbone=backbone, image_size=32, channels=8, num_classes=3, **options
        )
    )
    net, params, stats = functionalize(model)
    declared = (net.task, net.grid, net.has_token_head, net.has_dense_logits)
    assert declared == ("segmentation", model.grid, False, False)
    key = jax.random.key(0)
    run = lambda p, s: (
        net.bind(p, s).feature_maps(images(2, 64, 48)),
        net.apply(p, s, images(2, 64, 48), train=True, key=key),
    )
    features, (output, new) = jax.eval_shape(run, params, stats)
    assert [f.shape[1:] for f in features] == [
        (16, 12, widths[0]), (8, 6, widths[1]), (4, 3, widths[2]), (4, 3, 2048)
    ]  # fmt: skip
    assert (output.logits.shape, output.aux.shape) == ((2, 16, 12, 3), (2, 4, 3, 3))
    assert jax.tree.structure(new) == jax.tree.structure(stats)


def test_default_blocks_are_the_ends_of_the_quarters():
    blocks = lambda depth: abstract("upernet", depth=depth, out_indices=None).out_indices
    assert [blocks(depth) for depth in (12, 7, 1)] == [(2, 5, 8, 11), (0, 2, 4, 6), (0, 0, 0, 0)]


def test_published_settings_are_defaults_with_an_option_each():
    for name, scale in (("upernet_lvvit_s", 2.0), ("upernet_lvvit_m", 2.0), ("upernet_lvvit_l", 1.0)):
        blocks = abstract(name, drop_path=0.3).backbone.blocks
        assert {b.skip_lam for b in blocks} == {scale}
        assert {b.norm1.epsilon for b in blocks} | {b.norm2.epsilon for b in blocks} == {1e-6}
        assert {b.drop_path for b in blocks} == {b.attn.drop_rate for b in blocks} == {0.0}
        np.testing.assert_allclose([b.mlp.drop_rate for b in blocks], [0, 0.3])
    sane = abstract(mlp_dropout=False, epsilon=1e-5, skip_lam=3.0, drop_path=0.3).backbone.blocks
    assert {b.skip_lam for b in sane} == {3.0}
    assert {b.norm1.epsilon for b in sane} == {1e-5}
    assert {b.mlp.drop_rate for b in sane} == {0.0}
    np.testing.assert_allclose([b.drop_path for b in sane], [0, 0.3])
    plain = abstract("upernet", backbone="lvvit_l").backbone.blocks[0]
    assert (plain.skip_lam, plain.norm1.epsilon, plain.mlp.drop_rate) == (3.0, 1e-5, 0.0)


@pytest.mark.slow
def test_a_key_drops_in_the_blocks_and_in_the_heads():
    """The first block's rate is 0, so the auxiliary head, which sees only that, shows its own dropout."""
    net, params, stats = functionalize(
        small(out_indices=(0, 0, 0, 1), head="fcn", drop_path=0.5, head_drop=0.2)
    )

    @jax.jit
    def run(key):
        first, last = net.bind(params, stats).feature_maps(images(2, 32), key=key)
        return first, last, net.bind(params, stats)(images(2, 32), key=key).aux

    plain, dropped, again = run(None), run(jax.random.key(1)), run(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, dropped, again)
    changed = [np.abs(a - b).max() > 1e-4 for a, b in zip(plain, dropped, strict=True)]
    assert changed == [False, True, True]


def test_dropout_of_heads_drops_whole_channels():
    x = drop_channels(jnp.ones((4, 3, 5, 64)), 0.25, jax.random.key(0))
    assert set(np.unique(x).round(4)) == {np.float32(0.0), np.float32(1.3333)}
    assert (np.ptp(np.asarray(x), axis=(1, 2)) == 0).all()
    assert 0.6 < np.mean(np.asarray(x) > 0) < 0.9


def test_the_kernel_of_upsample_is_not_flipped():
    layer = Upsample(2, 2, rngs=nnx.Rngs(0))
    x = images(1, 3, 4)[..., :2]
    y, kernel = np.asarray(layer(x)), np.asarray(layer.kernel[...])  # [p, q, out, in]
    assert y.shape == (1, 6, 8, 2)
    np.testing.assert_allclose(y[0, 3, 6], kernel[1, 0] @ x[0, 1, 3], atol=1e-6)
    np.testing.assert_allclose(y[0, 4, 5], kernel[0, 1] @ x[0, 2, 2], atol=1e-6)


def test_initialization_is_the_published_one():
    tensors = to_torch(small(channels=64))
    std = lambda name: tensors[f"{name}.weight"].std()
    assert abs(std("decode_head.conv_seg") - 0.01) < 2e-3
    assert np.abs(tensors["decode_head.conv_seg.bias"]).max() == 0
    assert abs(std("decode_head.bottleneck.conv") - (2 / (64 * 9)) ** 0.5) < 1e-3
    for name, fan in (("side_layer1.0", 32 * 16), ("side_layer4.0", 32)):
        bound = np.abs(tensors[f"backbone.{name}.weight"]).max()
        assert 0.95 * fan**-0.5 < bound <= fan**-0.5


def test_bfloat16_computes_low_and_keeps_high():
    net, params, stats = functionalize(abstract(dtype="bfloat16"))
    assert {str(x.dtype) for x in jax.tree.leaves((params, stats))} == {"float32"}
    features = jax.eval_shape(lambda p, s: net.bind(p, s).feature_maps(images(2, 64)), params, stats)
    assert {str(x.dtype) for x in features} == {"bfloat16"}
    output = jax.eval_shape(net.apply, params, stats, images(2, 64))[0]
    assert (output.logits.dtype, output.aux.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.slow
def test_a_sharded_batch_has_the_statistics_of_the_whole_batch():
    """Loss and running statistics of 8 images on 8 devices equal those on one device."""
    net, params, stats = functionalize(small(depth=1, out_indices=(0, 0, 0, 0)))
    x = images(8, 32)
    labels = np.random.RandomState(1).randint(0, 5, (8, 32, 32)).astype(np.int32)
    labels[:3] = 255  # the devices' numbers of labeled pixels differ

    @jax.jit
    def step(x, labels):
        output, new = net.apply(params, stats, x, train=True)
        return tlvit.segmentation_loss(output, labels, normalize="valid"), new

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    alone, together = step(x, labels), step(*jax.device_put((x, labels), sharded))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(a).max(), 1e-2))
    jax.tree.map(close, alone, together)


def test_errors_name_the_numbers():
    for options, text in [
        ({"backbone": "regnety_016"}, "backbone must be one of deit_base.*not 'regnety_016'"),
        ({"head": "psp"}, "head must be one of upernet, fcn, not 'psp'"),
        ({"out_indices": (0, 1, 1)}, "out_indices must be 4 blocks, not 3"),
        ({"out_indices": (0, 1, 2, 2)}, r"Indices must be in 0\.\.1, not 2, 2"),
        ({"image_size": 40}, "40x40.*16"),
    ]:
        with pytest.raises(ValueError, match=text):
            abstract(**options)
    with pytest.raises(TypeError, match="depht"):
        abstract(depht=3)
    net, params, stats = functionalize(abstract())
    run = lambda x, train: jax.eval_shape(lambda p, s: net.apply(p, s, x, train=train), params, stats)
    with pytest.raises(ValueError, match="smaller than one patch"):
        run(images(1, 10, 64), False)
    with pytest.raises(ValueError, match="one value per channel"):  # of the pool of one bin
        run(images(1, 64), True)
