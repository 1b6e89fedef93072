#!/usr/bin/env bash
# Run several processes on this machine, each with its own CPU devices, as a multi-host run would.
#
#   launch/local.sh --processes 4 --devices 2 -- batch --model DIR --input in.jsonl --output out.jsonl
#
# Everything after -- goes to qwen-dist unchanged. Standard output is that of process 0; every process has a log. When one
# process fails, all are stopped, and the exit code is that of the process that was killed, or else of the first that failed.
set -euo pipefail

usage() {
    echo "usage: launch/local.sh [--processes N] [--devices M] [--port P] [--logs DIR] [--dry-run] -- COMMAND [ARGUMENTS]" >&2
    exit 2
}

refuse() {
    printf 'launch/local.sh: %s; got %q\n' "$1" "$2" >&2
    exit 2
}
check_number() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$1 must be a whole number of at least 1" "$2"; }

processes=2 devices=1 port=$((20000 + RANDOM % 20000)) logs="" dry_run=""
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    if [[ $1 == --* && $1 != --dry-run && -z ${2-} ]]; then refuse "$1 needs a value" ""; fi
    case $1 in
        --processes) processes=$2 && shift ;;
        --devices) devices=$2 && shift ;;
        --port) port=$2 && shift ;;
        --logs) logs=$2 && shift ;;
        --dry-run) dry_run=yes ;;
        *) usage ;;
    esac
    shift
done
[ $# -ge 2 ] || usage
shift
check_number --processes "$processes"
check_number --devices "$devices"
check_number --port "$port"
if ((port > 65535)); then refuse "--port must be at most 65535" "$port"; fi
logs=${logs:-logs/local-$(date +%Y%m%d-%H%M%S)}

environment() {
    printf '%s\n' JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "QWEN_DIST_COORDINATOR=127.0.0.1:$port" \
        "QWEN_DIST_NUM_PROCESSES=$processes" "QWEN_DIST_PROCESS_ID=$1" PYTHONUNBUFFERED=1
}

if [ -n "$dry_run" ]; then
    for ((i = 0; i < processes; i++)); do
        mapfile -t variables < <(environment "$i")
        printf '%q ' env "${variables[@]}" qwen-dist "$@"
        printf '> %q\n' "$logs/$i.log"
    done
    exit 0
fi

mkdir -p "$logs"
declare -A running=()
stop_all() {
    for pid in "${!running[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    sleep 2
    for pid in "${!running[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
}
trap 'stop_all; exit 130' INT TERM

for ((i = 0; i < processes; i++)); do
    mapfile -t variables < <(environment "$i")
    if [ "$i" = 0 ]; then
        env "${variables[@]}" qwen-dist "$@" </dev/null 2>"$logs/$i.log" &
    else
        env "${variables[@]}" qwen-dist "$@" </dev/null >"$logs/$i.log" 2>&1 &
    fi
    running[$!]=$i
done

status=0
while [ ${#running[@]} -gt 0 ] && [ "$status" = 0 ]; do
    wait -n -p ended "${!running[@]}" || status=$?
    unset "running[$ended]"
done
if [ "$status" != 0 ]; then
    # The other processes notice and end by themselves; those that still run after a minute are killed.
    for ((tenths = 0; tenths < 600; tenths++)); do
        alive=""
        for pid in "${!running[@]}"; do ! kill -0 "$pid" 2>/dev/null || alive=yes; done
        [ -n "$alive" ] || break
        sleep 0.1
    done
    # On a busy machine a process that noticed may end before the one that was killed.
    for pid in "${!running[@]}"; do
        [ -z "$alive" ] || break # those are killed here
        code=0
        wait "$pid" || code=$?
        if ((status <= 128 && code > 128)); then status=$code; fi
    done
    [ -z "$alive" ] || stop_all
    grep -h "^qwen-dist" "$logs"/*.log | sort -u >&2 || true
    echo "launch/local.sh: failed with exit code $status; the logs are in $logs" >&2
fi
exit "$status"
