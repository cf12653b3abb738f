"""One module per job; each is a function ``run(recipe) -> Report``."""
