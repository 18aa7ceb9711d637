"""Fine-tuning by families of tasks: each file is a family, each page of ``configs/tasks`` a data set of one."""
