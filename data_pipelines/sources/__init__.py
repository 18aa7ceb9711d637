"""Where records come from: one file per format, all with random access by index and stable keys."""
