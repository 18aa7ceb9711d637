"""Where recipes written before :mod:`data_pipelines.config` import sources' config from."""

from data_pipelines.config import SourceConfig

__all__ = ["SourceConfig"]
