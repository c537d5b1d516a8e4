"""The search: the command, the tuner of recipes, its results and its workers.

The search space, the hypermodel and the oracles are `keras_gradclip.tuning`.
"""
