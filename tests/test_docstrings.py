"""Docstrings agree with the code, and those of public names are complete.

A name is public if the `__init__` of a package exports it, or if it is a public method of such a class. Docstrings of
other names may be short, but must be correct, too.
"""

import ast
import builtins
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap

import torch

import mgllava

SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Example:", "Yields:")
# `name (`type`, *optional*, defaults to `value`): …`; the type may span several lines.
ENTRY = re.compile(r"^ {4}`?\**(?P<name>\w+)(?:, \**\w+)*`? ?(?:\((?P<type>.*?)\))?:(?= |$)", re.MULTILINE | re.DOTALL)
DEFAULT = re.compile(r"defaults to\s+`(.+?)`", re.DOTALL)
# Classes that document options, and the classes with the defaults of these options.
DEFAULTS_ELSEWHERE = {
    **{f"{family}ImageProcessorKwargs": f"{family}ImageProcessorMixin" for family in ("MGLlava", "RamPlus", "Slime")},
    "MGLlavaVideoProcessorKwargs": "MGLlavaVideoProcessor",
}


# Programs that plugins belong to, and that are not installed with the development tools.
HOSTS = ("vllm", "lmms_eval")


def modules():
    """Import all modules, except those of plugins whose program is not installed."""
    names = ["mgllava", *(module.name for module in pkgutil.walk_packages(mgllava.__path__, "mgllava."))]
    found = []
    for name in names:
        try:
            if not name.endswith("__main__"):
                found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            assert name.startswith("mgllava.integrations.") and error.name in HOSTS, (name, error)
    return found


def is_package(module):
    return hasattr(module, "__path__")


def exports(module):
    return getattr(module, "__all__", [])


def documented_objects():
    """Return every function, class and method without a leading underscore, by its full name."""
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module.__name__}.{name}"] = (module, value)
            if inspect.isclass(value):
                for method_name, method in vars(value).items():
                    function = getattr(method, "__func__", method)
                    if not method_name.startswith("_") and inspect.isfunction(function):
                        found[f"{module.__name__}.{name}.{method_name}"] = (module, function)
    return found


def public_objects():
    """Return what the packages export, with the public methods that exported classes define."""
    exported = [getattr(module, name) for module in modules() if is_package(module) for name in exports(module)]
    methods = [
        getattr(method, "__func__", method)
        for value in exported
        if inspect.isclass(value)
        for name, method in vars(value).items()
        if not name.startswith("_")
    ]
    return {id(value) for value in (*exported, *methods)}


OBJECTS = documented_objects()
PUBLIC = public_objects()
ERRORS = {value.__name__: value for _, value in OBJECTS.values() if inspect.isclass(value)}


def section(value, name):
    """Return the lines of one section of a docstring; its entries are indented by 4."""
    lines, inside = [], False
    for line in (inspect.getdoc(value) or "").splitlines():
        if line.strip() in SECTIONS and not line.startswith(" "):
            inside = line.strip() == name
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside:
            lines.append(line)
    return "\n".join(lines)


def is_public(value):
    return id(value) in PUBLIC


def own_docstring(value):
    return bool(value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__)


def entries(value):
    return list(ENTRY.finditer(section(value, "Args:")))


def parameters(value):
    try:
        return inspect.signature(value).parameters
    except ValueError:  # an exception class without a constructor of its own
        return {}


def default_of(value, name):
    """Return the default of an argument, from the signature or an attribute of the class."""
    if value.__name__ in DEFAULTS_ELSEWHERE:
        return getattr(getattr(inspect.getmodule(value), DEFAULTS_ELSEWHERE[value.__name__]), name, False)
    parameter = parameters(value).get(name)
    if parameter is not None and parameter.default is not inspect.Parameter.empty:
        return parameter.default
    return getattr(value, name, inspect.Parameter.empty)


def problems_with_arguments(module, value):
    known = parameters(value)
    is_function = inspect.isfunction(value)
    takes_more = not is_function or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for entry in entries(value):
        argument, kind = entry["name"], " ".join((entry["type"] or "").split())
        if not takes_more and argument not in known:
            yield f"{argument} is documented, but is not an argument"
        elif said := DEFAULT.search(kind):
            claimed, actual = eval(said[1], {**vars(module), "torch": torch}), default_of(value, argument)
            if actual != claimed and not (isinstance(claimed, list) and list(actual) == claimed):
                yield f"{argument} {said[0]}, but its default is {actual!r}"
        elif is_function and argument in known and "*optional*" in kind:
            parameter = known[argument]
            if parameter.default is inspect.Parameter.empty and "None" not in str(parameter.annotation):
                yield f"{argument} is documented as optional, but is required"
    if is_function and is_public(value) and "see [`" not in (value.__doc__ or ""):
        documented = section(value, "Args:")
        for argument, parameter in known.items():
            is_passed_on = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and not documented
            if argument not in ("self", "cls") and not is_passed_on and not re.search(rf"\b{argument}\b", documented):
                yield f"{argument} is not documented"


def test_documented_arguments_and_defaults_are_those_of_the_code():
    problems = [
        f"{name}: {problem}"
        for name, (module, value) in OBJECTS.items()
        if own_docstring(value)
        for problem in problems_with_arguments(module, value)
    ]
    assert problems == []


def test_public_names_have_docstrings():
    assert [name for name, (_, value) in OBJECTS.items() if is_public(value) and not own_docstring(value)] == []


def error_class(module, name):
    """Return the exception class that a docstring or a `raise` names."""
    names = {**vars(builtins), **ERRORS, **vars(module), "torch": torch}
    try:
        found = eval(name, names)
    except (NameError, AttributeError, SyntaxError, TypeError):
        found = None
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def source_tree(function):
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # made by a decorator
        return ast.Module([], [])


def with_handlers(node, caught=()):
    """Yield every node of a function with the exceptions that are caught around it."""
    yield node, caught
    if isinstance(node, ast.Try):
        kinds = [kind for handler in node.handlers for kind in getattr(handler.type, "elts", [handler.type])]
        inside = (*caught, *("BaseException" if kind is None else ast.unparse(kind) for kind in kinds))
        for child in node.body:
            yield from with_handlers(child, inside)
        for child in (*node.handlers, *node.orelse, *node.finalbody):
            yield from with_handlers(child, caught)
    else:
        for child in ast.iter_child_nodes(node):
            yield from with_handlers(child, caught)


def called_function(node, module, owner):
    """Return the function of this package that a call refers to, and its class."""
    called, found = node.func, None
    if isinstance(called, ast.Name):
        found = vars(module).get(called.id)
    elif isinstance(called, ast.Attribute) and ast.unparse(called.value) in ("self", "cls"):
        found = getattr(owner, called.attr, None)
    if inspect.isclass(found):
        owner, found = found, getattr(found, "__init__", None)
    found = getattr(found, "__func__", found)
    is_own = inspect.isfunction(found) and found.__module__.startswith("mgllava.")
    return (found, owner) if is_own else (None, None)


@functools.cache
def errors_of(function, owner, depth=0):
    """Return the exceptions of a function, including those of the functions of this package that it calls."""
    module, found = inspect.getmodule(function), set()
    for node, handlers in with_handlers(source_tree(function)):
        errors = set()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            errors = {error_class(module, ast.unparse(node.exc.func))} - {None}
        elif isinstance(node, ast.Call) and depth < 5:
            callee, owner_of_callee = called_function(node, module, owner)
            errors = errors_of(callee, owner_of_callee, depth + 1) if callee else set()
        caught = tuple(error for name in handlers if (error := error_class(module, name)))
        found |= {error for error in errors if not issubclass(error, caught)}
    return found


def test_documented_errors_exist_and_public_functions_document_all_errors():
    problems = []
    for name, (module, value) in OBJECTS.items():
        if not inspect.isfunction(value):
            continue
        documented = re.findall(r"^ {4}`?([\w.]+)`?:", section(value, "Raises:"), re.MULTILINE)
        classes = {error: error_class(module, error) for error in documented}
        problems += [f"{name}: there is no {error}" for error, found in classes.items() if found is None]
        parents = tuple(found for found in classes.values() if found)
        owner = getattr(module, name.split(".")[-2], None)
        has_sections = is_public(value) and "Args:" in (value.__doc__ or "")
        for error in errors_of(value, owner) if has_sections else ():
            if issubclass(error, Exception) and not issubclass(error, parents):
                problems.append(f"{name}: {error.__name__} is raised, but is not in `Raises:`")
    assert problems == []
