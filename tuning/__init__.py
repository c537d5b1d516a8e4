"""Search for clipping thresholds with KerasTuner.

`tuning.space.clip_hyperparameters` is the search space, `tuning.hypermodel.ClipHyperModel` puts it
around a `build_model(hp)`, and `python tuning/search.py` searches for a recipe.
"""
