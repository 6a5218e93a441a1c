"""The record of the native product's soak test: how many random products were compared, and that no bit differed.

The cases and the comparison are those of tests/kernels/test_native_product.py, which this script runs through pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from hqdit.pipeline.environment import describe_environment
from hqdit.pipeline.publish import publish_text

ROOT = Path(__file__).parent.parent


def run_soak(cases: int) -> ElementTree.Element:
    """The soak test's entry in pytest's report; exits with pytest's code if the test did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "soak", "tests/kernels/test_native_product.py"]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        environment = {**os.environ, "HQDIT_SOAK_CASES": str(cases)}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code:
            sys.exit(code)
        (test,) = ElementTree.parse(report).getroot().iter("testcase")
    skipped = test.find("skipped")
    if skipped is not None:
        sys.exit(f"the soak test was skipped: {skipped.get('message')}")
    return test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="record to write")
    parser.add_argument("--cases", type=int, default=20_000)
    args = parser.parse_args()
    test = run_soak(args.cases)
    found = {entry.attrib["name"]: entry.attrib["value"] for entry in test.iter("property")}
    record = {
        "test": f"{test.attrib['classname']}::{test.attrib['name']}",
        "cases": int(found["cases"]),
        "calls": int(found["calls"]),
        "differing_bits": 0,  # one would have failed the test
        "instruction_sets": found["instruction_sets"].split(","),
        "seconds": round(float(test.attrib["time"])),
        "environment": describe_environment(),
    }
    publish_text(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
