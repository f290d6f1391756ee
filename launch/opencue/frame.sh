#!/bin/bash
# UNTESTED on OpenCue itself: the command of a frame, which paints the seed that is its number.
# README.md beside it has the outline, and says what is tested.
#
#     frame.sh SEED --config job.yaml --output /mnt/pictures/%a.png ...
#
# %a in the flags becomes the seed. PYTHON names the interpreter, by default `python`.
seed=$1
shift

# RQD kills with SIGKILL and without notice, so there is a checkpoint every few steps; a frame that
# is retried goes on from it. exec, so that whoever signals this frame signals the launcher.
exec "${PYTHON:-python}" -m launch --seed "$seed" --progress plain --resume \
    --checkpoint.every 5 "${@//%a/$seed}"
