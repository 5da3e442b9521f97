"""What the passes did to a graph, as plain data for a report."""

from __future__ import annotations

from ..reporting import GraphReport, SiteReport
from .base import Context


def summarize(context: Context) -> GraphReport:
    """The report of a graph when all passes have run."""
    notes = {note.site: note.reason for note in context.notes}
    done = [
        SiteReport(s.index, s.attention.form, s.attention.node.name, True, None, notes.get(s.index))
        for s in context.rewritten
    ]
    left = [
        SiteReport(-1 if r.site is None else r.site, "attention", r.node, False, r.reason)
        for r in context.refusals
    ]
    sites = tuple(sorted(done + left, key=lambda site: site.index))
    general = tuple(note.reason for note in context.notes if note.site is None)
    return GraphReport(sites, context.decode_sites, context.encoder_sites, general)
