"""The launchers: the commands that they print, and runs with stand-ins for gcloud, uv, tlvit and srun."""

import os
import shlex
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

from tlvit import version
from tlvit.main import EXIT_STOPPED, parse_flags

POD, SLURM = ROOT / "scripts" / "launch_tpu_pod.sh", ROOT / "scripts" / "launch_slurm.sh"
TRAIN = ["--config=lvvit_s", "--workdir=gs://bucket/run", "--config.model.name='lvvit_s'"]
TPU = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-16"]

# The TPU's state is a file; its host is a folder.
GCLOUD = r"""#!/usr/bin/env bash
echo "$4 ${*:5}" | sed 's/ --zone.*//' >>"$FAKE/calls"
case "$4" in
  describe) cat "$FAKE/state" 2>/dev/null || { echo "ERROR: (gcloud.x) NOT_FOUND: x" >&2; exit 1; } ;;
  create)
    if [ -s "$FAKE/create_errors" ]; then
      head -n 1 "$FAKE/create_errors" >&2
      sed -i 1d "$FAKE/create_errors"
      exit 3
    fi
    mkdir -p "$FAKE/host/.local/bin"
    cp "$FAKE/bin/uv" "$FAKE/host/.local/bin"
    echo READY >"$FAKE/state" ;;
  delete) rm -rf "$FAKE/state" "$FAKE/host" ;;
  scp) for file in "${@:5}"; do [ ! -f "$file" ] || cp "$file" "$FAKE/host"; done ;;
  ssh)
    [ "$(cat "$FAKE/state")" = READY ] || exit 1
    cd "$FAKE/host"
    for word in "$@"; do [ "$word" = "${word#--command=}" ] || HOME=$PWD bash -c "${word#*=}"; done ;;
esac
"""
# Installs a tlvit that ends with the next status of the list. "preempted" takes the TPU away.
UV = r"""#!/usr/bin/env bash
echo "uv $*" >>"$FAKE/calls"
[ "$1" = venv ] && mkdir -p env/bin
[ "$1" = venv ] || cp "$FAKE/bin/tlvit" env/bin/
"""
TLVIT = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >"$FAKE/arguments"
next=$(head -n 1 "$FAKE/statuses")
sed -i 1d "$FAKE/statuses"
echo "step 7"
[ "$next" = preempted ] && echo PREEMPTED >"$FAKE/state" && exit 1
exit "$next"
"""
WAITING_TLVIT = """#!/usr/bin/env bash
trap 'kill $!; exit 75' TERM
echo "step 3"
sleep 1000 &
wait
"""
SRUN = r"""#!/usr/bin/env bash
echo "srun $*" >>"$FAKE/calls"
while [ "$1" != tlvit ]; do shift; done
"$@"
"""
SCONTROL = r"""#!/usr/bin/env bash
echo "scontrol $*" >>"$FAKE/calls"
"""


class Cluster:
    """A folder of stand-ins on PATH."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        programs = {"gcloud": GCLOUD, "uv": UV, "tlvit": TLVIT, "srun": SRUN, "scontrol": SCONTROL}
        for name, text in programs.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def run(self, *command, statuses=(), create_errors=(), **environment):
        """Runs a command; the i-th start of tlvit ends with statuses[i]."""
        (self.folder / "statuses").write_text("".join(f"{s}\n" for s in statuses))
        (self.folder / "create_errors").write_text("".join(f"{e}\n" for e in create_errors))
        return subprocess.run(
            command, env=self.environment() | environment, capture_output=True, text=True, timeout=60
        )

    def environment(self):
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "FAKE": str(self.folder)}

    def calls(self):
        """What was called since the last time, without the looks at the run."""
        lines = (self.folder / "calls").read_text().splitlines()
        (self.folder / "calls").unlink()
        return [line for line in lines if not line.endswith("look")]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


START = [
    "scp launch_tpu_host.sh package.whl pod: --worker=all",
    'ssh pod --worker=all --command=bash launch_tpu_host.sh install "file://$HOME/package.whl"',
    "uv venv --quiet --allow-existing --python=3.12 env",
    "uv pip install --quiet --python=env/bin/python --reinstall-package=tlvit tlvit[tf,tpu,gcs] @ file://HOST/package.whl",
    "ssh pod --worker=all --command=bash launch_tpu_host.sh start --config=lvvit_s --workdir=gs://bucket/run "
    r"--config.model.name=\'lvvit_s\'",
]
CREATE = "create pod --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"


def launch(cluster, *options, train=TRAIN, **changes):
    """Runs the pod launcher with a ready package; returns the process and the calls in short."""
    (cluster.folder / "package.whl").touch()
    package = f"--package={cluster.folder / 'package.whl'}"
    done = cluster.run(POD, *TPU, "--poll=0", package, *options, "--", *train, **changes)
    names = {f"{ROOT}/scripts/": "", f"{cluster.folder}/host": "HOST", f"{cluster.folder}/": ""}
    calls = []
    for call in cluster.calls():
        for long, short in names.items():
            call = call.replace(long, short)
        calls.append(call)
    return done, calls


def test_a_pod_is_created_used_and_deleted(cluster):
    done, calls = launch(cluster, "--delete", "--spot", "--create-flag=--network=mine", statuses=[0])
    assert done.returncode == 0, done.stderr
    describe, flags = "describe pod --format=value(state)", " --spot --network=mine"
    assert calls == [describe, CREATE + flags, describe, *START, "delete pod --quiet"]
    assert (cluster.folder / "arguments").read_text().splitlines() == ["train", "--multihost", *TRAIN]


def test_a_stopped_and_a_preempted_run_continue(cluster):
    done, calls = launch(cluster, statuses=[75, "preempted", 0])
    assert done.returncode == 0, done.stderr
    actions = [c for c in calls if c.startswith(("create", "delete")) or " start " in c]
    assert actions == [CREATE, START[-1], START[-1], "delete pod --quiet", CREATE, START[-1]]
    assert "# pod is PREEMPTED: deleting it" in done.stdout
    assert "pod still costs money; to delete it: gcloud compute tpus tpu-vm delete pod" in done.stdout


def test_a_failure_ends_the_script_with_its_status_and_the_log(cluster):
    done, calls = launch(cluster, statuses=[1])
    assert done.returncode == 1
    assert "step 7" in done.stdout
    assert "tlvit ended with status 1" in done.stdout
    assert calls[-2:] == [
        "ssh pod --worker=all --command=bash launch_tpu_host.sh log",
        "describe pod --format=value(state)",
    ]


def test_capacity_is_waited_for_and_other_errors_are_not(cluster):
    full = "ERROR: (gcloud.x) There is no more capacity in the zone"
    done, calls = launch(cluster, create_errors=[full, full], statuses=[0])
    assert done.returncode == 0, done.stderr
    assert calls.count(CREATE) == 3
    cluster.run("gcloud", "compute", "tpus", "tpu-vm", "delete")
    done, calls = launch(cluster, create_errors=["ERROR: quota"], statuses=[0])
    assert (done.returncode, calls[-1]) == (3, CREATE)
    assert "ERROR: quota" in done.stderr


def test_a_running_tlvit_is_followed_and_stops_when_asked(cluster):
    cluster.run("gcloud", "compute", "tpus", "tpu-vm", "create")
    home = cluster.folder / "host"
    shutil.copy(ROOT / "scripts" / "launch_tpu_host.sh", home)
    (home / "tlvit-run/env/bin").mkdir(parents=True)
    (home / "tlvit-run/env/bin/tlvit").write_text(WAITING_TLVIT)
    (home / "tlvit-run/env/bin/tlvit").chmod(0o755)
    host = lambda *command: cluster.run("bash", home / "launch_tpu_host.sh", *command, HOME=str(home))
    assert host("look").stdout == "nothing\n"
    assert host("start").returncode == 0
    for _ in range(1000):
        if (seen := host("look").stdout) == "running  step 3\n":
            break
    assert seen == "running  step 3\n"
    pid = (home / "tlvit-run/pid").read_text()
    assert host("start").returncode == 0  # gcloud repeats a command whose connection broke
    assert (home / "tlvit-run/pid").read_text() == pid
    follower = subprocess.Popen(
        [POD, *TPU, "--poll=0", "--", *TRAIN], env=cluster.environment(), stdout=subprocess.PIPE, text=True
    )
    while (line := follower.stdout.readline()) and line != "running  step 3\n":
        assert line == "# tlvit runs on pod already\n"
    assert cluster.run(POD, "--name=pod", "--zone=z", "--stop").returncode == 0
    assert "the same command resumes it" in follower.communicate(timeout=60)[0]
    assert follower.returncode == EXIT_STOPPED
    assert not [call for call in cluster.calls() if call.startswith("scp")]


def test_a_restarted_host_is_noticed(cluster):
    home = cluster.folder / "host"
    (home / "tlvit-run").mkdir(parents=True)
    (home / "tlvit-run/pid").write_text("999999999\n")
    look = cluster.run("bash", ROOT / "scripts/launch_tpu_host.sh", "look", HOME=str(home))
    assert look.stdout == "ended the host was restarted\n"


def test_a_run_that_ends_during_a_look_has_ended_by_itself(cluster):
    """`cat` stands for the end of a run: whoever reads the number of its process finds it gone."""
    home = cluster.folder / "host"
    (home / "tlvit-run").mkdir(parents=True)
    (home / "tlvit-run/pid").write_text("999999999\n")
    (cluster.folder / "bin/cat").write_text(
        '#!/bin/sh\n[ "$1" != pid ] || echo 0 >status\nexec /bin/cat "$@"\n'
    )
    (cluster.folder / "bin/cat").chmod(0o755)
    look = cluster.run("bash", ROOT / "scripts/launch_tpu_host.sh", "look", HOME=str(home))
    assert look.stdout == "ended 0\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name=pod"], "--name and --zone are needed"),
        (TPU, "the arguments of tlvit train are needed, after --"),
        (["--name=pod", "--zone=z", "--", "--config=lvvit_s"], "--type is needed"),
        ([*TPU, "--config=lvvit_s"], "unknown option --config=lvvit_s"),
        (["--name=pod", "--zone=z", "--type=v9-8", "--", "--config=lvvit_s"], "add --version="),
    ],
)
def test_missing_and_unknown_options_are_errors(cluster, options, message):
    done = cluster.run(POD, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (cluster.folder / "calls").exists()


def test_the_printed_commands_of_the_pod_launcher(cluster):
    done = cluster.run(POD, "--dry-run", "--delete", "--spot", "--project=mine", *TPU, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert not (cluster.folder / "calls").exists()
    tpu, end = "gcloud compute tpus tpu-vm", "--zone=us-west4-a --project=mine"
    wheel = f"build/wheel/tlvit-{version.__version__}-py3-none-any.whl"
    ssh = f"{tpu} ssh pod --worker=all '--command=bash launch_tpu_host.sh"
    assert done.stdout.replace(f"{ROOT}/", "").splitlines() == [
        f"{tpu} describe pod '--format=value(state)' {end}",
        f"{tpu} {CREATE} --spot {end}",
        "# installing tlvit on all hosts and starting it",
        "rm -rf build/wheel",
        "mkdir -p build/wheel/source",
        "cp -R tlvit configs setup.py pyproject.toml README.md LICENSE MANIFEST.in build/wheel/source",
        "python3 -m pip wheel --quiet --no-deps --wheel-dir=build/wheel build/wheel/source",
        f"{tpu} scp scripts/launch_tpu_host.sh {wheel} pod: --worker=all {end}",
        f'{ssh} install "file://$HOME/{wheel.split("/")[-1]}"\' {end}',
        rf"{ssh} start {' '.join(TRAIN[:2])} --config.model.name=\'\''lvvit_s\'\''' {end}",
        "# every 60 s, until the run ends:",
        f"{ssh.replace('all', '0')} look' {end}",
        "# after status 75 or a preemption all of this again, after any other status:",
        f"{ssh} log' {end}",
        f"{tpu} delete pod --quiet {end}",
    ]
    *_, start, _, _, _, _, _ = done.stdout.splitlines()
    (command,) = [w for w in shlex.split(start) if w.startswith("--command")]
    assert shlex.split(command)[3:] == TRAIN


def test_the_printed_commands_of_the_slurm_launcher(cluster):
    done = cluster.run(SLURM, "--dry-run", *TRAIN, SLURM_CPUS_PER_TASK="8")
    assert done.stdout.splitlines() == [
        "srun --kill-on-bad-exit=0 --cpus-per-task=8 tlvit train --multihost --config=lvvit_s "
        r"--workdir=gs://bucket/run --config.model.name=\'lvvit_s\'",
        "# after status 75:",
        "scontrol requeue JOB",
    ]
    assert not (cluster.folder / "calls").exists()


@pytest.mark.parametrize("status", [0, 75, 1])
def test_a_slurm_job_is_queued_again_after_status_75(cluster, status):
    done = cluster.run(SLURM, *TRAIN, statuses=[status], SLURM_JOB_ID="12")
    assert done.returncode == status
    assert (cluster.folder / "arguments").read_text().splitlines() == ["train", "--multihost", *TRAIN]
    srun, *scontrol = cluster.calls()
    assert srun.startswith("srun --kill-on-bad-exit=0 tlvit train --multihost")
    assert scontrol == ["scontrol requeue 12"] * (status == EXIT_STOPPED)


def test_slurm_options():
    """One task for each GPU, and SIGTERM to the tasks, not to the script (B:), before the time limit."""
    lines = [s.removeprefix("#SBATCH --") for s in SLURM.read_text().splitlines() if s.startswith("#SBATCH")]
    options = dict(line.split("=") if "=" in line else (line, "") for line in lines)
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    assert options["signal"] == "TERM@300"
    assert {"requeue", "open-mode"} <= set(options)


def test_the_slurm_script_outside_of_a_job_or_environment_says_so(cluster):
    environment = {"SLURM_JOB_ID": ""}
    assert "this script is for sbatch" in cluster.run(SLURM, *TRAIN, **environment).stderr
    (cluster.folder / "bin" / "tlvit").unlink()
    done = subprocess.run(
        [str(SLURM), *TRAIN],
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "tlvit is not on PATH" in done.stderr) == (2, True)


def test_the_commands_in_the_documentation(cluster):
    """The launchers take their options, and tlvit its arguments."""
    text = (ROOT / "docs" / "accelerators.md").read_text().replace("\\\n", "")
    pod, *_ = [
        shlex.split(line) for line in text.splitlines() if line.startswith("scripts/launch_tpu_pod.sh")
    ]
    slurm, *_ = [shlex.split(line) for line in text.splitlines() if line.startswith("sbatch")]
    assert cluster.run(ROOT / pod[0], "--dry-run", *pod[1:]).returncode == 0
    parse_flags(pod[pod.index("--") + 1 :])
    parse_flags(slurm[slurm.index("scripts/launch_slurm.sh") + 1 :])


@pytest.mark.parametrize("file", ["launch_gke.yaml", "launch_gke_gpu.yaml"])
def test_a_gke_job_starts_again_after_status_75_and_evictions(cluster, file):
    documents = list(yaml.safe_load_all((ROOT / "scripts" / file).read_text()))
    jobset = documents[-1]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    stopped, evicted = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert stopped == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [EXIT_STOPPED]},
    }
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (job["backoffLimit"], job["completionMode"], pod["restartPolicy"]) == (0, "Indexed", "Never")
    assert job["parallelism"] == job["completions"]
    assert pod["terminationGracePeriodSeconds"] >= 300
    account = [d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"] or ["default"]
    assert [pod["serviceAccountName"]] == account


@pytest.mark.parametrize("file", ["launch_gke.yaml", "launch_gke_gpu.yaml"])
def test_the_command_of_a_gke_pod_installs_and_trains(cluster, file):
    *_, jobset = yaml.safe_load_all((ROOT / "scripts" / file).read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    parse_flags(container["args"])
    (cluster.folder / "bin" / "pip").write_text(
        f'#!/usr/bin/env bash\necho {shlex.quote("pip")} "$@" >>$FAKE/calls\n'
    )
    (cluster.folder / "bin" / "pip").chmod(0o755)
    variables = {v["name"]: v["value"] for v in container["env"]}
    done = cluster.run(*container["command"], *container["args"], statuses=[75], **variables)
    assert done.returncode == EXIT_STOPPED
    (pip,) = cluster.calls()
    assert pip.startswith("pip install --quiet tlvit[tf,")
    arguments = (cluster.folder / "arguments").read_text().splitlines()
    assert arguments == ["train", "--multihost", *container["args"]]
