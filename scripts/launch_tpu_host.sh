#!/usr/bin/env bash
# What scripts/launch_tpu_pod.sh runs on each host of a TPU.
#
#   launch_tpu_host.sh install PACKAGE    ends what is left of an earlier run, then installs tlvit
#   launch_tpu_host.sh start ARGUMENTS…   starts `tlvit train --multihost ARGUMENTS…` in the background
#   launch_tpu_host.sh look               prints "running" and the last line of the log, "ended" and how, or "nothing"
#   launch_tpu_host.sh stop               asks the run to save its state and end
#   launch_tpu_host.sh log                prints the last lines of the log
#
# Files in ~/tlvit-run: env/ (the Python environment), log, pid (of the shell that waits for tlvit), status (of tlvit,
# once it has ended), stopped (if `stop` asked for the end).
set -euo pipefail
mkdir -p ~/tlvit-run
cd ~/tlvit-run

is_running() { [ -e pid ] && [ ! -e status ] && kill -0 "$(cat pid)" 2>/dev/null; }

install() {
  while is_running && pkill -TERM -P "$(cat pid)"; do sleep 2; done
  # The images have Python 3.10 and tlvit needs 3.11 or newer: uv installs its own.
  [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv venv --quiet --allow-existing --python=3.12 env
  ~/.local/bin/uv pip install --quiet --python=env/bin/python --reinstall-package=tlvit "tlvit[tf,tpu,gcs] @ $1"
}

start() {
  is_running && return  # gcloud repeats a command whose connection broke
  rm -f status stopped
  (
    trap '' HUP
    code=0
    env/bin/tlvit train --multihost "$@" >>log 2>&1 || code=$?
    echo "$code" >status.new
    mv status.new status  # at once, so that nobody reads an empty file
  ) </dev/null >/dev/null 2>&1 &
  echo $! >pid
}

# Looks for the run first: one that ends meanwhile has written its status before it is gone.
look() {
  if is_running; then
    echo "running  $(tail -n 1 log)"
  elif [ -e status ]; then
    echo "ended $(cat status)$([ ! -e stopped ] || echo " as asked")"
  elif [ -e pid ]; then
    echo "ended the host was restarted"
  else
    echo "nothing"
  fi
}

case "$1" in
  install | start | look) "$@" ;;
  stop) is_running && touch stopped && pkill -TERM -P "$(cat pid)" ;;
  log) tail -n 20 log ;;
esac
