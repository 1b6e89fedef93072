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

refuse() {
    printf 'launch/gke/launch.sh: %s; got %q\n' "$1" "$2" >&2
    exit 2
}
check_number() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$1 must be a whole number of at least 1" "$2"; }

declare -A values=([NAME]=qwen-dist [SLICES]=1 [TOPOLOGY]="")
kind="" logs="" dry_run=""
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    if [[ $1 == --* && $1 != --dry-run && -z ${2-} ]]; then refuse "$1 needs a value" ""; fi
    case $1 in
        --kind) kind=$2 && shift ;;
        --name | --image | --accelerator | --topology | --nodes | --chips | --slices)
            key=${1#--}
            values[${key^^}]=$2
            shift
            ;;
        --logs) logs=$2 && shift ;;
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
for key in NODES CHIPS SLICES; do check_number "--${key,,}" "${values[$key]}"; done
if ! [[ ${values[NAME]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
    refuse "--name must have at most 40 lower-case letters, digits and -, and begin with a letter" "${values[NAME]}"
fi
for key in IMAGE ACCELERATOR TOPOLOGY; do
    if ! [[ ${values[$key]} =~ ^[A-Za-z0-9._/:@-]*$ ]]; then
        refuse "--${key,,} may have letters, digits and . _ / : @ -" "${values[$key]}"
    fi
done

# Quote as YAML strings; Kubernetes replaces $$ by $, and $(NAME) otherwise.
quote() {
    local text=$1 code character escaped
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//\$/\$\$}
    for ((code = 1; code < 160; code++)); do # control characters, of which the last 32 have two bytes in UTF-8
        if ((code == 32)); then code=127; fi
        printf -v escaped '\\x%02x' "$code"
        if ((code < 128)); then printf -v character '%b' "$escaped"; else printf -v character '%b' "\\xc2$escaped"; fi
        text=${text//"$character"/"$escaped"}
    done
    text=${text//$'\xe2\x80\xa8'/\\u2028} # line and paragraph separators, byte-order mark
    text=${text//$'\xe2\x80\xa9'/\\u2029}
    text=${text//$'\xef\xbb\xbf'/\\ufeff}
    printf '"%s"' "$text"
}
arguments=()
for argument in "$@"; do arguments+=("$(quote "$argument")"); done
joined=$(printf ', %s' "${arguments[@]}")
values[ARGUMENTS]=${joined:2}

# Replace each ${NAME} of the file once: an argument may contain such a text.
rest=$(<"$(dirname "$0")/$kind.yaml")
manifest=""
while [[ $rest =~ ^([^\$]*)\$\{([A-Z]+)\}(.*)$ ]]; do
    manifest+=${BASH_REMATCH[1]}${values[${BASH_REMATCH[2]}]}
    rest=${BASH_REMATCH[3]}
done
manifest+=$rest
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
