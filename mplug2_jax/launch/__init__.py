"""How a run gets onto machines: processes here, or a file for what schedules them elsewhere."""
