"""Canonical names of parameters: the same whether a model is plain, compiled or wrapped."""

from collections import Counter
from collections.abc import Iterable

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """`name` without what wrappers add: `module._orig_mod.h.0._fsdp_wrapped_module.w` is `h.0.w`.

    `_orig_mod` (torch.compile), `_fsdp_wrapped_module` and `_checkpoint_wrapped_module` go wherever they stand
    as a component: these wrap single layers too, and nobody calls a layer that. `module`, which DDP adds around
    the whole model, goes at the start only, however often: further in, it may be a user's own name, and
    `layer.module.weight` and `layer.weight` may be two tensors. The last component always stays.
    """
    *path, last = name.split(".")
    inner = [part for part in path if part not in _WRAPPERS]
    while inner and inner[0] == "module":
        inner.pop(0)
    return ".".join([*inner, last])


def canonical_prefix(name: str) -> str:
    """The canonical name of a module: what the names of its parameters begin with."""
    if "_" not in name and not name.startswith("module"):
        return name  # as most are, of modules in their hundreds
    return canonical_name(f"{name}.-").removesuffix("-").removesuffix(".")


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Each of `names` to its canonical name, or to itself where two of them would become one.

    No two share a value: a name that is kept has a canonical name that is shared, so it is nobody else's.
    """
    canonical = {name: canonical_name(name) for name in names}
    shared = Counter(canonical.values())
    return {name: short if shared[short] == 1 else name for name, short in canonical.items()}
