"""Which models are compressed: every image-text-to-text family that transformers ships, tried.

    tiny      a tiny random model of any family, from its own default configuration
    recipes   what single families need beside that: data only
    prompts   two images of different shape, and text around them, as any family takes them
    probe     one family run with a full and a compressed cache
    command   tries all of them
    markdown  docs/models.md
    exports   the same for docs/export_families.md: one family's language part through export

Families come from the library's own auto-mapping, so a new one shows up by itself.
"""
