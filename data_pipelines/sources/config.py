"""The old import path of sources' config, for recipes older than :mod:`data_pipelines.config`."""

from data_pipelines.config import SourceConfig

__all__ = ["SourceConfig"]
