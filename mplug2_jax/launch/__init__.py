"""How a run gets onto machines."""
