"""What the engine costs and saves, each part by itself: `python -m benchmarks.NAME`, from here.

attention.py      linear attention: time beside its products, memory, error
communication.py  bytes and rounds on the wire: counted, and by formula beside the published
projection.py     one rank's share of a large job, and what N ranks would come to
end_to_end.py     a whole job: seconds of each part, memory of each rank
peers/            the same picture by the engine, by diffusers and by DistriFusion, in turn
quality.py        what the displaced mode costs in quality
memory.py         what each setting that saves memory saves
codec.py          the streaming codec against the exact one
output.py         writing a picture, in each format
report.py         all of these in a few minutes, as one page (`make bench`)
common.py         what they share
"""
