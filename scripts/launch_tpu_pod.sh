#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: creates the TPU or uses the existing one of this name, installs tlvit on all of
# its hosts, starts `tlvit train --multihost` on all of them, follows the run, and resumes it after a preemption.
#
#   scripts/launch_tpu_pod.sh --name=lvvit --zone=us-west4-a --type=v5litepod-16 --spot --delete -- \
#       --config=lvvit_s --workdir=gs://BUCKET/lvvit_s --config.data.dir=gs://BUCKET/tfds \
#       --config.data.score_maps=gs://BUCKET/score_maps
#
# The arguments after -- are those of `tlvit train`. Options:
#   --name=NAME --zone=ZONE --type=TYPE   the TPU (gcloud compute tpus tpu-vm accelerator-types list --zone=ZONE)
#   --project=PROJECT    default: the project that gcloud is configured for
#   --version=VERSION    TPU software version; default: the one for TYPE
#   --spot               a spot TPU, which costs less and may be preempted at any time
#   --create-flag=FLAG   one more flag of `gcloud compute tpus tpu-vm create`, such as --service-account=…; repeatable
#   --package=PACKAGE    a wheel, or git+https://…; default: a wheel of this checkout
#   --poll=SECONDS       how often the run is looked at; default 60
#   --stop               asks a started run to save its state and end, and does nothing else
#   --delete             deletes the TPU when the run has ended
#   --dry-run            prints the commands for a TPU that does not exist yet, and runs nothing
#
# The run does not depend on this script: Ctrl-C ends only the script, and the same command follows the run again.
# The exit status is that of `tlvit train`. docs/accelerators.md explains the rest.
set -euo pipefail

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name="" zone="" type="" project="" version="" package="" poll=60 stop="" delete="" dry_run=""
create_flags=()
train=""  # arguments of tlvit train, quoted
ended=""  # how the run ended: its exit status, or the state of the TPU

fail() {
  echo "error: $1 (--help shows the options)" >&2
  exit 2
}

log() { echo "# $*"; }

parse() {
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
      --name=* | --zone=* | --type=* | --project=* | --version=* | --package=* | --poll=*)
        local option="${1%%=*}"
        printf -v "${option#--}" %s "${1#*=}"
        ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --spot) create_flags+=(--spot) ;;
      --stop) stop=1 ;;
      --delete) delete=1 ;;
      --dry-run) dry_run=1 ;;
      -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;;
      *) fail "unknown option $1; the arguments of tlvit train follow --" ;;
    esac
    shift
  done
  [ -n "$name" ] && [ -n "$zone" ] || fail "--name and --zone are needed"
  [ -z "$stop" ] || return 0
  [ -n "$type" ] || fail "--type is needed"
  [ $# -gt 1 ] || fail "the arguments of tlvit train are needed, after --"
  shift
  train=$(printf ' %q' "$@")
  case "$train" in
    *--workdir=gs://*) ;;
    *) log "warning: --workdir is not in gs://. It must be a folder that all hosts share and that outlives the TPU." ;;
  esac
  [ -n "$version" ] || version=$(software_version "$type")
}

software_version() {  # cloud.google.com/tpu/docs/runtimes
  case "$1" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "no software version is known for $1: add --version=…" ;;
  esac
}

run() {  # runs a command; with --dry-run prints it, quoted
  if [ -z "$dry_run" ]; then
    "$@"
    return
  fi
  local word line=""
  for word in "$@"; do
    case "$word" in
      *[!A-Za-z0-9_./:=,@%+-]*) line+=" '${word//\'/\'\\\'\'}'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line# }"
}

tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+--project="$project"}; }

on_hosts() { tpu ssh "$name" --worker="$1" --command="bash launch_tpu_host.sh $2"; }  # $1: a host's index, or all

state() {  # the state of the TPU: READY, PREEMPTED, …, or MISSING
  if tpu describe "$name" --format='value(state)' 2>"$messages"; then
    return
  elif grep -q NOT_FOUND "$messages"; then
    echo MISSING
  else
    cat "$messages" >&2
    return 1
  fi
}

create() {  # waits for capacity; another error ends the script
  local status=0
  log "creating $name, $type in $zone"
  while true; do
    tpu create "$name" --accelerator-type="$type" --version="$version" ${create_flags[@]+"${create_flags[@]}"} \
      2>"$messages" && return
    status=$?
    cat "$messages" >&2
    grep -q "no more capacity" "$messages" || exit "$status"
    log "trying again in $((5 * poll)) s"
    sleep "$((5 * poll))"
  done
}

make_ready() {
  local found
  while true; do
    found=$(state)
    case "$found" in
      READY) return ;;
      MISSING) create ;;
      STOPPED) tpu start "$name" ;;
      PREEMPTED | TERMINATED)
        log "$name is $found: deleting it"
        tpu delete "$name" --quiet
        ;;
      *)
        log "$name is $found: waiting"
        sleep "$poll"
        ;;
    esac
  done
}

build_wheel() {  # once, of a copy, because setuptools leaves files in the folder that it builds
  local folder="$checkout/build/wheel" number
  number=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$checkout/tlvit/version.py")
  package="$folder/tlvit-$number-py3-none-any.whl"
  run rm -rf "$folder"
  run mkdir -p "$folder/source"
  run cp -R "$checkout"/{tlvit,configs,setup.py,pyproject.toml,README.md,LICENSE,MANIFEST.in} "$folder/source"
  run python3 -m pip wheel --quiet --no-deps --wheel-dir="$folder" "$folder/source"
}

start() {
  log "installing tlvit on all hosts and starting it"
  [ -n "$package" ] || build_wheel
  local files=("$checkout/scripts/launch_tpu_host.sh") requirement="$package"
  case "$package" in
    *://*) ;;
    *) files+=("$package") requirement="file://\$HOME/${package##*/}" ;;
  esac
  tpu scp "${files[@]}" "$name:" --worker=all
  on_hosts all "install \"$requirement\""
  on_hosts all "start$train"
}

follow() {  # prints the last line of the log until the run ends; sets `ended`
  local seen found
  while true; do
    if seen=$(on_hosts 0 look 2>"$messages"); then
      case "$seen" in
        "ended "*) ended="${seen#ended }" && return ;;
        *) echo "$seen" ;;
      esac
    elif found=$(state) && [ "$found" != READY ]; then
      ended="$found"
      return
    else
      log "no connection to $name"
    fi
    sleep "$poll"
  done
}

finish() {  # $1: exit status
  if [ -n "$delete" ]; then
    tpu delete "$name" --quiet
  else
    log "$name still costs money; to delete it: gcloud compute tpus tpu-vm delete $name --zone=$zone${project:+ --project=$project}"
  fi
  exit "$1"
}

parse "$@"
if [ -n "$stop" ]; then
  on_hosts all stop
  exit
fi
if [ -n "$dry_run" ]; then
  tpu describe "$name" --format='value(state)'
  tpu create "$name" --accelerator-type="$type" --version="$version" ${create_flags[@]+"${create_flags[@]}"}
  start
  log "every $poll s, until the run ends:"
  on_hosts 0 look
  log "after status 75 or a preemption all of this again, after any other status:"
  on_hosts all log
  finish 0
fi

messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
trap 'log "the run continues: the same command follows it, --stop ends it"; exit 130' INT
while true; do
  make_ready
  case "$(on_hosts 0 look 2>/dev/null || true)" in
    running*) log "tlvit runs on $name already" ;;
    *) start ;;
  esac
  follow
  case "$ended" in
    0) log "the run is complete" && finish 0 ;;
    75) log "the run was asked to stop and saved its state (status 75): starting it again" ;;
    "75 as asked") log "the run has saved its state: the same command resumes it" && finish 75 ;;
    [0-9]*)
      on_hosts all log || true
      [ "$(state || echo READY)" = READY ] || continue
      log "tlvit ended with status $ended; above are the last lines of each host"
      finish "${ended%% *}"
      ;;
    *) log "$name: $ended" ;;
  esac
done
