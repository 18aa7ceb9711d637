"""The model of an exported folder, for transformers' ``AutoModel``; computed by the packages of the folder.

They are imported from there, or downloaded with it at the same revision: transformers itself would only copy files that
this one imports relatively, side by side.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from .configuration_mplug2 import Mplug2Config
from .mplug2_runtime import copy_companions, find_runtime

_DECODER = "text_decoder.cls.predictions"


class Mplug2Model(PreTrainedModel):
    """mPLUG-2 for captions (of images and clips) or for answers (to questions about them).

    Raises:
        ImportError: see ``mplug2_runtime``.
        UserError: a size in the config is missing or out of range.
    """

    config_class = Mplug2Config
    main_input_name = "pixel_values"
    base_model_prefix = ""
    _supports_sdpa = True
    # transformers 5 reads both names, 4 the keys.
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        f"{_DECODER}.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
        f"{_DECODER}.decoder.bias": f"{_DECODER}.bias",
    }

    def __init__(self, config: Mplug2Config) -> None:
        super().__init__(config)
        self._folder = find_runtime(config.name_or_path, getattr(config, "_commit_hash", None))
        runtime = importlib.import_module("mplug2_torch.conversion.torch_runtime")
        exported = importlib.import_module("mplug2_torch.conversion.exported.model")
        preprocessing = importlib.import_module("mplug2_torch.conversion.exported.preprocessing")
        sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(runtime.Config)}
        model = exported.KINDS[config.task](runtime.Config(**sizes))
        for name, module in model.named_children():
            self.add_module(name, module)  # so names of weights are those of the file
        self._model: Any
        object.__setattr__(self, "_model", model)  # has the same modules
        self._search = preprocessing.read_inference(self._folder)[2]
        self._keys_to_ignore_on_load_unexpected = [pattern.pattern for pattern, _ in model.ignored_names()]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load the weights of a folder, as that of transformers, but strictly.

        Raises:
            ValueError: the weights lack some of the model's.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the weights of {model.name_or_path} lack {len(missing)} of the model's, as {missing[0]}; copy the "
                "whole folder of the export"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write weights and config into a folder, and copy code, settings and tokenizer."""
        super().save_pretrained(save_directory, *args, **kwargs)
        copy_companions(self._folder, Path(save_directory))

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave a module as it is: all weights come from the file."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the decoder's word table."""
        return self.get_submodule("text_decoder.bert.embeddings.word_embeddings")

    def encode(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder's memory [b, s, d] and its mask [b, s].

        Args:
            pixel_values: normalized frames [b, 3, t, y, x], by the processor.
            input_ids: questions [b, l], for a model that answers them.
            attention_mask: of the questions [b, l], 1 for valid tokens.

        Raises:
            ValueError: questions are missing, or the model only captions.
        """
        answers = self.config.task == "videoqa"
        if answers != (input_ids is not None):
            raise ValueError(
                "input_ids are missing, expected the ids of a question for each image or clip" if answers
                else "input_ids are given, but this model captions, and has no part that reads a question"
            )  # fmt: skip
        model: Any = self._model
        if input_ids is None:
            visual = model.encode_visual(pixel_values)
            return visual, torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        memory, memory_mask = model.instruction_memory(pixel_values, input_ids, mask.bool())
        return memory, memory_mask

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, decoder_input_ids: Tensor | None = None, **unused: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Return logits [b, m, v] of texts, and their mean cross entropy if they are labels.

        Args:
            pixel_values: see :meth:`encode`.
            input_ids: see :meth:`encode`.
            attention_mask: see :meth:`encode`.
            labels: texts [b, m] from the begin token on, padded with 0 or -100: logits are of the tokens after each.
            decoder_input_ids: texts without a loss.
            unused: what Trainer and others add.
        """
        memory, mask = self.encode(pixel_values, input_ids, attention_mask)
        texts = labels.clamp(min=0) if decoder_input_ids is None and labels is not None else decoder_input_ids
        if texts is None:
            return Seq2SeqLMOutput(encoder_last_hidden_state=memory)
        logits = self._model.text_decoder(texts, texts != 0, memory, mask)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].masked_fill(labels[:, 1:] <= 0, -100)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets)
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=memory)

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        **settings: int | bool,
    ) -> Tensor:  # fmt: skip
        """Return ids [b, m] of the best texts by the project's beam search, padded with 0.

        Args:
            pixel_values: see :meth:`encode`.
            input_ids: see :meth:`encode`.
            attention_mask: see :meth:`encode`.
            settings: num_beams, min_length, max_length (of generated tokens) or extend_finished, instead of those in
                ``inference.json``.

        Raises:
            ValueError: an unknown setting; or see :meth:`encode`.
        """
        search = importlib.import_module("mplug2_torch.conversion.torch_runtime.search")
        known = {field.name for field in dataclasses.fields(self._search)}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"{unknown[0]} is not a setting of the search: expected {', '.join(sorted(known))}")
        config = self._model.with_default_tokens(dataclasses.replace(self._search, **settings))
        decoder = self._model.text_decoder
        memory = decoder.project(*self.encode(pixel_values, input_ids, attention_mask))
        output = search.generate(decoder, memory, config)
        return output.ids[:, 0, : int(output.lengths[:, 0].max())]
