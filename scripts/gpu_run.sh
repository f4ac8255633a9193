#!/usr/bin/env bash
# Runs what scripts/gpu_pack.sh has packed, on a machine with an NVIDIA GPU and python3. Two calls, sized for a machine
# that is borrowed for minutes; FOLDER is the pack, RECORD an empty folder to be:
#
#   timeout -k 10 375 bash FOLDER/run.sh RECORD --seconds 345                            # a fresh machine: tests, short bench, sanitizers
#   timeout -k 10 270 bash FOLDER/run.sh RECORD2 --seconds 240 --only bench,variants,ncu  # then, if all passed: the measurements
#
# The results come back as RECORD.tar.gz (--archive FILE puts it elsewhere); the summary is what is printed last. Without
# --seconds there are 20 minutes, for all stages. run.py beside this file says what the stages are.
exec python3 "$(dirname "$(readlink -f "$0")")/run.py" "$@"
