"""When training goes wrong in a way that the loss alone does not show."""

from __future__ import annotations

from collections.abc import Mapping


def has_fallen(highest: Mapping[str, float], record: Mapping[str, float], classes: int) -> bool:
    """Whether the clean validation accuracy is under half of the best one before, which was well above chance."""
    return _halved("validation_clean", highest, record, classes)


def training_alarm(
    highest: Mapping[str, float], record: Mapping[str, float], classes: int, *, fallen: int, last: bool = False
) -> str | None:
    """What is wrong with an epoch, if anything.

    A network often falls back to chance while the learning rate still rises, and learns again afterwards. So a low clean
    accuracy is called a collapse only when the rate does not rise, and in the second validation in a row or in the last one.

    Args:
        highest: the best validation accuracies (percent) and alignment and the highest learning rate (`lr`) of the epochs
            before; empty in the first.
        record: `train_accuracy` (on the training attack) and `lr` of the epoch, and what it has of `validation_clean`,
            `validation_pgd` and `alignment` (`Outcome.alignment`, mean over the epoch).
        classes: accuracy by chance is 100 / classes.
        fallen: validations in a row that `has_fallen` says of, this one included.
        last: whether the run ends with this epoch.
    """
    rising = record.get("lr", 0.0) > highest.get("lr", 0.0)
    if has_fallen(highest, record, classes) and not rising and (fallen >= 2 or last):
        fell = f"from {highest['validation_clean']:.1f} % to {record['validation_clean']:.1f} %"
        return f"training collapsed: clean accuracy on validation fell {fell}; try a lower learning rate or a warm-up"
    if _halved("validation_pgd", highest, record, classes) and record["train_accuracy"] > highest["validation_pgd"]:
        fell = f"from {highest['validation_pgd']:.1f} % to {record['validation_pgd']:.1f} %"
        return (
            f"catastrophic overfitting: PGD accuracy on validation fell {fell} while the training attack is met with "
            f"{record['train_accuracy']:.1f} %; try more attack steps or a smaller step"
        )
    if "alignment" in record and record["alignment"] < 0.5 * highest.get("alignment", 0.0):
        fell = f"from {highest['alignment']:.2f} to {record['alignment']:.2f}"
        return (
            f"the attack loses its way: the cosine between the signs of its last gradient and of the training pass's fell "
            f"{fell}; catastrophic overfitting may follow: try a smaller step or more passes"
        )
    return None


def _halved(name: str, highest: Mapping[str, float], record: Mapping[str, float], classes: int) -> bool:
    chance = 100.0 / classes
    return name in record and highest.get(name, 0.0) > 2 * chance and record[name] < 0.5 * highest[name]
