#!/bin/bash
# The measurements on a GPU that SPEED.md shows, in two calls of at most four minutes each:
#
#     bash eval/gpu.sh tests            # tests/test_gpu.py, steps at d_sae 16k, bitwise repeats, a profile
#     bash eval/gpu.sh bench            # steps at 65k and 131k, whole runs, torch's own sparse products
#     bash eval/gpu.sh --wheels FOLDER tests        # install these wheels first, on a machine without a network
#     bash eval/gpu.sh --device cpu --tiny bench    # check that it runs
#
# Results are written to $OUT, or to eval/results (with --tiny, to a temporary folder) if it is unset, as they come (those
# of whole runs at the end).
# gpu_parts.txt says how each part ended; finished parts are skipped. If $OUT lacks this file, that of eval/results is
# copied there. Each part has its own time limit, so that one that hangs leaves time for the others.
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} results=eval/results device=cuda tiny=() run=() call="" seconds=230
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=$2 && shift ;;
        --device) device=$2 && shift ;;
        --tiny) tiny=(--tiny) run=(--d-sae 256 --k 4 --steps 3 --batch-size 512 --repeats 1) ;;
        tests | bench) call=$1 ;;
        *) echo "Usage: bash eval/gpu.sh [--wheels FOLDER] [--device DEVICE] [--tiny] tests|bench" >&2 && exit 2 ;;
    esac
    shift
done
[ "$call" ] || { echo "Say what to run: tests or bench" >&2 && exit 2; }
out=${OUT:-$results} failed=0
[ ${#tiny[@]} -gt 0 ] && out=${OUT:-$(mktemp -d)} # as finished parts, they would keep a GPU's from being measured
mkdir -p "$out"
for file in bench_gpu.json bench_end_to_end_gpu.json gpu_parts.txt; do
    [ ${#tiny[@]} -gt 0 ] && break
    [ -e "$results/$file" ] && [ ! -e "$out/$file" ] && cp "$results/$file" "$out/"
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ "$wheels" ]; then
    folder=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --target "$folder" "$wheels"/*.whl || exit
    export PYTHONPATH=$PYTHONPATH:$folder
fi

# Run a command unless it succeeded before, and again while failed kernels cost it the GPU; the limit is in seconds.
part() {
    local name=$1 limit=$2 status=75 start=$SECONDS left
    shift 2
    grep -qs "^$name ended with 0 " "$out/gpu_parts.txt" && return
    while [ $status = 75 ]; do
        left=$((limit - SECONDS + start))
        [ $left -gt $((seconds - SECONDS)) ] && left=$((seconds - SECONDS))
        [ $left -gt 0 ] || break
        timeout --kill-after=5 "$left" "$@" 2>&1 | tee -a "$out/gpu_log.txt"
        status=${PIPESTATUS[0]}
    done
    echo "$name ended with $status after $((SECONDS - start)) s" | tee -a "$out/gpu_parts.txt"
    [ "$status" = 0 ] || failed=1
}

# Run one part of bench/gpu.py.
measure() {
    part "$1" "$2" "$python" eval/bench/gpu.py "$1" --device "$device" --out "$out/bench_gpu.json" "${tiny[@]}"
}

if [ $call = tests ]; then
    part tests 110 "$python" -m pytest tests/test_gpu.py -q -rfEs -p no:cacheprovider
    measure 16k 80
    measure repeats 25
    measure profile 30
else
    measure 65k 75
    measure 131k 75
    part end_to_end 60 "$python" eval/bench/end_to_end.py --device "$device" --out "$out/bench_end_to_end_gpu.json" "${run[@]}"
    measure without_triton 30
fi
exit $failed
