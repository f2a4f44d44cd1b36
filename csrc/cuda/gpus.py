"""Prints the compute capabilities of the GPUs that the CUDA driver lists, such as "90;120"; without any, says why and exits with 1.

The build asks the driver rather than nvidia-smi or /dev, because containers may hold the GPU without either of them.
"""

from __future__ import annotations

import ctypes
import sys

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def main() -> None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        sys.exit("there is no CUDA driver")

    def ask(function: str, *arguments: object) -> int:
        """The number that a function of the driver writes into its first argument."""
        value = ctypes.c_int()
        status = getattr(cuda, function)(ctypes.byref(value), *arguments)
        if status != 0:
            sys.exit(f"the CUDA driver answers {function} with error {status}")
        return value.value

    if (status := cuda.cuInit(0)) != 0:
        sys.exit(f"the CUDA driver answers cuInit with error {status}")
    found = set()
    for number in range(ask("cuDeviceGetCount")):
        device = ask("cuDeviceGet", number)
        found.add(10 * ask("cuDeviceGetAttribute", MAJOR, device) + ask("cuDeviceGetAttribute", MINOR, device))
    if not found:
        sys.exit("the CUDA driver lists no GPU")
    print(";".join(map(str, sorted(found))))


if __name__ == "__main__":
    main()
