"""The documents say what the code does: names, files, options, targets, keys and examples in them exist.

The convention for text in backticks, stated at the top of docs/architecture.md: `package.module.name` is a Python name
below `hqdit`, `folder/file.py` is a file below `src/hqdit` or the repository's root. Other words with an underscore or
an inner capital have to occur somewhere in the source.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import functools
import importlib
import json
import math
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import calibration, peculiar_dit, tiny_dit

import hqdit
from hqdit.cli.main import app
from hqdit.layers.linear import HQLinear
from hqdit.pipeline import checkpoint, description
from hqdit.pipeline.checkpoint import load, save
from hqdit.pipeline.config import _ADDED, QuantizationConfig
from hqdit.pipeline.quantize import quantize

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hqdit"
GUIDES = (
    "docs/architecture.md",
    "docs/method.md",
    "docs/checkpoint.md",
    "docs/diffusers.md",
    "docs/kernels.md",
    "docs/records.md",
    "docs/evaluation.md",
    "docs/support.md",
    "docs/jobs.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
DOCUMENTS = (*GUIDES, "README.md")
FREE_MODULES = ("errors", "progress", "randomness")
FILE_ENDINGS = (".py", ".md", ".toml", ".html", ".yml", ".txt", ".json", ".h", ".cc")
#: Files that exist beside a model, or after a command has run, and not in the repository.
OTHER_FILES = {
    "config.json",
    "model_index.json",
    "transformer/config.json",
    "demo/report.html",
    "benchmarks/results/cpu.json",
    "build/peer_accuracy",
    "docs/records/native_soak.json",
    "docs/records/fuzz.json",
    "docs/records/damage_soak.json",
    "docs/records/estimates.json",
    "docs/records/peer_accuracy",
    "build/native",
    "record.json",
    "DIR/cache",
    "DIR/report.html",
    "docs/records/reproduce",
    "hqdit_manifest.json",
    "job.json",
    "publishing.json",
}
#: Kernels, and what the files of their instruction sets are named after.
KERNELS, INSTRUCTION_SETS = ("product", "rotate_quantize", "attention"), ("portable", "avx2", "avx512", "amx")

each_document = pytest.mark.parametrize("document", DOCUMENTS)
each_guide = pytest.mark.parametrize("document", GUIDES)


# Reading markdown


@functools.cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@functools.cache
def code_blocks(document: str) -> tuple[tuple[str, str], ...]:
    """(language, text) of every fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(document), flags=re.MULTILINE | re.DOTALL)
    return tuple((language, body) for language, body in found)


@functools.cache
def quoted(document: str) -> frozenset[str]:
    """Everything in single backticks, outside fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r"`([^`\n]+)`", prose))


def section(document: str, title: str) -> str:
    """The text under a heading, up to the next heading of any level."""
    parts = re.split(r"^#+ (.*)$", text_of(document), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def rows(markdown: str) -> list[list[str]]:
    """Cells of the table rows, the header and the rule under it left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = [index for index, line in enumerate(lines) if set(line) <= set("|-: ")]
    headers = {index - 1 for index in rules} | set(rules)
    return [row for index, row in enumerate(cells) if index not in headers]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_column(markdown: str) -> list[str]:
    return [name for row in rows(markdown) for name in names_in(row[0])]


def shell_lines(document: str) -> list[str]:
    """Command lines of the fenced blocks, continued lines joined, comments and prompts left out."""
    joined = [
        body.replace("\\\n", " ") for language, body in code_blocks(document) if language not in ("python", "pycon")
    ]
    lines = [line.strip().removeprefix("$ ").split("  #")[0].strip() for body in joined for line in body.splitlines()]
    return [*lines, *sorted(quoted(document))]


# What there is


@functools.cache
def source_files() -> tuple[str, ...]:
    """Modules of the packages, as in `formats/catalog.py`."""
    return tuple(
        path.relative_to(SOURCE).as_posix() for path in sorted(SOURCE.glob("*/**/*.py")) if path.name != "__init__.py"
    )


@functools.cache
def packages() -> frozenset[str]:
    return frozenset(name.partition("/")[0] for name in source_files())


@functools.cache
def words_of_source() -> frozenset[str]:
    files = [*SOURCE.rglob("*.py"), ROOT / "Makefile", ROOT / "CMakeLists.txt", *(ROOT / "training").glob("*.py")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "native").rglob("*.h"), *(ROOT / "native").rglob("*.cc")]
    return frozenset(re.findall(r"[A-Za-z_]\w*", "\n".join(path.read_text(encoding="utf-8") for path in files)))


@functools.cache
def words_of_diffusers() -> frozenset[str]:
    """Of diffusers' modules that its users' page speaks of, and of the tests that run its own."""
    names = ("models.modeling_utils", "pipelines.pipeline_utils", "loaders.peft", "loaders.lora_pipeline", "quantizers")
    files = [Path(str(importlib.import_module(f"diffusers.{name}").__file__)) for name in names]
    files.append(ROOT / "tests" / "integrations" / "test_diffusers_mixin.py")
    return frozenset(re.findall(r"[A-Za-z_]\w*", "\n".join(path.read_text(encoding="utf-8") for path in files)))


def is_python_name(text: str) -> bool:
    first, *rest = text.split(".")
    known = packages() | set(FREE_MODULES) | {"hqdit"}
    return bool(rest) and first in known and all(part.isidentifier() for part in rest) and not is_file(text)


def is_file(text: str) -> bool:
    return " " not in text and "\\" not in text and (text.endswith(FILE_ENDINGS) or "/" in text.strip("/"))


def resolve(text: str) -> object:
    """The object behind a dotted name below `hqdit`: the longest part that is a module, then attributes."""
    parts = text.removeprefix("hqdit.").split(".")
    for length in range(len(parts), -1, -1):
        name = ".".join(("hqdit", *parts[:length]))
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):
                raise
            continue
        for part in parts[length:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise AttributeError(text)


@functools.cache
def commands() -> dict[str, frozenset[str]]:
    """Command -> its options, long names."""
    group = typer.main.get_command(app)
    members: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    return {
        name: frozenset(o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--"))
        | {"--help"}
        for name, command in members.items()
    }


@functools.cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][a-z-]*):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


# Names, files, links, options, targets


@each_guide
def test_every_python_name_exists(document: str) -> None:
    broken = []
    for text in sorted(quoted(document)):
        if is_python_name(text):
            try:
                resolve(text)
            except AttributeError:
                broken.append(text)
    assert not broken


def test_the_resolver_notices_a_name_that_is_gone() -> None:
    assert resolve("pipeline.quantize.quantize") is quantize
    assert resolve("quantizers.spec.LinearSpec.in_features") is not None
    for text in ("gptq.solver.no_such_name", "gptq.no_such_module", "layers.linear.HQLinear.no_such_method"):
        assert is_python_name(text)
        with pytest.raises(AttributeError):
            resolve(text)


@each_guide
def test_every_file_exists(document: str) -> None:
    named = {text for text in quoted(document) if is_file(text) and not text.startswith("make ")} - OTHER_FILES
    broken = [name for name in sorted(named) if not any((base / name).exists() for base in (SOURCE, ROOT))]
    assert not broken


@each_guide
def test_every_other_name_occurs_in_the_source(document: str) -> None:
    named = {text.strip("_") for text in quoted(document) if re.fullmatch(r"[A-Za-z_]\w*", text)}
    shaped_like_code = {name for name in named if "_" in name or re.search(r"[a-z][A-Z]|[A-Z][a-z]+[A-Z]", name)}
    known = words_of_source() | (words_of_diffusers() if document == "docs/diffusers.md" else set())
    assert not sorted(name for name in shaped_like_code - known if f"_{name}" not in known)


@each_document
def test_every_relative_link_leads_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(document))
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert anchor in slugs, target


@each_document
def test_every_command_has_the_options_that_are_shown(document: str) -> None:
    for line in shell_lines(document):
        words = line.split()
        if words[:1] != ["hqdit"] or len(words) < 2 or words[1].startswith("-"):
            continue
        assert words[1] in commands(), line
        shown = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert shown <= commands()[words[1]], line


@each_guide
def test_every_option_exists(document: str) -> None:
    known = frozenset[str]().union(*commands().values(), {"--version", "--help"})
    assert {text for text in quoted(document) if re.fullmatch(r"--[a-z-]+", text)} <= known


@each_document
def test_every_make_target_exists(document: str) -> None:
    named = {line.split()[1] for line in shell_lines(document) if re.match(r"make [a-z]", line)}
    assert named <= make_targets()


# docs/architecture.md


def test_every_module_has_its_line() -> None:
    listed = first_column(section("docs/architecture.md", "Files"))
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == set(source_files())


def test_every_free_module_is_explained() -> None:
    top_level = {path.name for path in SOURCE.glob("*.py")}
    assert top_level == {f"{name}.py" for name in FREE_MODULES} | {"__init__.py"}
    assert top_level <= quoted("docs/architecture.md")


def test_the_floors_are_those_of_the_contract() -> None:
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    enforced = [set(re.findall(r"hqdit\.(\w+)", layer)) for layer in layers]
    assert [set(names_in(row[0])) for row in rows(section("docs/architecture.md", "Floors"))] == enforced


def test_the_floors_in_brief_are_those_of_the_contract() -> None:
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    enforced = [set(re.findall(r"hqdit\.(\w+)", layer)) for layer in reversed(layers)]
    brief = section("CONTRIBUTING.md", "The floors in brief").partition(".")[0]
    assert [{"errors"}, *(set(names_in(part)) for part in brief.split(">"))] == enforced


def imported_by() -> Iterator[tuple[str, str]]:
    """(top-level library, package or module of hqdit) for every import in the source."""
    for path in SOURCE.rglob("*.py"):
        where = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], where) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0], where


def test_third_party_libraries_are_imported_where_the_table_says() -> None:
    table = {
        names_in(row[0])[0]: set(names_in(row[1].partition("(")[0]))
        for row in rows(section("docs/architecture.md", "Third-party libraries"))
    }
    found: dict[str, set[str]] = {library: set() for library in table}
    everywhere = {"__future__", "hqdit", "torch", "numpy", *sys.stdlib_module_names}
    for library, where in imported_by():
        if library not in everywhere:
            found.setdefault(library, set()).add(where)
    assert found == table


def test_formats_need_neither_torch_nor_numpy() -> None:
    assert not {library for library, where in imported_by() if where == "formats"} & {"torch", "numpy"}


def test_reports_work_on_plain_records() -> None:
    assert ("torch", "report") not in set(imported_by())


# docs/kernels.md


def test_every_native_file_has_its_line() -> None:
    by_instruction_set = {f"native/src/{kernel}_{isa}.cc" for kernel in KERNELS for isa in INSTRUCTION_SETS}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "native").rglob("*") if path.is_file()}
    others = {name for name in files - by_instruction_set if not name.endswith(("_test.cc", ".pyc"))}
    listed = first_column(section("docs/kernels.md", "Files"))
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == others


def test_every_instruction_set_has_its_line() -> None:
    names = re.search(r"kNames\[kIsaCount\] = \{(.*?)\}", text_of("native/src/isa.cc"))
    assert names is not None
    described = [row[0] for row in rows(section("docs/kernels.md", "Instruction sets"))]
    assert described == re.findall(r'"(\w+)"', names[1])


# docs/checkpoint.md, against what a real save writes

CONFIGS = (
    QuantizationConfig(),
    QuantizationConfig(weights="e2m1", rotation="none", gptq=False, modulation=False),
    QuantizationConfig(
        format_granularity="channel", activation_granularity="channel-token", fold_value_rotation=True, gptq=False
    ),
    QuantizationConfig(
        weight_granularity="group",
        activation_granularity="group",
        group_size=36,
        rotation="block:36",
        gptq=False,
        keep_dtype="bfloat16",
    ),
    QuantizationConfig(activation_granularity="tensor", gptq=False),
    QuantizationConfig.preset("svdquant"),
    QuantizationConfig.preset("hqdit-plus"),
    QuantizationConfig.preset("hqdit-plus").replace(average_bits=5.0, max_error=0.5),
    QuantizationConfig.preset("fpq").replace(include=("*.0.attn1.to_q",)),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for number, config in enumerate(CONFIGS):
        folders.append(tmp_path_factory.mktemp("documents") / str(number))
        save(quantize(peculiar_dit(), config, calibration()), folders[-1])
    rms = QuantizationConfig(weights="e2m1", activation_scale_rule="rms", gptq=False)
    folders.append(tmp_path_factory.mktemp("documents") / "rms")
    save(quantize(tiny_dit(), rms), folders[-1])
    return folders


@pytest.fixture(scope="module")
def descriptions(saved: list[Path]) -> list[dict[str, Any]]:
    return [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in saved]


def table_of_keys(title: str, which: int = 0) -> dict[str, str]:
    """Key -> type, from one of the tables of a section of docs/checkpoint.md."""
    tables = re.split(r"\n(?!\|)", section("docs/checkpoint.md", title))
    found = [part for part in re.findall(r"(?:^\|.*\n?)+", "\n".join(tables), flags=re.MULTILINE) if "| Key |" in part]
    return {names_in(row[0])[0]: row[1] for row in rows(found[which])}


#: What a word in the column "Type" admits.
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "list": (list,),
    "list of strings": (list,),
    "null": (type(None),),
}


def require_keys(found: list[dict[str, Any]], documented: dict[str, str], always: bool = True) -> None:
    """The keys that occur are those documented, and their values have the documented types."""
    assert set().union(*found) == set(documented)
    for entry in found:
        assert not always or set(entry) == set(documented)
        for key, value in entry.items():
            kinds = tuple(kind for word in documented[key].split(" or ") for kind in TYPES[word])
            assert isinstance(value, kinds), (key, value)
            assert not isinstance(value, bool) or bool in kinds, (key, value)


def entries(descriptions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for description in descriptions for entry in description["layers"].values()]


def test_top_level_keys(descriptions: list[dict[str, Any]]) -> None:
    documented = table_of_keys("quantization_config")
    require_keys(descriptions, documented)
    assert set(documented) == description.KEYS


def test_keys_of_the_request(descriptions: list[dict[str, Any]]) -> None:
    documented = table_of_keys("config")
    require_keys([description["config"] for description in descriptions], documented, always=False)
    everywhere = set.intersection(*(set(description["config"]) for description in descriptions))
    assert set(documented) - everywhere == _ADDED.keys()
    assert set(documented) == {field.name for field in dataclasses.fields(QuantizationConfig)}


def test_keys_of_the_calibration(descriptions: list[dict[str, Any]]) -> None:
    written = [description["calibration"] for description in descriptions if description["calibration"]]
    assert 0 < len(written) < len(descriptions)
    require_keys(written, table_of_keys("calibration"))


def test_keys_of_a_layer(descriptions: list[dict[str, Any]]) -> None:
    require_keys(entries(descriptions), table_of_keys("A layer's entry"))


def test_keys_inside_a_layer(descriptions: list[dict[str, Any]]) -> None:
    inner = [entry[part] for entry in entries(descriptions) for part in ("weight", "activation", "rotation")]
    require_keys(inner, table_of_keys("A layer's entry", 1), always=False)


def test_keys_of_a_record(descriptions: list[dict[str, Any]]) -> None:
    records = [entry["record"] for entry in entries(descriptions)]
    require_keys(records, table_of_keys("A layer's entry", 2), always=False)
    with_gptq = [set(record) for record in records if record["method"] == "gptq"]
    without = [set(record) for record in records if record["method"] != "gptq"]
    last_five = set(list(table_of_keys("A layer's entry", 2))[-5:])
    assert all(last_five <= record for record in with_gptq) and all(not last_five & record for record in without)


def test_tensors_of_a_layer(saved: list[Path]) -> None:
    table = {names_in(row[0])[0]: row for row in rows(section("docs/checkpoint.md", "Tensors"))}
    seen = set()
    for folder in saved:
        for name, layer in checkpoint.quantized_layers(load(folder)).items():
            for suffix, tensor in layer.state_dict().items():
                seen.add(suffix)
                if suffix != "bias":
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    assert dtype in table[suffix][1].split(" or "), (name, suffix)
    assert seen == set(table)


def test_the_layer_lists_the_same_tensors() -> None:
    described = re.findall(r"^        (\w+): ", HQLinear.__doc__ or "", flags=re.MULTILINE)
    assert described == first_column(section("docs/checkpoint.md", "Tensors"))


def test_shared_tensors_are_stored_under_the_name_that_sorts_first(descriptions: list[dict[str, Any]]) -> None:
    shared = [item for description in descriptions for item in description["shared_tensors"].items()]
    assert shared and all(stored < alias for alias, stored in shared)


def test_bits_per_weight_follow_the_formula(saved: list[Path]) -> None:
    layer = checkpoint.quantized_layers(load(saved[0]))["transformer_blocks.0.ff.net.0.proj"]
    n, k = layer.out_features, layer.in_features
    assert 8 * layer.storage_bytes / (n * k) == pytest.approx(4 + 32 / k + 1 / n, rel=1e-12)


def test_loading_runs_no_quantization_code(saved: list[Path]) -> None:
    called: set[str] = set()

    def watch(frame: Any, event: str, _argument: object) -> None:
        if event == "call":
            called.add(frame.f_globals.get("__name__", ""))

    sys.setprofile(watch)
    try:
        load(saved[0])
    finally:
        sys.setprofile(None)
    ours = {name for name in called if name.startswith("hqdit.")}
    assert "hqdit.pipeline.checkpoint" in ours
    forbidden = ("gptq", "calibration", "sampling", "pipeline.plan", "pipeline.rotation_check")
    forbidden += ("quantizers.scaling", "quantizers.format_selection", "quantizers.quantized_tensor")
    assert not {name for name in ours if name.removeprefix("hqdit.").startswith(forbidden)}


# docs/records.md, against the committed records


def benchmark_records() -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    return [record for record in found if "rotate_quantize_fraction" in record]


def documented_keys(title: str) -> dict[str, str]:
    return {names_in(row[0])[0]: row[1] for row in rows(section("docs/records.md", title))}


def test_keys_of_the_benchmark() -> None:
    for record in benchmark_records():
        require_keys([record], documented_keys("Keys of the record"))
        require_keys(record["product"], documented_keys("An entry of product"))
        require_keys([record["forward"]], documented_keys("forward"))
        require_keys(record["forward"]["by_tokens"], documented_keys("An entry of by_tokens"))
        require_keys([record["memory"]], documented_keys("memory"))


def test_keys_of_the_soak_record() -> None:
    path = ROOT / "docs" / "records" / "native_soak.json"
    if path.exists():
        require_keys([json.loads(path.read_text())], documented_keys("The soak record"))


# Examples and versions


@each_document
def test_examples_print_what_is_shown(document: str) -> None:
    session = "\n".join(body for language, body in code_blocks(document) if language == "pycon")
    example = doctest.DocTestParser().get_doctest(session, {}, document, document, 0)
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=output.append)
    assert not result.failed, "".join(output)


def test_some_examples_are_run() -> None:
    with_examples = {name for name in GUIDES if any(language == "pycon" for language, _ in code_blocks(name))}
    assert {"docs/method.md", "docs/checkpoint.md"} <= with_examples


def test_the_changelog_knows_the_version() -> None:
    assert re.search(rf"^## \[{re.escape(hqdit.__version__)}\]", text_of("CHANGELOG.md"), flags=re.MULTILINE)


def test_the_changelog_lists_the_public_names() -> None:
    public = {f"hqdit.{name}" for name in hqdit.__all__ if not name.startswith("_")}
    assert public == {text for text in quoted("CHANGELOG.md") if text.startswith("hqdit.")}


def test_the_default_of_every_documented_number() -> None:
    from hqdit.calibration.capture import MODULATION_PAIRS
    from hqdit.calibration.samples import DEFAULT_SAMPLES, MIN_TRAJECTORIES
    from hqdit.evaluation.fidelity import PAIRS
    from hqdit.gptq.solver import BLOCK_COLUMNS, DAMPING_LADDER, DEAD_FRACTION
    from hqdit.pipeline.rotation_check import TOLERANCE
    from hqdit.quantizers.scaling import MIN_SCALE, MSE_FRACTIONS

    method = text_of("docs/method.md")
    assert f"{MODULATION_PAIRS:,} random (t, class) pairs" in method
    assert f"By default {DEFAULT_SAMPLES} tuples" in method and f"at least {MIN_TRAJECTORIES} of them" in method
    assert f"from {PAIRS} trajectories" in method
    assert f"blocks of {BLOCK_COLUMNS} columns" in method
    assert DAMPING_LADDER == (0.01, 0.1, 1.0) and "1 % of the mean diagonal" in method
    assert "10 %, then 100 %" in method
    assert DEAD_FRACTION == 1e-12 and "below 1e-12 of the mean" in method
    assert TOLERANCE == 1e-5 and "above 1e-5" in method
    assert MIN_SCALE == 2.0**-126 and "at least 2⁻¹²⁶" in method
    assert (len(MSE_FRACTIONS), MSE_FRACTIONS[0], round(MSE_FRACTIONS[-1], 12)) == (61, 1.0, 0.4)
    assert "61 fractions of that scale, 1.00 down to 0.40" in method
    assert QuantizationConfig().alpha == 0.25 and "0.25 by default" in method


def test_what_compensated_outliers_cost() -> None:
    method = text_of("docs/method.md")
    share = 0.05
    for factor in (10, 30, 100):
        growth = (1 - share + share * factor**2) * (1 - share + share / factor**2)
        assert f"{10 * math.log10(growth):.1f} dB at c = {factor}" in method
