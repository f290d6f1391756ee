"""The service: pictures over HTTP, by ranks that are another group of processes.

    python -m engine.serve --engine-config configs/sdxl_4k.yaml --ranks 8

    app.py           the doors: who may come in, health, metrics, pages
    generations.py   POST /v1/images/generations, in OpenAI's shape, answered when all is painted
    images.py        /v1/images, for long jobs: status, events, content, the Deep Zoom view
    asked.py         what a request may say, and what it comes to
    jobs.py          one job: its record, who listens to it
    book.py          all jobs: the bounded queue, the records on disk
    workers.py       the group of ranks: started, fed, watched, started again
    group.py         one life of that group: a process, its pipes, its last words
    doors.py         the API key, the cookie, the hosts that may be asked for
    errors.py        mistakes and failures in OpenAI's shape
    metrics.py       what Prometheus may count
    settings.py      the service's own settings

The server holds no model and touches no GPU. So a rank that dies takes nothing along: the group
ends, the server starts another one, and the job goes on from its checkpoint, or fails with the
reason. What the server knows is in one folder, a folder for each job; a server that is killed finds
there what it owes.

This package asks for the extra `serve`.
"""
