"""The examples, run as a user runs them; what they refuse; and a run that is interrupted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_is_a_picture

import custom_backprop

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LAST_LINE = re.compile(r"test accuracy: ours (\d+\.\d\d) %, stock (\d+\.\d\d) %")


def command(name, *options):
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, options)]


def environment():
    """Without what tests/conftest.py sets for Triton: an example must see to that itself."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": path}


def run(name, *options, cwd):
    done = subprocess.run(
        command(name, *options),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def rows(text):
    """The table of linear_regression: name -> W, b, the difference."""
    return {
        name: tuple(map(float, rest))
        for name, *rest in re.findall(
            r"^(NumPy|ours|stock) +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE
        )
    }


def test_linear_regression(tmp_path):
    out = run("linear_regression", cwd=tmp_path).stdout
    table = rows(out)
    assert set(table) == {"NumPy", "ours", "stock"}
    for W, b, difference in table.values():
        assert abs(W - 4) < 0.3
        assert abs(b) < 0.3
        assert difference <= 1e-12
    assert table["ours"][:2] == pytest.approx(table["NumPy"][:2], rel=0, abs=1e-12)
    assert "all three agree to 1e-12" in out
    picture = Path("out", "linear_regression", "linear_regression.png")
    assert f"wrote {picture}" in out
    assert_is_a_picture(tmp_path / picture)


def test_linear_regression_finds_the_least_squares_line(example):
    module, _ = example("linear_regression")
    x = module.np.random.default_rng(3).uniform(-1, 1, (100, 1))
    y = 4 * x + module.np.sin(50 * x)
    exact = module.np.linalg.lstsq(module.np.hstack([x, module.np.ones_like(x)]), y, rcond=None)[0][
        :, 0
    ]
    found = module.by_numpy(x, y, module.np.zeros((1, 1)), module.np.zeros(1), 1000)[-1]
    assert found == pytest.approx(exact, rel=0, abs=1e-10)


def test_linear_regression_fails_where_the_ways_differ(example, monkeypatch, capsys):
    module, main = example("linear_regression")
    right = module.by_numpy
    monkeypatch.setattr(module, "by_numpy", lambda *args: right(*args) + 1e-11)
    with pytest.raises(SystemExit, match="differ by more than 1e-12"):
        main("--steps", 3)
    assert "all three agree to" not in capsys.readouterr().out


def test_backends(example, tmp_path, capsys):
    _, main = example("linear_regression")
    main("--steps", 20, "--backend", "formula")
    assert custom_backprop.get_backend() == "formula"
    assert rows(capsys.readouterr().out)["ours"][2] <= 1e-12
    out = run(
        "linear_regression", "--steps", 2, "--backend", "triton", "--device", "cpu", cwd=tmp_path
    ).stdout
    assert rows(out)["ours"][2] <= 1e-12


def test_digits(tmp_path, example):
    done = run("digits", "--device", "cpu", "--draw", cwd=tmp_path)
    out, folder = done.stdout, tmp_path / "out" / "digits"
    match = LAST_LINE.fullmatch(out.splitlines()[-1])
    assert match, out
    assert float(match[1]) >= 97
    assert float(match[2]) >= 97
    files = ["backward.html", "backward.svg", "digits.png", "weights.pt"]
    for name in files:
        assert f"wrote {Path('out', 'digits', name)}" in out
    assert_is_a_picture(folder / "digits.png")
    assert sorted(os.listdir(folder)) == files, "a finished run leaves no checkpoint"
    assert "LinearActivation" in (folder / "backward.svg").read_text(encoding="utf-8")
    assert "360/360" in done.stderr, "no progress bar"
    assert "USDT" not in done.stderr

    module, _ = example("digits")
    weights = torch.load(folder / "weights.pt")
    model = module.stock_model()
    for parameter, ours in zip(model.parameters(), weights["ours"].values(), strict=True):
        parameter.data = ours
    _, x, _, y = module.data(0, "cpu")
    assert f"{100 * (model(x).argmax(1) == y).double().mean().item():.2f}" == match[1], (
        "stock's layers read our weights otherwise"
    )


@pytest.mark.parametrize(
    ("dtype", "epochs", "tolerance"), [(torch.float64, 6, 1e-14), (torch.float32, 1, 1e-6)]
)
def test_digits_reach_the_weights_of_stock(
    dtype, epochs, tolerance, example, monkeypatch, tmp_path, capsys
):
    """In float32 only at first: training amplifies the rounding."""
    module, main = example("digits")
    data, models = module.data, [module.our_model, module.stock_model]
    monkeypatch.setattr(
        module,
        "data",
        lambda *args: [t.to(dtype) if t.is_floating_point() else t for t in data(*args)],
    )
    for model in models:
        monkeypatch.setattr(module, model.__name__, lambda model=model: model().to(dtype))
    main("--epochs", epochs)
    match = LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])
    assert match[1] == match[2]
    weights = torch.load(tmp_path / "weights.pt")
    for a, b in zip(*(weights[name].values() for name in ("ours", "stock")), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


#: examples/digits.py, which sends itself the signal of Ctrl-C within its third epoch
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may ignore it
import digits
step, steps = digits.Learner.step, []
def interrupted(*args):
    steps.append(1)
    if len(steps) == 60:
        os.kill(os.getpid(), signal.SIGINT)
    return step(*args)
digits.Learner.step = interrupted
digits.main()
"""


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, example):
    options = ("--epochs", 6, "--seed", 3, "--device", "cpu", "--out")
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, options), tmp_path / "stopped"],
        cwd=EXAMPLES,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "the same command continues" in stopped.stderr
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt")["epoch"] == 2
    resumed = run("digits", *options, tmp_path / "stopped", cwd=tmp_path)
    assert "continuing after epoch 2 of 6" in resumed.stdout

    _, main = example("digits")
    main(*options, tmp_path / "whole")
    weights = [torch.load(tmp_path / name / "weights.pt") for name in ("stopped", "whole")]
    for name in ("ours", "stock"):
        for key, value in weights[1][name].items():
            assert torch.equal(weights[0][name][key], value), (name, key)


def test_digits_by_formula(example, capsys):
    _, main = example("digits")
    main("--epochs", 1, "--backend", "formula")
    assert LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read the checkpoint"),
        (b"not a checkpoint", "cannot read the checkpoint"),
        ({"epoch": 1}, "cannot read the checkpoint"),
        ([1], "cannot read the checkpoint"),
        (
            {"settings": {"seed": 5, "depth": 7}},
            r"other settings \(.*seed 5, now 0; epochs None, now 2;.*; depth 7, now None\): "
            "repeat those",
        ),
    ],
)
def test_digits_refuses_a_checkpoint_it_cannot_go_on_from(content, message, example, tmp_path):
    _, main = example("digits")
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        example("common")[0].save(content, path)
    with pytest.raises(SystemExit, match=message) as error:
        main("--epochs", 2)
    assert str(path) in str(error.value)
    assert "delete it, or name another folder by --out, to start again" in str(error.value)
    assert path.exists(), "it is the user's to delete"


def test_a_damaged_checkpoint_is_noticed_wherever_the_damage_is(example, tmp_path):
    common, _ = example("common")
    path, settings = tmp_path / "checkpoint.pt", {"seed": 0, "torch": "2"}
    common.save({"settings": settings, "epoch": 1, "weights": torch.randn(50)}, path)
    whole = path.read_bytes()
    assert common.load(path, settings)["epoch"] == 1
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 5)
    ]
    for content in [*flipped, *(whole[:i] for i in range(0, len(whole), 50)), whole[:-1]]:
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=r"checkpoint\.pt.*to start again$"):
            common.load(path, settings)


@pytest.mark.parametrize("damage", ["flipped byte", "truncated"])
def test_digits_does_not_go_on_from_damaged_weights(damage, example, monkeypatch, tmp_path):
    module, main = example("digits")
    path, after = tmp_path / "checkpoint.pt", []

    def save_and_interrupt(*args):
        save_epoch(*args)
        after.append(1)
        if len(after) == 1:
            raise KeyboardInterrupt

    save_epoch = module.save_epoch
    monkeypatch.setattr(module, "save_epoch", save_and_interrupt)
    with pytest.raises(SystemExit):
        main("--epochs", 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content if damage == "flipped byte" else content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r"cannot (use|read) the checkpoint .*to start again$"):
        main("--epochs", 2)


def test_a_checkpoint_is_written_whole_or_not_at_all(example, monkeypatch, tmp_path):
    common, _ = example("common")
    path = tmp_path / "checkpoint.pt"
    common.save({"settings": {}, "epoch": 1}, path)

    def interrupted(state, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.save({"settings": {}, "epoch": 2}, path)
    assert common.load(path, {})["epoch"] == 1


@pytest.mark.parametrize("name", ["linear_regression", "digits", "distributed"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "meta"), "meta"),
        (("--out", "/dev/fd"), "/dev/fd"),  # a folder that takes no file
        (("--backend", "cuda"), "unknown backend 'cuda'"),
        (("--device", "nowhere"), "nowhere"),
        (("--seed", -1), "-1 is less than 0"),
        (("--out", __file__), "File exists"),
    ],
)
def test_bad_options_are_told_in_one_line(name, options, message, example, capsys):
    _, main = example(name)
    with pytest.raises(SystemExit) as error:
        main(*options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "package"),
    [("linear_regression", "matplotlib"), ("digits", "tqdm"), ("digits", "custom_backprop")],
)
def test_a_missing_package_is_named(name, package, example, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package}.*pip install -e '\.\[demo\]'"):
        example(name)
