"""Chat templates: jinja2 from a file, run where it can do nothing and cannot run for long."""
