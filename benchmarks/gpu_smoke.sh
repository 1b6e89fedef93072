#!/usr/bin/env bash
# Run gpu.py on a machine that has an NVIDIA GPU, Python 3.11 or newer and perhaps jax, but neither a network nor these packages.
#   gpu_smoke.sh collect WHEELS [3.12]    with a network: the packages, but jax for CUDA, for that version of Python (35 MB)
#   gpu_smoke.sh collect-cuda WHEELS      also jax for CUDA (gigabytes), for a machine without it or with another version
#   gpu_smoke.sh run WHEELS OUT […]       without a network: unpack what is missing, then gpu.py --output OUT […]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
packages=(flax ml_collections ml_dtypes safetensors tokenizers jinja2 markupsafe huggingface_hub rich optax absl-py
  pyyaml treescope msgpack typing_extensions packaging urllib3 tqdm filelock fsspec requests markdown-it-py mdurl pygments
  orbax-checkpoint etils tensorstore humanize nest_asyncio simplejson psutil importlib_resources zipp)

collect() { # folder, version of Python, packages…
  local folder=$1 version=$2; shift 2
  "$python" -m pip download --quiet --dest "$folder" --only-binary :all: --no-deps --python-version "$version" \
    --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 "$@"
  du -sh "$folder"
}

unpack() { # wheels, folder: a wheel is a zip file; those of packages that are installed already stay where they are
  "$python" - "$1" "$2" <<'PY'
import importlib.metadata, pathlib, re, sys, zipfile
wheels, site = map(pathlib.Path, sys.argv[1:])
def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
def is_old_jax(name):
    found = installed(name)
    return found is not None and name.startswith("jax") and not (0, 10) <= tuple(map(int, re.findall(r"\d+", found)[:2])) < (0, 13)
for wheel in sorted(wheels.glob("*.whl")):
    name, version = wheel.name.split("-")[:2]
    if installed(name) is None or is_old_jax(name):
        zipfile.ZipFile(wheel).extractall(site)
        print("unpacked", name, version)
    else:
        print("found", name, installed(name))
PY
}

case ${1:-} in
  collect) collect "$2" "${3:-3.12}" "${packages[@]}" ;;
  collect-cuda) "$python" -m pip download --quiet --dest "$2" 'jax[cuda13]>=0.10,<0.13' ;;
  run)
    site=${SITE:-$(mktemp -d)}
    unpack "$2" "$site"
    out=$3; shift 3
    export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"
    "$python" -c "import jax; print(jax.__version__, jax.devices())"
    "$python" "$root/benchmarks/gpu.py" --output "$out" "$@" ;;
  *) sed -n '2,5p' "$0"; exit 2 ;;
esac
