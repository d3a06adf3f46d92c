"""Parameter counts and multiply-adds against the paper, the module itself and torch's own counter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drwkv.models import cost, create


def on_meta(name: str, **settings: Any) -> Any:
    with torch.device("meta"):
        return create(name, **settings)


@pytest.mark.parametrize(
    ("size", "num_params"),
    [("S", 38_934_552), ("B", 74_404_632), ("M", 132_105_240), ("L", 438_574_104), ("H", 779_276_312)],
)
def test_unconditional_pixel_models_have_the_releases_parameter_counts(size: str, num_params: int) -> None:
    model = on_meta(f"DRWKV-{size}/2", input_size=32, in_channels=3)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_params
    assert cost.cost(model).num_params == num_params


@pytest.mark.parametrize(
    ("size", "gmac"), [("S", 1.72), ("B", 3.32), ("M", 5.90), ("L", 19.65), ("H", 34.95)]
)
def test_multiply_adds_at_64_tokens_are_the_papers_gflops(size: str, gmac: float) -> None:
    total = cost.cost(on_meta(f"DRWKV-{size}/4", input_size=32, in_channels=3))
    assert total.num_tokens == 64
    assert total.num_macs / 1e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize(("pixels", "gmac"), [(256, 139), (512, 555)])
def test_the_huge_model_costs_what_the_design_says_on_latents(pixels: int, gmac: float) -> None:
    model = on_meta("DRWKV-H/2", input_size=32, in_channels=4, num_classes=1000)
    assert cost.cost(model, input_size=pixels // 8).num_macs / 1e9 == pytest.approx(gmac, rel=0.005)


@pytest.mark.parametrize(
    ("conditioning", "skip", "num_classes"),
    [*itertools.product(("adaln-zero", "adaln", "in-context"), ("concat", "add", "none"), (None, 5))],
)
def test_the_formulas_agree_with_the_module_and_with_torchs_counter(
    conditioning: str, skip: str, num_classes: int | None
) -> None:
    settings: dict[str, Any] = dict(input_size=(8, 4), in_channels=3, patch_size=2, hidden_size=12, depth=5)
    options: dict[str, Any] = dict(
        conditioning=conditioning, skip=skip, hidden_rate=3, learn_variance=skip == "add"
    )
    model = create("DRWKV", num_classes=num_classes, **settings, **options)
    total = cost.cost(model, input_size=(8, 12))
    assert total.num_params == sum(parameter.numel() for parameter in model.parameters())

    y = None if num_classes is None else torch.tensor([1, 5])
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 8, 12), torch.zeros(2), y)
    counts = counter.get_flop_counts()["Global"]
    # 2 FLOPs a multiply-add, 2 samples
    assert sum(count for op, count in counts.items() if "drwkv" not in str(op)) == 2 * 2 * total.num_macs


def test_the_table_prints_a_line_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(["DRWKV-H/2", "DRWKV-S/4", "--input-size", "64"]) == 0
    header, huge, small = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "parameters", "tokens", "GMAC/image", "training", "TFLOP/image"]
    assert huge.split() == ["DRWKV-H/2", "781,100,064", "1,024", "555.41", "3.332"]
    assert small.split()[0] == "DRWKV-S/4"


def test_a_wrong_name_or_size_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(["DRWKV-X/2"]) == 2
    assert cost.main(["DRWKV-S/8", "--input-size", "20"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no model is called 'DRWKV-X/2'" in first and "20x20" in second
