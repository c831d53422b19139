#!/usr/bin/env bash
#SBATCH --job-name=tlvit
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Trains on the GPUs of a SLURM cluster, one task for each GPU, and continues after the time limit and after preemptions.
#
#   sbatch --nodes=4 scripts/launch_slurm.sh --config=lvvit_s --workdir=/shared/lvvit_s \
#       --config.data.dir=/shared/tfds --config.data.score_maps=/shared/score_maps
#   scripts/launch_slurm.sh --dry-run --config=lvvit_s …      prints the commands and runs nothing
#
# The arguments are those of `tlvit train`. Options of sbatch before the script's name replace those above. A node with
# N GPUs needs --gres=gpu:N --ntasks-per-node=N: JAX gives task i of a node its GPU i, so every task must see all N
# (--gpus-per-task hides them). sbatch passes the environment on: activate that of tlvit first.
#
# SLURM sends SIGTERM 300 s before the time limit. tlvit then saves its state and ends with status 75, and the job is
# queued again, with the same command. Any other status is the job's. docs/accelerators.md explains the rest.
set -euo pipefail

dry_run=""
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi

# srun does not take --cpus-per-task from sbatch since SLURM 22.05. JAX ends all tasks when one is lost.
command=(srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
  tlvit train --multihost "$@")
if [ -n "$dry_run" ]; then
  printf -v line ' %q' "${command[@]}"
  printf '%s\n' "${line# }" "# after status 75:" "scontrol requeue ${SLURM_JOB_ID:-JOB}"
  exit
fi

[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this script is for sbatch: sbatch $0 …" >&2 && exit 2; }
command -v tlvit >/dev/null || { echo "error: tlvit is not on PATH: activate its environment before sbatch" >&2 && exit 2; }
status=0
"${command[@]}" || status=$?
if [ "$status" -eq 75 ]; then
  echo "# the run saved its state (status 75): job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
