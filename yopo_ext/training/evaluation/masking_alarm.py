"""Signs that a model hides its gradients instead of being robust."""

from __future__ import annotations

from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.attacks.registry import parse_attack


def alarms(robust: dict[str, float]) -> list[str]:
    """Signs, in robust accuracies in percent by attack, that gradients are masked and the accuracies too high."""
    found = []
    for images in {name.partition("@")[2] for name in robust}:  # attacks on the same images
        found += _alarms({n.partition("@")[0]: value for n, value in robust.items() if n.partition("@")[2] == images})
    return found


def not_finite_alarm(images: int, samples: int) -> list[str]:
    """The alarm of a network whose logits are NaN or infinite for so many images of the samples."""
    if images == 0:
        return []
    return [
        f"outputs are not finite for {images} of {samples} images: NaN counts as wrong, and attacks that use gradients are blind"
    ]


def _alarms(robust: dict[str, float]) -> list[str]:
    found = []
    white_box = {name: value for name, value in robust.items() if name not in ("square", "autoattack")}
    if "square" in robust and white_box and robust["square"] < min(white_box.values()):
        found.append("Square, which needs no gradients, beats every attack that uses them")
    plain = {name: attack for name in robust if isinstance(attack := parse_attack(name), PgdAttack)}
    weak, strong = (
        min((robust[n] for n, a in plain.items() if a == PgdAttack(steps, a.restarts, samples=a.samples)), default=None)
        for steps in (20, 50)
    )
    if weak is not None and strong is not None and weak - strong > 5.0:
        found.append(f"PGD-50 leaves {weak - strong:.1f} points less than PGD-20: short attacks do not converge")
    return found
