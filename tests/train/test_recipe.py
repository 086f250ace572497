"""The recipe: schedule and refusals."""

import pytest

from fastres.train import Recipe


def test_learning_rate_warms_up_linearly_and_ends_at_zero():
    recipe = Recipe(epochs=10, warmup=2, lr=0.1)
    rates = [recipe.learning_rate(step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[30] == pytest.approx(0.05) and rates[-1] < 0.001


def test_peak_learning_rate_follows_the_batch():
    assert Recipe(batch=512).peak_lr == pytest.approx(2 * Recipe(batch=256).peak_lr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet7"}, "model: expected one of resnet11.*got 'resnet7'"),
        ({"precision": "int8"}, "precision: expected one of auto, fp32"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"size": 0}, "size: expected at least 1 pixel"),
        ({"freeze": 5}, "freeze: expected None or 0 to 4, got 5"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 up to 1"),
        ({"finetune": "nowhere.pt"}, "finetune: expected a file, got 'nowhere.pt'"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)
