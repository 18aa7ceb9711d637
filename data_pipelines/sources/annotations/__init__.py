"""Annotation files with folders of media beside them: a table says what each public format calls things."""
