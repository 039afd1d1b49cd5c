#!/bin/sh
# Measures this machine's TPU or GPU in about 15 minutes; see benchmarks/on_device.py. Flags are passed on:
#   benchmarks/on_device.sh --config=stage3_mixed --config.batch_size=8
# PYTHON names an interpreter that has the package already, with JAX for the device; without it an environment is made.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    case "$(ls /dev 2>/dev/null)" in
        *nvidia0*) extra=cuda12 ;;
        *accel0* | *vfio*) extra=tpu ;;
        *) echo "error: no TPU or NVIDIA GPU in /dev; set PYTHON to try it on a CPU" >&2; exit 2 ;;
    esac
    python3 -m venv runs/on_device/venv
    runs/on_device/venv/bin/pip install --quiet --no-compile -e ".[$extra]"
    PYTHON=runs/on_device/venv/bin/python
fi
exec "$PYTHON" -m benchmarks.on_device "$@"
