"""One file per task; ``specs`` says what each needs and reads, ``table`` lists their implementations."""
