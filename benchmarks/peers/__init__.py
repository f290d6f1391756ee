"""The peers side by side, each painting the same job: `python -m benchmarks.peers`.

__main__.py         the rounds, the table, the plot
jobs.py             a job, and how each peer paints it in processes of its own
models.py           whole pipelines of random weights, in the shapes of `benchmarks.networks`
distrifuser.txt     what DistriFusion needs: an environment of its own
distrifuser_job.py  the job by DistriFusion, run by that environment's interpreter
"""
