"""Every metric of a worker: name, kind, labels and meaning. What serves them and what documents them reads this."""

from __future__ import annotations

from enum import StrEnum

from attrs import frozen


class Kind(StrEnum):
    """What Prometheus does with a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@frozen(kw_only=True)
class Spec:
    """One metric. A counter's name is shown with ``_total`` at its end."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    #: Upper bounds of a histogram's buckets.
    buckets: tuple[float, ...] = ()

    @property
    def shown_name(self) -> str:
        """The name in queries."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name


#: From a cached picture to a long video.
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 90, 120, 180, 240, 360, 600, 1200)

# -- what ended and how long it took, counted by this worker

JOBS = Spec(
    name="ourvidz_jobs",
    kind=Kind.COUNTER,
    labels=("job_type", "outcome"),
    meaning="Jobs that ended here: `completed`, `failed`, or `released` to another worker",
)
ERRORS = Spec(
    name="ourvidz_job_errors",
    kind=Kind.COUNTER,
    labels=("job_type", "error_type"),
    meaning="Attempts that failed, by error; `other` is an exception of a plugin",
)
RETRIES = Spec(
    name="ourvidz_job_retries",
    kind=Kind.COUNTER,
    labels=("job_type",),
    meaning="Attempts after which the job runs again",
)
DEAD_LETTERS = Spec(
    name="ourvidz_dead_letters", kind=Kind.COUNTER, meaning="Messages put aside by this worker, not to be tried again"
)
ASSETS = Spec(name="ourvidz_assets", kind=Kind.COUNTER, labels=("job_type",), meaning="Assets stored")
ASSET_BYTES = Spec(name="ourvidz_asset_bytes", kind=Kind.COUNTER, labels=("job_type",), meaning="Bytes stored")
WAITED = Spec(
    name="ourvidz_job_wait_seconds",
    kind=Kind.HISTOGRAM,
    labels=("job_type",),
    buckets=(1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600),
    meaning="From the message's `created_at` to its first start, by the producer's clock",
)
STAGES = Spec(
    name="ourvidz_stage_seconds",
    kind=Kind.HISTOGRAM,
    labels=("job_type", "stage"),
    buckets=_SECONDS,
    meaning="Time of a stage: `claim`, `references`, `waiting` for the engine, `generate`, `store` an asset, `total`",
)
RATIO = Spec(
    name="ourvidz_generation_ratio",
    kind=Kind.HISTOGRAM,
    labels=("job_type",),
    buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10),
    meaning="Generation time over what was expected of the job; above 1 is slower",
)
CALLBACKS = Spec(
    name="ourvidz_callbacks",
    kind=Kind.COUNTER,
    labels=("status", "result"),
    meaning="Requests of terminal callbacks: `delivered`, `refused` and sent again later, or `given_up`",
)

# -- what the worker is doing, read when the page is asked for

READY = Spec(name="ourvidz_worker_ready", kind=Kind.GAUGE, meaning="1 where `/readyz` answers 200, else 0")
WORKER_STATE = Spec(
    name="ourvidz_worker_state", kind=Kind.GAUGE, labels=("state",), meaning="1 for the state that the worker is in"
)
ENGINE_STATE = Spec(
    name="ourvidz_engine_state", kind=Kind.GAUGE, labels=("state",), meaning="1 for the state that the engine is in"
)
RUNNING = Spec(name="ourvidz_jobs_running", kind=Kind.GAUGE, meaning="Jobs that this worker has")
BUSY = Spec(
    name="ourvidz_engine_busy_seconds",
    kind=Kind.COUNTER,
    meaning="How long jobs have had the engine, and with it the GPU",
)
DEVICE_USED = Spec(
    name="ourvidz_device_memory_used_bytes",
    kind=Kind.GAUGE,
    meaning="Memory in use on the worker's GPU, all processes counted; absent without one",
)
DEVICE_TOTAL = Spec(
    name="ourvidz_device_memory_bytes", kind=Kind.GAUGE, meaning="Memory of the worker's GPU; absent without one"
)
USAGE_DROPPED = Spec(
    name="ourvidz_usage_records_dropped",
    kind=Kind.COUNTER,
    meaning="Worker and completion records that the endpoint of `OURVIDZ_METRICS_URL` did not take",
)

# -- what the queues hold: every worker of a queue shows the same, so take `max`, not `sum`

QUEUE_UP = Spec(
    name="ourvidz_queue_up",
    kind=Kind.GAUGE,
    meaning="1 where Redis told what the queues hold; 0 where the numbers below are old or absent",
)
QUEUE_JOBS = Spec(
    name="ourvidz_queue_jobs",
    kind=Kind.GAUGE,
    labels=("queue", "state"),
    meaning="Jobs: `waiting` in the producer's list, `in_flight`, `retrying` later, `dead`",
)
QUEUE_OLDEST = Spec(
    name="ourvidz_queue_oldest_seconds",
    kind=Kind.GAUGE,
    labels=("queue",),
    meaning="Age of the oldest waiting job by its `created_at`; 0 where none waits, absent where it has none",
)
LEASE_OLDEST = Spec(
    name="ourvidz_lease_oldest_seconds",
    kind=Kind.GAUGE,
    labels=("queue",),
    meaning="How long the job that is in flight for longest has been",
)
LEASE_OVERDUE = Spec(
    name="ourvidz_lease_overdue_seconds",
    kind=Kind.GAUGE,
    labels=("queue",),
    meaning="How long the lease of a silent worker has been over; above a minute nobody recovers jobs",
)
OUTBOX = Spec(
    name="ourvidz_outbox_callbacks",
    kind=Kind.GAUGE,
    labels=("queue", "state"),
    meaning="Terminal callbacks: `waiting` to be accepted, or `undelivered` and put aside",
)
OUTBOX_OLDEST = Spec(
    name="ourvidz_outbox_oldest_seconds",
    kind=Kind.GAUGE,
    labels=("queue",),
    meaning="How long ago the oldest callback that is still refused was first sent; of the 100 that are due next",
)

SPECS = tuple(value for value in list(globals().values()) if isinstance(value, Spec))
