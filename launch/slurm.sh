#!/usr/bin/env bash
# Run one process on each node of a Slurm job, with all GPUs of the node.
#
#   launch/slurm.sh --nodes 4 --gpus-per-node 8 --partition gpu -- batch --model DIR --input in.jsonl --output out.jsonl
#
# Everything after -- goes to qwen-dist unchanged. Run this on a login node, where it makes an allocation, or inside an
# allocation. qwen-dist reads process ids and coordinator from Slurm's variables. When one process fails, Slurm stops all.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: launch/slurm.sh --nodes N [--gpus-per-node G] [--partition P] [--time T] [--logs DIR] [--dry-run] -- COMMAND [ARGUMENTS]
TEXT
    exit 2
}

refuse() {
    printf 'launch/slurm.sh: %s; got %q\n' "$1" "$2" >&2
    exit 2
}
check_number() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$1 must be a whole number of at least 1" "$2"; }

nodes="" logs="" dry_run="" options=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    if [[ $1 == --* && $1 != --dry-run && -z ${2-} ]]; then refuse "$1 needs a value" ""; fi
    case $1 in
        --nodes) nodes=$2 && shift ;;
        --gpus-per-node)
            check_number "$1" "$2"
            options+=("$1=$2") && shift
            ;;
        --partition | --time) options+=("$1=$2") && shift ;;
        --logs) logs=$2 && shift ;;
        --dry-run) dry_run=yes ;;
        *) usage ;;
    esac
    shift
done
if [ $# -lt 2 ] || [ -z "$nodes" ]; then usage; fi
shift
check_number --nodes "$nodes"
logs=${logs:-logs/slurm-$(date +%Y%m%d-%H%M%S)}

command=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 "${options[@]}"
    --kill-on-bad-exit=1 --wait=60 --output="$logs/%t.log" qwen-dist "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
mkdir -p "$logs"
status=0
"${command[@]}" || status=$?
if [ "$status" = 0 ]; then
    cat "$logs/0.log"
else
    grep -h "^qwen-dist" "$logs"/*.log | sort -u >&2 || true
    echo "launch/slurm.sh: failed with exit code $status; the logs are in $logs" >&2
fi
exit "$status"
