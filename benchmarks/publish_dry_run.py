"""Everything in ``schedulers/`` and ``pipelines/``, pushed to a Hub on this machine and loaded back from it. ``make publish-dry-run``.

    python benchmarks/publish_dry_run.py

Ends with 1 where a folder holds a file that does not belong on the Hub, or what comes back is not what lies here.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from diffx.hub.artifact import published_files
from diffx.testing import LocalHub

ROOT = Path(__file__).parent.parent
KINDS = ("schedulers", "pipelines")
# In a process that knows the LocalHub only: arguments are [kind, name, folder] each.
CHILD = """
import json, sys
import diffusers, diffx
from diffx.loading import EMBEDDED

told = []
for kind, name, folder in json.loads(sys.argv[1]):
    repo_id, loaded, note = f"tester/{name}", None, ""
    try:
        diffx.push_to_hub(folder, repo_id, private=True)
        if kind == "pipelines":
            load = lambda **trust: diffusers.DiffusionPipeline.from_pretrained(EMBEDDED, custom_pipeline=repo_id, **trust)
        else:
            load = lambda **trust: diffx.AutoScheduler.from_pretrained(repo_id, **trust)
        try:
            loaded, code = load(), False
        except ValueError as error:
            if "trust_remote_code=True" not in str(error):
                raise
            loaded, code = load(trust_remote_code=True), True
        if kind == "schedulers":
            here = diffx.AutoScheduler.from_pretrained(folder, trust_remote_code=code)
            if type(here).__name__ != type(loaded).__name__ or dict(here.config) != dict(loaded.config):
                raise ValueError("another scheduler came back")
            loaded.set_timesteps(4, **({"mu": 1.0} if loaded.config.get("use_dynamic_shifting") else {}))
        note = "its code, when trusted" if code else "no code"
    except Exception as error:
        note = f"{type(error).__name__}: {error}"
        loaded = None
    told.append([type(loaded).__name__ if loaded is not None else "", note])
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Published:
    """What became of one folder."""

    kind: str
    name: str
    num_files: int
    num_bytes: int
    loaded: str  # the class that came back, "" where nothing did
    note: str
    equal: bool  # the files on the Hub are those of the folder, byte for byte

    @property
    def fine(self) -> bool:
        return bool(self.loaded) and self.equal


def folders(root: Path = ROOT) -> list[Path]:
    """Every folder that is published."""
    return sorted(folder for kind in KINDS for folder in (root / kind).iterdir() if folder.is_dir() and folder.name != "__pycache__")


def publish(published: Iterable[Path], hub: LocalHub) -> list[Published]:
    """Push those folders and load them back.

    Raises:
        ValueError: one of them holds a file that does not belong on the Hub.
    """
    contents = {folder: {name: (folder / name).read_bytes() for name in published_files(folder)} for folder in published}
    work = [[folder.parent.name, folder.name, str(folder)] for folder in contents]
    told = json.loads(hub.run(["-c", CHILD, json.dumps(work)]).stdout.splitlines()[-1])
    found = []
    for (folder, files), (loaded, note) in zip(contents.items(), told, strict=True):
        there = {k: v for k, v in hub.files(f"tester/{folder.name}").items() if k != ".gitattributes"}
        sizes = sum(map(len, files.values()))
        found.append(Published(folder.parent.name, folder.name, len(files), sizes, loaded, note, there == files))
    return found


def table(found: Iterable[Published]) -> str:
    """A line per folder."""
    lines = ["| folder | files | KB | comes back as | runs | files equal |", "| --- | --- | --- | --- | --- | --- |"]
    for each in found:
        size = f"{each.num_bytes / 1000:.1f}"
        equal = "yes" if each.equal else "no"
        lines.append(f"| {each.kind}/{each.name} | {each.num_files} | {size} | {each.loaded or 'nothing'} | {each.note} | {equal} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with LocalHub() as hub:
        try:
            found = publish(folders(), hub)
        except ValueError as error:
            sys.exit(str(error))
    print(table(found))
    sys.exit(0 if all(each.fine for each in found) else 1)


if __name__ == "__main__":
    main()
