"""Kill `rewriter ir run` at random moments: is the resumed dataset the undisturbed one, byte for byte?

    python benchmarks/ir_kill.py --config benchmarks/ir_kill.toml --kills 20

Runs once undisturbed, then again on an empty store, with SIGKILL to the process at random moments,
each at most a fifth of the undisturbed time after the start, until it was killed often enough; the last
run may end. Compares every file of the two datasets but `run.json` and the card, which hold times.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(config: str, store: Path, output: Path) -> list[str]:
    """The run to disturb."""
    run = [sys.executable, "-m", "rewriter", "ir", "run", "--config", config]
    return [*run, "--store", str(store), "--output", str(output)]


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file by its relative name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in {"run.json", "card.html"}  # times
    }


def killed(arguments: list[str], after_s: float) -> bool:
    """Start, wait, kill; False where it had ended before."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def disturbed(arguments: list[str], kills: int, longest_s: float, seed: int) -> int:
    """Kill at random moments, then let a last run end; returns how often it was killed."""
    chance = random.Random(seed)
    done = 0
    while done < kills:
        after = chance.uniform(0.5, longest_s)
        if not killed(arguments, after):
            print(f"ended before kill {done + 1}", flush=True)
            break
        done += 1
        print(f"killed {done}/{kills} after {after:.1f} s", flush=True)
    subprocess.run(arguments, check=True)
    return done


def main() -> int:
    """Print what differs; exit code 1 if anything does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="benchmarks/ir_kill.toml")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="ir-kill-"))
    try:
        started = time.monotonic()
        subprocess.run(command(options.config, place / "a", place / "one"), check=True)
        took = time.monotonic() - started
        again = command(options.config, place / "b", place / "two")
        kills = disturbed(again, options.kills, max(took / 5, 3.0), options.seed)
        one, two = hashes(place / "one"), hashes(place / "two")
        differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
        print(
            f"undisturbed {took:.0f} s; killed {kills} times; {len(one)} files, {len(differ)} differ"
        )
        print("\n".join(differ))
        return 1 if differ or kills < options.kills else 0
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
