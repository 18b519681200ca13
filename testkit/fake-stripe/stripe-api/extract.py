"""Extracts the parameters of Stripe's API from Stripe's Python library, as JSON Schema.

Stripe generates the library from its OpenAPI document. Each release of the library is for one version of the API. To
run this script for a release:

    python3 -m venv venv && venv/bin/pip install stripe==16.0.1
    venv/bin/python extract.py

The operations are those that the fake has. Descriptions are omitted, except for the maximum lengths that they state.
"""

import ast
import functools
import importlib
import json
import pathlib
import re
import sys
import typing
from decimal import Decimal

import stripe
from stripe._api_version import _ApiVersion
from stripe._request_options import RequestOptions
from stripe._stripe_object import UntypedStripeObject
from typing_extensions import Literal, NotRequired, get_type_hints, is_typeddict

OPERATIONS = [
    "GET /v1/account",
    "GET /v1/billing/meters",
    "GET /v1/billing/meters/{id}",
    "GET /v1/billing/meters/{id}/event_summaries",
    "GET /v1/checkout/sessions/{session}",
    "GET /v1/customers",
    "GET /v1/customers/{customer}",
    "GET /v1/invoices",
    "GET /v1/invoices/{invoice}",
    "GET /v1/prices",
    "GET /v1/prices/{price}",
    "GET /v1/products",
    "GET /v1/products/{id}",
    "GET /v1/subscriptions",
    "GET /v1/subscriptions/{subscription_exposed_id}",
    "GET /v1/webhook_endpoints",
    "GET /v2/core/events/{id}",
    "DELETE /v1/customers/{customer}",
    "DELETE /v1/subscriptions/{subscription_exposed_id}",
    "POST /v1/billing/meter_events",
    "POST /v1/billing/meters",
    "POST /v1/billing_portal/sessions",
    "POST /v1/checkout/sessions",
    "POST /v1/checkout/sessions/{session}/expire",
    "POST /v1/customers",
    "POST /v1/invoices/{invoice}/finalize",
    "POST /v1/invoices/{invoice}/pay",
    "POST /v1/prices",
    "POST /v1/products",
    "POST /v1/subscriptions",
    "POST /v1/subscriptions/{subscription_exposed_id}",
    "POST /v1/subscriptions/{subscription}/resume",
    "POST /v1/webhook_endpoints",
]

OPTIONS = set(RequestOptions.__annotations__)
SCALARS = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    # Stripe accepts decimal numbers as strings.
    Decimal: {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$"},
}


def schema(hint):
    """Returns the JSON Schema of a type."""
    if hint in SCALARS:
        return dict(SCALARS[hint])
    if is_typeddict(hint):
        return record(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is NotRequired:
        return schema(arguments[0])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": schema(arguments[0])}
    if origin in (dict, UntypedStripeObject):
        return {"type": "object", "additionalProperties": schema(arguments[-1])}
    if type(None) in arguments:
        arguments = tuple(it for it in arguments if it is not type(None))
    # A union. The library lists the values of an enumeration, and adds `str` for values of later versions.
    values = [it for it in arguments if typing.get_origin(it) is Literal]
    is_enumeration = any(value != "" for it in values for value in typing.get_args(it))
    if is_enumeration:
        arguments = tuple(it for it in arguments if it is not str)
    options = []
    for it in arguments:
        option = schema(it)
        if option not in options:
            options.append(option)
    return options[0] if len(options) == 1 else {"anyOf": options}


def record(params):
    """Returns the JSON Schema of a dictionary with known keys."""
    # Options of the request itself are not sent as parameters.
    for option in OPTIONS:
        params.__annotations__.pop(option, None)
    fields = get_type_hints(params, include_extras=True)
    lengths = max_lengths(params)
    properties = {}
    for key in sorted(fields):
        properties[key] = schema(fields[key])
        for option in properties[key].get("anyOf", [properties[key]]):
            if key in lengths and option == {"type": "string"}:
                option["maxLength"] = lengths[key]
    required = sorted(set(fields) & params.__required_keys__)
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


@functools.cache
def classes(module):
    """Returns the classes that a module defines, as syntax trees."""
    tree = ast.parse(pathlib.Path(sys.modules[module].__file__).read_text())
    return {it.name: it for it in tree.body if isinstance(it, ast.ClassDef)}


def max_lengths(params):
    """Returns the maximum lengths that the descriptions of keys state, by key."""
    found, field = {}, None
    for it in classes(params.__module__)[params.__name__].body:
        if isinstance(it, ast.AnnAssign):
            field = it.target.id
        elif isinstance(it, ast.Expr) and isinstance(it.value, ast.Constant):
            length = re.search(r"may be up to \*?(\d+) characters", it.value.value)
            if length:
                found[field] = int(length[1])
    return found


def name(annotation):
    """Returns the name of the class of parameters in an annotation, such as `Optional["CustomerListParams"]`."""
    names = [it.value for it in ast.walk(annotation) if isinstance(it, ast.Constant)]
    return names[0]


def operations(source):
    """Yields the operations of a service, each with its method and path, and the module and class of its parameters."""
    tree = ast.parse(source)
    modules = {
        alias.name: it.module
        for it in ast.walk(tree)
        if isinstance(it, ast.ImportFrom)
        for alias in it.names
    }
    for function in (it for it in ast.walk(tree) if isinstance(it, ast.FunctionDef)):
        for call in (it for it in ast.walk(function) if isinstance(it, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or call.func.attr != "_request":
                continue
            path = call.args[1].func.value if isinstance(call.args[1], ast.Call) else call.args[1]
            arguments = function.args.posonlyargs + function.args.args
            params = [name(it.annotation) for it in arguments if it.arg == "params"]
            if params:
                yield f"{call.args[0].value.upper()} {path.value}", modules[params[0]], params[0]


def main():
    found = {}
    for source in sorted(pathlib.Path(stripe.__file__).parent.rglob("_*_service.py")):
        for operation, module, params in operations(source.read_text()):
            if operation in OPERATIONS:
                found[operation] = schema(getattr(importlib.import_module(module), params))
    missing = set(OPERATIONS) - set(found)
    assert not missing, missing
    folder = pathlib.Path(__file__).parent
    lines = [
        f"{json.dumps(it)}: {json.dumps(found[it], separators=(',', ':'))}" for it in sorted(found)
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (folder / f"{_ApiVersion.CURRENT}.json").write_text(text)


if __name__ == "__main__":
    main()
