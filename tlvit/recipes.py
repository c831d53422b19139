"""Where the settings of a command come from: a recipe file, a workdir's config.json, and overriding flags.

Also loads what users write in Python files of their own: metric writers and annotators.
"""

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from tlvit import config as settings
from tlvit.files import as_path
from tlvit.records import convert, read_json

RECIPE_FOLDERS = (  # of the installed package, and of a checkout
    pathlib.Path(__file__).parent / "configs",
    pathlib.Path(__file__).parent.parent / "configs",
)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted({path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.py")} - {"__init__"})


def load_recipe(recipe: str) -> ConfigDict:
    """The settings of a recipe.

    Args:
      recipe: the name of a shipped recipe or a .py file, with :VARIANT for recipes that have variants. The
        file may import other files of its folder.

    Raises:
      ValueError: there is no such recipe or variant, or the file raises an error.
    """
    name, _, variant = recipe.partition(":")
    path = _find(name)
    with _faults_of(path):
        module = _load_file(path)
        if not hasattr(module, "get_config"):
            raise ValueError(f"{path} is not a recipe: it has no function get_config().")
        if variant and not inspect.signature(module.get_config).parameters:
            raise ValueError(f"{name} has no variants: leave out :{variant}.")
        found = module.get_config(*[variant] if variant else [])
    if not isinstance(found, ConfigDict):
        raise ValueError(f"get_config() of {path} must return settings, made by tlvit.config.default().")
    return found


def load_writer(file: str, workdir: str, config: dict[str, Any]) -> Any:
    """The metric writer that a user's Python file makes with its function make_writer(workdir, config).

    Raises:
      ValueError: there is no such file or function, or the file raises an error.
    """
    path = pathlib.Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"The file {file} of --writer does not exist.")
    with _faults_of(path):
        module = _load_file(path)
        if not hasattr(module, "make_writer"):
            raise ValueError(f"{path} has no function make_writer(workdir, config).")
        return module.make_writer(workdir, config)


def load_annotator(spec: str, image_size: tuple[int, int] | None = None) -> Any:
    """The annotator of --annotator=SPEC: timm:NAME, timm:NAME:WEIGHTS or FILE.py:FUNCTION.

    Args:
      spec: a model of timm, or a Python file and its function without arguments that returns a
        `tlvit.DenseAnnotator`. The file may import other files of its folder.
      image_size: (height, width), for models of timm. None: the model's own.

    Raises:
      ImportError: timm is not installed.
      ValueError: it is something else, there is no such model, file or function, or the file raises an error.
    """
    kind, _, rest = spec.partition(":")
    if kind == "timm" and rest:
        from tlvit.annotators.timm_models import TimmAnnotator

        name, _, weights = rest.partition(":")
        return TimmAnnotator(name, weights, image_size)
    file, _, function = spec.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError(f"An annotator is timm:NAME, timm:NAME:WEIGHTS or FILE.py:FUNCTION, not {spec!r}.")
    path = pathlib.Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"The file {file} of --annotator does not exist.")
    if image_size is not None:
        raise ValueError(f"The annotator of {file} has its own image_size: leave out --image-size.")
    with _faults_of(path):
        module = _load_file(path)
        if not callable(getattr(module, function, None)):
            names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise ValueError(f"{path} has no function {function}(); it has {', '.join(names) or 'none'}.")
        make = getattr(module, function)
        needed = [p.name for p in inspect.signature(make).parameters.values() if _is_needed(p)]
        if needed:
            raise ValueError(
                f"{function} of {path} needs the arguments {', '.join(needed)}, but it is called without any."
            )
        annotator = make()
        if annotator is None:
            raise ValueError(f"{function}() of {path} returns None, not a tlvit.DenseAnnotator.")
    with contextlib.suppress(AttributeError):  # a class with slots, or one without a version of its own
        if not hasattr(annotator, "version"):
            annotator.version = hashlib.sha256(path.read_bytes()).hexdigest()
    return annotator


def _is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a function cannot be called without this parameter."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


def load_workdir(workdir: str | pathlib.Path) -> ConfigDict | None:
    """The settings of a workdir's run; None if it has no config.json.

    Raises:
      ValueError: config.json is damaged or has unknown settings.
    """
    path = as_path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        config = settings.resolve(read_json(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return ConfigDict(settings.to_dict(config))


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes the overrides of settings out of the arguments of a command.

    Returns:
      The other arguments, and (name, text) of --config.NAME=TEXT or --config.NAME TEXT. The text of
      --config.NAME alone is "True", and of --noconfig.NAME "False".
    """
    others: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            others.append(argument)
            continue
        off, name, text = match.groups()
        if text is None:
            given = not off and rest and not rest[0].startswith("--")
            text = rest.pop(0) if given else str(not off)
        overrides.append((name, text))
    return others, overrides


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets one setting from the text of a flag.

    Args:
      config: settings, which are changed.
      name: such as "batch_size" or "optim.learning_rate", or any "model.options.NAME".
      text: the value.

    Raises:
      ValueError: the setting does not exist, or the text is not a value of its type.
    """
    name = name.replace("-", "_")
    if name.startswith("model.options."):
        with config.model.options.unlocked(), config.model.options.ignore_type():
            config.model.options[name.removeprefix("model.options.")] = _literal(text)
        return
    types = settings.setting_types()
    if name not in types:
        raise ValueError(settings.unknown_setting(name))
    if name == "model.options":
        raise ValueError("Options of the model are set one by one: --config.model.options.NAME=VALUE.")
    section, _, key = name.rpartition(".")
    target = config[section] if section else config
    with config.ignore_type():  # the type is that of the setting, not that of the recipe's value
        target[key] = _value(text, types[name], name)


def _find(name: str) -> pathlib.Path:
    """The file of a recipe."""
    files = [folder / f"{name}.py" for folder in RECIPE_FOLDERS]
    files.append(pathlib.Path(name if name.endswith(".py") else f"{name}.py"))
    for path in files:
        if path.is_file():
            return path.absolute()
    if name.endswith(".py"):
        raise ValueError(
            f"The recipe file {name} does not exist; shipped recipes: {', '.join(recipe_names())}."
        )
    raise ValueError(f"{name!r} is not a shipped recipe or a .py file; recipes: {', '.join(recipe_names())}")


def _load_file(path: pathlib.Path) -> ModuleType:
    """Runs a Python file, which may import other files of its folder."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"tlvit_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file.")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _faults_of(path: pathlib.Path) -> Iterator[None]:
    """Any error of a user's Python file becomes a ValueError with the file and the line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line, text = lines[-1] if lines else 1, str(error)
        if isinstance(error, SyntaxError):
            line, text = error.lineno or 1, error.msg
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {text}") from error


def _value(text: str, kind: Any, name: str) -> Any:
    """The value of a setting of a type."""
    if name.endswith("image_size"):
        return settings.parse_image_size(text.strip("()[] ").rstrip(",").replace(",", "x")) if text else ()
    words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    if kind is bool:
        return convert(words.get(text.lower(), text), kind, f"config.{name}")
    origin = typing.get_origin(kind)
    if kind is str or origin is typing.Literal:
        return text
    value = _literal(text)
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(text)  # nan and inf are no literals
    if origin is tuple and not isinstance(value, tuple | list):
        names = typing.get_args(kind)[0] is str
        value = tuple(filter(None, text.replace(" ", "").split(","))) if names else (value,)
    return convert(value, kind, f"config.{name}")


def _literal(text: str) -> Any:
    """The Python value of "12", "0.1", "(2, 1)" or "None"; other text stays text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
