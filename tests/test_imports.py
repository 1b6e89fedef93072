"""Import rules: a module imports only lower levels, and importing the package has no effect."""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import qwen_dist

ROOT = pathlib.Path(qwen_dist.__file__).parent
PACKAGES = sorted(ROOT.rglob("__init__.py"))
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path not in PACKAGES
}

# A module may import modules of a lower level, and of the same level in its package. The longest prefix counts.
LEVELS = {
    "errors": -1,
    "json_reader": 0,
    "key_reader": 0,
    "chat": 1,
    "template_worker": 0,
    "template_process": 1,
    "chat_template": 2,
    "outputs": 1,
    "storage": 2,
    "tokenizer_vocab": 3,
    "tokenizer_files": 4,
    "capture": 1,
    "text_sample": 1,
    "charts": 1,
    "config": 3,
    "config_fields": 1,
    "engine.request": 1,
    "engine.generation_config": 3,
    "engine.sequence": 2,
    "engine.page_allocator": 1,
    "engine.scheduler": 3,
    "engine.batch": 4,
    "batch.jsonl": 7,
    "batch.journal": 3,
    "batch.output": 7,
    "openai_api": 6,
    "models.config": 1,
    "families": 1,
    "hf_config": 3,
    "models.state_spec": 1,
    "planning.chips": 1,
    "demo": 1,
    "config_files": 2,
    "failures": 2,
    "ops.native_library": 1,
    "runtime.cluster": 1,
    "runtime.memory": 1,
    "runtime.processors": 1,
    "runtime.settings": 1,
    "runtime.stderr_filter": 1,
    "runtime.control": 2,
    "runtime.preflight": 2,
    "runtime.backend": 2,
    "runtime.distributed": 3,
    "mesh": 2,
    "sharding": 2,
    "tokenizer": 5,
    "ops": 3,
    "quantization": 4,
    "models": 4,
    "checkpoint": 5,
    "engine": 6,
    "train": 6,
    "batch": 7,
    "server": 7,
    "server.answer_parser": 7,
    "server.errors": 7,
    "server.call": 7,
    "server.answers": 7,
    "planning": 7,
    "parity": 7,
    "llm": 7,
    "causal_lm": 7,
    "evaluation": 8,
    "cli": 8,
    "cli.command_parser": 8,
    "cli.commands": 8,
    "cli.flags": 8,
    "__main__": 9,
}
WITHOUT_JAX = {
    "errors",
    "charts",
    "cli.command_parser",
    "cli.commands",
    "cli.flags",
    "config",
    "config_fields",
    "config_files",
    "failures",
    "ops.native_library",
    "runtime.memory",
    "runtime.processors",
    "runtime.settings",
    "runtime.stderr_filter",
    "json_reader",
    "key_reader",
    "chat",
    "chat_template",
    "template_process",
    "template_worker",
    "storage",
    "tokenizer_files",
    "outputs",
    "tokenizer_vocab",
    "runtime.cluster",
    "runtime.control",
    "runtime.preflight",
    "tokenizer",
    "engine.request",
    "engine.generation_config",
    "engine.sequence",
    "engine.page_allocator",
    "engine.scheduler",
    "engine.batch",
    "batch.jsonl",
    "openai_api",
    "server.answer_parser",
    "server.errors",
    "server.call",
    "server.answers",
    "batch.journal",
    "batch.output",
    "models.config",
    "models.state_spec",
    "planning.chips",
}
MESH_AXES = {"data", "fsdp", "tensor", "expert", "context"}


def level_of(module: str) -> str:
    """Return the entry of LEVELS that a module belongs to."""
    parts = module.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in LEVELS)


def imports(path: pathlib.Path, *, types_too: bool = False) -> set[str]:
    """Return every module that a file imports, in functions too; with `types_too` also those for types only."""
    tree = ast.parse(path.read_text())
    if not types_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) in (
                "TYPE_CHECKING",
                "_TYPE_CHECKING",
                "typing.TYPE_CHECKING",
            ):
                node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Return the modules of this package among imported names."""
    return {name.removeprefix("qwen_dist.") for name in names if name.removeprefix("qwen_dist.") in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    here = level_of(module)
    for other in own(imports(MODULES[module], types_too=True)):
        there = level_of(other)
        same_package = module.split(".")[0] == other.split(".")[0]
        assert LEVELS[there] < LEVELS[here] or (same_package and LEVELS[there] <= LEVELS[here]), f"{module} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count; imports for types only do not."""
    imported = {module: own(imports(path)) - {module} for module, path in MODULES.items()}

    def reached(module: str) -> set[str]:
        found, todo = set(), [module]
        while todo:
            new = imported[todo.pop()] - found
            found |= new
            todo += new
        return found

    assert not {module for module in MODULES if module in reached(module)}


def test_a_class_name_means_one_thing():
    names = [
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert not {name for name in names if names.count(name) > 1 and not name.startswith("_")}


def functions() -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of every function of the package, nested ones too."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1


def test_functions_are_short():
    assert not {name: lines for name, lines in functions() if lines > 60}


def test_models_say_only_what_is_computed():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "models").glob("*.py")) <= 1500


# Text about the behaviour of one compiler or backend.
BACKEND = re.compile(r"XLA('s)? (CPU|TPU|GPU)|\b(CPU|TPU|GPU)s?('s)?\b[^.]{0,30}\b(compiler|backend)|glibc", re.IGNORECASE)


def test_only_ops_describe_a_backend():
    """The behaviour of a backend belongs next to the implementation that it concerns; chip data is in planning.chips."""
    allowed = {"ops", "planning.chips"}
    found = {}
    for module, path in MODULES.items():
        # checkpoint.buffers is about the runtime of CPU devices, not about a compiler.
        if level_of(module) not in allowed and module != "checkpoint.buffers":
            lines = [line for line in path.read_text().splitlines() if BACKEND.search(line)]
            found |= {module: lines} if lines else {}
    assert not found


def test_packages_import_nothing():
    """An `__init__` that imports its modules would make every import of one import all."""
    for path in PACKAGES:
        # The entry point is qwen_dist.cli:main; its modules import what a command needs inside functions. The names of the
        # library are imported when they are first used.
        allowed = {
            "cli": {"qwen_dist.cli.main", "qwen_dist.cli.main.main"},
            "qwen_dist": {"importlib", "os", "typing", "typing.TYPE_CHECKING"},
        }
        assert imports(path) <= allowed.get(path.parent.name, set()), path


@pytest.mark.parametrize("module", [module for module in MODULES if level_of(module) in WITHOUT_JAX])
def test_modules_without_jax(module):
    reached, todo = set(), [module]
    while todo:
        names = imports(MODULES[todo.pop()])
        assert not {name for name in names if name.split(".")[0] in ("jax", "flax", "torch", "transformers")}
        new = own(names) - reached
        reached |= new
        todo += new


def test_only_the_reference_imports_torch_and_transformers():
    users = {m for m, path in MODULES.items() if {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}}
    assert users <= {"parity.reference"}


def test_flax_is_used_without_linen_and_nnx_transformations():
    forbidden = {"jit", "grad", "value_and_grad", "scan", "vmap", "pmap", "remat", "cond", "while_loop", "shard_map"}
    for module, path in MODULES.items():
        assert not {name for name in imports(path, types_too=True) if name.startswith("flax.linen")}, module
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
        }
        assert not used & forbidden, module


def test_only_mesh_and_sharding_name_the_mesh_axes():
    """Models name the dimensions of tensors; the rules map these to mesh axes."""
    for module, path in MODULES.items():
        if level_of(module) in ("models", "ops", "checkpoint", "engine", "train", "batch"):
            constants = {
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert not constants & (MESH_AXES - {"data"}), module  # "data" is also a field of formats
            if level_of(module) == "models":
                assert not constants & MESH_AXES, module
                assert not {name for name in imports(path) if "PartitionSpec" in name or "Mesh" in name}, module


def test_no_module_has_a_catch_all_name():
    assert not {module for module in MODULES if {"utils", "common", "helpers", "misc"} & set(module.split("."))}


def test_configurations_import_ml_collections_only():
    for path in (ROOT.parent / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections"}, path


def test_importing_the_package_has_no_effect():
    program = """
import logging, os, sys
environment, handlers = dict(os.environ), list(logging.root.handlers)
import qwen_dist, qwen_dist.cli
assert dict(os.environ) == environment
assert logging.root.handlers == handlers
heavy = {"jax", "flax", "torch", "transformers", "numpy", "ml_collections", "tokenizers", "rich", "huggingface_hub"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_every_module_starts_no_device_and_changes_no_setting():
    # The comparison with PyTorch imports PyTorch, which does set environment variables; `evaluation` needs lm-eval.
    modules = [f"qwen_dist.{module}" for module in MODULES if level_of(module) not in ("parity", "evaluation")]
    program = f"""
import importlib, os
import jax
settings, environment = dict(jax.config.values), dict(os.environ)
for module in {modules!r}:
    importlib.import_module(module)
changed = {{key for key, value in jax.config.values.items() if settings.get(key) != value}}
assert not changed, changed
assert dict(os.environ) == environment
assert not jax._src.xla_bridge.backends_are_initialized()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
