"""`starkv inspect` writes one page that shows which tokens of a prompt are kept, and why.

`prompt` loads the model and its inputs. `capture` runs them through the compiled passes and hands
out what each layer scores. `collect` makes ranks and axes of it. `page` writes the HTML file.
"""
