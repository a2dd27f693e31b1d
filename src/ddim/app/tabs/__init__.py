"""The tabs of the page: layout, and which event calls which handler."""
