"""The command `minillm serve`: the engine behind OpenAI's API. Its options are the fields of `ServerOptions` and
`EngineConfig`, and for several engines `ClusterOptions`; their help texts are the comments of those fields.
"""

import argparse
import inspect
import os
import re
from dataclasses import MISSING, Field, fields
from typing import get_args

from minillm.engine import EngineConfig
from minillm.serving import KEY_VARIABLE, ClusterOptions, ServerOptions

COMMENT = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)  # of a field of a dataclass
DEFAULTS = {"worker": "process"}  # in one process, HTTP and the engine would share Python's lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="storyteller", help="storyteller, a checkpoint folder or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    dtypes = ["auto", "float64", "float32", "bfloat16", "float16", "half"]
    parser.add_argument("--dtype", choices=dtypes, help="by default float32, on a GPU auto: the checkpoint's own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add_fields(parser.add_argument_group("the server"), ServerOptions)
    add_fields(parser.add_argument_group("the engine"), EngineConfig)
    add_fields(parser.add_argument_group("several engines, on Ray Serve"), ClusterOptions)


def add_fields(group: argparse._ArgumentGroup, options: type) -> None:
    """Add an option for each field of a dataclass; without it, the dataclass has its default."""
    comments = {}
    for base in reversed(options.__mro__[:-1]):
        comments |= dict(COMMENT.findall(inspect.getsource(base)))
    for field in fields(options):
        kind = kind_of(field)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        default = DEFAULTS.get(field.name, field.default)
        text = f"{comments.get(field.name, '')} (default: {default})".strip().replace("%", "%%")
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **how)


def kind_of(field: Field) -> type:
    """The type of an option: bool, int, float or str."""
    found, kinds = [field.type], []
    while found:
        kind = found.pop(0)
        kinds += [kind] if kind in (bool, int, float, str) else []
        found += get_args(kind)
    assert kinds and field.default is not MISSING, field.name
    return kinds[0]


def given(arguments: argparse.Namespace, options: type) -> dict:
    """The fields of a dataclass that are given on the command line."""
    return {field.name: vars(arguments)[field.name] for field in fields(options) if field.name in arguments}


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it. Raises ConfigError and the errors of `LLMEngine`."""
    key = {"api_key": os.environ[KEY_VARIABLE]} if os.environ.get(KEY_VARIABLE) else {}
    options = ServerOptions(**key | given(arguments, ServerOptions))
    cluster = ClusterOptions(**given(arguments, ClusterOptions))
    loading = {"dtype": arguments.dtype, "device": arguments.device, "revision": arguments.revision}
    if cluster.replicas:  # each has a process of its own
        from minillm.serving import serve_replicas

        config = EngineConfig(**given(arguments, EngineConfig))
        return serve_replicas(arguments.model, options, config, cluster, **loading)
    from minillm.serving import serve

    return serve(arguments.model, options, EngineConfig(**DEFAULTS | given(arguments, EngineConfig)), **loading)
