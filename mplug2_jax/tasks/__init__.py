"""One file per task; ``contracts`` says what each needs and reads, ``table`` lists their implementations."""
