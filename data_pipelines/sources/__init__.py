"""Sources of records: one file per format, all with random access by index and stable keys."""
