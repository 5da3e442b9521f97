"""The specification of every op: plain torch, any device, no host synchronisation.

Source of the formulas: STaR-KV, arXiv 2606.01790.
"""
