"""Several processes that train one model together, and what it costs."""
