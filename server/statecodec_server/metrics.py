"""Prometheus metrics: what this process sees itself, and what all workers have counted in the database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .database import Database, counters, jobs, uploads
from .quotas import Quotas
from .records import DURATION_BUCKETS, ENDED, RATIO_BUCKETS, Jobs

_SECONDS = (0.005, 0.025, 0.1, 0.5, 2, 10, 60, 600)


class Metrics:
    """The registry of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "statecodec_http_request_seconds",
            "Time to answer, by method, route and class of status.",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def watch(self, database: Database, quotas: Quotas, records: Jobs) -> None:
        """Add what lies in the database."""
        self.registry.register(_FromDatabase(database, quotas, records))

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


def _cumulative(edges: tuple[float, ...], counts: dict[str, float]) -> list[tuple[str, float]]:
    total, rows = 0.0, []
    for edge in (*map(str, edges), "+Inf"):
        total += counts.get(edge, 0.0)
        rows.append((edge, total))
    return rows


class _FromDatabase(Collector):
    def __init__(self, database: Database, quotas: Quotas, records: Jobs) -> None:
        self._database, self._quotas, self._records = database, quotas, records

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stored: dict[str, dict[str, float]] = defaultdict(dict)
        for row in self._database.all(sa.select(counters)):
            stored[row["metric"]][row["labels"]] = row["value"]
        yield from self._jobs(stored)
        yield from self._now()

    def _jobs(self, stored: dict[str, dict[str, float]]) -> Iterator[Metric]:
        submitted = CounterMetricFamily("statecodec_jobs_submitted", "Jobs accepted.", labels=["operation"])
        for operation, value in stored["jobs_submitted"].items():
            submitted.add_metric([operation], value)
        ended = CounterMetricFamily("statecodec_jobs_ended", "Jobs that ended.", labels=["operation", "state"])
        for labels, value in stored["jobs_ended"].items():
            ended.add_metric(labels.split(" "), value)
        yield from (submitted, ended)
        for name, metric, text in (
            ("statecodec_job_bytes_in", "job_bytes_in", "Bytes that succeeded jobs read."),
            ("statecodec_job_bytes_out", "job_bytes_out", "Bytes that succeeded jobs made."),
        ):
            family = CounterMetricFamily(name, text, labels=["operation"])
            for operation, value in stored[metric].items():
                family.add_metric([operation], value)
            yield family
        total = stored["upload_bytes"].get("", 0.0)
        yield CounterMetricFamily("statecodec_upload_bytes", "Upload bytes acknowledged.", value=total)
        yield self._durations(stored)
        ratios = HistogramMetricFamily("statecodec_compression_ratio", "Source bytes / result bytes of compress jobs.")
        ratios.add_metric([], _cumulative(RATIO_BUCKETS, stored["job_ratio"]), stored["job_ratio_sum"].get("", 0.0))
        yield ratios

    @staticmethod
    def _durations(stored: dict[str, dict[str, float]]) -> Metric:
        family = HistogramMetricFamily("statecodec_job_seconds", "Duration of succeeded jobs.", labels=["operation"])
        by_operation: dict[str, dict[str, float]] = defaultdict(dict)
        for labels, value in stored["job_seconds"].items():
            operation, edge = labels.split(" ")
            by_operation[operation][edge] = value
        for operation, counts in by_operation.items():
            seconds = stored["job_seconds_sum"].get(operation, 0.0)
            family.add_metric([operation], _cumulative(DURATION_BUCKETS, counts), seconds)
        return family

    def _now(self) -> Iterator[Metric]:
        queue = GaugeMetricFamily("statecodec_jobs_open", "Jobs that have not ended.", labels=["state"])
        count = sa.func.count()
        jobs_in = {"queued": 0, "running": 0}
        for row in self._database.all(
            sa.select(jobs.c.state, count.label("n")).where(jobs.c.state.notin_(ENDED)).group_by(jobs.c.state)
        ):
            jobs_in[row["state"]] = row["n"]
        for state, value in jobs_in.items():
            queue.add_metric([state], value)
        yield queue
        open_uploads = self._database.one(sa.select(count.label("n")).where(uploads.c.state == "receiving"))
        number = open_uploads["n"] if open_uploads else 0
        yield GaugeMetricFamily("statecodec_uploads_open", "Uploads that are not complete.", value=number)
        yield GaugeMetricFamily("statecodec_stored_bytes", "Bytes held for all tokens.", value=self._quotas.used())
        yield GaugeMetricFamily("statecodec_disk_free_bytes", "Above the reserve.", value=self._quotas.free_disk())
        yield GaugeMetricFamily("statecodec_workers", "Workers heard of.", value=len(self._records.alive()))
