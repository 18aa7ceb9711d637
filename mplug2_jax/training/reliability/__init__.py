"""Handling of failures: faulty steps, preemption, hung processes, silent data corruption, two runs at once."""
