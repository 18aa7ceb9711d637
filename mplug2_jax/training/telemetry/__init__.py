"""Telemetry of a run: metrics, events, goodput, throughput, profiles."""
