"""What a program costs, known before it runs."""
