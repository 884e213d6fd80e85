"""Counters for Prometheus; each studio has its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CHUNK_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)


class Metrics:
    """What the server did, and what it does now."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(
            registry=registry
        )  # resident memory, processor time, open files; nothing outside Linux
        self.streams = Gauge("streamvid_streams", "Streams by status", ["status"], registry=registry)
        self.in_memory = Gauge(
            "streamvid_streams_in_memory", "Streams whose caches are in memory", registry=registry
        )
        self.kv_bytes = Gauge(
            "streamvid_kv_bytes", "Bytes of keys and values of all streams", registry=registry
        )
        self.viewers = Gauge("streamvid_viewers", "Open connections to streams", registry=registry)
        self.started = Counter("streamvid_streams_started", "Streams that began to run", registry=registry)
        self.refused = Counter(
            "streamvid_streams_refused", "Requests refused as the queue was full", registry=registry
        )
        self.ended = Counter("streamvid_streams_ended", "Streams ended", ["reason"], registry=registry)
        self.frames = Counter("streamvid_frames", "Pixel frames made", registry=registry)
        self.chunk_seconds = Histogram(
            "streamvid_chunk_seconds",
            "Seconds per chunk by stage",
            ["stage"],
            buckets=CHUNK_SECONDS,
            registry=registry,
        )
        self.prompts = Counter(
            "streamvid_prompts", "Live prompts by what became of them", ["status"], registry=registry
        )
        self.prompt_seconds = Histogram(
            "streamvid_prompt_seconds",
            "From accepting a prompt to its first chunk",
            buckets=CHUNK_SECONDS,
            registry=registry,
        )

    def chunk(self, frames: int, timings: Mapping[str, float]) -> None:
        """A chunk was made."""
        self.frames.inc(frames)
        for stage, seconds in timings.items():
            self.chunk_seconds.labels(stage).observe(seconds)

    def prompt(self, receipt: Any) -> None:
        """A live prompt was applied or given up."""
        self.prompts.labels(receipt.status).inc()
        if receipt.applied_at is not None:
            self.prompt_seconds.observe(receipt.applied_at - receipt.accepted_at)

    def text(self) -> bytes:
        """Prometheus' exposition format."""
        return generate_latest(self.registry)
