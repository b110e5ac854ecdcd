#!/usr/bin/env bash
# One torchrun a node, which starts the ranks of that node. What follows the script is torchrun's, and the training's:
#
#     sbatch --nodes=4 --gpus-per-node=8 recipes/launch/slurm_torchrun.sh -m recipes.generate --preset 1.5b
#
# Without GPUs, RANKS_PER_NODE says how many ranks a node has. Submit it where the repository is.
#SBATCH --job-name=zeroopt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-}" # srun does not take it over from sbatch since SLURM 22.05
[[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK

# The port depends on the job: two jobs may have their first ranks on one node.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    "$@"
