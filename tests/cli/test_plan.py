"""``mplug2 plan --shardings``: every parameter has a place, and every rule that could not act says why."""

import re
from collections.abc import Callable

from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define
from mplug2_jax.parallel.logical import ACTIVATION_RULES, PARAMETER_RULES

from .conftest import Outcome

PLAN = ("plan", "--config", "demo", "--shardings")


def test_places_and_reasons_on_devices_that_nobody_has(mplug2: Callable[..., Outcome]) -> None:
    shown = mplug2(*PLAN, "--devices", "96", "--config.mesh.tensor=3", "--config.mesh.sequence=2")
    assert (shown.status, shown.err) == (0, "")
    assert "mesh of 96 devices: replica=1, data=1, fsdp=16, sequence=2, tensor=3" in shown.out
    rows = {line.split()[0]: line for line in shown.out.splitlines() if re.match(r"\w+/", line)}
    assert re.search(r"2, 128, 512 +layers, embed, mlp +-, fsdp, - \* +8,192$", rows["decoder/layers/mlp/up/kernel"])
    assert re.search(r"64, 128 +position, embed +-, fsdp +512$", rows["decoder/embeddings/positions"])
    reason = "decoder/layers/mlp/up/kernel: 'mlp' stays whole: 512 is not a multiple of tensor=3"
    assert reason in shown.out.partition("rules that could not act")[2]
    marked = {name for name, row in rows.items() if " * " in row}
    explained = set(re.findall(r"^  (\S+): '", shown.out, re.MULTILINE))
    assert marked == explained


def test_both_tables_and_every_parameter_are_shown(mplug2: Callable[..., Outcome]) -> None:
    shown = mplug2(*PLAN)
    assert "mesh of 8 devices: replica=1, data=1, fsdp=8, sequence=1, tensor=1" in shown.out
    for name in (*PARAMETER_RULES, *ACTIVATION_RULES):
        assert re.search(rf"^{name} +[-\w]", shown.out, re.MULTILINE), name
    parts = ("vision", "temporal", "text", "universal", "fusion", "decoder", "mlm", "contrastive", "matching")
    definition = define(model_config("tiny"), parts)
    assert f"\n{definition.count():,} parameters; a device holds " in shown.out
    assert "could not act" not in shown.out


def test_what_cannot_be_is_a_sentence(mplug2: Callable[..., Outcome]) -> None:
    for words, message in (
        (("--devices", "0"), "--devices=0 must be at least 1"),
        (("--devices", "6", "--config.mesh.data=4"), "4 does not divide the 6 devices"),
    ):
        refused = mplug2(*PLAN, *words)
        assert refused.status == 2
        assert message in refused.err
    assert mplug2("plan", "--config", "demo").status == 2  # nothing was asked for
