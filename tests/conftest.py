"""What every test starts from: one thread, no network, a fixed seed, and where the data are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Root of the checkout."""


def _find_data() -> Path | None:
    """The shared test data: `$REWRITER_DATA`, or `shared/data` beside or in the checkout."""
    named = os.environ.get("REWRITER_DATA")
    if named:
        return Path(named)
    places = (ROOT.parent / "shared" / "data", ROOT / "shared" / "data")
    return next((place for place in places if place.is_dir()), None)


DATA = _find_data()
if DATA is not None:
    os.environ["REWRITER_DATA"] = str(DATA)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: 0 for tests on a GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """One thread, the same random numbers and no gradients, whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with `stories260k`, `gsm8k` and `text`; skips the test where it is not there."""
    if DATA is None or not DATA.is_dir():
        pytest.skip("no test data: set REWRITER_DATA to the folder with stories260k")
    return DATA


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    """A trained Llama of 260k parameters with its golden tokens."""
    directory = shared_data / "stories260k"
    if not directory.is_dir():
        pytest.skip(f"no stories260k in {shared_data}")
    return directory


@pytest.fixture(scope="session")
def trial_reasoner() -> Path:
    """The trained model that comes with the examples."""
    return ROOT / "examples" / "models" / "trial_reasoner"
