"""The record of the damage soak: every flipped bit and every truncation of a checkpoint, each found by its manifest.

The damage is that of tests/pipeline/test_manifest.py, which this script runs through pytest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from hqdit.pipeline.environment import describe_environment
from hqdit.pipeline.publish import publish_text

ROOT = Path(__file__).parent.parent
TEST = "tests/pipeline/test_manifest.py::test_every_flipped_bit_and_every_truncation"


def run_soak() -> ElementTree.Element:
    """The soak test's entry in pytest's report; exits with pytest's code if the test did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "soak", TEST, "-o", "junit_family=xunit1"]
        code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False).returncode
        if code:
            sys.exit(code)
        (test,) = ElementTree.parse(report).getroot().iter("testcase")
    return test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="record to write")
    args = parser.parse_args()
    test = run_soak()
    found = {entry.attrib["name"]: int(entry.attrib["value"]) for entry in test.iter("property")}
    record = {
        "test": f"{test.attrib['classname']}::{test.attrib['name']}",
        "files": found["files"],
        "bytes": found["bytes"],
        "flipped_bits": 8 * found["bytes"],
        "truncations": found["bytes"],
        "unnoticed": 0,  # one would have failed the test
        "seconds": round(float(test.attrib["time"])),
        "environment": describe_environment(),
    }
    publish_text(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
