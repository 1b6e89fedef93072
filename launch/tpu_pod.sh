#!/usr/bin/env bash
# Run the same command on every worker of a TPU VM slice.
#
#   launch/tpu_pod.sh --name my-pod --zone us-east5-a install            copies this checkout and installs it
#   launch/tpu_pod.sh --name my-pod --zone us-east5-a run -- batch --model DIR --input in.jsonl --output out.jsonl
#   launch/tpu_pod.sh --name my-pod --zone us-east5-a logs               copies each worker's log here
#   launch/tpu_pod.sh --name my-pod --zone us-east5-a stop
#
# Everything after -- goes to qwen-dist unchanged. The run continues when this script or its connection ends: `run` with the
# same arguments then follows the existing run. When one worker fails, all of them stop by themselves.
set -euo pipefail

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2
    exit 2
}

refuse() {
    printf 'launch/tpu_pod.sh: %s; got %q\n' "$1" "$2" >&2
    exit 2
}

name="" zone="" project="" logs="" dry_run=""
while [ $# -gt 0 ]; do
    if [[ $1 == --* && $1 != --dry-run && -z ${2-} ]]; then refuse "$1 needs a value" ""; fi
    case $1 in
        --name) name=$2 && shift ;;
        --zone) zone=$2 && shift ;;
        --project) project=$2 && shift ;;
        --logs) logs=$2 && shift ;;
        --dry-run) dry_run=yes ;;
        install | run | logs | stop) break ;;
        *) usage ;;
    esac
    shift
done
if [ $# -lt 1 ] || [ -z "$name" ] || [ -z "$zone" ]; then usage; fi
step=$1
shift
logs=${logs:-logs/$name}
where=(--zone="$zone" ${project:+--project="$project"})

run() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
on_all() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

collect_logs() {
    [ -n "$dry_run" ] || mkdir -p "$logs"
    local workers=0
    if [ -z "$dry_run" ]; then
        workers=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(networkEndpoints.len())')
    fi
    for ((worker = 0; worker < workers; worker++)); do
        run gcloud compute tpus tpu-vm scp "$name:qwen-dist-run/log" "$logs/$worker.log" "${where[@]}" --worker="$worker" || true
    done
    echo "the logs are in $logs" >&2
}

case $step in
    install)
        root=$(cd "$(dirname "$0")/.." && pwd)
        run tar --exclude=.git --exclude=.venv --exclude=logs -czf /tmp/qwen-dist.tgz -C "$root" .
        run gcloud compute tpus tpu-vm scp /tmp/qwen-dist.tgz "$name:" "${where[@]}" --worker=all
        on_all 'mkdir -p qwen-dist && tar -xzf qwen-dist.tgz -C qwen-dist && python3 -m venv qwen-dist/.venv && qwen-dist/.venv/bin/pip install --quiet "./qwen-dist[tpu]"'
        ;;
    run)
        if [ $# -lt 2 ] || [ "$1" != "--" ]; then usage; fi
        shift
        # Follow a run that exists; else start one that survives a lost connection and writes its exit code to a file.
        printf -v arguments '%q ' "$@"
        printf -v command '%q' "cd; qwen-dist/.venv/bin/qwen-dist $arguments > qwen-dist-run/log 2>&1; echo \$? > qwen-dist-run/status"
        status=0
        on_all "mkdir -p qwen-dist-run; if ! kill -0 -- -\$(cat qwen-dist-run/pid 2>/dev/null) 2>/dev/null; then rm -f qwen-dist-run/status; setsid nohup bash -c $command >/dev/null 2>&1 </dev/null & echo \$! > qwen-dist-run/pid; fi; while [ ! -f qwen-dist-run/status ]; do sleep 2; done; exit \$(cat qwen-dist-run/status)" || status=$?
        collect_logs
        exit "$status"
        ;;
    logs) collect_logs ;;
    stop) on_all "kill -TERM -- -\$(cat qwen-dist-run/pid)" ;;
esac
