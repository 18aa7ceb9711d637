"""Every shipped recipe is a valid run; the released ones have the release's quirks, ours have none."""

from pathlib import Path

import pytest

from mplug2_jax.config import as_recipe, build, load_recipe
from mplug2_jax.errors import UserError
from mplug2_jax.recipes.digitworld import FINETUNES
from mplug2_jax.training.config import RunConfig

SPECS = (
    "demo", "demo:long", "released", "released:caption", "released:videoqa,base", "released:caption,tiny", "pretrain",
    "pretrain:tiny", "pretrain:base", "pretrain:large", "finetune", "finetune:caption", "finetune:videoqa,base",
    "finetune:caption,tiny", "finetune:videoqa,tiny,1", "finetune:caption,large,64", "imagenet:large,zero_shot",
    "kinetics400:large,zero_shot", "msrvtt_qa:large,released", "msvd_caption:base,released",
    *(f"digitworld:{name}" for name in FINETUNES),
)  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_recipes_are_valid_runs(spec: str) -> None:
    config = build(RunConfig, load_recipe(spec))
    assert config.parts()
    assert bool(config.evaluations) == (not spec.startswith("pretrain"))
    assert build(RunConfig, as_recipe(config)) == config


def test_every_recipe_file_is_covered(repository: Path) -> None:
    shipped = {path.stem for path in (repository / "configs").glob("*.py")}
    assert shipped - {"folder"} <= {spec.partition(":")[0] for spec in SPECS}  # it and those of tasks: tests/recipes


def test_only_the_released_recipes_have_quirks() -> None:
    ours, caption, answers = (
        build(RunConfig, load_recipe(spec)) for spec in ("demo", "released:caption", "released:videoqa")
    )
    for released in (caption, answers):
        stream = next(iter(released.streams.values())).data
        assert released.optimizer.decay_mask == "released"
        assert released.optimizer.clip_norm == 0
        assert released.schedule.kind.startswith("released")
        assert released.tasks.search.extend_finished
        assert released.model.positions_init == "zeros"
        assert stream.examples.tokenization == "released"
        assert (stream.visual.transform, stream.visual.sampling) == ("released_train", "random")
        heldout = next(iter(released.evaluations.values())).data.visual
        assert (heldout.transform, heldout.sampling) == ("released_test", "uniform")
    assert next(iter(caption.streams.values())).data.examples.prompt == "a video of"
    assert caption.tasks.distillation is None
    distillation = answers.tasks.distillation
    assert distillation is not None
    assert (distillation.alpha, distillation.softmax_axis, distillation.average_fusion) == (0.0, "time", False)

    assert ours.optimizer.decay_mask == "kernels"
    assert ours.schedule.kind == "cosine"
    assert not ours.tasks.search.extend_finished
    assert ours.model.positions_init == "normal"
    assert ours.tasks.distillation is None
    assert all(stream.data.examples.tokenization == "standard" for stream in ours.streams.values())


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("released:captions", "recipe released:captions: did you mean 'caption'? (valid: caption, videoqa)"),
        ("released:caption,huge", "recipe released:caption,huge: valid: base, large, tiny"),
        ("pretrain:lage", "recipe pretrain:lage: did you mean 'large'? (valid: base, large, tiny)"),
        ("pretrain:base,8", "recipe pretrain:base,8: valid: paper"),
        ("imagenet:large,zeroshot", "recipe imagenet:large,zeroshot: did you mean 'zero_shot'? (valid: zero_shot)"),
        ("digitworld:digits", "recipe digitworld:digits: did you mean 'digit'?"),
        ("vatex_caption:large,scts", "recipe vatex_caption:large,scts: did you mean 'scst'? (valid: scst, zero_shot)"),
        ("vqa_v2:large,released", "recipe vqa_v2:large,released: it has no variants; remove ',released'"),
        ("vatex_caption:large,", "recipe vatex_caption:large,: valid: scst, zero_shot"),
        ("vatex_caption:lage,scst", "recipe vatex_caption:lage: did you mean 'large'? (valid: base, large, tiny)"),
        ("finetune:captions", "recipe finetune:captions: did you mean 'caption'? (valid: caption, videoqa)"),
        ("finetune:,tiny", "recipe finetune:,tiny: valid: caption, videoqa"),
        ("finetune:caption,huge", "recipe finetune:caption,huge: valid: base, large, tiny"),
        ("finetune:caption,tiny,many", "recipe finetune:caption,tiny,many: 'many' should be a number of frames"),
        ("finetune:caption,tiny,0", "recipe finetune:caption,tiny,0: '0' should be a number of frames"),
        ("finetune:caption,tiny,-4", "recipe finetune:caption,tiny,-4: '-4' should be a number of frames"),
        ("finetune:caption,tiny,4,5", "recipe finetune:caption,tiny,4,5: takes a task, a size and a number of frames"),
    ],
)
def test_unknown_arguments_name_the_valid_ones(spec: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(spec)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("recipe", ["coco_caption", "msrvtt_caption", "msvd_caption", "nocaps", "vatex_caption"])
def test_captioning_continues_by_reward(recipe: str) -> None:
    plain, rewarded = (build(RunConfig, load_recipe(f"{recipe}:{arg}")) for arg in ("large", "large,scst"))
    (stream,) = rewarded.streams.values()
    assert set(stream.objectives) == {"scst"}
    assert stream.data.shapes()["references"][0] == (64, 20, 32)
    assert rewarded.steps < plain.steps
    assert rewarded.optimizer.learning_rate < plain.optimizer.learning_rate
    assert rewarded.evaluations == plain.evaluations
    assert rewarded.parts() == plain.parts()


def test_long_videos_are_sharded() -> None:
    short, long = (build(RunConfig, load_recipe(f"finetune:caption,large{frames}")) for frames in ("", ",64"))
    assert short.streams["video"].data.visual.num_frames == 16
    assert long.streams["video"].data.visual.num_frames == 64
    assert (short.mesh.sequence, long.mesh.sequence) == (1, 2)


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_pretraining_has_all_objectives_and_the_batch_sizes_of_its_size(size: str) -> None:
    streams = build(RunConfig, load_recipe(f"pretrain:{size}")).streams
    assert {name: set(stream.objectives) for name, stream in streams.items()} == {
        "image_text": {"vlc", "vlm", "ilm"}, "video_text": {"vlc", "vlm", "ilm"}, "text": {"mlm"},
    }  # fmt: skip
    images, videos = (streams[name].data.batch_size for name in ("image_text", "video_text"))
    if size != "tiny":
        chips = {"base": 256, "large": 512}[size]
        assert (images / chips, videos / chips) == (32, 8)
