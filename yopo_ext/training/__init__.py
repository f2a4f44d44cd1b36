"""Training, evaluation and comparison of robust image classifiers. Needs the `train` extra."""

from importlib.util import find_spec

_missing = [
    package
    for module, package in (
        ("yaml", "pyyaml"),
        ("lightning_fabric", "lightning-fabric"),
        ("matplotlib", "matplotlib"),
        ("sklearn", "scikit-learn"),
        ("tqdm", "tqdm"),
    )
    if find_spec(module) is None
]
if _missing:
    raise ModuleNotFoundError(
        f"yopo_ext.training needs {', '.join(_missing)}, not installed: pip install 'yopo-ext[train]'", name=_missing[0]
    )
