#!/bin/bash
#SBATCH --gpus=1
# A study on a cluster, as Slurm arrays; run it on the login node, with bash:
#
#     bash eval/study/slurm.sh pythia-160m              # 8 tasks a stage, each with a GPU
#     PARTS=16 STAGES="evaluate compare" bash eval/study/slurm.sh pythia-160m --arms "pool_5*"
#     python eval/study/run.py --config pythia-160m --stages prepare     # before it, where tasks have no network
#     python eval/study/run.py --config pythia-160m --status --part 1/8
#
# A stage begins when all tasks of the one before have ended, well or not. Run it again if something is missing: what is
# there is not computed again.
if [ -n "$SLURM_ARRAY_TASK_ID" ]; then
    exec python "$RUN" "$@" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
fi
config=$1 && shift
export RUN="$(cd "$(dirname "$0")" && pwd)/run.py"
for stage in ${STAGES:-train evaluate absorption synthetic compare}; do
    job=$(sbatch --parsable --array="1-${PARTS:-8}" --job-name="$config-$stage" ${job:+--dependency=afterany:$job} \
        "$0" --config "$config" --stages "$stage" "$@") || exit
    echo "$stage: job $job"
done
