"""Every feature loss equals an independent formula, or has the invariance for which it was chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from yolo_compress.distill.feature import MASKED, Aligner, Generator, find
from yolo_compress.errors import RecipeError
from yolo_compress.recipe.choices import FEATURE_LOSSES

PURE = [name for name in FEATURE_LOSSES if name != "mgd"]


def maps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    return student, teacher, torch.rand(3, 1, 5, 6, generator=generator, dtype=torch.float64)


def distance(name: str, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> float:
    return float(find(name).distance(student, teacher, weight))


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_zero_for_equal_maps_and_positive_otherwise(name: str) -> None:
    student, teacher, weight = maps()
    assert distance(name, teacher, teacher, weight) == pytest.approx(0.0, abs=1e-12)
    assert distance(name, student, teacher, weight) > 1e-3


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_gradient_goes_to_the_student_and_its_adapter(name: str) -> None:
    student, teacher, weight = (tensor.float() for tensor in maps())
    student.requires_grad_()
    loss = find(name)
    adapter = loss.adapter(4, 4)
    loss.distance(adapter(student), teacher, weight).backward()
    assert student.grad is not None and bool(student.grad.any()) and teacher.grad is None
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("name", PURE)
def test_equal_maps_through_a_fresh_adapter_are_still_equal(name: str) -> None:
    _, teacher, weight = (tensor.float() for tensor in maps())
    with torch.no_grad():
        assert distance(name, find(name).adapter(4, 4)(teacher), teacher, weight) == pytest.approx(0, abs=1e-6)


def test_fitnet_is_the_mean_squared_difference() -> None:
    student, teacher, weight = maps()
    assert distance("fitnet", student, teacher, weight) == pytest.approx(
        (student - teacher).square().sum().item() / student.numel()
    )


def test_cwd_is_the_kl_of_each_channels_softmax() -> None:
    student, teacher, weight = maps()
    total = 0.0
    for image in range(3):
        for channel in range(4):
            p, q = (np.exp(feat[image, channel].numpy().ravel()) for feat in (teacher, student))
            p, q = p / p.sum(), q / q.sum()
            total += float((p * np.log(p / q)).sum())
    assert distance("cwd", student, teacher, weight) == pytest.approx(total / 12)
    shift = torch.randn(3, 4, 1, 1, dtype=torch.float64)
    assert distance("cwd", teacher + shift, teacher, weight) == pytest.approx(0.0, abs=1e-12)


def test_pkd_is_one_minus_the_correlation_whatever_scale_and_shift() -> None:
    student, teacher, weight = maps()
    correlations = [
        np.corrcoef(student[:, channel].numpy().ravel(), teacher[:, channel].numpy().ravel())[0, 1]
        for channel in range(4)
    ]
    expected = 1 - float(np.mean(correlations))
    assert distance("pkd", student, teacher, weight) == pytest.approx(expected, abs=1e-4)
    scale = torch.tensor([0.5, 2.0, 30.0, 7.0], dtype=torch.float64).view(1, 4, 1, 1)
    assert distance("pkd", student * scale + 3.0, teacher * 5.0 - scale, weight) == pytest.approx(expected, abs=1e-4)


def test_attention_is_two_minus_two_cosines_whatever_the_order_and_number_of_channels() -> None:
    student, teacher, weight = maps()
    rows = [feat.square().sum(1).flatten(1).numpy() for feat in (student, teacher)]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*rows, strict=True)]
    expected = 2 - 2 * float(np.mean(cosines))
    assert distance("attention", student, teacher, weight) == pytest.approx(expected)
    doubled = torch.cat([student[:, [2, 0, 3, 1]]] * 2, 1)
    assert distance("attention", doubled, teacher, weight) == pytest.approx(expected)


def test_relation_compares_row_normalised_gram_matrices() -> None:
    student, teacher, weight = maps()
    rows = [feat.flatten(1).numpy() for feat in (student, teacher)]
    grams = [gram / np.linalg.norm(gram, axis=1, keepdims=True) for gram in (row @ row.T for row in rows)]
    expected = float(np.square(grams[0] - grams[1]).sum()) / 3**2
    assert distance("relation", student, teacher, weight) == pytest.approx(expected)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    rotated = torch.einsum("bchw,cd->bdhw", student, rotation)
    assert distance("relation", rotated, teacher, weight) == pytest.approx(expected)
    assert distance("relation", student[:1], teacher[:1], weight) == 0.0


def test_an_aligner_is_the_identity_as_far_as_widths_go() -> None:
    feat = torch.randn(1, 3, 2, 2)
    wider = Aligner(3, 5)(feat)
    assert torch.equal(wider[:, :3], feat) and not wider[:, 3:].any()


def test_an_aligner_starts_at_the_regression_of_the_teacher_on_the_student() -> None:
    """The aligner finds channels of a pruned model at other positions in the teacher. Its error is that of least squares."""
    torch.manual_seed(0)
    teacher = torch.randn(4, 6, 9, 9) * torch.arange(1, 7).view(1, 6, 1, 1) + 5
    student = teacher[:, [4, 1, 2]]
    aligner = Aligner(3, 6)
    aligner.start(student, teacher)
    torch.testing.assert_close(aligner(student)[:, [4, 1, 2]].detach(), student, rtol=0, atol=0.5)
    design_NC, target_ND = (feat.movedim(1, 3).flatten(0, 2).double().numpy() for feat in (student, teacher))
    design_NC = np.hstack([design_NC, np.ones((len(design_NC), 1))])
    residual_ND = target_ND - design_NC @ np.linalg.lstsq(design_NC, target_ND, rcond=None)[0]
    left = (aligner(student) - teacher).square().mean()
    assert float(left.detach()) == pytest.approx(float(np.square(residual_ND).mean()), rel=0.02)


def test_an_aligner_of_equal_maps_stays_the_identity_and_one_that_started_stays_where_it_is() -> None:
    torch.manual_seed(0)
    feat = torch.randn(2, 4, 5, 5)
    aligner = Aligner(4, 4)
    aligner.start(feat, feat)
    assert torch.equal(aligner(feat), feat)
    resumed = Aligner(4, 4)
    resumed.load_state_dict(aligner.state_dict())
    resumed.start(feat, torch.randn(2, 4, 5, 5))
    assert torch.equal(resumed(feat), feat)


def test_a_dead_channel_of_the_student_does_not_stop_the_start() -> None:
    feat = torch.randn(2, 4, 5, 5)
    feat[:, 1] = 0
    aligner = Aligner(4, 5)
    aligner.start(feat, torch.randn(2, 5, 5, 5))
    assert bool(torch.isfinite(aligner.weight).all())


def test_mgd_rebuilds_from_what_the_mask_leaves() -> None:
    """For equal maps, the loss is the error of the generator, which reconstructs masked locations from their neighbours."""
    torch.manual_seed(0)
    generator = Generator(4)
    seen: list[torch.Tensor] = []
    generator.first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    feat = torch.rand(2, 4, 40, 40) + 1
    assert generator(feat).shape == feat.shape
    masked = seen[0] == 0
    assert bool((masked.all(1) == masked.any(1)).all()), "a location is masked in all channels or in none"
    assert torch.equal(seen[0][~masked], feat[~masked])
    assert float(masked.float().mean()) == pytest.approx(MASKED, abs=0.03)


def test_mgds_generator_is_trained() -> None:
    torch.manual_seed(0)
    adapter, teacher = find("mgd").adapter(2, 3), torch.rand(4, 3, 6, 6)
    student = torch.rand(4, 2, 6, 6)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    means = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = find("mgd").distance(adapter(student), teacher, torch.ones(4, 1, 6, 6))
        loss.backward()
        optimizer.step()
        means.append(float(loss.detach()))
    assert np.mean(means[-5:]) < 0.5 * np.mean(means[:5])
    assert sum(isinstance(module, nn.Conv2d) for module in adapter.modules()) == 3


HEAD = "import torch\n\n\ndef mine(student_BCHW, teacher_BCHW, weight_B1HW):\n    "


def test_a_loss_of_ones_own_comes_through_an_aligner(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(HEAD + "return (student_BCHW - teacher_BCHW).abs().mean()\n")
    torch.manual_seed(3)
    after = torch.rand(1)
    torch.manual_seed(3)
    loss = find(f"{tmp_path}/own.py:mine")
    assert torch.equal(torch.rand(1), after), "trying it draws nothing from the training's generator"
    student, teacher, weight = maps()
    assert float(loss.distance(student, teacher, weight)) == pytest.approx(float((student - teacher).abs().mean()))
    assert isinstance(loss.adapter(2, 3), Aligner)


def test_a_loss_of_ones_own_may_bring_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\nfrom yolo_compress.distill.feature import FeatureLoss, l2\n\n"
        "mine = FeatureLoss(l2, lambda student, teacher: nn.Conv2d(student, teacher, 3, padding=1))\n"
    )
    assert find(f"{tmp_path}/own.py:mine").adapter(2, 3).kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "def mine(student, teacher): ...",
            r"takes \(student, teacher\), expected a function of \(student_BCHW, teacher",
        ),
        ("mine = 3", "is a int, expected a function"),
        (
            HEAD + "return (student_BCHW - teacher_BCHW).square().mean((1, 2, 3))",
            r"a tensor of shape \(2,\), expected a scalar",
        ),
        (HEAD + "return 1.0", "returns a float, expected a scalar tensor"),
        (HEAD + "return (student_BCHW - 2).sqrt().mean()", "returns nan"),
        (HEAD + "return student_BCHW.detach().mean()", "no gradient to the student"),
        (
            HEAD + "return student_BCHW @ weight_B1HW",
            r"fails on a map of shape \(2, 3, 4, 6\): RuntimeError: .* \(line 5\)",
        ),
        ("import nothing_of_the_kind", r"cannot be imported: ModuleNotFoundError: .* \(line 1\)"),
    ],
)
def test_an_invalid_feature_loss_is_refused_with_the_expected_form(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.py").write_text(text + "\n")
    with pytest.raises(RecipeError, match=rf"^distill\.feature_loss: .*own\.py.*{said}"):
        find(f"{tmp_path}/own.py:mine")
