#!/bin/bash
# The command of a frame: it paints the seed that is the frame's number. README.md beside it has an
# outline that calls it, and says what is tested.
#
#     frame.sh SEED --config job.yaml --output /mnt/pictures/%a.png ...
#
# %a in the flags becomes the seed. PYTHON names the interpreter, by default `python`.
seed=$1
shift

# The GPUs that RQD has reserved for this frame; it does not hide the others.
if [ -n "$CUE_GPU_CORES" ]; then
    export CUDA_VISIBLE_DEVICES=$CUE_GPU_CORES
fi

# RQD kills with SIGKILL and without notice, so there is a checkpoint every few steps; a frame that
# is retried goes on from it. Whoever is kinder and tells the whole group, gets the ranks' answer.
trap : TERM INT
"${PYTHON:-python}" -m launch --seed "$seed" --progress plain --resume \
    --checkpoint.every 5 "${@//%a/$seed}" 2>&1
code=$?

# RQD takes one line from a pipe whenever something new has come, and no more once the frame has
# ended: of lines that came together, such as the last ones of a failure, all but the first would be
# lost. One more line, after them, makes it take them all.
sleep 0.5
echo "exit code $code"
sleep 0.5
exit "$code"
