"""The attacks of an evaluation, one file each; `registry.py` names them."""
