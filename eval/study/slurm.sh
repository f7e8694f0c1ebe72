#!/bin/bash
#SBATCH --gpus=1
# Submits a study to a cluster as Slurm arrays; run it with bash on the login node:
#
#     bash eval/study/slurm.sh pythia-160m              # 8 tasks per stage, one GPU each
#     PARTS=16 STAGES="evaluate compare" bash eval/study/slurm.sh pythia-160m --arms "pool_5*"
#     python eval/study/run.py --config pythia-160m --stages prepare     # first, if tasks have no network
#     python eval/study/run.py --config pythia-160m --status --part 1/8
#
# A stage starts when all tasks of the previous one have ended, even if some failed. Run it again if results are
# missing: finished ones are not recomputed.
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
