"""The driving task, which `driving_resnet50.py` and `driving_pilotnet.py` share."""
