#!/usr/bin/env bash
# Everything that needs a GPU, shown on one: benchmarks/gpu.sh [--rehearse] [--only STEP,...] [--budget SECONDS]
# Nothing comes from the network: wheels in .whl/ in this tree are unpacked into $SITE (/tmp/site), made elsewhere by
#   pip wheel --no-deps -w .whl megatron-core==0.19.2 hydra-core==1.3.2 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3
# Ends within 8 minutes; writes benchmarks/results/*_<gpu>.json; the exit code is 0 only if nothing failed.
# --rehearse: tiny sizes on the CPU stand-in, into a temporary folder; it shows that the scripts run, and no speed.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SITE=${SITE:-/tmp/site}

shopt -s nullglob
wheels=(.whl/*.whl)
if [ "${#wheels[@]}" -gt 0 ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "${wheels[@]}"
fi
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" benchmarks/gpu/drive.py "$@"
