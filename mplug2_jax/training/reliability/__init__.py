"""A file for each thing that can break: bad records, spikes, preemption, hung processes, wrong bits, two trainers."""
