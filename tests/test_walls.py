"""The import graph: the plugin's modules import in one direction, and only some of each other."""

import graphlib
import subprocess
import sys

import pytest

grimp = pytest.importorskip("grimp")

#: The plugin's layers from the bottom up; each imports only itself and the layers before it.
ROOMS = (
    ("_validation", "declarations", "command_line"),  # without Keras
    ("_types", "_compat", "_layers", "names", "files"),
    ("_arithmetic", "aggregation", "_workers"),
    ("clippers",),
    ("optimizer",),
    ("gate", "_undo", "model"),
    ("diagnostics",),
    ("", "tuning", "__main__"),  # the package itself, and modules that import it
)


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(
        "keras_gradclip",
        "recipes",
        "tuning",
        include_external_packages=True,
        exclude_type_checking_imports=False,
        cache_dir=None,
    )


def modules(graph, package):
    return [m for m in graph.modules if m == package or m.startswith(f"{package}.")]


def floor(module):
    room = module.split(".")[1] if "." in module else ""
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


def test_no_circle(graph):
    own = [m for p in ("keras_gradclip", "recipes", "tuning") for m in modules(graph, p)]
    arrows = {m: graph.find_modules_directly_imported_by(m) for m in own}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"an import circle: {' <- '.join(error.args[1])}")


def test_the_plugin_imports_downwards(graph):
    upwards = [
        f"{importer} -> {imported}"
        for importer in modules(graph, "keras_gradclip")
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported.startswith("keras_gradclip.") and floor(imported) > floor(importer)
    ]
    assert not upwards


def test_the_plugin_stands_alone(graph):
    for other in ("recipes", "tuning"):
        assert not graph.find_shortest_chains("keras_gradclip", other), other
    assert not graph.find_shortest_chains("recipes", "tuning")
    assert "benchmarks" not in graph.modules  # measures only, imported by nobody


#: Modules outside of the plugin that import one of its private modules, and why.
KNOWN_OUTSIDERS = {
    ("recipes.training.checkpoint", "keras_gradclip._compat"),  # layers at any depth
}


def test_private_modules_are_the_plugins_own(graph):
    outsiders = {
        (importer, imported)
        for package in ("recipes", "tuning")
        for importer in modules(graph, package)
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported.startswith("keras_gradclip.") and "._" in imported
    }
    assert outsiders == KNOWN_OUTSIDERS


def test_commands_are_imported_by_nobody(graph):
    tools = set(modules(graph, "recipes.tools")) - {"recipes.tools"}
    commands = {tool for tool in tools if not tool.startswith("recipes.tools._")}
    commands -= {"recipes.tools.study"}  # what runs the cells of the others
    for command in (*commands, "tuning.search", "keras_gradclip.__main__"):
        importers = graph.find_modules_that_directly_import(command)
        assert not importers, f"{command} is a command, and imported by {importers}"


@pytest.mark.parametrize(
    "package, private, home",
    [
        ("keras", "keras.src", "keras_gradclip._compat"),
        ("keras_tuner", "keras_tuner.engine", "keras_gradclip.tuning._kerastuner"),
    ],
)
def test_private_names_of_hosts_live_in_one_module(graph, package, private, home):
    homes = {
        importer
        for importer in graph.find_modules_that_directly_import(package)
        for detail in graph.get_import_details(importer=importer, imported=package)
        if private in detail["line_contents"]
    }
    assert homes <= {home}


def test_the_package_loads_neither_kerastuner_nor_matplotlib():
    """In a separate process, because imports inside functions do not count."""
    code = (
        "import sys, keras; before = set(sys.modules); import keras_gradclip; "
        "heavy = {'keras_tuner', 'matplotlib', 'jinja2', 'optuna', 'tensorflow_datasets'}; "
        "print(sorted(heavy & set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]
