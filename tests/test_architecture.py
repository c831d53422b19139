"""Imports run one way: layers, no circles, and which file may import which library."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "tlvit").rglob("*.py"))
NAMES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES
}

# Files and folders of tlvit/ by layer, as the design has them; a name that is not here fails the test.
LAYERS = {
    "version": 0, "shapes": 0, "files": 0, "signals": 0, "types": 0, "records": 0, "section": 0, "config": 0,
    "class_names": 0, "host_memory": 0, "error_text": 0,
    "ops": 1,
    "models": 2,
    "checkpoints": 3, "images": 3,
    "data": 4, "annotators": 4,
    "training": 5,
    "annotate": 6, "maps": 6, "convert": 6, "export": 6, "probe": 6, "predict": 6, "segment": 6,
    "prediction_files": 6,
    "summary": 6, "visualize": 6, "draw_tokens": 6, "draw_classes": 6, "drawing": 6,
    "main": 6, "__main__": 6, "command": 6, "checkpoint_flags": 6, "recipes": 6, "published": 6,
    "model_zoo": 6,
}  # fmt: skip
COMMAND = 6
# What may be imported from outside of the standard library in layers 0 to 2; a layer may use those under it.
LIBRARIES = {0: {"jax", "numpy"}, 1: {"einops"}, 2: {"flax"}}
ONLY_IN = {
    "tensorflow": ("tlvit.data", "tlvit.checkpoints.program_example"),  # a program for users, not for tlvit
    "tensorflow_datasets": "tlvit.data", "keras": "tlvit.data",
    "matplotlib": "tlvit.drawing", "orbax": "tlvit.checkpoints.native",
    "timm": "tlvit.annotators.timm_models",
    "torch": ("tlvit.checkpoints.torch_files", "tlvit.annotators.timm_models"),
}  # fmt: skip


def layer(module):
    """The layer of tlvit.x or tlvit.x.y; the package itself counts as a command."""
    parts = module.split(".")
    return COMMAND if len(parts) == 1 else LAYERS[parts[1]]


def imports(path):
    """(module, line, at the top level) of every import in a file; tlvit's own as its files' names."""
    tree = ast.parse(path.read_text())
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    known = set(NAMES.values())
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in known else node.module), node.lineno, top


def every_import():
    return [(NAMES[path], *found) for path in FILES for found in imports(path)]


def ours(module):
    return module == "tlvit" or module.startswith("tlvit.")


def within(module, package):
    return module == package or module.startswith(package + ".")


def test_there_is_something_to_check():
    assert {"tlvit", "tlvit.types", "tlvit.models.lvvit", "tlvit.training.step", "tlvit.convert"} <= set(
        NAMES.values()
    )
    assert ("tlvit.training.classification", "tlvit.ops.losses") in {(a, b) for a, b, *_ in every_import()}


def test_imports_run_from_a_higher_layer_to_a_lower_one():
    upwards = [
        f"{importer} (layer {layer(importer)}) imports {module} (layer {layer(module)}), line {line}"
        for importer, module, line, _ in every_import()
        if ours(module) and importer != "tlvit" and layer(module) > layer(importer)
    ]
    assert upwards == []


def test_the_package_opens_only_what_needs_no_tensorflow():
    high = [
        (m, line)
        for name, m, line, top in every_import()
        if name == "tlvit" and top and ours(m) and m != "tlvit" and layer(m) > 2
    ]
    assert high == []


def test_no_circles():
    graph = {name: set() for name in NAMES.values()}
    for importer, module, _, _ in every_import():
        if ours(module) and module != importer:
            graph[importer].add(module)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_libraries_are_imported_in_their_files():
    wrong = []
    for importer, module, line, top in every_import():
        library = module.split(".")[0]
        homes = ONLY_IN.get(library, importer)
        if not any(within(importer, home) for home in ([homes] if isinstance(homes, str) else homes)):
            wrong.append(f"{importer}:{line}: {library} belongs to {ONLY_IN[library]}")
        if library in ("torch", "timm") and top:
            wrong.append(f"{importer}:{line}: {library} is imported by the function that needs it")
        if library == "ml_collections" and layer(importer) < COMMAND and (top or importer != "tlvit.config"):
            wrong.append(f"{importer}:{line}: a ConfigDict belongs to the commands")
    assert wrong == []


# Imported inside of functions: settings of recipes, and paths of gs://.
LAZY = {("tlvit.config", "ml_collections"), ("tlvit.files", "etils")}


def test_lower_layers_have_few_dependencies():
    wrong = []
    for importer, module, line, top in every_import():
        library, at = module.split(".")[0], layer(importer)
        allowed = set().union(*(LIBRARIES[i] for i in LIBRARIES if i <= at))
        known = allowed | sys.stdlib_module_names | {"tlvit"}
        lazy = not top and (importer, library) in LAZY
        optional = (importer, library) == ("tlvit.shapes", "jaxtyping")
        if at <= 2 and library not in known and not lazy and not optional:
            wrong.append(f"{importer}:{line}: {library} in layer {at}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["tlvit", "configs", "scripts"])
def test_every_file_has_a_docstring(folder):
    silent = [
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        if not (ast.get_docstring(ast.parse(path.read_text())) or "").strip()
    ]
    assert silent == []


def test_conventions():
    """No asserts outside of tests, and none of the NNX and JAX functions that the design excludes."""
    left_out = {
        ("nnx", "jit"), ("nnx", "Optimizer"), ("nnx", "scan"), ("nnx", "bridge"), ("jax", "pmap"),
        ("jax_utils", "replicate"),
    }  # fmt: skip
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                wrong.append(f"{path.name}:{node.lineno}: assert")
            if isinstance(node, ast.Attribute) and (getattr(node.value, "id", ""), node.attr) in left_out:
                wrong.append(f"{path.name}:{node.lineno}: {node.value.id}.{node.attr}")
    assert wrong == []
    assert not list(ROOT.glob("tlvit/**/utils.py"))


def test_the_training_step_imports_nothing_heavy():
    """In a new interpreter. What `import tlvit` imports is tested with the public API."""
    code = (
        "import sys, tlvit.training.step, tlvit.training.state, tlvit.training.prefetch\n"
        "names = 'tensorflow tensorflow_datasets clu ml_collections torch orbax tlvit.data'.split()\n"
        "print([name for name in names if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_training_step_runs_without_jaxtyping():
    """As on accelerator images, which have JAX, Flax, optax and einops, and not much else."""
    code = (
        "import sys; sys.modules['jaxtyping'] = None\n"
        "import jax.numpy as jnp, tlvit, tlvit.training.step\n"
        "model = tlvit.create_model('lvvit_t', depth=1, image_size=32, num_classes=3)\n"
        "print(model(jnp.zeros((1, 32, 32, 3))).logits.shape)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "(1, 3)"
