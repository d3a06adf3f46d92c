"""Weights in and out, and through them the published architecture's own numbers.

`golden/drwkv_*.safetensors` hold parameters under the released names, inputs, outputs and every gradient,
computed on the release in float32 with the operator in float64.
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from drwkv import convert
from drwkv.models import create

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # relative RMS


def load_golden(name: str) -> dict[str, Tensor]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def write_released(path: Path, ema: dict[str, Tensor], **changes: Any) -> Path:
    """A checkpoint as the release's trainer writes it."""
    model = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    opt = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    args = argparse.Namespace(model="DRWKV-M/2", image_size=32, lr=1e-4, resume=None, latent_space=False)
    torch.save({"model": model, "ema": ema, "opt": opt, "args": args} | changes, path)
    return path


def relative_rms(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b).double().norm() / b.double().norm())


@pytest.mark.parametrize("name", ["drwkv_cond", "drwkv_uncond"])
def test_imported_weights_give_the_published_outputs_and_gradients(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    released = write_released(tmp_path / "0050000.pt", with_prefix(golden, "param."))
    model = convert.build(released)
    output = model(golden["input.x"], golden["input.t"], golden.get("input.y"))
    assert relative_rms(output, golden["output"]) < TOLERANCE
    (output * golden["cotangent"]).sum().backward()
    gradients = with_prefix(golden, "grad.")
    assert set(gradients) == {key for key, _ in model.named_parameters()}
    errors = {key: relative_rms(model.get_parameter(key).grad, grad) for key, grad in gradients.items()}  # type: ignore[arg-type]
    wrong = {key: error for key, error in errors.items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "drwkv_cond",
            dict(input_size=12, patch_size=2, hidden_size=32, in_channels=4, depth=5, num_classes=10),
        ),
        (
            "drwkv_uncond",
            dict(input_size=16, patch_size=4, hidden_size=24, in_channels=3, depth=3, num_classes=None),
        ),
    ],
)
def test_the_configuration_is_inferred_from_the_tensors(name: str, expected: dict[str, Any]) -> None:
    config = convert.infer_config(with_prefix(load_golden(name), "param."))
    assert config == expected | dict(name="DRWKV", learn_variance=True, hidden_rate=4)


def test_fixed_variance_and_another_hidden_rate_are_inferred(tmp_path: Path) -> None:
    model = create(
        "DRWKV",
        input_size=4,
        in_channels=3,
        patch_size=2,
        hidden_size=8,
        depth=3,
        learn_variance=False,
        hidden_rate=2,
    )
    _, config = convert.load_weights(write_released(tmp_path / "a.pt", model.state_dict()))
    assert config["learn_variance"] is False and config["hidden_rate"] == 2


def test_ema_or_model_is_chosen_and_the_wrappers_prefix_is_taken_off(tmp_path: Path) -> None:
    params = with_prefix(load_golden("drwkv_uncond"), "param.")
    wrapped = {f"module.{name}": tensor + 1 for name, tensor in params.items()}
    path = write_released(tmp_path / "a.pt", params, model=wrapped)
    ema, _ = convert.load_weights(path)
    model, _ = convert.load_weights(path, "model")
    assert set(ema) == set(model) == set(params)
    assert all(torch.equal(ema[name], params[name]) for name in params)
    assert all(torch.equal(model[name], params[name] + 1) for name in params)


def test_a_bare_state_dict_and_an_old_style_file_load_too(tmp_path: Path) -> None:
    params = with_prefix(load_golden("drwkv_uncond"), "param.")
    torch.save(params, tmp_path / "bare.pt")
    torch.save({"ema": params}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for file in ("bare.pt", "old.pt"):
        weights, _ = convert.load_weights(tmp_path / file)
        assert all(torch.equal(weights[name], params[name]) for name in params)


def test_safetensors_keep_weights_and_configuration(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(input_size=(4, 8), in_channels=3, patch_size=2, hidden_size=8, depth=3)
    model: Any = create("DRWKV", **settings, num_classes=2, conditioning="in-context", skip="add", seed=5)
    convert.save_weights(tmp_path / "deep" / "a.safetensors", model.state_dict(), model.config)
    (tmp_path / "plain").touch()
    assert (tmp_path / "deep" / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    again: Any = convert.build(tmp_path / "deep" / "a.safetensors")
    assert again.config == model.config
    x, t, y = torch.randn(2, 3, 4, 8), torch.tensor([5, 600]), torch.tensor([0, 2])
    torch.testing.assert_close(again(x, t, y), model(x, t, y), rtol=0, atol=0)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_the_command_converts_a_released_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = with_prefix(load_golden("drwkv_cond"), "param.")
    source, target = write_released(tmp_path / "a.pt", params), tmp_path / "a.safetensors"
    assert convert.main([str(source), str(target)]) == 0
    assert "params" not in capsys.readouterr().err
    weights, config = convert.load_weights(target)
    assert all(torch.equal(weights[name], params[name]) for name in params)
    assert config == convert.load_weights(source)[1]


class _Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("style", ["zip", "old", "plain pickle", "in the Namespace"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(style: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "bad.pt"
    params = with_prefix(load_golden("drwkv_uncond"), "param.")
    if style == "plain pickle":
        path.write_bytes(pickle.dumps({"ema": _Attack(trace)}))
    elif style == "in the Namespace":
        write_released(path, params, args=argparse.Namespace(lr=_Attack(trace)))
    else:
        torch.save(
            {"ema": params, "args": _Attack(trace)}, path, _use_new_zipfile_serialization=style == "zip"
        )
    with pytest.raises(ValueError, match="refused, nothing was run") as caught:
        convert.load_weights(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_line(tmp_path: Path) -> None:
    params = with_prefix(load_golden("drwkv_uncond"), "param.")
    del params["norm_f.bias"]
    params["norm_g.bias"] = torch.zeros(3)
    params["norm_f.weight"] = torch.zeros(25)
    with pytest.raises(ValueError) as caught:
        convert.load_weights(write_released(tmp_path / "a.pt", params))
    message = str(caught.value)
    assert "missing norm_f.bias" in message and "unexpected norm_g.bias" in message and "\n" not in message
    assert "norm_f.weight (25,), expected (24,)" in message and "a.pt" in message


def test_a_model_without_skip_layers_is_not_taken_for_the_released_one(tmp_path: Path) -> None:
    model = create("DRWKV", input_size=4, in_channels=3, patch_size=2, hidden_size=8, depth=3, skip="add")
    with pytest.raises(ValueError, match=r"missing out_blocks\.0\.skip_linear\.weight"):
        convert.load_weights(write_released(tmp_path / "a.pt", model.state_dict()))


def _damaged_zip(path: Path) -> None:
    torch.save({"ema": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("empty.pt", lambda path: path.touch(), "empty.pt"),
        ("text.pt", lambda path: path.write_text("hello"), "text.pt"),
        ("cut.pt", _damaged_zip, "cut.pt"),
        ("list.pt", lambda path: torch.save([1, 2], path), "holds a list"),
        ("no_ema.pt", lambda path: torch.save({"model": {}}, path), "no 'ema' weights; it holds model"),
        ("other.pt", lambda path: torch.save({"a": torch.zeros(2)}, path), "not Diffusion-RWKV weights"),
        ("text.safetensors", lambda path: path.write_text("hello"), "no safetensors file"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(
    name: str, write: Any, message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        convert.load_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no 'config' in its metadata"),
        ({"config": "{"}, "is no JSON"),
        ({"config": json.dumps({"name": "DRWKV"})}, "its configuration makes no model"),
        (
            {"config": json.dumps({"name": "DRWKW", "input_size": 4, "in_channels": 3})},
            "did you mean 'DRWKV'",
        ),
    ],
)
def test_safetensors_with_a_wrong_configuration_are_refused(
    metadata: Any, message: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        convert.load_weights(tmp_path / "a.safetensors")


def test_wrong_commands_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_released(tmp_path / "a.pt", with_prefix(load_golden("drwkv_uncond"), "param."))
    assert convert.main([str(tmp_path / "none.pt"), str(tmp_path / "b.safetensors")]) == 2
    assert convert.main([str(source), str(tmp_path / "b.pt")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "none.pt: no such file" in errors[0] and "choose that ending" in errors[1]
    with pytest.raises(ValueError, match="must be 'ema' or 'model'"):
        convert.load_weights(source, "best")
