"""C++ that TorchInductor writes for a few small models, taken from its own cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from rewriter.errors import SourceError

__all__ = ["HEADERS", "Headers", "inductor_texts", "why_no_inductor"]

_PROGRAM = """\
import torch
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, width, heads, act):
        super().__init__()
        self.heads, self.act = heads, act
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    def forward(self, x):
        b, t, w = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) * (w // self.heads) ** -0.5
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        x = x + self.out((scores.masked_fill(~seen, -1e9).softmax(-1) @ v).transpose(1, 2).reshape(b, t, w))
        return x + self.down(self.act(self.up(self.second(x))))

def pool(x): return F.avg_pool2d(F.relu(x), 2) + x.amax((2, 3), keepdim=True)
def stats(x): return x.var(-1), x.cumsum(-1), x.sort(-1).values, x.argmax(-1), torch.logsumexp(x, -1)
def embed(i, w): return F.embedding(i, w).sin() * F.embedding(i + 1, w).cos()
def loss(x, y): return F.cross_entropy(x, y) + F.huber_loss(x.exp(), x.sigmoid())
def quant(x):
    s = x.abs().amax(-1, keepdim=True) / 127
    return (x / s).round().clamp(-128, 127).to(torch.int8), s

torch.manual_seed(0)
g = torch.randn
with torch.no_grad():
    for act in (F.gelu, F.silu, F.relu):
        torch.compile(Block(64, 4, act))(g(2, 32, 64))
        torch.compile(Block(64, 4, act).bfloat16())(g(2, 32, 64).bfloat16())
    torch.compile(pool)(g(2, 8, 32, 32))
    torch.compile(stats)(g(64, 128))
    torch.compile(embed)(torch.arange(32), g(64, 48))
    torch.compile(loss)(g(32, 64), torch.arange(32))
    torch.compile(quant)(g(32, 256))
"""

_KERNEL = re.compile(r'extern "C"')


class Headers:
    """What the texts include: PyTorch's headers and Python's."""

    def directories(self) -> tuple[Path, ...]:
        """Where they are."""
        import torch

        place = Path(torch.__file__).parent / "include"
        wanted = (place, place / "torch/csrc/api/include", Path(sysconfig.get_path("include")))
        return tuple(one for one in wanted if one.is_dir())

    def flags(self, isa: str) -> tuple[str, ...]:
        """As TorchInductor passes them for an instruction set."""
        upper = isa.upper()
        return (
            f"-DCPU_CAPABILITY={upper}",
            f"-DCPU_CAPABILITY_{upper}",
            "-D_GLIBCXX_USE_CXX11_ABI=1",
        )


HEADERS = Headers()


def why_no_inductor() -> str | None:
    """What TorchInductor needs and this machine lacks, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"{compiler} is not installed, which torch.compile needs: apt-get install g++"
    return None


def inductor_texts(workspace: Path) -> dict[str, str]:
    """Compile the models in a process of its own; C++ text by file name, sorted by the text.

    Raises:
        SourceError: torch.compile failed, or wrote no kernel.
    """
    cache = workspace / "inductor"
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    }
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1000, check=False
    )
    if done.returncode:
        raise SourceError(f"torch.compile failed: {done.stderr.strip()[-1000:]}")
    texts = set()
    for path in cache.rglob("*.cpp"):
        text = path.read_text(encoding="utf-8")
        if _KERNEL.search(text) and "cpp_prefix" in text:
            texts.add(text.replace(str(cache), "."))
    if not texts:
        raise SourceError("torch.compile wrote no C++ kernel")
    return {f"inductor_{number:03d}.cpp": text for number, text in enumerate(sorted(texts))}
