"""``mplug2 plan``: shardings, whole plans, searches, ahead-of-time compilation, and errors."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.config import SourceConfig
from mplug2_jax.cli import plan as plan_command
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.sharding import ACTIVATION_RULES, PARAMETER_RULES
from mplug2_jax.planning.plan_file import PlanFile, read_plan
from tests.runs import recipe_file, text_run

from .conftest import mplug2

PLAN = ("plan", "--config", "demo", "--shardings")


def test_shardings_and_skipped_rules_on_any_number_of_devices() -> None:
    shown = mplug2(*PLAN, "--devices", "96", "--config.mesh.tensor=3", "--config.mesh.sequence=2")
    assert (shown.status, shown.err) == (0, "")
    assert "mesh of 96 devices: replica=1, data=1, fsdp=16, sequence=2, tensor=3" in shown.out
    rows = {line.split()[0]: line for line in shown.out.splitlines() if re.match(r"\w+/", line)}
    assert re.search(r"2, 128, 512 +layers, embed, mlp +-, fsdp, - \* +8,192$", rows["decoder/layers/mlp/up/kernel"])
    assert re.search(r"64, 128 +position, embed +-, fsdp +512$", rows["decoder/embeddings/positions"])
    reason = "decoder/layers/mlp/up/kernel: 'mlp' is not sharded: 512 is not a multiple of tensor=3"
    assert reason in shown.out.partition("skipped rules")[2]
    marked = {name for name, row in rows.items() if " * " in row}
    explained = set(re.findall(r"^  (\S+): '", shown.out, re.MULTILINE))
    assert marked == explained


def test_both_rule_tables_and_every_parameter_are_shown() -> None:
    shown = mplug2(*PLAN)
    assert "mesh of 8 devices: replica=1, data=1, fsdp=8, sequence=1, tensor=1" in shown.out
    for name in (*PARAMETER_RULES, *ACTIVATION_RULES):
        assert re.search(rf"^{name} +[-\w]", shown.out, re.MULTILINE), name
    parts = ("vision", "temporal", "text", "universal", "fusion", "decoder", "mlm", "contrastive", "matching")
    model_def = define_model(model_config("tiny"), parts)
    assert f"\n{model_def.num_params():,} parameters; " in shown.out
    assert "skipped rules" not in shown.out


def test_errors_of_shardings() -> None:
    for words, message in (
        (("--devices", "0"), "--devices=0 must be at least 1"),
        (("--devices", "6", "--config.mesh.data=4"), "4 does not divide the 6 devices"),
    ):
        refused = mplug2(*PLAN, *words)
        assert refused.status == 2
        assert message in refused.err


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe with one text stream."""
    heldout = {"digits": SourceConfig(kind="text", split="heldout", max_records=8)}
    data = dataclasses.replace(text_run().streams["text"].data, sources=heldout)
    run = text_run(steps=2, evaluations={"words": EvaluationConfig(task="mlm", data=data, num_samples=1)})
    return recipe_file(run, tmp_path_factory.mktemp("recipes") / "small.py")


CPU_PLAN = ("--config", "demo", "--topology", "cpu:8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology", "cpu:8"), "--config is missing: name the recipe to plan, as pretrain:large"),
        (("--config", "demo"), "plan needs --topology, as v5p:8x8x8, or --shardings"),
        (("--config", "dmo", "--topology", "cpu:8"), "recipe 'dmo' is neither a file nor a shipped recipe"),
        (("--config", "demo", "--topology", "v5x:4x4"), "did you mean 'v5p'? (valid: a100, cpu, h100, h200, tpu7x, v4"),
        (("--config", "demo", "--topology", "v5e:3x3"), "v5e does not come in this shape: v5e:1x1, v5e:2x2, v5e:2x4"),
        ((*CPU_PLAN, "--slices", "2"), "--slices 2: expected at least 1, and more than"),
        ((*CPU_PLAN, "--effort", "2"), "--effort=2.0 must be between -1 and 1"),
        ((*CPU_PLAN, "--effort", "nan"), "--effort=nan must be between -1 and 1"),
        ((*CPU_PLAN, "--minutes", "-1"), "--minutes=-1.0 must be at least 0"),
        (
            (*CPU_PLAN, "--config.streams.text.data.batch_size=12"),
            "config.streams.text.data.batch_size / config.grad_accum_steps=12 does not split over the mesh's 8 batch "
            "shards",
        ),
        ((*CPU_PLAN, "--evaluation", "masked_word"), "--evaluation masked_word: did you mean 'masked_words'?"),
        ((*CPU_PLAN, "--search", "--evaluation", "masked_words"), "--search is for training: remove --evaluation"),
        (("--config", "demo", "--topology", "h100:64"), "is planned on 64 simulated CPU devices, but JAX was started"),
    ],
)
def test_errors_are_one_line(words: tuple[str, ...], message: str) -> None:
    refused = mplug2("plan", *words)
    assert (refused.status, refused.out) == (2, "")
    assert message in refused.err
    assert refused.err.count("\n") == 1


def test_output_paths_are_checked_before_compiling(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    refused = mplug2("plan", *CPU_PLAN, "--search", "--out", tmp_path / "plan.json")
    assert refused.status == 2
    assert f"--out {tmp_path / 'plan.json'} exists; remove it, or choose another name" in refused.err
    assert (tmp_path / "plan.json").read_text() == "mine"
    for option in ("--json", "--html"):
        refused = mplug2("plan", *CPU_PLAN, option, tmp_path / "lost" / "plan")
        assert refused.status == 2
        assert f"{option} {tmp_path / 'lost' / 'plan'}: folder {tmp_path / 'lost'} does not exist" in refused.err
        assert "compiling" not in refused.log


def test_the_old_name_of_cost_goldens_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    actions: list[str] = []
    monkeypatch.setattr(plan_command, "_run_cost_goldens", lambda action: actions.append(action) or 0)
    assert [mplug2("plan", option, "quick").status for option in ("--ledger", "--cost-goldens")] == [0, 0]
    assert actions == ["quick", "quick"]
    assert "--ledger" not in mplug2("plan", "--help").out


@pytest.mark.slow
def test_a_whole_plan_as_text_json_and_html(small: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "plan.json", tmp_path / "plan.html"
    shown = mplug2("plan", "--config", small, "--topology", "cpu:8", "--effort", "0", "--json", data, "--html", page,
                   "--config.mesh.tensor=2")  # fmt: skip
    assert shown.status == 0, shown.err
    assert "compiling for cpu:8" in shown.log
    assert re.search(
        r"^small, train: [\d,]+ parameters on cpu:8 \(8 chips\), mesh fsdp=4, tensor=2$", shown.out, re.MULTILINE
    )
    assert "compiled for simulated CPU devices" in shown.out
    assert f"fits\npage: {page}\n" in shown.out
    plain = json.loads(data.read_text())
    assert (plain["fits"], plain["chips"], plain["examples"]) == (True, 8, {"text": 8})
    assert sum(plain["memory"]["breakdown"].values()) == pytest.approx(plain["memory"]["peak"])
    assert "small on cpu:8" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.html", "plan.json"]


@pytest.mark.slow
def test_the_plan_of_an_evaluation(small: Path) -> None:
    shown = mplug2("plan", "--config", small, "--topology", "cpu:8", "--evaluation", "words", "--effort", "0")
    assert shown.status == 0, shown.err
    assert re.search(r"^small, words: [\d,]+ parameters on cpu:8", shown.out, re.MULTILINE)
    assert "  words / text" in shown.out
    assert "chip-hours" not in shown.out


@pytest.mark.slow
def test_a_search_writes_a_plan_for_training(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "plan.json"
    words = ("--config", small, "--topology", "cpu:8", "--effort", "0", "--config.log_every=2")
    shown = mplug2("plan", *words, "--search", "--minutes", "0.2", "--out", out)
    assert shown.status == 0, shown.err
    assert "candidates; compiling the most promising" in shown.log
    assert "layout (* the recipe's own)" in shown.out
    plan = read_plan(out)
    assert (plan.config, plan.topology) == (str(small), "cpu:8")
    assert plan.overrides[0] == "--config.log_every=2"
    assert plan.predictions["num_trials"] >= 1
    assert list((tmp_path / ".cache/mplug2_jax/plans").glob("*.json"))
    trained = mplug2("train", "--plan", out, "--workdir", tmp_path / "run", "--config.steps=1")
    assert trained.status == 0, trained.err


@pytest.mark.slow
def test_training_follows_a_plan(recipes: Path, tmp_path: Path) -> None:
    plan = PlanFile(
        config=str(recipes / "text.py"), topology="cpu:8",
        overrides=("--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.steps=2", "--config.eval_every=0"),
    )  # fmt: skip
    plan.write(tmp_path / "plan.json")
    words = ("--plan", tmp_path / "plan.json", "--workdir", tmp_path / "run", "--config.steps=1")
    refused = mplug2("train", *words, "--config", "demo")
    assert refused.status == 2
    assert "--config demo with --plan" in refused.err
    assert "the plan already sets it; give one or the other" in refused.err
    assert not (tmp_path / "run").exists()

    trained = mplug2("train", *words)
    assert trained.status == 0, trained.err
    assert "mesh data=8 on cpu" in trained.log
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert (kept["mesh"]["data"], kept["mesh"]["fsdp"], kept["steps"]) == (8, 1, 1)  # overrides apply after the plan


def test_errors_of_train_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"topology": "v5x:8", "config": "demo", "overrides": []}')
    for plan, message in (
        ("lost.json", "lost.json does not exist; create it with mplug2 plan --search"),
        ("plan.json", "plan.json: --topology v5x:8: chip 'v5x' is unknown"),
    ):
        refused = mplug2("train", "--plan", tmp_path / plan, "--workdir", tmp_path / "run")
        assert refused.status == 2
        assert message in refused.err
    neither = mplug2("train", "--workdir", tmp_path / "run")
    assert "--config is missing: name a recipe, or a --plan that has one" in neither.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_uses_a_saved_executable_on_matching_machines_only(small: Path, tmp_path: Path) -> None:
    """Run real processes; a cache set in the environment is ignored."""
    kept = tmp_path / "kept"

    def process(*words: object, devices: int | None = None) -> str:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other"), "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
        } | ({"JAX_NUM_CPU_DEVICES": str(devices)} if devices else {})  # fmt: skip
        line = [sys.executable, "-m", "mplug2_jax.cli.main", "-v", *map(str, words), "--config.eval_every=100"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def train(name: str, devices: int) -> str:
        return process("train", "--config", small, "--workdir", tmp_path / name, f"--config.compilation_cache={kept}",
                       "--config.steps=1", devices=devices)  # fmt: skip

    output = process("plan", "--config", small, "--topology", "cpu:4", "--save-executable", kept, "--config.steps=1")
    assert f"executable: {kept}; mplug2 train ... --config.compilation_cache={kept}" in output
    manifest = json.loads((kept / "executable.json").read_text())
    assert manifest["devices"] == "4 x cpu"
    keys = {path.name.removesuffix("-cache") for path in kept.glob("*-cache")}
    assert len(keys) == 1

    same = train("same", 4)
    assert re.search(r"compiled in [\d.]+ s, loaded from the AOT program", same)
    hits = set(re.findall(r"[Pp]ersistent compilation cache hit for '[^']*' with key '([^']*)'", same))
    assert keys <= hits

    other = train("other", 2)
    reason = r"the AOT program was not used: \S+ was compiled for devices 4 x cpu, here 2 x cpu; program"
    assert re.search(rf"compiled in [\d.]+ s; {reason}", other)


def test_a_plan_does_not_initialize_accelerators() -> None:
    """Run a process without JAX_PLATFORMS, which JAX reads when it is imported."""
    code = "import sys; from mplug2_jax.cli.main import main; main(sys.argv[1:]); import jax; "
    code += "print(jax.config.jax_platforms)"
    words = ("plan", "--config", "demo", "--topology", "cpu:8", "--evaluation", "nothing")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert "--evaluation nothing: valid: " in done.stderr
    assert done.stdout == "cpu\n"


def test_the_error_of_a_missing_libtpu_says_how_to_install_it(tmp_path: Path) -> None:
    """Run a process that cannot import it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'libtpu':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Gone())\n"
    )
    words = ["plan", "--config", "finetune:caption,tiny", "--topology", "v5e:2x2"]
    # JAX sets TPU_LIBRARY_PATH where it finds libtpu.
    environment = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-m", "mplug2_jax.cli.main", *words], capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    message = "plans for TPUs need the compiler in libtpu, which is not installed: pip install 'mplug2-jax[tpu]'"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"mplug2: error: {message}")
