#!/usr/bin/env bash
# srun starts every rank itself, as a task of the job. What follows the script is python's, and the training's:
#
#     sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 recipes/launch/slurm_srun.sh -m recipes.generate --preset 1.5b
#
# A node's tasks all have to see all of its GPUs (--gpus-per-node, not --gpus-per-task): rank i of a node takes the i-th.
#SBATCH --job-name=zeroopt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-}" # srun does not take it over from sbatch since SLURM 22.05
[[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK

# What torch reads of a rank, SLURM knows under other names, task by task.
# shellcheck disable=SC2016  # the inner shell, of each task, expands them
rank='
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
exec python "$@"'

export MASTER_ADDR="${hosts[0]}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may have their first ranks on one node
srun --kill-on-bad-exit=1 bash -c "$rank" rank "$@"
