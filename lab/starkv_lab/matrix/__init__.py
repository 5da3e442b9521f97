"""Tries every image-text-to-text family of transformers, and says which ones are compressed.

    tiny      builds a tiny random model of any family from its default configuration
    recipes   holds the data that single families need in addition
    prompts   makes a prompt of two images of different shape, with text around them
    probe     runs one family with a full and with a compressed cache
    command   tries all families
    markdown  writes docs/models.md
    exports   exports the language part of one family, for docs/export_families.md

The families come from the library's own auto-mapping, so new families appear by themselves.
"""
