"""The modules of the rooms that use the device have no import cycles."""

import graphlib

import grimp

ROOMS = ("tinsmith.engine", "tinsmith.model", "tinsmith.losses", "tinsmith.ckpt")


def test_no_module_of_the_device_rooms_imports_itself_by_way_of_others():
    """Imports inside functions and below `TYPE_CHECKING` count as all others do."""
    graph = grimp.build_graph("tinsmith", exclude_type_checking_imports=False, cache_dir=None)
    modules = {room for room in ROOMS if room in graph.modules}.union(*map(graph.find_descendants, ROOMS))
    assert len(modules) > 100
    imports = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules of a cycle
