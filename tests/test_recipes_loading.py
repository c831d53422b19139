"""Recipe files, the settings of a workdir and overriding flags."""

import json
import textwrap

import pytest
from ml_collections import ConfigDict

from tlvit import recipes
from tlvit.config import Config, default, resolve, to_dict


def written(folder, name, text):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def changed(*overrides):
    config = default()
    for name, text in overrides:
        recipes.override(config, name, text)
    return resolve(config)


def test_overrides_are_split_from_the_other_arguments():
    others, overrides = recipes.split_overrides(
        ["--config=x", "--config.seed=3", "--workdir", "w", "-config.epochs=4", "--noconfig.ema.warmup",
         "--config.token_labels", "--config.mesh.data", "-1", "--config.model.init_from=a=b", "--debug"]
    )  # fmt: skip
    assert others == ["--config=x", "--workdir", "w", "--debug"]
    assert overrides == [
        ("seed", "3"), ("epochs", "4"), ("ema.warmup", "False"), ("token_labels", "True"),
        ("mesh.data", "-1"), ("model.init_from", "a=b"),
    ]  # fmt: skip


def test_overrides_have_the_types_of_their_settings():
    config = changed(
        ("batch-size", "4"), ("optim.min_lr", "0"), ("token_labels", "true"), ("ema.warmup", "1"),
        ("image_size", "96x64"), ("eval.image_size", "(48,)"), ("augment.crop_scale", "0.5,1"),
        ("model.init_from", "1e3"), ("model.options.depth", "3"), ("model.options.rule", "mean"),
        ("model.init_missing", "aux_head"), ("model.init_unexpected", "head_dist, dist_token"),
    )  # fmt: skip
    assert (config.batch_size, config.optim.min_lr, config.ema.warmup) == (4, 0.0, True)
    assert (config.image_size, config.eval.image_size) == ((96, 64), (48, 48))
    assert config.augment.crop_scale == (0.5, 1.0)
    assert config.model.init_missing == ("aux_head",)
    assert config.model.init_unexpected == ("head_dist", "dist_token")
    assert changed(("model.init_missing", "('a', 'b')")).model.init_missing == ("a", "b")
    assert changed(("model.init_missing", "")).model.init_missing == ()
    assert (config.model.init_from, config.model.options) == ("1e3", {"depth": 3, "rule": "mean"})
    assert changed(("model.options.drop_path", "0.1"), ("model.options.drop_path", "nan")).model.options == {
        "drop_path": "nan"
    }
    assert changed(("eval.image_size", ""), ("data.train_split", "train[:90%]")).eval.image_size == ()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.lr", "1", "config.optim.lr is not a setting; did you mean config.optim.learning_rate?"),
        ("lr", "1", "config.lr is not a setting; did you mean config.optim.learning_rate?"),
        ("epoch", "1", "config.epoch is not a setting; did you mean config.epochs?"),
        (
            "weight_decay",
            "1",
            "config.weight_decay is not a setting; did you mean config.optim.weight_decay?",
        ),
        ("optm.name", "x", "config.optm.name is not a setting; did you mean config.optim.name?"),
        ("optim.batch_size", "1", "did you mean config.batch_size?"),
        ("foo.bar", "1", "config.foo.bar is not a setting; known: seed, batch_size, "),
        ("optim.qqq", "1", "config.optim.qqq is not a setting; known: optim.name, optim.learning_rate, "),
        ("optim", "3", "config.optim is a section; its settings are optim.name, optim.learning_rate, "),
        ("model.options", "{}", "--config.model.options.NAME=VALUE"),
        ("batch_size", "x", "config.batch_size must be an integer, not 'x'."),
        ("batch_size", "4.5", "config.batch_size must be an integer, not 4.5."),
        ("token_labels", "maybe", "config.token_labels must be true or false, not 'maybe'."),
        ("optim.learning_rate", "nan", "config.optim.learning_rate must be a finite number, not nan."),
        ("optim.learning_rate", "fast", "config.optim.learning_rate must be a number, not 'fast'."),
        ("image_size", "a,b", "An image size is one number or HEIGHTxWIDTH, not 'axb'."),
        ("augment.crop_scale", "0.3", "config.augment.crop_scale must have 2 values, not 1."),
        ("augment.crop_scale", "(" * 500, "config.augment.crop_scale"),
    ],
)
def test_a_wrong_override_is_one_sentence(name, text, message):
    with pytest.raises(ValueError) as raised:
        changed((name, text))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_recipes_may_import_files_of_their_folder(tmp_path):
    written(tmp_path, "my_base.py", "EPOCHS = 7\n")
    path = written(
        tmp_path,
        "mine.py",
        """
        from tlvit.config import default
        from my_base import EPOCHS

        def get_config(variant="a"):
            config = default()
            config.epochs = EPOCHS
            config.model.name = variant
            return config
        """,
    )
    assert resolve(recipes.load_recipe(f"{path}:lvvit_t")).model.name == "lvvit_t"
    assert recipes.load_recipe(str(path.with_suffix(""))).epochs == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "bad.py is not a recipe: it has no function get_config()"),
        ("x = (", r"bad.py, line 1: SyntaxError: '\(' was never closed"),
        ("import not_there", "bad.py, line 1: ModuleNotFoundError: No module named 'not_there'"),
        ("\ndef get_config():\n    return 1 / 0", "bad.py, line 3: ZeroDivisionError"),
        (
            "from tlvit.config import default\ndef get_config():\n    default().epochs = 'x'",
            "bad.py, line 3: TypeError",
        ),
        ("def get_config():\n    return None", r"get_config\(\) of .*bad.py must return settings"),
    ],
)
def test_a_faulty_recipe_is_one_sentence(text, message, tmp_path):
    path = written(tmp_path, "bad.py", text)
    with pytest.raises(ValueError, match=message):
        recipes.load_recipe(str(path))


def test_recipes_that_do_not_exist():
    with pytest.raises(ValueError, match=r"'lvvit_x' is not a shipped recipe or a .py file; recipes: deit, "):
        recipes.load_recipe("lvvit_x")
    with pytest.raises(ValueError, match=r"/none/x.py does not exist"):
        recipes.load_recipe("/none/x.py")
    with pytest.raises(ValueError, match=r"lvvit_s has no variants: leave out :x"):
        recipes.load_recipe("lvvit_s:x")


def test_a_writer_is_made_by_a_python_file(tmp_path):
    path = written(
        tmp_path,
        "tracker.py",
        """
        def make_writer(workdir, config):
            return (workdir, config["epochs"])
        """,
    )
    assert recipes.load_writer(str(path), "w", {"epochs": 3}) == ("w", 3)
    for text, message in (
        ("x = 1", "bad_tracker.py has no function make_writer"),
        ("def make_writer(workdir):\n    pass", "bad_tracker.py, line 1: TypeError"),
    ):
        bad = written(tmp_path, "bad_tracker.py", text)
        with pytest.raises(ValueError, match=message):
            recipes.load_writer(str(bad), "w", {})
    with pytest.raises(ValueError, match=r"none.py of --writer does not exist"):
        recipes.load_writer("none.py", "w", {})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def make(path, size=64): ...",
            r"make of .*mine\.py needs the arguments path, but",
        ),
        ("def make(*paths): ...", r"make\(\) of .*mine\.py returns None, not a tlvit\.DenseAnnotator"),
        ("def make():\n    1 / 0", r"mine\.py, line 2: ZeroDivisionError"),
    ],
)
def test_functions_that_make_no_annotator(code, message, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        recipes.load_annotator(f"{tmp_path / 'mine.py'}:make")


def test_the_settings_of_a_workdir(tmp_path):
    assert recipes.load_workdir(tmp_path) is None
    config = Config(epochs=7)
    path = written(tmp_path, "config.json", json.dumps(to_dict(config)))
    found = recipes.load_workdir(tmp_path)
    assert isinstance(found, ConfigDict)
    assert resolve(found) == config
    for text, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object"),
                          ('{"epoch": 3}', "config.json: config.epoch is not a setting; did you mean"),
                          ('{"optim": 3}', "config.optim must be a section"),
                          ('{"epochs": "x"}', "config.json: config.epochs must be an integer")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as raised:
            recipes.load_workdir(tmp_path)
        assert str(path) in str(raised.value)
