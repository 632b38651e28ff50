"""What every benchmark does: it finds its checkpoint, says on what machine it runs, and puts its results where they are wanted."""

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from checkpoints import make_checkpoint


def check_device(device: str):
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            sys.exit(f"--device {device}: there is no GPU that PyTorch sees")


def find_checkpoint(given: Path | None, work: Path, size: str) -> Path:
    """The folder that was given, or one of this size, which is made where there is none yet."""
    folder = given or work / size
    if not (folder / "config.json").exists():
        if given:
            sys.exit(f"{folder}: no config.json here")
        print(f"making {folder}", file=sys.stderr)
        make_checkpoint(folder, size)
    return folder.resolve()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def started(device: str, **more) -> dict:
    """Results that say when and where they began."""
    when = datetime.now(timezone.utc).isoformat(timespec="minutes")
    return {"date": when, "processor": processor(), "device": device, "load_before": os.getloadavg()[0], **more}


def ended(results: dict) -> dict:
    return results | {"load_after": os.getloadavg()[0]}


def publish(args, results: dict, report: str, draw: Callable[[dict, Path], None] | None = None):
    """Print the report, and write what `--json` and `--plot` ask for."""
    print(report)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if draw and args.plot:
        draw(results, args.plot)
