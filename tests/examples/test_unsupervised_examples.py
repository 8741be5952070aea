"""The examples that learn without labels: what they find is right, what they write is there, and an
interrupted run continues."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from helpers import assert_is_a_picture
from sklearn.cluster import KMeans

NAMES = ("autoencoder", "contrastive")


def test_a_linear_autoencoder_spans_the_space_of_pca(example):
    module, _ = example("autoencoder")
    torch.manual_seed(0)
    x, _, _ = module.data("cpu")
    for code in module.CODES:
        coder = module.Coder(code, (), x)
        for _ in range(20):
            coder.epoch(torch.arange(len(x)))
        assert module.angle_to_principal_components(coder.model, x) < 1e-3
        lost = torch.linalg.svdvals(x)[code:].square().sum() / x.numel()
        assert coder.history[-1] == pytest.approx(lost.item(), rel=1e-5)
        with torch.no_grad():
            assert coder.loss(coder.model(x), x).item() == pytest.approx(
                coder.history[-1], rel=1e-12
            ), "R stands for the digits"


def test_the_gradient_of_k_means(example):
    module, _ = example("autoencoder")
    x, centroids = torch.randn(20, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    centroids[5] = 100  # nobody's nearest
    torch.autograd.gradcheck(
        lambda c: 1.7 * module.SquaredDistances.apply(x, c)[0], centroids.requires_grad_()
    )


def test_newtons_step_is_lloyds(example):
    module, _ = example("autoencoder")
    x, _, _ = module.data("cpu")
    start = x[:10]
    ours, _, nearest = module._descend(x, start)
    lloyd = KMeans(
        10, init=start.numpy(), n_init=1, max_iter=module.MOST_STEPS, tol=0, algorithm="lloyd"
    ).fit(x.numpy())
    assert ours == pytest.approx(lloyd.inertia_, rel=1e-9)
    assert torch.equal(nearest, torch.from_numpy(lloyd.labels_).long())


def test_autoencoder(example, tmp_path, capsys, monkeypatch):
    module, main = example("autoencoder")
    monkeypatch.setattr(module, "STARTS", 1)
    main("--epochs", 2)
    out = capsys.readouterr().out
    assert "the linear codes do not span PCA's spaces to 1e-3 after 2 epochs" in out
    assert re.search(
        r"^squared error of 2 numbers: nonlinear 0\.0\d+, linear 0\.0\d+; of 16 numbers: ",
        out,
        re.M,
    )
    assert re.search(
        r"normalised mutual information: 0\.\d{3} \(\w+ \d+\), "
        r"scikit-learn's KMeans on raw pixels 0\.7\d\d$",
        out.strip(),
    )
    for name in ("codes.png", "reconstructions.png"):
        assert f"wrote {tmp_path / name}" in out
        assert_is_a_picture(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["codes.png", "reconstructions.png", "weights.pt"], (
        "a finished run leaves no checkpoint"
    )


def test_contrastive(example, tmp_path, capsys):
    _, main = example("contrastive")
    main("--epochs", 8)
    out = capsys.readouterr().out
    told = re.findall(
        r"^linear probe, (.+): InfoNCE (\d+\.\d\d) %, triplet (\d+\.\d\d) %, "
        r"pixels (\d+\.\d\d) %$",
        out,
        re.M,
    )
    found = {setting: tuple(map(float, accuracies)) for setting, *accuracies in told}
    assert list(found) == ["all labels", "5 labels, shifted"]
    assert min(found["all labels"]) > 90
    info_nce, triplet, pixels = found["5 labels, shifted"]
    assert min(info_nce, triplet) > pixels + 10
    assert f"wrote {tmp_path / 'contrastive.png'}" in out
    assert_is_a_picture(tmp_path / "contrastive.png")
    assert sorted(os.listdir(tmp_path)) == ["contrastive.png", "weights.pt"]


def test_views_and_partners(example):
    module, _ = example("contrastive")
    generator = torch.Generator().manual_seed(0)
    x, _, labels, _ = module.data(0, "cpu")
    seen = module.view(x[:50], generator)
    padded = torch.nn.functional.pad(x[:50].view(-1, 8, 8), (1, 1, 1, 1))
    shifts = torch.stack(
        [padded[:, i : i + 8, j : j + 8].flatten(1) for i in range(3) for j in range(3)]
    )
    nearest = (shifts - seen).square().mean(dim=2).sqrt().min(dim=0)
    assert nearest.values.max() < 1.5 * module.NOISE, "a view is a shift and noise"
    assert len(nearest.indices.unique()) > 5
    same, other = (module.partners(labels[:200], fits, generator) for fits in (True, False))
    assert torch.equal(labels[:200][same], labels[:200])
    assert not (same == torch.arange(200)).any()
    assert not (labels[:200][other] == labels[:200]).any()
    assert module.partners(torch.tensor([3]), True, generator).tolist() == [0]


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, example, tmp_path, capsys, monkeypatch):
    module, main = example(name)
    if name == "autoencoder":
        monkeypatch.setattr(module, "STARTS", 1)
        monkeypatch.setattr(module, "ITERATIONS", 3)
    else:
        monkeypatch.setattr(module, "judge", lambda *_: {"a: neighbours": 0.0, "a: probe": 0.0})
    main("--epochs", 3, "--seed", 3)
    whole = torch.load(tmp_path / "weights.pt")
    save, saved = module.save, []

    def interrupting(state, path):
        save(state, path)
        saved.append(state.get("epoch"))
        if saved == [1, 2]:
            raise KeyboardInterrupt

    for writer in (module, sys.modules["common"]):
        monkeypatch.setattr(writer, "save", interrupting)
    with pytest.raises(SystemExit) as error:
        main("--epochs", 3, "--seed", 3)
    assert error.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    main("--epochs", 3, "--seed", 3)
    assert "continuing after epoch 2 of 3" in capsys.readouterr().out
    resumed = torch.load(tmp_path / "weights.pt")
    for model, weights in whole.items():
        for key, value in weights.items():
            assert torch.equal(resumed[model][key], value), (model, key)


@pytest.mark.parametrize("name", NAMES)
def test_bad_options_and_packages_are_told(name, example, monkeypatch, capsys, tmp_path):
    module, main = example(name)
    with pytest.raises(SystemExit) as error:
        main("--epochs", 0)
    assert error.value.code == 2
    assert "0 is less than 1" in capsys.readouterr().err.splitlines()[-1]
    module.save({"settings": {"seed": 5}}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="other settings"):
        main("--epochs", 2)
    sys.modules.pop(module.__name__)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"tqdm.*pip install -e '\.\[demo\]'"):
        example(name)
