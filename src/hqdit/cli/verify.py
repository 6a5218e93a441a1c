"""`hqdit verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hqdit.cli.options import Debug, JsonFile, Quiet, require_json, say, write_json


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that hqdit wrote.")],
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every file of a folder against its manifest: size and SHA-256."""
    from hqdit.pipeline.manifest import compare_with_manifest, read_manifest, report

    require_json(json_file, None, folder)
    listed = read_manifest(folder)
    found = compare_with_manifest(folder)
    write_json(json_file, {"files": len(listed), "is_sound": found.is_sound, **asdict(found)})
    report(folder, found)
    if not quiet:
        say(f"{folder}: {len(listed)} files, {sum(facts.bytes for facts in listed.values()):,} bytes, all as written")
