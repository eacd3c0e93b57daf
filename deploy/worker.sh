#!/bin/sh
# Starts one worker under any launcher: gives it its token and its name, and becomes it.
#
#   SITE=paris TOKEN_FILE=worker/token sh deploy/worker.sh python my_training.py ...
#
# The command gets `--worker-id SITE.INDEX` at its end. SITE is the name in the credential, which may act as itself and
# as every name that begins with it and a dot. The index is the launcher's and the same after a restart, so that a
# worker takes its own place: that of a Kubernetes Indexed Job, of Slurm's srun, of torchrun, or INDEX; else 0.
set -eu

: "${SITE:?is the name in the credential, such as paris}"
index="${INDEX:-${JOB_COMPLETION_INDEX:-${SLURM_PROCID:-${RANK:-0}}}}"
if [ -n "${TOKEN_FILE:-}" ]; then
    case "$TOKEN_FILE" in
        /*) ;;
        *) TOKEN_FILE="$PWD/$TOKEN_FILE" ;;
    esac
    if [ ! -s "$TOKEN_FILE" ] || [ ! -r "$TOKEN_FILE" ]; then
        echo "TOKEN_FILE=$TOKEN_FILE is not there, empty, or not for this user to read" >&2
        exit 1
    fi
    # The file, not what is in it: the worker reads it again for every call, so a renewed token needs no restart.
    unset PACELINE_TOKEN
    export PACELINE_TOKEN_FILE="$TOKEN_FILE"
fi
exec "$@" --worker-id "$SITE.$index"
