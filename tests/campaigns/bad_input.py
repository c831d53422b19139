"""Bad input for every command: what each case must answer.

A case is a command, the exit status, and a phrase of the sentence that it must print. No case may print a
traceback, take longer than its limit, or use more memory than its limit. `test_bad_input` runs them.
"""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable

import image_kinds
import numpy as np
import safetensors.numpy
from campaigns import damage
from PIL import Image
from tiny_runs import student_command

LIMIT_MB = 1500
DIGITS = ("--data=digits", "--data-dir={s}/data")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command with bad input.

    Attributes:
      name: unique, for the report.
      command: words of the command; {s} stands for the case's copy of the scene.
      phrase: what the answer must contain.
      status: the exit status.
      prepare: changes the copy of the scene first.
      megabytes: the most memory that the command may use, above that before it.
    """

    name: str
    command: tuple[str, ...]
    phrase: str
    status: int = 1
    prepare: Callable[[pathlib.Path], object] = lambda folder: None
    megabytes: float = LIMIT_MB


def train(*changes: str) -> tuple[str, ...]:
    """Starts a new run with changed settings."""
    return ("train", *student_command(pathlib.Path("{s}"), "{s}/new"), *changes)


def resume(*changes: str) -> tuple[str, ...]:
    """Resumes the scene's run for another epoch."""
    return ("train", *student_command(pathlib.Path("{s}"), "{s}/student"), "--config.epochs=5", *changes)


def predict(*arguments: str, checkpoint: str = "{s}/student") -> tuple[str, ...]:
    return ("predict", f"--checkpoint={checkpoint}", *arguments)


def convert(
    *arguments: str, checkpoint: str = "{s}/student", out: str = "{s}/out.safetensors"
) -> tuple[str, ...]:
    return ("convert", f"--checkpoint={checkpoint}", f"--out={out}", *arguments)


def annotate(
    *arguments: str, checkpoint: str = "{s}/annotator", data: tuple[str, ...] = DIGITS, out: str = "{s}/m2"
) -> tuple[str, ...]:
    return ("annotate", f"--checkpoint={checkpoint}", *data, f"--out={out}", *arguments)


EVAL = ("eval", "--workdir={s}/student", "--config.data.dir={s}/data")
MAPS = ("maps", "{s}/maps", *DIGITS)
MAPS_RECORD = "maps/score_maps.json"
FOLDER = (
    "train", "--config=lvvit_folder", "--workdir={s}/new", "--config.data.name={s}/images",
    "--config.token_labels=false", "--config.loss.plain_labels=true", "--config.batch_size=8",
    "--config.epochs=1", "--config.image_size=32", "--config.model.options.depth=1",
    "--config.model.options.dim=48", "--config.model.options.num_heads=2",
)  # fmt: skip


def write(name: str, content: bytes) -> Callable[[pathlib.Path], object]:
    """Replaces a file of the scene."""

    def prepare(folder: pathlib.Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return prepare


def edit(name: str, **values) -> Callable[[pathlib.Path], object]:
    """Changes keys of a JSON file of the scene; None removes a key."""

    def prepare(folder: pathlib.Path) -> None:
        record = json.loads((folder / name).read_text())
        for key, value in values.items():
            *sections, last = key.split("__")
            inner = record
            for section in sections:
                inner = inner[int(section) if section.isdigit() else section]
            if value is None:
                del inner[last]
            else:
                inner[last] = value
        (folder / name).write_text(json.dumps(record))

    return prepare


def remove(name: str) -> Callable[[pathlib.Path], object]:
    """Removes a file or folder of the scene."""

    def prepare(folder: pathlib.Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def folder_instead(name: str) -> Callable[[pathlib.Path], object]:
    """Puts a folder where a file of the scene is."""

    def prepare(folder: pathlib.Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return prepare


def tensors(name: str, change: Callable[[dict], object] = lambda _: None) -> Callable[[pathlib.Path], object]:
    """Exports the scene's run as a .safetensors file, with changed tensors."""

    def prepare(folder: pathlib.Path) -> None:
        from tlvit import export, load

        model, info = load(folder / "student")
        export(model, folder / "good.safetensors", info=info)
        arrays = safetensors.numpy.load_file(folder / "good.safetensors")
        metadata = {"tlvit": json.dumps(info.to_json())}
        change(arrays)
        safetensors.numpy.save_file(arrays, folder / name, metadata)

    return prepare


def set_nan(arrays: dict) -> None:
    arrays["head.weight"] = np.full_like(arrays["head.weight"], np.nan)


def set_complex(arrays: dict) -> None:
    arrays["head.weight"] = arrays["head.weight"].astype(np.complex64)


def evil_pickle(folder: pathlib.Path) -> None:
    """A PyTorch file whose unpickling would create a file."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "executed"),)

    with zipfile.ZipFile(folder / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"head.weight": Evil()}, protocol=2))
        archive.writestr("archive/version", "3\n")


def zip_bomb(folder: pathlib.Path) -> None:
    """A small PyTorch file that unpacks to 8 GB."""
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        with archive.open("archive/data/0", "w", force_zip64=True) as file:
            block = bytes(1 << 24)
            for _ in range(512):
                file.write(block)


def safetensors_header(length: int, header: bytes = b"{}") -> bytes:
    """A .safetensors file that says its header has `length` bytes."""
    return struct.pack("<Q", length) + header


def huge_png(folder: pathlib.Path) -> None:
    """A PNG file whose header says 60000x60000 pixels."""
    pixels = np.zeros((1, 1, 3), np.uint8)
    (folder / "huge.png").write_bytes(image_kinds.png(8, 2, pixels, size=(60_000, 60_000)))


def long_png(folder: pathlib.Path) -> None:
    """A valid PNG of 30000x1 pixels."""
    Image.new("RGB", (30_000, 1)).save(folder / "long.png")


def truncated(name: str, source: str = "photo.jpg") -> Callable[[pathlib.Path], object]:
    """Writes the first half of a file of the scene."""

    def prepare(folder: pathlib.Path) -> None:
        content = (folder / source).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return prepare


def fifo(name: str) -> Callable[[pathlib.Path], object]:
    return lambda folder: os.mkfifo(folder / name)


def loop(name: str) -> Callable[[pathlib.Path], object]:
    return lambda folder: (folder / name).symlink_to(folder / name)


def raw_name(folder: pathlib.Path) -> None:
    """A photograph whose name is not UTF-8."""
    os.makedirs(folder / "raw", exist_ok=True)
    shutil.copy(folder / "photo.jpg", os.fsencode(folder / "raw") + b"/\xff\xfe.jpg")


def shard(change: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], object]:
    """Changes the first shard of the score maps."""
    return lambda folder: change(sorted((folder / "maps").glob("maps-*"))[0])


def nan_run(folder: pathlib.Path) -> None:
    """A model folder whose weights are NaN."""
    import jax
    from flax import nnx

    from tlvit import load
    from tlvit.checkpoints.native import save_model_folder

    model, info = load(folder / "student")
    state = jax.tree.map(lambda x: np.full_like(x, np.nan), nnx.state(model, nnx.Param))
    nnx.update(model, state)
    save_model_folder(folder / "nan", model, info)


# A setting of a run, and the answer to it.
SETTINGS = (
    ("optim.learning_rate=-1", "config.optim.learning_rate must be at least 0, not -1.0."),
    ("optim.learning_rate=nan", "config.optim.learning_rate must be a finite number, not nan."),
    ("optim.learning_rate=inf", "config.optim.learning_rate must be a finite number, not inf."),
    ("optim.learning_rate=fast", "config.optim.learning_rate must be a number, not 'fast'."),
    ("optim.learning_rate=1e9", "config.optim.learning_rate must be at most 1000, not 1000000000.0."),
    ("optim.min_lr=1", "config.optim.min_lr is 1, above the peak, config.optim.learning_rate=0.001."),
    ("optim.warmup_lr=-1", "config.optim.warmup_lr must be at least 0, not -1.0."),
    ("optim.weight_decay=inf", "config.optim.weight_decay must be a finite number, not inf."),
    ("optim.weight_decay=-0.1", "config.optim.weight_decay must be at least 0, not -0.1."),
    ("optim.clip_norm=-1", "config.optim.clip_norm must be at least 0, not -1.0."),
    ("optim.warmup_epochs=nan", "config.optim.warmup_epochs must be a finite number, not nan."),
    ("optim.accumulate=0", "config.optim.accumulate must be at least 1, not 0."),
    (
        "optim.accumulate=3",
        "A batch of 16 images cannot be split evenly over 1 device in 3 accumulated parts",
    ),
    ("optim.name=adam", "config.optim.name must be adamw or lamb or sgd or momentum, not 'adam'."),
    ("optim.base_batch_size=0", "config.optim.base_batch_size must be at least 1, not 0."),
    ("optim.schedule_unit=days", "config.optim.schedule_unit must be epoch or step, not 'days'."),
    ("loss.dense_weight=-1", "config.loss.dense_weight must be at least 0, not -1.0."),
    ("loss.dense_weight=nan", "config.loss.dense_weight must be a finite number, not nan."),
    ("loss.label_smoothing=1.5", "config.loss.label_smoothing must be at most 1, not 1.5."),
    ("loss.cls_target=no", "config.loss.cls_target must be annotator or published or documented or label, "),
    ("augment.color_jitter=inf", "config.augment.color_jitter must be a finite number, not inf."),
    ("augment.color_jitter=-1", "config.augment.color_jitter must be at least 0, not -1.0."),
    ("augment.crop_scale=0.5", "config.augment.crop_scale must have 2 values, not 1."),
    (
        "augment.crop_scale=(1.0,0.5)",
        "config.augment.crop_scale must be (low, high) with low <= high, not (1.0, 0.5).",
    ),
    ("augment.hflip=2", "config.augment.hflip must be at most 1, not 2.0."),
    (
        "augment.randaugment=rand-x9",
        "RandAugment policy 'rand-x9' has the piece 'x9'; known are mM, nN, mstdS and i",
    ),
    ("augment.randaugment=m9", "RandAugment policy 'm9' begins with 'm9' instead of 'rand'"),
    ("augment.randaugment_on=gpu", "config.augment.randaugment_on must be host or device, not 'gpu'."),
    ("augment.random_erasing=-0.5", "config.augment.random_erasing must be at least 0, not -0.5."),
    ("augment.mixup=0.8", "config.token_labels excludes mixup (0.8) and cutmix (0): a score map belongs t"),
    ("augment.repeats=0", "config.augment.repeats must be at least 1, not 0."),
    (
        "augment.interpolation=nearest",
        "config.augment.interpolation must be bilinear or bicubic or random, not 'neare",
    ),
    ("distill.tau=0", "config.distill.tau must be above 0, not 0.0."),
    ("distill.alpha=2", "config.distill.alpha must be at most 1, not 2.0."),
    (
        "distill.teacher=/nowhere",
        "config.distill.teacher and config.token_labels are two recipes: choose one of ",
    ),
    ("ema.decay=1.0", "config.ema.decay must be below 1, not 1.0."),
    ("ema.decay=-1", "config.ema.decay must be at least 0, not -1.0."),
    ("eval.batch_size=1000000", "config.eval.batch_size must be at most 131072, not 1000000."),
    ("eval.crop_pct=2", "config.eval.crop_pct must be at most 1, not 2.0."),
    ("eval.interpolation=best", "config.eval.interpolation must be auto or bilinear or bicubic, not 'best'."),
    ("checkpoint.keep=0", "config.checkpoint.keep must be at least 1, not 0."),
    ("mesh.data=0", "config.mesh: data 0 x fsdp 1 x model 1: sizes are at least 1, and one of"),
    ("mesh.data=100", "config.mesh: data 100 = 100 devices, but there are 1."),
    ("mesh.fsdp=2", "config.mesh: data 1 x fsdp 2 = 2 devices, but there are 1."),
    ("mesh.heartbeat_timeout=1", "config.mesh.heartbeat_timeout must be at least 10, not 1."),
    (
        "data.name=no_such_data",
        "TFDS does not know a data set 'no_such_data', data has none, and there is no folder",
    ),
    ("data.name=/nowhere", "There is no folder /nowhere."),
    ("data.dir=/nowhere", "There are no digit scenes in /nowhere/digit_scenes. Prepare them once: tlvit.d"),
    (
        "data.train_split=training",
        "digits has no split 'training', only ['test', 'train']: Unknown split 'trainin",
    ),
    (
        "data.train_split=train[:",
        "digits has no split 'train[:', only ['test', 'train']: Error parsing split 'tr",
    ),
    (
        "data.eval_split=score_maps",
        "digits has no split 'score_maps', only ['test', 'train']: Unknown split 'score",
    ),
    (
        "data.train_split=train[:0%]",
        "Split 'train[:0%]' of digits in data/digit_scenes/s48_train64_test40_seed0",
    ),
    ("data.threads=100000", "config.data.threads must be at most 1024, not 100000."),
    ("data.threads=-1", "config.data.threads must be at least 0, not -1."),
    ("data.shuffle_gib=inf", "config.data.shuffle_gib must be a finite number, not inf."),
    ("data.shuffle_gib=-1", "config.data.shuffle_gib must be at least 0, not -1.0."),
    ("data.shuffle_gib=lots", "config.data.shuffle_gib must be a number, not 'lots'."),
    ("data.max_corrupt=2", "config.data.max_corrupt must be at most 1, not 2.0."),
    ("data.max_missing_maps=-0.5", "config.data.max_missing_maps must be at least 0, not -0.5."),
    ("data.exif=maybe", "config.data.exif must be auto or apply or ignore, not 'maybe'."),
    ("data.label_crop=left", "config.data.label_crop must be aligned or published, not 'left'."),
    ("data.score_maps=/nowhere", "/nowhere is not a folder of score maps (no score_maps.json)."),
    ("data.score_maps=", "config.token_labels is on, but config.data.score_maps is empty. Make score map"),
    ("seed=-1", "config.seed must be at least 0, not -1."),
    ("seed=1180591620717411303424", "config.seed must be at most 4294967295, not 1180591620717411303424."),
    ("seed=1.5", "config.seed must be an integer, not 1.5."),
    ("batch_size=0", "config.batch_size must be at least 1, not 0."),
    ("batch_size=-4", "config.batch_size must be at least 1, not -4."),
    ("batch_size=65", "The 64 training images are fewer than a batch of 65."),
    ("batch_size=4.5", "config.batch_size must be an integer, not 4.5."),
    ("batch_size=100000000", "config.batch_size must be at most 131072, not 100000000."),
    ("epochs=0", "config.epochs must be at least 1, not 0."),
    ("epochs=-1", "config.epochs must be at least 1, not -1."),
    ("epochs=1000000000", "config.epochs must be at most 100000, not 1000000000."),
    ("epochs=many", "config.epochs must be an integer, not 'many'."),
    ("cooldown_epochs=-1", "config.cooldown_epochs must be at least 0, not -1."),
    ("image_size=50", "Image size 50x50 is not a multiple of the patch size 8."),
    ("image_size=0", "An image size is one number or HEIGHTxWIDTH, not '0'."),
    ("image_size=80000", "An image size is at most 4096 pixels, not 80000."),
    ("image_size=abc", "An image size is one number or HEIGHTxWIDTH, not 'abc'."),
    ("image_size=(48,48,48)", "An image size is one number or HEIGHTxWIDTH, not '48x48x48'."),
    ("log_every=0", "config.log_every must be at least 1, not 0."),
    ("token_labels=maybe", "config.token_labels must be true or false, not 'maybe'."),
    ("model.name=lvvit_x", "Unknown model 'lvvit_x'; did you mean lvvit_t or lvvit_s or lvvit_m?"),
    ("model.name=", "Unknown model ''; known: deit_base_distilled_patch16_224, deit_base_distilled_"),
    ("model.dtype=float16", "config.model.dtype must be float32 or bfloat16, not 'float16'."),
    ("model.options.depth=-1", "depth must be from 0 to 1000, not -1."),
    ("model.options.depht=2", "lvvit_s has no option 'depht'; did you mean depth?"),
    ("model.options.depth=two", "depth must be an integer, not 'two'."),
    ("model.options.dim=47", "Width 47 cannot be split over 4 heads."),
    ("model.options.num_heads=0", "num_heads must be from 1 to 1024, not 0."),
    ("model.options.drop_path=2", "drop_path must be in [0, 1), not 2.0."),
    ("model.options.mlp_ratio=-1", "mlp_ratio must be above 0 and at most 100, not -1.0."),
    ("model.options.patch_size=0", "patch_size must be from 1 to 1024, not 0."),
    ("model.options.rule=best", "rule must be one of max, mean, class, not 'best'."),
    ("model.init_from=/nowhere", "/nowhere does not exist."),
    ("optim.lr=1", "config.optim.lr is not a setting; did you mean config.optim.learning_rate?"),
    ("epoch=2", "config.epoch is not a setting; did you mean config.epochs?"),
    ("data.nmae=x", "config.data.nmae is not a setting; did you mean config.data.name?"),
    ("data=x", "config.data is a section; its settings are data.name, data.dir, data.train_spl"),
    ("model.options=x", "Options of the model are set one by one: --config.model.options.NAME=VALUE."),
)

# What a file of JSON holds in place of a record, and the answer.
NOT_RECORDS = {
    "is empty": (b"", "is empty."),
    "is cut": (b'{"epochs": ', "is not valid JSON: Expecting value at line 1, column 12."),
    "is a list": (b"[]", "must hold a JSON object, not []."),
    "is a number": (b"3", "must hold a JSON object, not 3."),
    "is null": (b"null", "must hold a JSON object, not null."),
    "is not UTF-8": (b"\xff\xfe{", "is not UTF-8 text: byte 0 is invalid."),
    "is deep": (b"[" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
}
# What is wrong in a config.json, the changed keys, and the answer of an evaluation. Training has the settings
# of its command.
WRONG_SETTINGS = {
    "has an unknown key": (
        {"optim__lr": 1},
        "config.json: config.optim.lr is not a setting; did you mean config.optim.",
    ),
    "has epochs as text": ({"epochs": "x"}, "config.json: config.epochs must be an integer, not 'x'."),
    "has a section as number": (
        {"optim": 3},
        "config.json: config.optim must be a section of settings, not 3.",
    ),
    "has a NaN": (
        {"optim__learning_rate": float("nan")},
        "config.json: config.optim.learning_rate must be a finite",
    ),
    "has other data": ({"data__name": "nothing"}, "TFDS does not know a data set 'nothing'"),
}
CHANGED = " was changed after it was written: its checksum is wrong. Restore the file, or write the"
WRONG_MAPS = {
    "has no shards": ({"shards": None}, CHANGED),
    "has an unknown key": (
        {"colour": 1},
        ": colour is an unknown key; known: annotator, annotator_hash, top_k,",
    ),
    "has another grid": ({"grid": [6, 24]}, CHANGED),
    "has a grid of text": ({"grid": "12"}, ": grid must be a list, not '12'."),
    "has an unknown geometry": ({"geometry": "bogus"}, ": geometry must be full or center, not 'bogus'."),
    "has center_share NaN": (
        {"center_fraction": float("nan")},
        ": center_fraction must be a finite number, not nan.",
    ),
    "has center_share 0": ({"center_fraction": 0}, ": center_fraction must be in (0, 1], not 0.0."),
    "has top_k 4": ({"top_k": 4}, CHANGED),
    "has top_k 0": ({"top_k": 0}, ": top_k must be between 1 and the number of classes, 10, not 0."),
    "has 11 classes": ({"num_classes": 11}, CHANGED),
    "has other data": ({"dataset": "mnist:train"}, CHANGED),
    "counts other images": ({"num_images": 63}, ": num_images is 63, but the shards have 64 records."),
    "has a shard with a path": ({"shards__0__file": "../../etc/passwd"}, ": "),
}
NOT_METRICS = {"empty": b"", "cut": b'{"epoch": 1', "a list": b"[]", "binary": b"\x00\xff"}
IS_NO_CHECKPOINT = " is not a PyTorch checkpoint or safetensors file."
NOT_WEIGHTS = (
    ("a.safetensors", "that is empty", b"", "(0 bytes, the first are b'')" + IS_NO_CHECKPOINT),
    ("a.safetensors", "that is text", b"hello", "(5 bytes, the first are b'hello')" + IS_NO_CHECKPOINT),
    ("a.safetensors", "with a huge header", safetensors_header(1 << 60), "(10 bytes, the first are "),
    (
        "a.safetensors",
        "with a cut header",
        safetensors_header(100),
        "is truncated or not a safetensors file: ",
    ),
    (
        "a.safetensors",
        "with a header that is no JSON",
        safetensors_header(2, b"xx"),
        "(10 bytes, the first are ",
    ),
    ("a.safetensors", "without tensors", safetensors_header(2), "has no tensors."),
    ("a.pth", "that is empty", b"", "(0 bytes, the first are b'')" + IS_NO_CHECKPOINT),
    ("a.pth", "that is text", b"hello", "(5 bytes, the first are b'hello')" + IS_NO_CHECKPOINT),
    ("a.pth", "that is a pickle of a number", pickle.dumps(3), "is truncated or not a PyTorch checkpoint: "),
    ("a.pth", "that is a cut pickle", b"\x80\x02}", "is truncated or not a PyTorch checkpoint: EOFError"),
    ("a.pth", "that is an empty zip", b"PK\x05\x06" + bytes(18), "(22 bytes, the first are b'PK"),
)
# A flag, and the answer to it: the command is not started.
PREDICT_FLAGS = {
    "--top=0": "argument --top: must be an integer from 1 to 1000000, not '0'",
    "--top=-3": "argument --top: must be an integer from 1 to 1000000, not '-3'",
    "--top=many": "argument --top: must be an integer from 1 to 1000000, not 'many'",
    "--batch-size=0": "argument --batch-size: must be an integer from 1 to 131072, not '0'",
    "--batch-size=-1": "argument --batch-size: must be an integer from 1 to 131072, not '-1'",
    "--batch-size=1e9": "argument --batch-size: must be an integer from 1 to 131072, not '1e9'",
    "--weights=best": "argument --weights: invalid choice: 'best' (choose from 'auto', 'ema', 'raw')",
    "--exif=maybe": "argument --exif: invalid choice: 'maybe' (choose from 'apply', 'ignore')",
    "--nothing": "unrecognized arguments: --nothing",
}
CONVERT_FLAGS = {
    "--num-classes=0": "argument --num-classes: must be an integer from 1 to 1000000, not '0'",
    "--num-classes=-3": "argument --num-classes: must be an integer from 1 to 1000000, not '-3'",
    "--image-size=80000": "argument --image-size: An image size is at most 4096 pixels, not 80000.",
    "--image-size=abc": "argument --image-size: An image size is one number or HEIGHTxWIDTH, not 'abc'.",
    "--image-size=0": "argument --image-size: An image size is one number or HEIGHTxWIDTH, not '0'.",
    "--option=depth": "argument --option: 'depth' is not NAME=VALUE, such as depth=12",
    "--heads=none": "argument --heads: invalid choice: 'none' (choose from 'keep', 'drop')",
    "--weights=best": "argument --weights: invalid choice: 'best' (choose from 'auto', 'ema', 'raw')",
}
ANNOTATE_FLAGS = {
    "--top-k=0": "argument --top-k: must be an integer from 1 to 65535, not '0'",
    "--top-k=-1": "argument --top-k: must be an integer from 1 to 65535, not '-1'",
    "--top-k=100000": "argument --top-k: must be an integer from 1 to 65535, not '100000'",
    "--batch-size=0": "argument --batch-size: must be an integer from 1 to 131072, not '0'",
    "--batch-size=many": "argument --batch-size: must be an integer from 1 to 131072, not 'many'",
    "--threads=-1": "argument --threads: must be an integer from 0 to 1024, not '-1'",
    "--threads=100000": "argument --threads: must be an integer from 0 to 1024, not '100000'",
    "--max-missing=2": "argument --max-missing: must be a number from 0 to 1, not '2'",
    "--image-size=abc": "argument --image-size: An image size is one number or HEIGHTxWIDTH, not 'abc'.",
    "--exif=maybe": "argument --exif: invalid choice: 'maybe' (choose from 'auto', 'apply', 'ignore')",
    "--crop-grid=2": "argument --crop-grid: must be ROWSxCOLUMNS, such as 2x3, not '2'",
    "--crop-grid=65x1": "argument --crop-grid: crop_grid must be (rows, columns), each from 1 to 64, not",
    "--logits=soft": "argument --logits: invalid choice: 'soft' (choose from 'auto', 'raw', 'shifted')",
    "--geometry=left": "argument --geometry: invalid choice: 'left' (choose from 'auto', 'full', 'center')",
    "--annotator=timm:resnet18": "argument --annotator: not allowed with argument --checkpoint",
}
SUMMARY_FLAGS = {
    "--num-classes=0": "argument --num-classes: must be an integer from 1 to 1000000, not '0'",
    "--image-size=100000": "argument --image-size: An image size is at most 4096 pixels, not 100000.",
    "--image-size=abc": "argument --image-size: An image size is one number or HEIGHTxWIDTH, not 'abc'.",
}

CASES = (
    *(Case(f"train --config.{text}", train(f"--config.{text}"), phrase) for text, phrase in SETTINGS),
    # flags of train
    Case(
        "train with an odd batch and MixToken",
        train("--config.batch_size=17", "--config.loss.mixtoken=true"),
        "A batch of 17 images over 1 device is 17 for each: MixToken, mixup and cutmix",
    ),
    Case("train without anything", ("train",), "--workdir is missing"),
    Case("train without workdir", ("train", "--config=digits"), "--workdir is missing"),
    Case(
        "train with an unknown recipe",
        ("train", "--config=digitz", "--workdir={s}/new"),
        "'digitz' is not a shipped recipe or a .py file; recipes: deit, deit3, digits, digits_se",
    ),
    Case(
        "train with an unknown variant",
        ("train", "--config=digits:x", "--workdir={s}/new"),
        "digits:x is not a variant of digits; choose one of token_labels, no_token_labels, relabel, ",
    ),
    Case(
        "train with a recipe that is missing",
        ("train", "--config=nothing.py", "--workdir={s}/new"),
        "The recipe file nothing.py does not exist; shipped recipes: deit, deit3, digits, ",
    ),
    Case(
        "train with a recipe that is a folder",
        ("train", "--config={s}/student", "--workdir={s}/new"),
        "'student' is not a shipped recipe or a .py file; recipes: deit, deit3, digits, ",
    ),
    Case(
        "train with a recipe of wrong syntax",
        ("train", "--config={s}/r.py", "--workdir={s}/new"),
        "r.py, line 1: SyntaxError: invalid syntax",
        prepare=write("r.py", b"def get_config(:\n"),
    ),
    Case(
        "train with a recipe without get_config",
        ("train", "--config={s}/r.py", "--workdir={s}/new"),
        "r.py is not a recipe: it has no function get_config().",
        prepare=write("r.py", b"x = 1\n"),
    ),
    Case(
        "train with a recipe that returns nothing",
        ("train", "--config={s}/r.py", "--workdir={s}/new"),
        "get_config() of r.py must return settings, made by tlvit.config.default().",
        prepare=write("r.py", b"def get_config():\n    pass\n"),
    ),
    Case(
        "train with a recipe that raises",
        ("train", "--config={s}/r.py", "--workdir={s}/new"),
        "r.py, line 2: KeyError: 'x'",
        prepare=write("r.py", b"def get_config():\n    return {}['x']\n"),
    ),
    Case(
        "train with a recipe that imports what is missing",
        ("train", "--config={s}/r.py", "--workdir={s}/new"),
        "r.py, line 1: ModuleNotFoundError: No module named 'no_such_module'",
        prepare=write("r.py", b"import no_such_module\n"),
    ),
    Case(
        "train with a recipe with an unknown setting",
        ("train", "--config={s}/r.py", "--workdir={s}/new"),
        "config.optim.lr is not a setting; did you mean config.optim.learning_rate?",
        prepare=write(
            "r.py",
            b"from tlvit.config import default\n"
            b"def get_config():\n  config = default()\n  config.optim.lr = 1\n  return config\n",
        ),
    ),
    Case(
        "train with a recipe of zero bytes",
        ("train", "--config={s}/r.py", "--workdir={s}/new"),
        "r.py, line 1: SyntaxError: source code string cannot contain null bytes",
        prepare=write("r.py", b"\0\0"),
    ),
    Case(
        "train with an unknown flag",
        train("--confg=x"),
        "unknown flag --confg; did you mean --config? (--help shows examples and all flags)",
    ),
    Case("train with a word", train("more"), "unknown arguments: more (--help shows examples and all flags)"),
    Case(
        "train with an unknown mode",
        train("--mode=test"),
        "flag --mode=test: value should be one of <train|eval>.",
    ),
    Case(
        "train with --checkpoint",
        train("--checkpoint=x"),
        "--checkpoint needs --mode=eval; to start training from weights: --config.model.init_from=P",
    ),
    Case(
        "train with --profile=10",
        train("--profile=10"),
        "--profile is START:STEPS, for example 100:5, not '10'.",
    ),
    Case(
        "train with a tracker that is missing",
        train("--writer={s}/w.py"),
        "The file w.py of --writer does not exist.",
    ),
    Case(
        "train with a tracker without make_writer",
        train("--writer={s}/w.py"),
        "w.py has no function make_writer(workdir, config).",
        prepare=write("w.py", b"x = 1\n"),
    ),
    Case("an unknown command", ("trian",), "tlvit has no command 'trian'", status=2),
    # workdir
    Case("a workdir that is a file", train("--workdir={s}/photo.jpg"), "photo.jpg is a file, not a folder."),
    Case(
        "a workdir below a file",
        train("--workdir={s}/photo.jpg/w"),
        "photo.jpg/w cannot be written: photo.jpg is not a folder.",
    ),
    Case(
        "a workdir that is a broken link",
        train(),
        "The workdir new is not a folder.",
        prepare=lambda folder: (folder / "new").symlink_to("/proc/none/w"),
    ),
    Case(
        "a workdir in /proc",
        train("--workdir=/proc/tlvit"),
        "/proc/tlvit cannot be written: no such file or directory.",
    ),
    Case(
        "a workdir with a bucket that does not exist in a scheme that does not exist",
        train("--workdir=abc://bucket/w"),
        "abc://bucket/w cannot be opened: TensorFlow reads gs:// and local files, not abc:",
    ),
    *(
        Case(
            f"{name} of the workdir is a folder",
            resume(),
            f"{name} is a folder, but a run writes this file: rename",
            prepare=folder_instead(f"student/{name}"),
        )
        for name in ("metrics.jsonl", "classes.txt", "config.json", "log.txt", "lock.json")
    ),
    Case(
        "checkpoints is a file",
        train(),
        "new/checkpoints is a file, but a run needs this folder: rename it.",
        prepare=write("new/checkpoints", b""),
    ),
    Case(
        "the workdir of another model",
        resume("--config.model.options.depth=2"),
        "student holds another run. Use a new --workdir, or its settings:",
    ),
    Case(
        "the workdir of another seed",
        resume("--config.seed=9"),
        "student holds another run. Use a new --workdir, or its settings:",
    ),
    Case(
        "the workdir of another batch size",
        resume("--config.batch_size=32"),
        "student holds another run. Use a new --workdir, or its settings:",
    ),
    Case(
        "fewer epochs than trained",
        resume("--config.epochs=1"),
        "this run is complete: 16 of 4 steps",
        status=0,
    ),
    *(
        Case(
            f"train with config.json that {what}",
            resume(),
            "resumed at step 16",
            status=0,
            prepare=write("student/config.json", content),
        )
        for what, (content, _) in NOT_RECORDS.items()
    ),
    *(
        Case(
            f"eval with config.json that {what}",
            EVAL,
            f"config.json {answer}",
            prepare=write("student/config.json", content),
        )
        for what, (content, answer) in NOT_RECORDS.items()
    ),
    *(
        Case(
            f"train with config.json that {what}",
            resume(),
            "resumed at step 16",
            status=0,
            prepare=edit("student/config.json", **values),
        )
        for what, (values, _) in WRONG_SETTINGS.items()
    ),
    *(
        Case(
            f"eval with config.json that {what}", EVAL, answer, prepare=edit("student/config.json", **values)
        )
        for what, (values, answer) in WRONG_SETTINGS.items()
    ),
    Case(
        "config.json is missing",
        resume("--config.seed=9"),
        "student holds another run. Use a new --workdir, or its settings:",
        prepare=remove("student/config.json"),
    ),
    *(
        Case(
            f"classes.txt is {what}",
            resume(),
            "resumed at step 16",
            status=0,
            prepare=write("student/classes.txt", content),
        )
        for what, content in {"empty": b"", "not UTF-8": b"\xff\n", "short": b"a\nb\n"}.items()
    ),
    *(
        Case(
            f"train with a last checkpoint whose record is {what}",
            resume(),
            "16/metrics/metrics is damaged: its checksum differs",
            status=0,
            prepare=write("student/checkpoints/16/metrics/metrics", content),
        )
        for what, content in NOT_METRICS.items()
    ),
    *(
        Case(
            f"predict with a last checkpoint whose record is {what}",
            predict("{s}/photo.jpg"),
            "16/metrics/metrics is damaged: its checksum differs",
            status=0,
            prepare=write("student/checkpoints/16/metrics/metrics", content),
        )
        for what, content in NOT_METRICS.items()
    ),
    Case(
        "all checkpoints without state",
        resume(),
        "None of the checkpoints of steps [8, 12, 16] can be read: student/checkpoints/8/state/_METADATA is",
        prepare=lambda folder: [shutil.rmtree(p) for p in (folder / "student/checkpoints").glob("*/state")],
    ),
    Case(
        "predict with checkpoints without state",
        predict("{s}/photo.jpg"),
        "The checkpoint of step 16 in student cannot be read: student/checkpoints/16/state/_METADATA is",
        prepare=lambda folder: [shutil.rmtree(p) for p in (folder / "student/checkpoints").glob("*/state")],
    ),
    Case(
        "predict with an empty checkpoints folder",
        predict("{s}/photo.jpg"),
        "student has no checkpoint.",
        prepare=lambda folder: [shutil.rmtree(p) for p in (folder / "student/checkpoints").glob("[0-9]*")],
    ),
    # eval
    Case("eval without a workdir", ("eval",), "--workdir is missing, or --checkpoint"),
    Case(
        "eval of an empty workdir",
        ("eval", "--workdir={s}/empty"),
        "--config is missing, and empty has no config.json: give a recipe, such as deit,",
        prepare=lambda folder: (folder / "empty").mkdir(),
    ),
    Case("eval of a missing workdir", ("eval", "--workdir={s}/nothing"), "nothing does not exist."),
    Case(
        "eval with a missing checkpoint",
        ("eval", "--config=digits", "--checkpoint={s}/nothing"),
        "nothing does not exist.",
    ),
    Case(
        "eval with other data",
        ("eval", "--workdir={s}/student", "--config.data.name={s}/images"),
        "images has no folder 'test'; it has ['train', 'val']. A part of a split is written as 'tra",
    ),
    Case(
        "eval with unknown weights",
        (*EVAL, "--weights=best"),
        "flag --weights=best: value should be one of <auto|ema|raw>.",
    ),
    Case(
        "eval of a huge batch",
        (*EVAL, "--config.eval.batch_size=1000000"),
        "config.eval.batch_size must be at most 131072, not 1000000.",
    ),
    Case(
        "eval without the data",
        EVAL,
        "There are no digit scenes in data/digit_scenes.",
        prepare=remove("data"),
    ),
    Case(
        "eval of a file",
        ("eval", "--config=digits", "--checkpoint={s}/photo.jpg"),
        "photo.jpg (12240 bytes, the first are b'\\xff\\xd8\\xff\\xe0\\x00\\x10JFI') is not a PyTorch che",
    ),
    Case(
        "eval of NaN weights",
        ("eval", "--config=digits", "--checkpoint={s}/nan", "--config.data.dir={s}/data"),
        "nan is not usable: 10 of 10 values of aux_head/bias, 480 of 480 values of aux_head/kernel,",
        prepare=nan_run,
    ),
    # score maps
    *(
        Case(
            f"train with score_maps.json that {what}",
            train(),
            f"score_maps.json {answer}",
            prepare=write(MAPS_RECORD, content),
        )
        for what, (content, answer) in NOT_RECORDS.items()
    ),
    *(
        Case(
            f"{command[0]} with score_maps.json that {what}",
            command,
            f"score_maps.json{answer}",
            prepare=edit(MAPS_RECORD, **values),
        )
        for what, (values, answer) in WRONG_MAPS.items()
        for command in (train(), MAPS)
    ),
    Case(
        "train with a missing shard of maps",
        train(),
        "score-map shard maps/maps-00000-of-00004.tfrecord is missing",
        prepare=shard(lambda p: p.unlink()),
    ),
    Case(
        "train with an empty shard of maps",
        train(),
        "score-map shard maps/maps-00000-of-00004.tfrecord is damaged: it has 0 bytes instead of 47",
        prepare=shard(lambda p: p.write_bytes(b"")),
    ),
    Case(
        "train with half a shard of maps",
        train(),
        "score-map shard maps/maps-00000-of-00004.tfrecord is damaged: it has 2000 bytes instead of",
        prepare=shard(lambda p: p.write_bytes(p.read_bytes()[:2000])),
    ),
    Case(
        "train with a zeroed shard of maps",
        train(),
        "score-map shard maps/maps-00000-of-00004.tfrecord is damaged: corrupted record at 0",
        prepare=shard(lambda p: p.write_bytes(bytes(p.stat().st_size))),
    ),
    Case(
        "train with a flipped bit in a shard of maps",
        train("--config.epochs=3"),
        "score-map shard maps/maps-00000-of-00004.tfrecord is damaged: corrupted record at ",
        prepare=shard(damage.flip),
    ),
    Case(
        "maps with a flipped bit in a shard",
        MAPS,
        "score-map shard maps/maps-00000-of-00004.tfrecord is damaged: corrupted record at ",
        prepare=shard(damage.flip),
    ),
    Case(
        "maps with a missing shard",
        MAPS,
        "score-map shard maps/maps-00000-of-00004.tfrecord is missing",
        prepare=shard(lambda p: p.unlink()),
    ),
    Case(
        "maps of a missing folder",
        ("maps", "{s}/nothing"),
        "nothing is not a folder of score maps (no score_maps.json).",
    ),
    Case(
        "maps of an unfinished folder",
        MAPS,
        "maps is not finished: run the annotation again, it continues (no score_maps.json).",
        prepare=lambda folder: (folder / MAPS_RECORD).rename(folder / "maps/score_maps.started.json"),
    ),
    Case(
        "maps of a run",
        ("maps", "{s}/student"),
        "student is not a folder of score maps (no score_maps.json).",
    ),
    Case(
        "maps of other data",
        ("maps", "{s}/maps", "--data={s}/images"),
        "The score maps in maps have 10 classes, class_folders/16-images-ba86537bb201:train has 2.",
    ),
    Case(
        "maps import without data",
        ("maps", "{s}/m3", "--import-published={s}/images"),
        "--import-published needs --data",
        status=2,
    ),
    Case(
        "maps import of a folder without files",
        ("maps", "{s}/m3", "--import-published={s}/images", "--data=digits", "--data-dir={s}/data"),
        "There are no .pt files in images.",
    ),
    Case(
        "maps with --max-missing=2",
        (*MAPS, "--max-missing=2"),
        "argument --max-missing: must be a number from 0 to 1, not '2'",
        status=2,
    ),
    Case(
        "maps with --threads=-1",
        (*MAPS, "--threads=-1"),
        "argument --threads: must be an integer from 0 to 1024, not '-1'",
        status=2,
    ),
    # predict: images
    Case(
        "predict a missing image",
        predict("{s}/nothing.jpg"),
        "nothing.jpg: skipped, No such file or directory",
    ),
    Case("predict a pattern without matches", predict("{s}/*.gif"), "No images in *.gif."),
    Case(
        "predict an empty folder",
        predict("{s}/empty"),
        "No images in empty.",
        prepare=lambda folder: (folder / "empty").mkdir(),
    ),
    Case(
        "predict an empty file",
        predict("{s}/e.jpg"),
        "e.jpg: skipped, the file is empty",
        prepare=write("e.jpg", b""),
    ),
    Case(
        "predict text",
        predict("{s}/e.jpg"),
        "e.jpg: skipped, it is not a JPEG, PNG, BMP, GIF, WEBP, TIFF or PPM image",
        prepare=write("e.jpg", b"hello"),
    ),
    Case(
        "predict half a JPEG",
        predict("{s}/e.jpg"),
        "e.jpg: skipped, image file is truncated (39 bytes not processed)",
        prepare=truncated("e.jpg"),
    ),
    Case(
        "predict an SVG",
        predict("{s}/e.svg"),
        "e.svg: skipped, it is not a JPEG, PNG, BMP, GIF, WEBP, TIFF or PPM image",
        prepare=write("e.svg", b"<svg/>"),
    ),
    Case(
        "predict a huge PNG",
        predict("{s}/huge.png"),
        "huge.png: skipped, Image size (3600000000 pixels) exceeds limit of 178956970 pixels",
        prepare=huge_png,
    ),
    Case("predict a long PNG", predict("{s}/long.png"), "long.png\n   ", status=0, prepare=long_png),
    Case(
        "predict a pipe",
        predict("{s}/p.jpg"),
        "p.jpg: skipped, it is not a regular file",
        prepare=fifo("p.jpg"),
    ),
    Case(
        "predict a link to itself",
        predict("{s}/l.jpg"),
        "l.jpg: skipped, Too many levels of symbolic links",
        prepare=loop("l.jpg"),
    ),
    Case(
        "predict a name that is not UTF-8",
        predict("{s}/raw"),
        "raw/\\xff\\xfe.jpg",
        status=0,
        prepare=raw_name,
    ),
    Case(
        "predict a good and a bad image",
        predict("{s}/photo.jpg", "{s}/e.jpg"),
        "e.jpg: skipped, it is not a JPEG, PNG, BMP, GIF, WEBP, TIFF or PPM image",
        status=0,
        prepare=write("e.jpg", b"hello"),
    ),
    Case(
        "predict a folder named like an image",
        predict("{s}/d.jpg"),
        "No images in d.jpg.",
        prepare=lambda folder: (folder / "d.jpg").mkdir(),
    ),
    # predict: flags
    *(
        Case(f"predict {flag}", predict("{s}/photo.jpg", flag), answer, status=2)
        for flag, answer in PREDICT_FLAGS.items()
    ),
    Case("predict --top=100", predict("{s}/photo.jpg", "--top=100"), "photo.jpg\n   ", status=0),
    Case(
        "predict --tokens in a missing folder",
        predict("{s}/photo.jpg", "--tokens={s}/none/t.png"),
        "tokens drawn in none/t.png",
        status=0,
    ),
    Case(
        "predict --tokens of another ending",
        predict("{s}/photo.jpg", "--tokens={s}/t.xyz"),
        "Drawings are written as .png or .jpg or .jpeg or .webp, not as t.xyz.",
    ),
    Case(
        "predict --classes of a missing file",
        predict("{s}/photo.jpg", "--classes={s}/none.txt"),
        "none.txt does not exist.",
    ),
    Case(
        "predict --classes of too few names",
        predict("{s}/photo.jpg", "--classes={s}/c.txt"),
        "c.txt has 2 class names for 10 classes.",
        prepare=write("c.txt", b"a\nb\n"),
    ),
    Case(
        "predict --classes of an empty file",
        predict("{s}/photo.jpg", "--classes={s}/c.txt"),
        "c.txt has no class names; it needs one a line.",
        prepare=write("c.txt", b"\n"),
    ),
    Case(
        "predict --classes of a folder",
        predict("{s}/photo.jpg", "--classes={s}/student"),
        "student is a folder, not a file of class names.",
    ),
    Case(
        "predict without images",
        ("predict", "--checkpoint={s}/student"),
        "the following arguments are required: IMAGE",
        status=2,
    ),
    Case(
        "predict --model of another family",
        predict("{s}/photo.jpg", "--model=deit_tiny_patch16_224", checkpoint="{s}/good.safetensors"),
        "good.safetensors holds a lvvit_s, not a deit_tiny_patch16_224.",
        prepare=tensors("x.safetensors"),
    ),
    Case(
        "predict --model that does not exist",
        predict("{s}/photo.jpg", "--model=lvvit_x", checkpoint="{s}/good.safetensors"),
        "Unknown model 'lvvit_x'; did you mean lvvit_t or lvvit_s or lvvit_m?",
        prepare=tensors("x.safetensors"),
    ),
    # checkpoints
    *(
        Case(
            f"predict with a {name[1:]} file {what}",
            predict("{s}/photo.jpg", checkpoint="{s}/" + name),
            f"{name} {answer}",
            prepare=write(name, content),
        )
        for name, what, content, answer in NOT_WEIGHTS
    ),
    Case(
        "predict with a pickle that runs code",
        predict("{s}/photo.jpg", checkpoint="{s}/evil.pth"),
        "evil.pth is refused: it asks for posix.mkdir. Nothing in it was executed. If you made this",
        prepare=evil_pickle,
    ),
    Case(
        "predict with a zip bomb",
        predict("{s}/photo.jpg", checkpoint="{s}/bomb.pth"),
        "bomb.pth is refused: its 8,349,279 bytes unpack to 8,589,934,598. PyTorch does not compres",
        prepare=zip_bomb,
    ),
    Case(
        "predict with NaN weights",
        predict("{s}/photo.jpg", checkpoint="{s}/a.safetensors"),
        "a.safetensors is not usable: 480 of 480 values of head.weight are NaN or infinite. Its tra",
        prepare=tensors("a.safetensors", set_nan),
    ),
    Case(
        "predict with complex weights",
        predict("{s}/photo.jpg", checkpoint="{s}/a.safetensors"),
        "a.safetensors: head.weight cannot become float32: is of type complex64",
        prepare=tensors("a.safetensors", set_complex),
    ),
    Case(
        "predict with a missing tensor",
        predict("{s}/photo.jpg", checkpoint="{s}/a.safetensors"),
        "a.safetensors, a lvvit_s: 1 tensors do not fit this LVViT:",
        prepare=tensors("a.safetensors", lambda a: a.pop("head.weight")),
    ),
    Case(
        "predict with an extra tensor",
        predict("{s}/photo.jpg", checkpoint="{s}/a.safetensors"),
        "a.safetensors, a lvvit_s: 1 tensors do not fit this LVViT:",
        prepare=tensors("a.safetensors", lambda a: a.update(extra=np.zeros(3, np.float32))),
    ),
    Case(
        "predict with a tensor of another shape",
        predict("{s}/photo.jpg", checkpoint="{s}/a.safetensors"),
        "a.safetensors, a lvvit_s: 1 tensors do not fit this LVViT:",
        prepare=tensors("a.safetensors", lambda a: a.update({"norm.weight": np.zeros(7, np.float32)})),
    ),
    Case(
        "predict with integer weights",
        predict("{s}/photo.jpg", checkpoint="{s}/a.safetensors"),
        "photo.jpg\n   ",
        status=0,
        prepare=tensors(
            "a.safetensors", lambda a: a.update({"head.weight": a["head.weight"].astype(np.int32)})
        ),
    ),
    Case(
        "predict with half a safetensors file",
        predict("{s}/photo.jpg", checkpoint="{s}/a.safetensors"),
        "a.safetensors is truncated or not a safetensors file: Error while deserializing header: in",
        prepare=lambda folder: (
            tensors("x.safetensors")(folder),
            truncated("a.safetensors", "good.safetensors")(folder),
        ),
    ),
    Case(
        "predict with a flipped bit in safetensors",
        predict("{s}/photo.jpg", checkpoint="{s}/good.safetensors"),
        "good.safetensors is damaged or was changed: its tensors and its record do not have the SHA",
        prepare=lambda folder: (tensors("x.safetensors")(folder), damage.flip(folder / "good.safetensors")),
    ),
    Case(
        "predict with a missing checkpoint",
        predict("{s}/photo.jpg", checkpoint="{s}/nothing"),
        "nothing does not exist.",
    ),
    Case(
        "predict with a folder of images as checkpoint",
        predict("{s}/photo.jpg", checkpoint="{s}/images"),
        "images is not a tlvit model folder (model/ and info/ expected).",
    ),
    Case(
        "predict with an image as checkpoint",
        predict("{s}/photo.jpg", checkpoint="{s}/photo.jpg"),
        "photo.jpg (12240 bytes, the first are b'\\xff\\xd8\\xff\\xe0\\x00\\x10JFI') is not a PyTorch che",
    ),
    Case(
        "predict with NaN weights in a model folder",
        predict("{s}/photo.jpg", checkpoint="{s}/nan"),
        "nan is not usable: 10 of 10 values of aux_head/bias, 480 of 480 values of aux_head/kernel,",
        prepare=nan_run,
    ),
    Case(
        "predict with a pipe as checkpoint",
        predict("{s}/photo.jpg", checkpoint="{s}/p.pth"),
        "p.pth is not a regular file.",
        prepare=fifo("p.pth"),
    ),
    # convert
    Case(
        "convert to an existing file",
        convert(out="{s}/photo.jpg"),
        "photo.jpg exists already; choose another name or remove it.",
    ),
    Case(
        "convert to an existing folder",
        convert(out="{s}/student"),
        "student exists already; choose another name or remove it.",
    ),
    Case(
        "convert to a folder that cannot be made",
        convert(out="/proc/tlvit/a.safetensors"),
        "/proc/tlvit/a.safetensors cannot be written: no such file or directory.",
    ),
    Case(
        "convert to another ending",
        convert("--to=pytorch", out="{s}/a.bin"),
        "a.bin: the ending must be one of .safetensors, .pth, .pt, .pth.tar.",
    ),
    Case(
        "convert below a file",
        convert(out="{s}/photo.jpg/a.safetensors"),
        "photo.jpg/a.safetensors cannot be written: photo.jpg is not a folder.",
    ),
    *(Case(f"convert {flag}", convert(flag), answer, status=2) for flag, answer in CONVERT_FLAGS.items()),
    Case(
        "convert --image-size=50",
        convert("--image-size=50"),
        "Image size 50x50 is not a multiple of the patch size 8.",
    ),
    Case(
        "convert --num-classes=3 without new heads",
        convert("--num-classes=3"),
        "student has heads for 10 classes, not 3; drop_heads=True (--heads=drop) initializes new on",
    ),
    Case(
        "convert --option of an unknown name",
        convert("--option=depht=3"),
        "lvvit_s has no option 'depht'; did you mean depth?",
    ),
    Case(
        "convert --option of another depth",
        convert("--option=depth=3"),
        "student, a lvvit_s: 22 tensors do not fit this LVViT:",
    ),
    Case(
        "convert --classes of the wrong length",
        convert("--classes={s}/c.txt"),
        "c.txt has 1 class names for 10 classes.",
        prepare=write("c.txt", b"a\n"),
    ),
    Case(
        "convert with NaN weights",
        convert(checkpoint="{s}/nan"),
        "nan is not usable: 10 of 10 values of aux_head/bias, 480 of 480 values of aux_head/kernel,",
        prepare=nan_run,
    ),
    Case("convert of nothing", convert(checkpoint="{s}/nothing"), "nothing does not exist."),
    # annotate
    *(Case(f"annotate {flag}", annotate(flag), answer, status=2) for flag, answer in ANNOTATE_FLAGS.items()),
    Case(
        "annotate with an image size that does not fit",
        annotate("--image-size=50", checkpoint="{s}/student"),
        "Image size 50x50 is not a multiple of the patch size 8.",
    ),
    Case(
        "annotate with an unknown split",
        annotate("--split=training"),
        "digits has no split 'training', only ['test', 'train']: Unknown split 'training'. Should b",
    ),
    Case(
        "annotate unknown data",
        annotate(data=("--data=no_such_data",)),
        "TFDS does not know a data set 'no_such_data', ~/tensorflow_datasets has none, and there is",
    ),
    Case(
        "annotate without prepared data",
        annotate(data=("--data=digits", "--data-dir={s}/none")),
        "There are no digit scenes in none/digit_scenes. Prepare them once: tlvit.data.sources.digi",
    ),
    Case(
        "annotate with data of other classes",
        annotate(data=("--data={s}/images",)),
        "The annotator has 10 classes, class_folders/16-images-ba86537bb201:train has 2.",
    ),
    Case(
        "annotate an empty folder",
        annotate(data=("--data={s}/empty",)),
        "empty has no folder 'train'; it has no folders of images: put them into ROOT/SPLIT/CLASS/.",
        prepare=lambda folder: (folder / "empty").mkdir(),
    ),
    Case(
        "annotate a folder without classes",
        annotate(data=("--data={s}/flat",)),
        "flat/train has no images in class folders (CLASS/NAME with a suffix of .jpg, .jpeg, .jpe, ",
        prepare=lambda folder: (
            (folder / "flat/train").mkdir(parents=True),
            shutil.copy(folder / "photo.jpg", folder / "flat/train/a.jpg"),
        ),
    ),
    Case("annotate to a file", annotate(out="{s}/photo.jpg"), "photo.jpg is a file, not a folder."),
    Case(
        "annotate to a folder that cannot be made",
        annotate(out="/proc/tlvit"),
        "/proc/tlvit cannot be written: no such file or directory.",
    ),
    Case(
        "annotate to a folder with other maps",
        annotate("--top-k=3", out="{s}/maps"),
        "maps already has score maps with top_k 5 instead of 3. Use another folder.",
    ),
    Case(
        "annotate with NaN weights",
        annotate(checkpoint="{s}/nan"),
        "nan is not usable: 10 of 10 values of aux_head/bias, 480 of 480 values of aux_head/kernel,",
        prepare=nan_run,
    ),
    Case("annotate with a missing checkpoint", annotate(checkpoint="{s}/nothing"), "nothing does not exist."),
    # image folders
    Case(
        "train on a folder with a pipe",
        FOLDER,
        "images/train: skipped 1 files that are not images: 1 pipes or devices",
        status=0,
        prepare=fifo("images/train/china/p.jpg"),
    ),
    Case(
        "train on a folder with a broken image",
        FOLDER,
        "1 of 16 images of class_folders/16-images-ba86537bb201:train cannot be read, more than dat",
        prepare=write("images/train/china/0.jpg", b"hello"),
    ),
    Case(
        "train on a folder with a link to itself",
        FOLDER,
        "images/train: skipped 1 files that are not images",
        status=0,
        prepare=loop("images/train/china/l.jpg"),
    ),
    Case(
        "train on a folder with a huge image",
        FOLDER,
        "1 of 17 images of class_folders/17-images-244234601cac:train cannot be read, more than dat",
        prepare=lambda folder: (
            huge_png(folder),
            shutil.move(folder / "huge.png", folder / "images/train/china/h.png"),
        ),
    ),
    Case(
        "train on a folder with a class with a line break",
        FOLDER,
        "'a\\nb' cannot be a class name: it has a line break, or spaces around it.",
        prepare=lambda folder: shutil.copytree(folder / "images/train/china", folder / "images/train/a\nb"),
    ),
    Case(
        "train on a folder with an empty class",
        FOLDER,
        "train images  16 of 2 classes",
        status=0,
        prepare=lambda folder: (folder / "images/train/empty").mkdir(),
    ),
    Case(
        "train on a folder with another class in val",
        FOLDER,
        "images/val has 1 classes that training does not have: other. The 2 classes are those of im",
        prepare=lambda folder: shutil.copytree(folder / "images/val/china", folder / "images/val/other"),
    ),
    Case(
        "train on a folder without val",
        FOLDER,
        "images has no folder 'val'; it has ['train']. A part of a split is written as 'train[:90%]",
        prepare=remove("images/val"),
    ),
    Case(
        "train on a folder with one class",
        FOLDER,
        "images/val has only one class, flower",
        status=0,
        prepare=lambda folder: [shutil.rmtree(folder / "images" / s / "china") for s in ("train", "val")],
    ),
    Case(
        "train on a folder that is missing",
        (*FOLDER, "--config.data.name={s}/none"),
        "There is no folder none.",
    ),
    # summary, visualize
    Case(
        "summary of an unknown model",
        ("summary", "lvvit_x"),
        "Unknown model 'lvvit_x'; did you mean lvvit_t or lvvit_s or lvvit_m?",
    ),
    Case("summary of nothing", ("summary",), "give names of models, --checkpoint or --all", status=2),
    *(
        Case(f"summary {flag}", ("summary", "lvvit_t", flag), answer, status=2)
        for flag, answer in SUMMARY_FLAGS.items()
    ),
    Case(
        "summary of an image size that does not fit",
        ("summary", "lvvit_t", "--image-size=50"),
        "Image size 50x50 is not a multiple of the patch size 16.",
    ),
    Case(
        "summary of a missing checkpoint", ("summary", "--checkpoint={s}/nothing"), "nothing does not exist."
    ),
    Case(
        "visualize a missing workdir",
        ("visualize", "--checkpoint={s}/nothing"),
        "nothing/config.json does not exist.",
    ),
    Case(
        "visualize a folder of images",
        ("visualize", "--checkpoint={s}/images"),
        "images/config.json does not exist.",
    ),
    Case(
        "visualize with metrics that are empty",
        ("visualize", "--checkpoint={s}/student"),
        "report written: student/report.png",
        status=0,
        prepare=write("student/metrics.jsonl", b""),
    ),
    Case(
        "visualize with metrics that are cut",
        ("visualize", "--checkpoint={s}/student"),
        "report written: student/report.png",
        status=0,
        prepare=write("student/metrics.jsonl", b'{"step": 1'),
    ),
    Case(
        "visualize --count=0",
        ("visualize", "--checkpoint={s}/student", "--count=0"),
        "argument --count: must be an integer from 1 to 100, not '0'",
        status=2,
    ),
    Case(
        "visualize with a baseline that is missing",
        ("visualize", "--checkpoint={s}/student", "--baseline={s}/none"),
        "none has no metrics.jsonl: it is not the workdir of a run.",
    ),
    Case(
        "visualize an unknown picture",
        ("visualize", "atention", "{s}/student", "{s}/photo.jpg"),
        "there is no picture 'atention'; choose one of report, attention, relevance, tokens, compare",
        status=2,
    ),
    Case(
        "visualize the attention of a convolutional model",
        ("visualize", "attention", "{s}/annotator", "{s}/photo.jpg", "--out={s}/a.png"),
        "RegNetY has no attention: attention and relevance are drawn of vision transformers",
    ),
    Case(
        "visualize the relevance for an unknown class",
        ("visualize", "relevance", "{s}/student", "{s}/photo.jpg", "--class=cat", "--out={s}/a.png"),
        "has no class 'cat': give one of its names or an index below 10.",
    ),
    Case(
        "visualize a file that is no image",
        ("visualize", "tokens", "{s}/student", "{s}/a.jpg", "--out={s}/a.png"),
        "a.jpg cannot be read: it is not a JPEG",
        prepare=write("a.jpg", b"hello"),
    ),
    Case(
        "draw maps with the recipe of an annotator",
        (*MAPS, "--images=2", "--config=digits:annotator", "--out={s}/a.png"),
        "regnety_002 has no tokens, so there are no token targets to draw",
    ),
    Case(
        "statistics of maps of other images",
        ("maps", "{s}/maps", "--stats", "--data={s}/images", "--split=train"),
        "The score maps in maps have 10 classes",
    ),
    Case(
        "train with a pattern that matches no parameter",
        train("--config.optim.lr_scale={'trunk/*':0}"),
        "config.optim.lr_scale: no parameter matches 'trunk/*'",
    ),
    # weights for training
    Case(
        "init_from text",
        train("--config.model.init_from={s}/a.pth"),
        "a.pth (5 bytes, the first are b'hello') is not a PyTorch checkpoint or safetensors file.",
        prepare=write("a.pth", b"hello"),
    ),
    Case(
        "init_from NaN weights",
        train("--config.model.init_from={s}/nan"),
        "nan is not usable: 10 of 10 values of aux_head/bias, 480 of 480 values of aux_head/kernel,",
        prepare=nan_run,
    ),
    Case(
        "init_from another family",
        train("--config.model.init_from={s}/annotator"),
        "config.model.init_from=annotator does not fit: it holds a regnety_002, and this run trains",
    ),
)
