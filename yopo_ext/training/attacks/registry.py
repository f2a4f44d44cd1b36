"""The attacks of an evaluation by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from yopo_ext.training.attacks.apgd import Apgd
from yopo_ext.training.attacks.autoattack import AutoAttack
from yopo_ext.training.attacks.base import Attack
from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.attacks.suites import SUITES as SUITES
from yopo_ext.training.nearest import nearest
from yopo_ext.training.numbers import parse_number

# Those that take no numbers; `pgd-...` and `cw-...` are read below.
ATTACKS: dict[str, Attack] = {
    attack.kind: attack for attack in (Apgd(), Apgd(targeted=True), AutoAttack(square=True), AutoAttack())
}


def parse_attack(text: str) -> Attack:
    """The attack written as "pgd-STEPS[-RESTARTS]", "cw-STEPS[-RESTARTS]" (PGD on the margin loss) or by its name.

    ":STEP_SIZE" after PGD's numbers sets its step (default: eps / 4), and "@IMAGES" at the end limits any attack to the
    first so many images: "pgd-40:0.01", "autoattack@1000".

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"((pgd|cw)-([1-9]\d*)(-[1-9]\d*)?(:[^@]+)?|[a-z-]+)(@[1-9]\d*)?", text.strip())
    close = nearest(text, (*ATTACKS, "pgd-20", "cw-20"))
    if found is None or not (found[2] or found[1] in ATTACKS):
        raise ValueError(
            "attack must look like pgd-20, pgd-50-10 (steps, restarts), cw-50-10 or pgd-40:0.01 (step size), or be one of "
            f"{', '.join(ATTACKS)}, with @1000 after it for the first 1000 images only; got {text!r}{close}"
        )
    name, kind, steps, restarts, step_size, images = found.groups()
    if kind is None:
        attack = ATTACKS[name]
    else:
        size = None if step_size is None else parse_number(step_size[1:], f"step size in attack {text!r}")
        if size is not None and not size > 0.0:
            raise ValueError(f"step size in attack {text!r} must be > 0")
        attack = PgdAttack(int(steps), int((restarts or "-1")[1:]), "ce" if kind == "pgd" else "margin", size)
    return attack if images is None else dataclasses.replace(attack, samples=int(images[1:]))


def parse_attacks(texts: Sequence[str]) -> list[Attack]:
    """The attacks, all of which can be run here.

    Raises:
        ValueError: for an unknown attack.
        ModuleNotFoundError: for one whose package is not installed.
    """
    found = [parse_attack(text) for text in texts]
    if not found or len({attack.name for attack in found}) < len(found):
        raise ValueError(f"attacks must be a list without repetitions, at least one long; got {list(texts)}")
    for attack in found:
        attack.require()
    return found
