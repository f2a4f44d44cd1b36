from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # policy.py, cases.py
torch.set_num_threads(1)  # tensors here are tiny; waiting threads would cost more than they do
