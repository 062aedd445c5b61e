"""The pages: rendered here, whole without scripts, and with HTMX where there are."""
