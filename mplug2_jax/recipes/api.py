"""All names that a recipe needs: configs, model sizes, and the fine-tuning recipes of task families."""

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, Kind, SourceConfig, VisualConfig
from mplug2_jax.config import as_recipe, build, load_recipe
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SIZES, ModelConfig, RematConfig, model_config
from mplug2_jax.objectives.config import DistillationConfig, MlmConfig, ScstConfig, VlcConfig, VlmConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.recipes.base import (
    ClassNames,
    TaskData,
    check_size,
    data_folder,
    file_source,
    parse_variant,
    read_class_names,
)
from mplug2_jax.recipes.captioning import caption_recipe
from mplug2_jax.recipes.classification import classification_recipe, tfds_classification_recipe
from mplug2_jax.recipes.corpora import corpus_sources
from mplug2_jax.recipes.folder import split_folder
from mplug2_jax.recipes.glue import glue_recipe
from mplug2_jax.recipes.grounding import grounding_recipe
from mplug2_jax.recipes.question_answering import vqa_recipe
from mplug2_jax.recipes.released import released_recipe
from mplug2_jax.recipes.retrieval import retrieval_recipe
from mplug2_jax.recipes.summarization import summarization_recipe
from mplug2_jax.tasks.config import TasksConfig, TaskSettings
from mplug2_jax.training.config import (
    AdamWConfig,
    CheckpointConfig,
    FaultConfig,
    LoraConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    StreamConfig,
    TokenizerConfig,
)
from mplug2_jax.training.durations import Durations

__all__ = [
    "SIZES", "AdamWConfig", "CheckpointConfig", "ClassNames", "DataConfig", "DistillationConfig", "Durations",
    "EvaluationConfig", "ExampleConfig", "FaultConfig", "InstructionConfig", "Kind", "LoraConfig", "MeshConfig",
    "MlmConfig", "ModelConfig", "OptimizerConfig", "ProfileConfig", "RematConfig", "RunConfig", "ScheduleConfig",
    "ScstConfig", "SearchConfig", "SourceConfig", "StreamConfig", "TaskData", "TaskSettings", "TasksConfig",
    "TokenizerConfig", "UserError", "VisualConfig", "VlcConfig", "VlmConfig", "as_recipe", "build", "caption_recipe",
    "check_size", "classification_recipe", "corpus_sources", "data_folder", "did_you_mean", "file_source",
    "glue_recipe", "grounding_recipe", "load_recipe", "model_config", "parse_variant", "read_class_names",
    "released_recipe", "retrieval_recipe", "split_folder", "summarization_recipe", "tfds_classification_recipe",
    "vqa_recipe",
]  # fmt: skip
