"""Checks a download of ImageNet (names, sizes, counts, free space) before TFDS spends hours preparing it.

python -m scripts.prepare_imagenet ~/Downloads --data-dir=~/tensorflow_datasets [--prepare]
"""

import argparse
import collections
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG"  # one .JPEG file of ImageNet is a PNG
NEEDED_SPACE = 320 << 30  # bytes: 155 GB of records, and as much again while TFDS shuffles them


@dataclasses.dataclass(frozen=True)
class Expected:
    """The contents of a complete download. The defaults are those of ILSVRC 2012.

    Attributes:
      train_bytes, val_bytes: sizes of the two files; None: not checked.
      classes: number of archives in the training file, one for each class.
      train_images, val_images: numbers of images.
    """

    train_bytes: int | None = 147_897_477_120
    val_bytes: int | None = 6_744_924_160
    classes: int = 1000
    train_images: int = 1_281_167
    val_images: int = 50_000


@dataclasses.dataclass(frozen=True)
class Report:
    """What a download has, and the problems on which TFDS would fail or which it would not notice."""

    facts: tuple[str, ...]
    problems: tuple[str, ...]


def check_download(folder: str, *, expected: Expected | None = None, quick: bool = False) -> Report:
    """Checks ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in a folder without unpacking them.

    Only the headers of the images are read.

    Args:
      folder: the folder of the two files, TFDS's manual_dir.
      expected: the contents of a complete download. None: `Expected()`.
      quick: check only the names and sizes of the two files.

    Returns:
      What the download has, and its problems.
    """
    expected = expected or Expected()
    facts, problems = [], []
    for kind, size in (("train", expected.train_bytes), ("val", expected.val_bytes)):
        path = os.path.join(folder, f"ILSVRC2012_img_{kind}.tar")
        if not os.path.isfile(path):
            problems.append(_absent(path, kind))
            continue
        found = os.path.getsize(path)
        facts.append(f"{path}: {found:,} bytes")
        if size is not None and found != size:
            problems.append(f"{path} has {found:,} bytes instead of {size:,}: {_explain(found, size)}")
        elif not quick:
            check = _check_train if kind == "train" else _check_val
            more_facts, more_problems = check(path, expected)
            facts += more_facts
            problems += more_problems
    return Report(tuple(facts), tuple(problems))


def _absent(path: str, kind: str) -> str:
    """A sentence about a missing file."""
    unpacked = os.path.join(os.path.dirname(path), kind)
    if os.path.isdir(unpacked):
        return (
            f"{path} is missing, but there is a folder {unpacked}: TFDS reads the archives only. "
            f"Class folders need no preparation: train with --config.data.name={os.path.dirname(path)}"
        )
    return (
        f"{path} is missing: download it from https://image-net.org/download-images (ILSVRC2012, after login)"
    )


def _explain(found: int, size: int) -> str:
    """Why a file has another size than expected."""
    if found < size:
        return f"{100 * found / size:.1f} % of it is downloaded"
    return "it is a different archive"


def _check_train(path: str, expected: Expected) -> tuple[list[str], list[str]]:
    """Checks the training file: an archive for each class, both it and its images named by the WordNet id."""
    problems, counts = [], collections.Counter()
    try:
        with tarfile.open(path) as outer:
            for member in outer:
                name = re.fullmatch(r"(?:\./)?(n\d{8})\.tar", member.name)
                file = outer.extractfile(member) if name else None
                if not name or file is None:
                    problems.append(
                        f"{path} has {member.name!r}, which is not a class archive (nXXXXXXXX.tar)"
                    )
                    continue
                synset = name.group(1)
                if synset in counts:
                    problems.append(f"{path} has {synset}.tar twice")
                with file, tarfile.open(fileobj=file) as inner:
                    wrong = list(_wrong_images(inner, rf"{synset}_\d+\.JPEG", counts, synset))
                problems += [f"{path}: {synset}.tar has {text}" for text in wrong[:3]]
                if not counts[synset]:
                    problems.append(f"{path}: {synset}.tar has no images")
                if len(counts) % 50 == 0:
                    print(f"  {len(counts)} classes, {counts.total():,} images", file=sys.stderr, flush=True)
    except (tarfile.TarError, EOFError, OSError) as error:
        problems.append(
            f"{path} is damaged after {counts.total():,} images of {len(counts)} classes: {error}"
        )
        return [], problems
    if len(counts) != expected.classes:
        problems.append(f"{path} has {len(counts)} classes instead of {expected.classes}")
    if counts.total() != expected.train_images:
        few = ", ".join(f"{synset} {n}" for synset, n in sorted(counts.items(), key=lambda x: x[1])[:3])
        problems.append(
            f"{path} has {counts.total():,} images instead of {expected.train_images:,}; fewest: {few}"
        )
    return [f"{path}: {counts.total():,} images of {len(counts)} classes"], problems


def _check_val(path: str, expected: Expected) -> tuple[list[str], list[str]]:
    """Checks the validation file: images numbered from 1, whose labels TFDS looks up by name."""
    counts = collections.Counter()
    try:
        with tarfile.open(path) as archive:
            problems = list(_wrong_images(archive, r"ILSVRC2012_val_\d{8}\.JPEG", counts, "val"))
    except (tarfile.TarError, EOFError, OSError) as error:
        return [], [f"{path} is damaged after {counts['val']:,} images: {error}"]
    problems = [f"{path} has {text}" for text in problems[:3]]
    if counts["val"] != expected.val_images:
        problems.append(f"{path} has {counts['val']:,} images instead of {expected.val_images:,}")
    return [f"{path}: {counts['val']:,} images"], problems


def _wrong_images(
    archive: tarfile.TarFile, pattern: str, counts: collections.Counter, label: str
) -> Iterator[str]:
    """Yields descriptions of wrong entries and counts the images under a label."""
    seen = set()
    for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        if file is None:
            yield f"{member.name!r}, which is not a file"
            continue
        if not re.fullmatch(pattern, member.name):
            yield f"{member.name!r}, which is not the name of one of its images"
            continue
        if member.name in seen:
            yield f"{member.name!r} twice"
        seen.add(member.name)
        counts[label] += 1
        start = file.read(4)
        if not start.startswith((JPEG, PNG)):
            yield f"{member.name!r}, which is not a JPEG file (it begins with {start!r})"


def check_space(data_dir: str, *, needed: int = NEEDED_SPACE) -> str | None:
    """Returns a sentence about too little free space for the prepared data, or None."""
    folder = os.path.abspath(data_dir)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{data_dir} has {free / 1e9:.0f} GB free; preparing needs about {needed / 1e9:.0f} GB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0 if there are no problems."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.prepare_imagenet",
        description="Checks a download of ImageNet before TFDS prepares it.",
        epilog="example:\n  python -m scripts.prepare_imagenet ~/Downloads --data-dir=/data/tfds --prepare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="DOWNLOADS", help="folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
    )
    parser.add_argument(
        "--data-dir",
        default="~/tensorflow_datasets",
        help="folder of the TFDS data sets (default: ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="check names and sizes only, without reading the files"
    )
    parser.add_argument("--prepare", action="store_true", help="run TFDS if there are no problems")
    options = parser.parse_args(arguments)
    folder, data_dir = os.path.expanduser(options.folder), os.path.expanduser(options.data_dir)
    report = check_download(folder, quick=options.quick)
    space = check_space(data_dir)
    for fact in report.facts:
        print(fact)
    problems = report.problems + ((space,) if space else ())
    for problem in problems:
        print(f"PROBLEM: {problem}")
    if problems:
        return 1
    command = ["tfds", "build", "imagenet2012", f"--manual_dir={folder}", f"--data_dir={data_dir}"]
    print(f"The download is complete. Prepare it with TFDS, which takes some hours:\n{shlex.join(command)}")
    return subprocess.run(command, check=False).returncode if options.prepare else 0


if __name__ == "__main__":
    sys.exit(main())
