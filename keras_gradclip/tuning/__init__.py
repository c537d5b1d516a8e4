"""Which threshold? A search space, a hypermodel and oracles for KerasTuner."""
