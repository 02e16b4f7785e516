"""Runs one share of a section and says so in lines of JSON: what begins, then its row."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.gpu import sections

#: The row has been written, the device is lost to this process: start another.
DEVICE_LOST = 75


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message, allow_nan=False), flush=True)


def _alive() -> bool:
    """Whether the device still answers after an error."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.zeros(1, device="cuda").item() == 0)
    except RuntimeError:
        return False


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=(*sections.SECTIONS, "sweep"))
    parser.add_argument("--sweep", default="")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--done", type=Path)
    parser.add_argument("--filter", default="")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    shard, shards = map(int, options.shard.split("/"))
    done = set(options.done.read_text().splitlines()) if options.done else set()
    setup = sections.Setup.here(options.tiny)
    if shard == 0:
        _say({"device": setup.describe()})
    sweeping = options.section == "sweep"
    jobs = sections.sweep(setup, options.sweep) if sweeping else sections.SECTIONS[options.section](setup)
    for number, job in enumerate(jobs):
        if number % shards != shard or job.name in done or options.filter not in job.name:
            continue
        _say({"start": job.name})
        try:
            row = job.run()
        except Exception as error:  # an error is this row's result, and the others' turn is next
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error).strip()[:600]} ({Path(place.filename).name}:{place.lineno})"
            _say({"name": job.name, "error": reason, "text": f"FAILED: {reason}"})
            if not _alive():
                return DEVICE_LOST
            continue
        _say({"name": job.name, **row})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
