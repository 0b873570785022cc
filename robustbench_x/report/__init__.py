"""Views of a stored result: Markdown, terminal, CSV. Each reads the report and nothing else."""
