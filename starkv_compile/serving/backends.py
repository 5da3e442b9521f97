"""vLLM's attention backends, each with a builder and an attention that compact prompts."""

from __future__ import annotations

from typing import Any

WRAPPED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
"""The backends. CPU_ATTN has run; the others are written from their code."""

PREFIX = "Compacting_"

_paths: dict[str, str] = {}
"""Where the class of each wrapped backend is, by its name in vLLM's registry."""


def wrap_backends() -> None:
    """Puts a subclass in the place of each backend. It is made when vLLM asks for it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in WRAPPED:
        member = AttentionBackendEnum[name]
        path = f"{__name__}.{PREFIX}{name}"
        if member.get_path() != path:
            _paths[name] = member.get_path()
            register_backend(member, path)


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    made = _subclass(name)
    globals()[name] = made
    return made


def _subclass(name: str) -> type:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    base = resolve_obj_by_qualname(_paths[name.removeprefix(PREFIX)])
    made: dict[str, type] = {}

    def get_impl_cls() -> type:
        from .attention import compacting_attention

        if "impl" not in made:
            made["impl"] = compacting_attention(base.get_impl_cls())
        return made["impl"]

    def get_builder_cls() -> type:
        from .metadata import compacting_builder

        if "builder" not in made:
            made["builder"] = compacting_builder(base.get_builder_cls())
        return made["builder"]

    def customize_spec(cls: Any, spec: Any) -> Any:
        from .current import current_rule
        from .scheduling import compacted

        spec = base.customize_spec(spec)
        rule = current_rule()
        return spec if rule is None else compacted(spec, rule)

    return type(
        name,
        (base,),
        {
            "__module__": __name__,  # vLLM groups layers by the full name
            "__qualname__": name,
            "__doc__": base.__doc__,
            "get_impl_cls": staticmethod(get_impl_cls),
            "get_builder_cls": staticmethod(get_builder_cls),
            "customize_spec": classmethod(customize_spec),
        },
    )
