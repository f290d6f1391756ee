"""What Prometheus may count, in a registry of the service's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.serve.jobs import Job

_BUCKETS_S = (1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600, 7200, 21600)


class Metrics:
    """All of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.jobs = Counter(
            "linfusion_jobs", "Jobs that have ended.", ["outcome"], registry=registry
        )
        for outcome in ("completed", "failed", "mistake", "cancelled"):
            self.jobs.labels(outcome)  # a rate needs the zero before the first one
        self.refused = Counter(
            "linfusion_jobs_refused", "Jobs refused because the queue was full.", registry=registry
        )
        self.restarts = Counter(
            "linfusion_worker_restarts", "Times that the ranks have died.", registry=registry
        )
        self.pixels = Counter("linfusion_pixels", "Pixels of finished pictures.", registry=registry)
        self.picture_seconds = Histogram(
            "linfusion_picture_seconds",
            "Seconds that a finished picture took the ranks.",
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.queue_length = Gauge("linfusion_queue_length", "Jobs that wait.", registry=registry)
        self.progress = Gauge(
            "linfusion_job_progress", "Share of the job in progress, 0 to 1.", registry=registry
        )
        self.ready = Gauge(
            "linfusion_workers_ready", "1 while the ranks take jobs.", registry=registry
        )

    def count(self, job: Job) -> None:
        """A job that has just ended."""
        is_mistake = job.error is not None and job.error.code == "mistake"
        self.jobs.labels("mistake" if is_mistake else job.status).inc()
        if job.status == "completed":
            self.pixels.inc(job.picture.height * job.picture.width)
            self.picture_seconds.observe(job.seconds)
