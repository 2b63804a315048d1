"""``python -m tests.packaging [--clone]``: what a user installs, tried in fresh environments."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.packaging.action import check_action
from tests.packaging.clone import check_clone
from tests.packaging.environments import build_distributions
from tests.packaging.extension import check_extension
from tests.packaging.wheel import check_wheel
from tests.packaging.without_torch import check_without_torch

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    wheel, sdist = build_distributions(folder / "dist")
    print(check_wheel(wheel, sdist, folder), flush=True)
    print(check_without_torch(wheel, folder), flush=True)
    print(check_extension(wheel, folder), flush=True)
    print(check_action(folder), flush=True)
    if "--clone" in sys.argv[1:]:
        print(check_clone(folder), flush=True)
