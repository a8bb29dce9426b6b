"""`builtin:tasks`: small tasks with exact answers, made here and now, and held out by template."""
