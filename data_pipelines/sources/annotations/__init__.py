"""Annotation files with folders of media; tables list the field names of each public format."""
