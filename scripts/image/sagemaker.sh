#!/bin/sh
# The entry point for SageMaker: its variables become the launcher's. SageMaker's argument `serve` says nothing.
set -eu

if [ -z "${HF_MODEL_ID:-}" ]; then
    echo "HF_MODEL_ID must be set" >&2
    exit 1
fi
[ "${1:-}" != serve ] || shift
export MODEL_ID="$HF_MODEL_ID"
[ -z "${HF_MODEL_REVISION:-}" ] || export REVISION="$HF_MODEL_REVISION"
[ -z "${SM_NUM_GPUS:-}" ] || export NUM_SHARD="$SM_NUM_GPUS"
[ -z "${HF_MODEL_QUANTIZE:-}" ] || export QUANTIZE="$HF_MODEL_QUANTIZE"
[ -z "${HF_MODEL_TRUST_REMOTE_CODE:-}" ] || export TRUST_REMOTE_CODE="$HF_MODEL_TRUST_REMOTE_CODE"
exec text-generation-launcher --port "${PORT:-8080}" "$@"
