"""Which attacks a suite is made of. Nothing is imported here: help texts list the suites before PyTorch is loaded."""

SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("pgd-20",),  # while developing
    "standard": ("pgd-20", "pgd-50-10", "cw-50-10"),  # what papers on fast training report
    # before claiming anything
    "full": ("pgd-20", "pgd-50-10", "cw-50-10", "apgd-ce", "apgd-t", "square", "autoattack"),
}
