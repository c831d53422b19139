"""The flags of `python -m tlvit.main`, and the `tlvit` command."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import tlvit
from tlvit import __main__ as tlvit_command
from tlvit import main
from tlvit.config import Config, Data, Eval, resolve, settings, to_dict
from tlvit.training.loop import ProfileWindow


def parsed(*arguments):
    return main.parse_flags(["--workdir=w", *arguments])


def test_a_recipe_is_a_name_or_a_file(tmp_path):
    by_name = parsed("--config=lvvit_m").config
    by_file = parsed(f"--config={ROOT / 'configs' / 'lvvit_m.py'}").config
    assert by_name.to_dict() == by_file.to_dict()
    assert by_name.model.name == "lvvit_m"
    assert parsed("--config=digits:annotator").config.model.name == "regnety_002"
    own = tmp_path / "own.py"
    own.write_text("from tlvit.config import default\n\ndef get_config():\n    return default()\n")
    assert parsed(f"--config={own}").config.model.name == "lvvit_s"


def test_settings_are_overridden():
    options = parsed(
        "--config=lvvit_s", "--config.optim.learning_rate=8e-4", "--config.image_size=96,64",
        "--config.model.options.depth=3", "--config.model.options.rule=mean", "--noconfig.loss.mixtoken",
    )  # fmt: skip
    config = resolve(options.config)
    assert (config.optim.learning_rate, config.image_size, config.loss.mixtoken) == (8e-4, (96, 64), False)
    assert config.model.options == {"drop_path": 0.1, "depth": 3, "rule": "mean"}
    assert resolve(parsed("--config=lvvit_s", "--config.image_size=96").config).image_size == (96, 96)
    assert resolve(parsed("--config=lvvit_s", "--config.eval.image_size=96").config).eval.image_size == (
        96,
        96,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--workdir=w"],
            "--config is missing, and w has no config.json: give a recipe, such as deit,",
        ),
        (["--config=lvvit_s"], "--workdir is missing$"),
        (["--config=lvvit_s", "--mode=eval"], "--workdir is missing, or --checkpoint"),
        (["--config=lvvit_s", "--workdir=w", "--checkpoint=x"], "--checkpoint needs --mode=eval"),
        (["--config=lvvit_s", "--workdir=w", "--profile=10"], "START:STEPS, for example 100:5, not '10'"),
        (["--config=lvvit_s", "--workdir=w", "more"], "unknown arguments: more"),
        (
            ["digits_small:annotator", "--workdir=w"],
            r"unknown arguments: digits_small:annotator; did you mean --config=digits_small:annotator\?",
        ),
        (
            ["--config=lvvit_x", "--workdir=w"],
            "'lvvit_x' is not a shipped recipe or a .py file; recipes: deit",
        ),
        (["--config=lvvit_s", "--workdir=w", "--mode=test"], "value should be one of <train|eval>"),
        (["--config=lvvit_s", "--workdir=w", "--weights=best"], "value should be one of <auto|ema|raw>"),
    ],
)
def test_wrong_flags_are_one_sentence(arguments, message, capsys):
    with pytest.raises(ValueError, match=message):
        main.parse_flags(arguments)
    assert main.main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "Traceback" not in printed


def test_profile_windows():
    assert main.parse_profile("100:5") == ProfileWindow(start=100, steps=5)
    assert main.parse_profile(None) is None
    for text in ("0:5", "5:0", "a:b", "5"):
        with pytest.raises(ValueError, match="START:STEPS"):
            main.parse_profile(text)


def test_help_shows_examples_and_every_flag(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "tlvit train --config=lvvit_s --workdir=/runs/lvvit_s" in text
    assert f"Recipes: {', '.join(main.recipe_names())}\n" in text
    for flag in main.FLAGS:
        assert f"--{flag} " in text
    words = " ".join(text.split())
    for name, _, _, meaning in settings():
        assert f" {name} " in words
        assert " ".join(meaning.split()) in words


def test_help_into_a_closed_pipe_has_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m tlvit train --help | head -1", shell=True, cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("Trains or resumes a run, or evaluates a checkpoint.\n", "")


@pytest.mark.parametrize("name", sorted(tlvit_command.COMMANDS))
def test_every_subcommand_has_help_with_an_example(name, capsys):
    try:
        status = tlvit_command.main([name, "--help"])
    except SystemExit as end:  # argparse
        status = end.code
    text = capsys.readouterr().out
    assert status == 0
    assert "tlvit" in text
    assert any(word in text.lower() for word in ("example", "python -m tlvit."))


def test_the_tlvit_command(capsys):
    assert tlvit_command.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in tlvit_command.COMMANDS)
    assert tlvit_command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tlvit {tlvit.__version__}\n"
    assert tlvit_command.main(["fly"]) == 2
    assert "tlvit has no command 'fly'" in capsys.readouterr().err
    assert tlvit_command.main(["eval", "--config=lvvit_s"]) == 1
    assert "--workdir is missing, or --checkpoint" in capsys.readouterr().err


def test_the_module_runs_as_a_process(tmp_path):
    """From another folder, as a user does; the exit status and the sentence are those of main()."""
    done = subprocess.run(
        [sys.executable, "-m", "tlvit", "train", "--config=lvvit_s", f"--workdir={tmp_path / 'w'}",
         "--config.data.score_maps="],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "config.data.score_maps is empty" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_prints_json_in_the_last_line(monkeypatch, capsys, tmp_path):
    sums = {"top1": 50.0, "top5": 75.0, "loss": 1.0, "count": 4}
    seen = []
    monkeypatch.setattr(
        main, "evaluate_checkpoint", lambda path, config, weights: seen.append(weights) or sums
    )
    (tmp_path / "checkpoints").mkdir()
    common = ["--config=lvvit_s", "--mode=eval", f"--workdir={tmp_path}"]
    assert main.main(common) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"checkpoint": str(tmp_path), "ema": sums, "raw": sums}
    assert main.main([*common, "--weights=raw"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"checkpoint": str(tmp_path), "raw": sums}
    assert seen == ["ema", "raw", "raw"]


def test_a_workdir_is_evaluated_with_its_own_settings(monkeypatch, capsys, tmp_path):
    seen = []
    evaluate = lambda path, config, weights: seen.append(config) or {"top1": 1.0, "top5": 2.0, "count": 3}
    monkeypatch.setattr(main, "evaluate_checkpoint", evaluate)
    own = Config(data=Data(name="photos", eval_split="val"), seed=7)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(own)))
    assert main.main(["--mode=eval", f"--workdir={tmp_path}", "--config.eval.image_size=48"]) == 0
    assert main.main(["--mode=eval", f"--checkpoint={tmp_path}", "--weights=raw"]) == 0
    assert seen == [dataclasses.replace(own, eval=Eval(image_size=(48, 48))), own]
    (tmp_path / "config.json").write_text("{")
    assert main.main(["--mode=eval", f"--workdir={tmp_path}"]) == 1
    assert f"{tmp_path}/config.json is not valid JSON: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch-size=4", "unknown flag --batch-size; did you mean --config.batch_size?"),
        ("--workdirr=w", "unknown flag --workdirr; did you mean --workdir?"),
        ("--config.optim.lr=1", "config.optim.lr is not a setting; did you mean config.optim.learning_rate?"),
        ("--config.seed=-1", "config.seed must be at least 0, not -1."),
    ],
)
def test_a_wrong_flag_names_the_one_that_may_be_meant(argument, message, capsys):
    assert main.main(["--config=lvvit_s", "--workdir=w", argument]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_commands_start_quietly():
    """No warning of Python or of a library, for example "found in sys.modules"."""
    done = subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-m", "tlvit.predict", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
