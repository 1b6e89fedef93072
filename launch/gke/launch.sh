#!/usr/bin/env bash
# Run the same command on all hosts of TPU slices, or all GPU nodes, of a Kubernetes cluster with JobSet.
#
#   launch/gke/launch.sh --kind tpu --image IMAGE --accelerator tpu-v6e-slice --topology 4x4 --nodes 4 --chips 4 -- batch ...
#   launch/gke/launch.sh --kind gpu --image IMAGE --accelerator nvidia-h100-80gb --nodes 2 --chips 8 -- batch ...
#
# --nodes: hosts of a slice (for GPUs: of the run). --chips: chips of a host. --slices: number of TPU slices. Everything
# after -- goes to qwen-dist unchanged. --dry-run prints the manifest. If one host fails, the whole run ends.
set -euo pipefail

usage() {
    sed -n '3,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

declare -A values=([NAME]=qwen-dist [SLICES]=1 [TOPOLOGY]="")
kind="" logs="" dry_run=""
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    case $1 in
        --kind) kind=${2:?} && shift ;;
        --name | --image | --accelerator | --topology | --nodes | --chips | --slices)
            key=${1#--}
            values[${key^^}]=${2:?}
            shift
            ;;
        --logs) logs=${2:?} && shift ;;
        --dry-run) dry_run=yes ;;
        *) usage ;;
    esac
    shift
done
if [ $# -lt 2 ]; then usage; fi
shift
case $kind in
    tpu) needed="IMAGE ACCELERATOR TOPOLOGY NODES CHIPS" ;;
    gpu) needed="IMAGE ACCELERATOR NODES CHIPS" ;;
    *) usage ;;
esac
for key in $needed; do
    if [ -z "${values[$key]:-}" ]; then
        echo "launch/gke/launch.sh: --${key,,} is missing" >&2
        exit 2
    fi
done

# Quote as JSON strings, and escape $(NAME), which Kubernetes would expand.
arguments=()
for argument in "$@"; do
    argument=${argument//\\/\\\\}
    argument=${argument//\"/\\\"}
    argument=${argument//$'\n'/\\n}
    argument=${argument//\$(/\$\$(}
    arguments+=("\"$argument\"")
done
joined=$(printf ', %s' "${arguments[@]}")
values[ARGUMENTS]=${joined:2}

manifest=$(<"$(dirname "$0")/$kind.yaml")
for key in "${!values[@]}"; do
    manifest=${manifest//"\${$key}"/"${values[$key]}"}
done
if [ -n "$dry_run" ]; then
    printf '%s\n' "$manifest"
    exit 0
fi

name=${values[NAME]}
logs=${logs:-logs/$name}
mkdir -p "$logs"
kubectl apply -f - <<<"$manifest"
until kubectl wait "jobset/$name" --for=condition=Completed --timeout=5s >/dev/null 2>&1; do
    if kubectl wait "jobset/$name" --for=condition=Failed --timeout=1s >/dev/null 2>&1; then break; fi
done
for pod in $(kubectl get pods -l "jobset.sigs.k8s.io/jobset-name=$name" -o name); do
    kubectl logs "$pod" >"$logs/${pod#pod/}.log" || true
done
echo "the logs are in $logs" >&2
kubectl wait "jobset/$name" --for=condition=Completed --timeout=1s >/dev/null
