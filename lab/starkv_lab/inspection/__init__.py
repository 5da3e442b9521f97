"""`starkv inspect`: one page that shows what is kept of a prompt, and why.

`prompt` -> `capture` (the compiled passes, their inputs handed out) -> `collect` (ranks and axes)
-> `page`.
"""
