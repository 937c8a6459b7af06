"""Any message of the contract, for property tests: a strategy made from a struct's own type information.

Knows msgspec's type descriptions and their bounds, and nothing of our structs: a new struct or field needs no
change here. Used by the unit tests of `schemas` and of whatever encodes or decodes.
"""

from functools import singledispatch
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def of(struct: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Instances of `struct` that its decoder accepts; fields with a default are sometimes left to it."""
    return _strategy(inspect.type_info(struct))


@singledispatch
def _strategy(info: Any) -> st.SearchStrategy[Any]:
    raise NotImplementedError(f"tests/support/structs.py does not know {type(info).__name__} yet")


@_strategy.register
def _(info: inspect.StructType) -> st.SearchStrategy[Any]:
    required = {field.name: _strategy(field.type) for field in info.fields if field.required}
    optional = {field.name: _strategy(field.type) for field in info.fields if not field.required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda values: info.cls(**values))


@_strategy.register
def _(info: inspect.IntType) -> st.SearchStrategy[int]:
    return st.integers(INT64_MIN if info.ge is None else info.ge, INT64_MAX if info.le is None else info.le)


@_strategy.register
def _(info: inspect.FloatType) -> st.SearchStrategy[float]:
    least = info.gt if info.ge is None else info.ge
    return st.floats(least, info.le, exclude_min=info.gt is not None, allow_nan=False, allow_infinity=False)


@_strategy.register
def _(info: inspect.StrType) -> st.SearchStrategy[str]:
    if info.pattern is not None:
        return st.from_regex(info.pattern, fullmatch=True)
    longest = 40 if info.max_length is None else info.max_length
    # In bytes, not characters: a tenant's name is bounded in both.
    return st.text(min_size=info.min_length or 0, max_size=longest).filter(
        lambda text: len(text.encode()) <= longest
    )


@_strategy.register
def _(_: inspect.BoolType) -> st.SearchStrategy[bool]:
    return st.booleans()


@_strategy.register
def _(_: inspect.NoneType) -> st.SearchStrategy[None]:
    return st.none()


@_strategy.register
def _(info: inspect.LiteralType) -> st.SearchStrategy[Any]:
    return st.sampled_from(info.values)


@_strategy.register
def _(info: inspect.UnionType) -> st.SearchStrategy[Any]:
    return st.one_of([_strategy(each) for each in info.types])


@_strategy.register
def _(info: inspect.TupleType) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(*[_strategy(each) for each in info.item_types])


@_strategy.register
def _(info: inspect.VarTupleType) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(_strategy(info.item_type), max_size=3).map(tuple)


@_strategy.register
def _(info: inspect.DictType) -> st.SearchStrategy[dict[Any, Any]]:
    return st.dictionaries(_strategy(info.key_type), _strategy(info.value_type), max_size=3)
